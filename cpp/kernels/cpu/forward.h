// The CPU forward: how the host side (dispatch.cpp) and the kernel compiled per instruction set (forward.cpp) meet.
#pragma once

#include <cstdint>

#include "../../params.h"

namespace lite_attention::cpu {

// One build of forward.cpp. Work items are (batch, head, visit group) triples, claimed one at a time so that workers
// whose tiles were dropped take more of them.
struct ForwardKernel {
  int64_t (*work_items)(const ForwardParams& params);
  int64_t (*scratch_floats)(const ForwardParams& params);  // for one worker
  void (*run)(const ForwardParams& params, float* scratch, int64_t* next_item);
};

// Runs body(context, worker) for workers 0 to workers-1, concurrently where it can.
using ParallelRun = void (*)(int64_t workers, void (*body)(void* context, int64_t worker), void* context);

void forward(const ForwardParams& params, int64_t max_workers, ParallelRun parallel_run);
void merge(const MergeParams& params, int64_t max_workers, ParallelRun parallel_run);

}  // namespace lite_attention::cpu
