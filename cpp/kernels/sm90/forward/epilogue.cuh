// What a warpgroup does with its finished rows: divides by the sum, writes lse, and stores the output by the copy
// engine, which drops rows and columns past the end.
#pragma once

#include "kernels/sm90/common/device.cuh"
#include "kernels/sm90/common/softmax.cuh"
#include "kernels/sm90/forward/params.cuh"
#include "kernels/sm90/forward/shared_storage.cuh"

namespace lite_attention::sm90 {

// The accumulator as 16-bit elements in slabs of kSwizzleColumns, 128-byte swizzled as a TMA box expects them.
template <class Config, class Output>
__device__ __forceinline__ void stage_output(const Output& output, typename Config::Element* staged) {
  constexpr int kRowBytes = kSwizzleColumns * sizeof(typename Config::Element);
  constexpr int kChunkBytes = 16;   // the unit of the swizzle
  constexpr int kChunkColumns = 8;  // and the side of a matrix
  const int lane = threadIdx.x % kWarpThreads;
  const int warp = threadIdx.x / kWarpThreads % kWarpgroupWarps;
  constexpr int kSlabChunks = kRowBytes / kChunkBytes;
  // Lane i addresses a row of one of four 8x8 matrices: both row halves of two neighbouring column chunks.
  const int row = warp * kWarpRows + lane % kWarpRows;
  const uint32_t row_address = shared_address(staged) + row * kRowBytes;
  const auto pairs = cute::recast<uint32_t const>(output);
  CUTLASS_PRAGMA_UNROLL
  for (int chunk = 0; chunk < Config::kHeadDim / kChunkColumns; chunk += 2) {
    const int slab = chunk * kChunkColumns / kSwizzleColumns;
    const int swizzled = (chunk % kSlabChunks + lane / kWarpRows) ^ (row % kSlabChunks);
    store_matrices(row_address + slab * Config::kTileM * kRowBytes + swizzled * kChunkBytes, pairs(chunk * 2),
                   pairs(chunk * 2 + 1), pairs(chunk * 2 + 2), pairs(chunk * 2 + 3));
  }
}

// A row that sees no key may still have met V of keys that are hidden from it, where a weight of 0 makes NaN of what is
// not finite: its output is 0 all the same.
template <class Elements>
__device__ __forceinline__ void clear_rows_without_keys(Elements& elements, const float (&factors)[kRowsPerThread]) {
  auto pairs = cute::recast<uint32_t>(elements);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(pairs); ++i) pairs(i) = factors[row_of(2 * i)] == 0.0f ? 0u : pairs(i);
}

// The first of a thread's two query rows.
__device__ __forceinline__ int first_row_of_thread(const WorkItem& item, int warpgroup) {
  return first_row_of_thread(item.first_row + warpgroup * kWarpgroupRows);
}

template <class Config, class Output>
__device__ __forceinline__ void finish_rows(const KernelParams& params, SharedStorage<Config>& shared,
                                            const WorkItem& item, int warpgroup, Softmax& softmax, Output& output) {
  const ForwardParams& forward = params.forward;
  const int row = first_row_of_thread(item, warpgroup);
  float factors[kRowsPerThread];
  float* lse = forward.outputs.lse +
               (static_cast<int64_t>(item.batch) * forward.problem.query_heads + item.head) * forward.problem.query_len;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kRowsPerThread; ++i) {
    const float sum = quad_sum(softmax.sum[i]);
    factors[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (threadIdx.x % kQuadLanes == 0 && row + kRowStep * i < forward.problem.query_len) {
      lse[row + kRowStep * i] = sum == 0.0f ? -kInfinity : softmax.reference[i] * forward.problem.scale + __logf(sum);
    }
  }
  scale_rows(output, factors);
  auto elements = cute::make_tensor<typename Config::Element>(output.layout());
  convert(output, elements);
  if constexpr (Config::kMasksVisits) clear_rows_without_keys(elements, factors);

  const bool elected = threadIdx.x % kWarpgroupThreads == 0;
  typename Config::Element* staged;
  if constexpr (Config::kStagesOutput) {
    staged = shared.staged_out[warpgroup];
    if (elected) wait_stores_read();  // of the item before
  } else {
    staged = shared.q[warpgroup];
  }
  warpgroup_sync(warpgroup);
  stage_output<Config>(elements, staged);
  fence_shared_writes();
  warpgroup_sync(warpgroup);
  if (elected) {
    CUTLASS_PRAGMA_UNROLL
    for (int slab = 0; slab < Config::kSlabs; ++slab) {
      store_box(params.out, staged + slab * Config::kTileM * kSwizzleColumns, slab * kSwizzleColumns,
                item.first_row + warpgroup * Config::kTileM, item.head, item.batch);
    }
    commit_stores();
    if constexpr (!Config::kStagesOutput) {
      wait_stores_read();
      barrier_arrive(&shared.q_empty[warpgroup]);
    }
  }
}

}  // namespace lite_attention::sm90
