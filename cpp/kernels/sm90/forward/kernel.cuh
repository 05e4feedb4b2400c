// The forward kernel: a producer and two or three consumer warpgroups per CTA, as many CTAs as the GPU runs at
// once, each working until nothing is left. docs/kernel.md draws it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include <cute/arch/cluster_sm90.hpp>

#include "kernels/sm90/forward/consumer.cuh"
#include "kernels/sm90/forward/producer.cuh"

namespace lite_attention::sm90 {

template <class Config, Walk kWalk>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    forward_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ char dynamic_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<Config>*>(dynamic_shared);
  constexpr bool kPaired = kWalk == Walk::kAll;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0);

  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = Config::kWarpgroups * kWarpgroupWarps;
    for (int i = 0; i < Config::kWarpgroups; ++i) {
      barrier_init(&shared.q_full[i], 1);
      barrier_init(&shared.q_empty[i], Config::kStagesOutput ? kWarpgroupWarps : 1);
    }
    for (int stage = 0; stage < Config::kStages; ++stage) {
      barrier_init(&shared.k_full[stage], 1);
      barrier_init(&shared.v_full[stage], 1);
      shared.v_visit[stage].how = 0;  // nothing yet
      barrier_init(&shared.k_empty[stage], kConsumerWarps * (kPaired ? 2 : 1));
      barrier_init(&shared.v_empty[stage], kConsumerWarps * (kPaired ? 2 : 1));
    }
    for (int slot = 0; slot < Config::kWorkSlots; ++slot) {
      barrier_init(&shared.work_full[slot], 1);
      barrier_init(&shared.work_empty[slot], kConsumerWarps);
      barrier_init(&shared.index_full[slot], 1);
      barrier_init(&shared.index_empty[slot], 1);
    }
    for (int visit = 0; visit < Config::kVisits; ++visit) {
      barrier_init(&shared.visit_full[visit], 1);
      barrier_init(&shared.visit_empty[visit], 1);
    }
    barrier_init_fence();
    for (const CUtensorMap* map : {&params.q, &params.k, &params.v, &params.out}) prefetch_map(*map);
  }
  if constexpr (kPaired) {
    cute::cluster_sync();
  } else {
    __syncthreads();
  }

  if (warpgroup == 0) {
    produce<Config, kWalk>(params, shared);
  } else {
    consume<Config, kWalk>(params, shared, warpgroup - 1);
  }
  // Neither CTA of a pair may leave while the other still loads into it or arrives at its barriers.
  if constexpr (kPaired) cute::cluster_sync();
}

template <class Config, Walk kWalk>
cudaError_t launch_walk(const KernelParams& params, int multiprocessors, cudaStream_t stream) {
  constexpr int kClusterSize = kWalk == Walk::kAll ? 2 : 1;
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  static_assert(Config::kCtas * (kSharedBytes + 1024) <= 228 * 1024);
  const auto kernel = &forward_kernel<Config, kWalk>;
  // Once a device would do, but a device's number says nothing about its context; the call takes well under 1 us.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute attribute{};
  if constexpr (kWalk == Walk::kAll) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kClusterSize, 1, 1};
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = std::min(multiprocessors * Config::kCtas / kClusterSize, params.work_items) * kClusterSize;
  config.blockDim = Config::kThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <typename Element, int kHeadDim>
cudaError_t launch(Walk walk, const KernelParams& params, int multiprocessors, cudaStream_t stream) {
  switch (walk) {
    case Walk::kAll:
      return launch_walk<Config<Element, kHeadDim, Walk::kAll>, Walk::kAll>(params, multiprocessors, stream);
    case Walk::kMapped:
      return launch_walk<Config<Element, kHeadDim, Walk::kMapped>, Walk::kMapped>(params, multiprocessors, stream);
    case Walk::kMappedFine:
      if constexpr (tile_shape(kHeadDim).tile_n != kFineTileN) {
        return launch_walk<Config<Element, kHeadDim, Walk::kMappedFine>, Walk::kMappedFine>(params, multiprocessors,
                                                                                            stream);
      }
      break;
    case Walk::kMappedDecided:
      return launch_walk<Config<Element, kHeadDim, Walk::kMappedDecided>, Walk::kMappedDecided>(params, multiprocessors,
                                                                                                stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lite_attention::sm90
