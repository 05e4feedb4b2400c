// The CPU kernel of the exact merge of partial results.
#pragma once

#include <cstdint>

#include "kernels/cpu/common/parallel_run.h"
#include "params/merge.h"

namespace lite_attention::cpu {

void merge(const MergeParams& params, int64_t max_workers, ParallelRun parallel_run);

}  // namespace lite_attention::cpu
