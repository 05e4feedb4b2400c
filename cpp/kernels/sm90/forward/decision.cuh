// The drop rule for the two rows a thread holds. What asks no row, plan.cu has written before.
#pragma once

#include "kernels/sm90/common/softmax.cuh"
#include "rules/drop_rule.h"

namespace lite_attention::sm90 {

struct RunningBest {
  float best[kRowsPerThread] = {-kInfinity, -kInfinity};  // the row's largest score in the tiles visited so far
  bool exists[kRowsPerThread];                            // rows past the end of q decide nothing, NaN or not

  // `rows`: from the thread's first on, so many exist.
  __device__ __forceinline__ explicit RunningBest(int rows) : exists{rows > 0, rows > kRowStep} {}

  // Whether the tile that these maxima are of matters to any row of the warp. A row with a score of NaN has a maximum
  // of NaN.
  __device__ __forceinline__ bool take(const float (&maxima)[kRowsPerThread], float threshold, float scale_log2) {
    bool some_row_keeps = false;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      some_row_keeps |= exists[row] && matters(maxima[row], best[row], scale_log2, threshold);
      best[row] = max_or_nan(best[row], maxima[row]);
    }
    return __any_sync(kAllLanes, some_row_keeps);
  }
};

}  // namespace lite_attention::sm90
