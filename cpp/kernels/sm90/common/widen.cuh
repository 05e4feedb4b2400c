// Stored numbers as fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lite_attention::sm90 {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

}  // namespace lite_attention::sm90
