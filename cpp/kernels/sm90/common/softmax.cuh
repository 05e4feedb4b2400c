// The running softmax of one warpgroup's rows, in registers: each thread's two, which it shares with its quad.
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cute/tensor.hpp>

#include "kernels/sm90/common/accumulator.cuh"
#include "kernels/sm90/common/device.cuh"

namespace lite_attention::sm90 {

inline constexpr float kInfinity = __builtin_inff();

// The largest score of each row in this tile. Two chains a row: one comparison waits for the last as long as two take.
// NaN is passed over, and reaches the output through the row's sum; or, for the drop rule, a row with it has a maximum
// of NaN, which the softmax takes too.
template <bool kNanWins, class Scores>
__device__ __forceinline__ void tile_maxima(const Scores& scores, float (&maxima)[kRowsPerThread]) {
  if constexpr (kNanWins) {
    constexpr int kChainStarts = 8;  // among the first elements, every other one is a chain's first
    float chains[kRowsPerThread][2];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      float& chain = chains[row_of(i)][(i >> 2) & 1];
      chain = i < kChainStarts && i % 2 == 0 ? scores(i) : max_or_nan(chain, scores(i));
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      const float maximum = max_or_nan(chains[row][0], chains[row][1]);
      const float of_pair = max_or_nan(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
      maxima[row] = max_or_nan(of_pair, __shfl_xor_sync(kAllLanes, of_pair, 2));
    }
  } else {
    float chains[kRowsPerThread][2] = {{-kInfinity, -kInfinity}, {-kInfinity, -kInfinity}};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      float& chain = chains[row_of(i)][(i >> 2) & 1];
      chain = fmaxf(chain, scores(i));
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) maxima[row] = quad_max(fmaxf(chains[row][0], chains[row][1]));
  }
}

struct Softmax {
  // Scores are taken relative to a row's reference. It is the row's maximum, but moves only once that has grown by more
  // than kSlack: what was accumulated then needs no rescaling in most tiles, and weights stay below 2^kSlack.
  static constexpr float kSlack = 8.0f;  // in powers of two

  float reference[kRowsPerThread] = {-kInfinity, -kInfinity};
  float sum[kRowsPerThread] = {0.0f, 0.0f};  // of this thread's columns only

  // Takes a tile's maxima into account. Returns whether any row of the warp must multiply what it has accumulated by
  // its correction; `sum` is corrected here.
  __device__ __forceinline__ bool move_reference(const float (&maxima)[kRowsPerThread], float scale_log2,
                                                 float (&correction)[kRowsPerThread]) {
    bool moved = false;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      const bool grown = (maxima[row] - reference[row]) * scale_log2 > kSlack;
      const float new_reference = grown ? maxima[row] : reference[row];
      correction[row] = grown ? exp2_approximate((reference[row] - new_reference) * scale_log2) : 1.0f;
      reference[row] = new_reference;
      sum[row] *= correction[row];
      moved |= grown;
    }
    return __any_sync(kAllLanes, moved);
  }

  // Scores become weights in place, and are summed: the tile on its own, since small weights would be lost one by one
  // beside a large sum, and in pairs, so that one addition waits for the last only half as often.
  template <class Scores>
  __device__ __forceinline__ void weigh(Scores& scores, float scale_log2) {
    float scaled_reference[kRowsPerThread];
    float tile_sum[kRowsPerThread] = {0.0f, 0.0f};
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      // A row that has met nothing but scores of -inf: any finite reference makes its weights 0 instead of NaN.
      scaled_reference[row] = reference[row] == -kInfinity ? 0.0f : reference[row] * scale_log2;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(scores); i += 2) {
      const int row = row_of(i);
      scores(i) = exp2_approximate(scores(i) * scale_log2 - scaled_reference[row]);
      scores(i + 1) = exp2_approximate(scores(i + 1) * scale_log2 - scaled_reference[row]);
      tile_sum[row] += scores(i) + scores(i + 1);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) sum[row] += tile_sum[row];
  }
};

// Multiplies each row of the accumulated output by its factor.
template <class Output>
__device__ __forceinline__ void scale_rows(Output& output, const float (&factors)[kRowsPerThread]) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(output); ++i) output(i) *= factors[row_of(i)];
}

// fp32 to 16 bits, element by element. The accumulator's register order is that of the next product's left operand.
template <class From, class To>
__device__ __forceinline__ void convert(const From& from, To& to) {
  using Element = typename To::value_type;
  auto from_pairs = cute::recast<cutlass::Array<float, 2> const>(from);
  auto to_pairs = cute::recast<cutlass::Array<Element, 2>>(to);
  cutlass::NumericArrayConverter<Element, float, 2> to_element;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(from_pairs); ++i) to_pairs(i) = to_element(from_pairs(i));
}

}  // namespace lite_attention::sm90
