// The forward kernels, as forward.cu launches them. Each dtype and number of columns is a source of its own
// (cmake/KernelInstances.cmake).
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/sm90/forward/params.cuh"
#include "kernels/sm90/forward/traversal.h"

namespace lite_attention::sm90 {

// `multiprocessors`: of the current device.
template <DataType dtype, int kColumns>
cudaError_t launch(Traversal traversal, const KernelParams& params, int multiprocessors, cudaStream_t stream);

}  // namespace lite_attention::sm90
