// What the forward kernels are launched with.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/sm90/plan/plan.h"

namespace lite_attention::sm90 {

struct TensorMaps {
  CUtensorMap q, k, v, out;
};

struct KernelParams : TensorMaps, PlanParams {
  int32_t heads_per_kv_head;
  float scale_log2;  // from q.k to powers of two
};

}  // namespace lite_attention::sm90
