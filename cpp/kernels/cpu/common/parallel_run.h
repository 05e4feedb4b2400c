// The caller's threads, as the kernels use them.
#pragma once

#include <cstdint>

namespace lite_attention::cpu {

// Runs body(context, worker) for workers 0 to workers-1, concurrently where it can.
using ParallelRun = void (*)(int64_t workers, void (*body)(void* context, int64_t worker), void* context);

}  // namespace lite_attention::cpu
