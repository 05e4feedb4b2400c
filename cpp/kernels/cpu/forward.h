// The CPU forward: how the host side (dispatch.cpp) and the kernel compiled per instruction set (forward.cpp) meet.
#pragma once

#include <cstdint>

#include "kernels/cpu/common/parallel_run.h"
#include "params/forward.h"

namespace lite_attention::cpu {

// Consecutive (batch, KV head) pairs that are packed and attended to together, batch-major.
struct Wave {
  int64_t first_kv_head;
  int64_t kv_heads;
  float* packed;  // packed_floats for each of them
};

// One build of forward.cpp. Items are claimed one at a time from a shared counter, so that workers whose tiles were
// dropped take more of them.
struct ForwardKernel {
  int64_t (*packed_floats)(const ForwardParams& params);   // K and V of one (batch, KV head)
  int64_t (*scratch_floats)(const ForwardParams& params);  // of one worker
  int64_t (*pack_items)(const ForwardParams& params, const Wave& wave);
  void (*pack)(const ForwardParams& params, const Wave& wave, int64_t* next_item);
  int64_t (*attend_items)(const ForwardParams& params, const Wave& wave);
  void (*attend)(const ForwardParams& params, const Wave& wave, float* scratch, int64_t* next_item);
};

void forward(const ForwardParams& params, int64_t max_workers, ParallelRun parallel_run);

}  // namespace lite_attention::cpu
