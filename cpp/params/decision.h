// What skip_attention decides by, and where the next map goes.
#pragma once

#include <cstdint>

namespace lite_attention {

struct Decision {
  const float* threshold = nullptr;  // one value, or one a head, in powers of two; null: no decisions are taken
  int64_t threshold_stride = 0;      // 0: one value for all heads
  int32_t* next_keep = nullptr;      // contiguous [batch, heads, query tiles, words]; null with threshold
};

}  // namespace lite_attention
