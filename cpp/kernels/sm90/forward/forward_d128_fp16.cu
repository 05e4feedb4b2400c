#include "kernels/sm90/forward/kernel.cuh"
#include "kernels/sm90/forward/launch.h"

namespace lite_attention::sm90 {

cudaError_t launch_d128_fp16(Walk walk, const KernelParams& params, int multiprocessors, cudaStream_t stream) {
  return launch<cutlass::half_t, 128>(walk, params, multiprocessors, stream);
}

}  // namespace lite_attention::sm90
