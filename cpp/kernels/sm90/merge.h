// The CUDA kernel of the exact merge of partial results.
#pragma once

#include <cuda_runtime_api.h>

#include "params/merge.h"

namespace lite_attention::sm90 {

// Launches on `stream` of the current device and returns without waiting. Throws std::runtime_error for more parts than
// it takes.
void merge(const MergeParams& params, cudaStream_t stream);

}  // namespace lite_attention::sm90
