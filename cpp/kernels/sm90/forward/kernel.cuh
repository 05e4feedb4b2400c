// The forward kernel: a producer and one to three consumer warpgroups per CTA, as many CTAs as the GPU runs at
// once, each working until nothing is left. docs/kernel.md draws it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <type_traits>

#include <cute/arch/cluster_sm90.hpp>

#include "kernels/sm90/forward/consumer.cuh"
#include "kernels/sm90/forward/launch.h"
#include "kernels/sm90/forward/producer.cuh"

namespace lite_attention::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kShape.ctas)
    forward_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ char dynamic_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<Config>*>(dynamic_shared);
  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroupThreads, 0);

  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kWarpgroups; ++i) {
      barrier_init(&shared.q_full[i]);
      barrier_init(&shared.q_empty[i]);
    }
    for (int stage = 0; stage < Config::kStages; ++stage) {
      barrier_init(&shared.k_full[stage]);
      barrier_init(&shared.v_full[stage]);
      shared.v_visit[stage].flags = {};  // nothing yet
      barrier_init(&shared.k_empty[stage]);
      barrier_init(&shared.v_empty[stage]);
    }
    for (int slot = 0; slot < Config::kWorkSlots; ++slot) {
      barrier_init(&shared.work_full[slot]);
      barrier_init(&shared.work_empty[slot]);
      barrier_init(&shared.index_full[slot]);
      barrier_init(&shared.index_empty[slot]);
    }
    for (int visit = 0; visit < Config::kVisits; ++visit) {
      barrier_init(&shared.visit_full[visit]);
      barrier_init(&shared.visit_empty[visit]);
    }
    barrier_init_fence();
    for (const CUtensorMap* map : {&params.q, &params.k, &params.v, &params.out}) prefetch_map(*map);
  }
  if constexpr (Config::kPaired) {
    cute::cluster_sync();
  } else {
    __syncthreads();
  }

  if (warpgroup == 0) {
    produce<Config>(params, shared);
  } else {
    consume<Config>(params, shared, warpgroup - 1);
  }
  // Neither CTA of a pair may leave while the other still loads into it or arrives at its barriers.
  if constexpr (Config::kPaired) cute::cluster_sync();
}

template <class Config>
cudaError_t launch_kernel(const KernelParams& params, int multiprocessors, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  static_assert(kSharedBytes == Config::kShape.shared_bytes());
  const auto kernel = &forward_kernel<Config>;
  // Once a device would do, but a device's number says nothing about its context; the call takes well under 1 us.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute attribute{};
  if constexpr (Config::kPaired) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {Config::kClusterCtas, 1, 1};
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim =
      std::min(multiprocessors * Config::kShape.ctas / Config::kClusterCtas, params.work_items) * Config::kClusterCtas;
  config.blockDim = Config::kThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Every shape of so many columns is compiled here, and the one of the traversal launched.
template <typename Element, int kColumns, size_t kRow = 0>
cudaError_t launch_shape(Traversal traversal, const KernelParams& params, int multiprocessors, cudaStream_t stream) {
  if constexpr (kRow == std::size(kShapes)) {
    return cudaErrorInvalidValue;
  } else {
    if constexpr (kShapes[kRow].columns == kColumns) {
      constexpr Traversal kTraversal = kShapes[kRow].traversal;
      if (traversal == kTraversal) {
        return launch_kernel<Config<Element, kColumns, kTraversal>>(params, multiprocessors, stream);
      }
    }
    return launch_shape<Element, kColumns, kRow + 1>(traversal, params, multiprocessors, stream);
  }
}

template <DataType dtype, int kColumns>
cudaError_t launch(Traversal traversal, const KernelParams& params, int multiprocessors, cudaStream_t stream) {
  using Element = std::conditional_t<dtype == DataType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>;
  return launch_shape<Element, kColumns>(traversal, params, multiprocessors, stream);
}

}  // namespace lite_attention::sm90
