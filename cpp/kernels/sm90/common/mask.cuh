// Scores of keys that a row does not see become -inf: keys that do not exist, and those that the token mask hides. Only
// tiles that the plan or the walker marked come here.
#pragma once

#include "kernels/sm90/common/softmax.cuh"
#include "rules/token_mask.h"

namespace lite_attention::sm90 {

// `keys` of the tile exist, the first ones.
template <class Scores>
__device__ __forceinline__ void mask_keys(Scores& scores, int keys) {
  const int first_column = first_column_of_thread();
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(scores); ++i) {
    if (first_column + column_of(i) >= keys) scores(i) = -kInfinity;
  }
}

// A bit for each of the at most 32 columns that a thread holds of a row, lowest first: those below `end`, which counts
// from the thread's first column on. Bits instead of comparisons: where a tile is masked, registers are short.
__device__ __forceinline__ uint32_t columns_below(int end) {
  const int columns = min((end >> 3) * 2 + min(end & 7, 2), 32);
  // Not by clamping to [0, 32] and asking for 32: nvcc 13.0 takes the answer from VIMNMX.RELU, which gives another one.
  return columns > 0 ? ~0u >> (32 - columns) : 0u;
}

// The same as mask_keys and the token mask. `position`: of the first of the thread's two rows.
template <class Scores>
__device__ __forceinline__ void mask_tokens(Scores& scores, int keys, int first_key, int position,
                                            const HeadWindow& window) {
  static_assert(cute::size(Scores{}) / kRowsPerThread <= 32);
  const int origin = first_key + first_column_of_thread();
  uint32_t visible[kRowsPerThread];
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row, position += kRowStep) {
    visible[row] = columns_below(min(first_key + keys, position + 1) - origin) &
                   (columns_below(window.sink_size - origin) |
                    ~columns_below(static_cast<int>(window.window_begin(position)) - origin));
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(scores); ++i) {
    const int column = (i >> 2) * 2 + (i & 1);
    if ((visible[row_of(i)] >> column & 1) == 0) scores(i) = -kInfinity;
  }
}

}  // namespace lite_attention::sm90
