// The drop rule for the two rows a thread holds. What asks no row, plan.cu has written before.
#pragma once

#include "kernels/sm90/common/softmax.cuh"
#include "rules/drop_rule.h"

namespace lite_attention::sm90 {

struct RunningBest {
  float best[kRowsPerThread];  // the row's largest score in the tiles visited so far

  // `first_row`: of the thread's two. Rows past the end of q decide nothing.
  __device__ __forceinline__ RunningBest(int64_t first_row, int64_t rows)
      : best{first_row < rows ? -kInfinity : kInfinity, first_row + kRowStep < rows ? -kInfinity : kInfinity} {}

  // Whether the tile that these maxima are of matters to any row of the warp.
  __device__ __forceinline__ bool take(const float (&maxima)[kRowsPerThread], float threshold, float scale_log2) {
    bool some_row_keeps = false;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      some_row_keeps |= matters(maxima[row], best[row], scale_log2, threshold);
      best[row] = fmaxf(best[row], maxima[row]);
    }
    return __any_sync(kAllLanes, some_row_keeps);
  }
};

}  // namespace lite_attention::sm90
