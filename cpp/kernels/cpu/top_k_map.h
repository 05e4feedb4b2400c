// The CPU kernel that packs the largest scores of each row into a keep map.
#pragma once

#include <cstdint>

#include "kernels/cpu/common/parallel_run.h"
#include "params/top_k_map.h"

namespace lite_attention::cpu {

void top_k_map(const TopKMapParams& params, int64_t max_workers, ParallelRun parallel_run);

}  // namespace lite_attention::cpu
