// The instantiations of the forward kernel, one source file for each head dim and dtype.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/sm90/forward/params.cuh"

namespace lite_attention::sm90 {

// `multiprocessors`: of the current device.
using Launch = cudaError_t(Walk walk, const KernelParams& params, int multiprocessors, cudaStream_t stream);

Launch launch_d64_bf16, launch_d64_fp16;
Launch launch_d128_bf16, launch_d128_fp16;
Launch launch_d256_bf16, launch_d256_fp16;

}  // namespace lite_attention::sm90
