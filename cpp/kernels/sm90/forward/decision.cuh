// The drop rule of skip_attention, for the two rows a thread holds. That the first tile visited stays, and forced ones,
// is plan.cu's part. The rule's other homes are named in cpp/README.md.
#pragma once

#include "kernels/sm90/common/softmax.cuh"

namespace lite_attention::sm90 {

struct Decision {
  float best[kRowsPerThread];  // the row's maximum over the tiles visited so far

  // Rows past the end of q decide nothing: no score raises a maximum of infinity.
  __device__ __forceinline__ Decision(int64_t first_row, int64_t rows)
      : best{first_row < rows ? -kInfinity : kInfinity, first_row + 8 < rows ? -kInfinity : kInfinity} {}

  // Whether any row of the warp keeps the tile that these maxima are of.
  __device__ __forceinline__ bool keeps(const float (&maxima)[kRowsPerThread], float threshold, float scale_log2) {
    bool raised = false;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      raised |= (maxima[row] - best[row]) * scale_log2 > threshold;
      best[row] = fmaxf(best[row], maxima[row]);
    }
    return __any_sync(0xffffffffu, raised);
  }
};

}  // namespace lite_attention::sm90
