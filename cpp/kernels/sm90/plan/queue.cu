#include "kernels/sm90/plan/queue.h"

#include <cuda_runtime.h>

#include "kernels/sm90/common/device.cuh"
#include "kernels/sm90/common/lanes.cuh"

namespace lite_attention::sm90 {
namespace {

constexpr int kSortThreads = 256;

// One block queues the groups of one head, those with most tiles first: what is taken last is short. Head by head,
// since CTAs at work on one head find its K and V in the L2 cache.
__global__ void __launch_bounds__(kSortThreads) queue_kernel(const __grid_constant__ PlanParams params) {
  __shared__ int bins[kSortThreads];
  __shared__ int warp_totals[kSortThreads / kWarpThreads];
  let_next_kernel_start();
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const int64_t first_group = static_cast<int64_t>(blockIdx.x) * params.groups;
  const GroupPlan* plans = params.workspace.groups + first_group;
  int32_t* queue = params.workspace.queue + first_group;
  const int64_t kv_tiles = params.forward.problem.kv_tiles();
  const auto bin_of = [&](int tiles) {  // most tiles: bin 0
    return static_cast<int>((kv_tiles - tiles) * (kSortThreads - 1) / kv_tiles);
  };

  bins[threadIdx.x] = 0;
  __syncthreads();
  wait_for_previous_kernel();
  if (blockIdx.x == 0 && threadIdx.x == 0) *params.workspace.taken = 0;
  for (int group = threadIdx.x; group < params.groups; group += kSortThreads) {
    atomicAdd(&bins[bin_of(plans[group].tiles)], 1);
  }
  __syncthreads();

  // Counts become the bins' first places in the queue.
  const int count = bins[threadIdx.x];
  int through = count;
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, through, distance);
    if (lane >= distance) through += before;
  }
  if (lane == kWarpThreads - 1) warp_totals[warp] = through;
  __syncthreads();
  int earlier_warps = 0;
  for (int other = 0; other < warp; ++other) earlier_warps += warp_totals[other];
  bins[threadIdx.x] = earlier_warps + through - count;
  __syncthreads();
  for (int group = threadIdx.x; group < params.groups; group += kSortThreads) {
    const int place = atomicAdd(&bins[bin_of(plans[group].tiles)], 1);
    queue[place] = static_cast<int32_t>(first_group + group);
  }
}

}  // namespace

cudaError_t launch_queue(const PlanParams& params, cudaStream_t stream) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(params.forward.problem.batch * params.forward.problem.query_heads);
  config.blockDim = kSortThreads;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, queue_kernel, params);
}

}  // namespace lite_attention::sm90
