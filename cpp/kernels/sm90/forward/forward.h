// The Hopper forward, as the operators call it: device pointers in ForwardParams, scratch from the caller, one stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params/forward.h"

namespace lite_attention::sm90 {

// Bytes of device memory that forward() uses for its work queues. Contents on entry do not matter.
int64_t workspace_bytes(const ForwardParams& params);

// Launches on `stream` of the current device and returns without waiting. kv_lens, maps and thresholds are read on the
// device, when the kernels run. Throws std::runtime_error, before any launch, for a q, k or v that the tensor memory
// accelerator cannot address: a first element off a 16-byte boundary, or a stride that is no multiple of 16 bytes. Its
// text names the argument but not the operator: "k has row stride 100, expected a multiple of 8 elements".
void forward(const ForwardParams& params, void* workspace, cudaStream_t stream);

}  // namespace lite_attention::sm90
