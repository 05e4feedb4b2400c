// The order in which planned visit groups are taken: those with most tiles first.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/sm90/plan/plan.h"

namespace lite_attention::sm90 {

// After the plan, in its stream.
cudaError_t launch_queue(const PlanParams& params, cudaStream_t stream);

}  // namespace lite_attention::sm90
