// How the 64 rows of a wgmma's accumulator lie in the registers of its warpgroup. A warp has 16 rows, a quad of its
// lanes two of them, 8 apart; of each 8 columns a lane has two neighbours.
#pragma once

#include "kernels/sm90/common/lanes.cuh"

namespace lite_attention::sm90 {

inline constexpr int kWarpRows = 16;
inline constexpr int kWarpgroupRows = kWarpgroupWarps * kWarpRows;
inline constexpr int kQuadLanes = 4;
inline constexpr int kRowsPerThread = 2;
inline constexpr int kRowStep = 8;  // from a thread's first row to its second

// The first of a thread's rows and columns; `row` is the warpgroup's first.
__device__ __forceinline__ int first_row_of_thread(int row) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  return row + thread / kWarpThreads * kWarpRows + thread % kWarpThreads / kQuadLanes;
}
__device__ __forceinline__ int first_column_of_thread() { return threadIdx.x % kQuadLanes * 2; }

// Which of a thread's two rows an element belongs to.
__device__ __forceinline__ constexpr int row_of(int element) { return (element >> 1) & 1; }

// How far an element's column is from the thread's first.
__device__ __forceinline__ constexpr int column_of(int element) { return (element >> 2) * 8 + (element & 1); }

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

}  // namespace lite_attention::sm90
