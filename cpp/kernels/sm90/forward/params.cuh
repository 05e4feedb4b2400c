// What the forward kernels are launched with.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/sm90/plan/plan.h"

namespace lite_attention::sm90 {

// Flat: with a PlanParams inside, nvcc schedules the producer in another way.
struct KernelParams {
  CUtensorMap q, k, v, out;
  ForwardParams forward;
  Workspace workspace;
  int32_t groups;      // as in PlanParams
  int32_t work_items;  // all that there is to do: visit groups, or pairs of them for pairs of CTAs
  int32_t words;       // of one row of the keep map
  int32_t heads_per_kv_head;
  float scale_log2;  // from q.k to powers of two
};

}  // namespace lite_attention::sm90
