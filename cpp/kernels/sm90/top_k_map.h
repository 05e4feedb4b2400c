// The CUDA kernel that packs the largest scores of each row into a keep map.
#pragma once

#include <cuda_runtime_api.h>

#include "params/top_k_map.h"

namespace lite_attention::sm90 {

// Launches on `stream` of the current device and returns without waiting.
void top_k_map(const TopKMapParams& params, cudaStream_t stream);

}  // namespace lite_attention::sm90
