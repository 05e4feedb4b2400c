// Before a launch that walks a keep map: what each visit group has to do, and in which order the groups are taken.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/sm90/forward/params.cuh"

namespace lite_attention::sm90 {

int64_t plan_bytes(const ForwardParams& params);
Workspace lay_out(const ForwardParams& params, void* memory);

// Fills the workspace, and next_keep with what the drop rule has no say in.
cudaError_t launch_plan(const KernelParams& params, cudaStream_t stream);

}  // namespace lite_attention::sm90
