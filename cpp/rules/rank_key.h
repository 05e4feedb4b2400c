// The order in which top_k_map ranks scores.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules/keep_map.h"

namespace lite_attention {

// Unsigned integers in the order of the scores: -0 and 0 give the same one, NaN the lowest, which no number gives. In
// bits throughout, since the processor may be set to take subnormal numbers for 0.
LITE_ATTENTION_INLINE inline uint32_t rank_key(float score) {
  constexpr uint32_t kSign = 0x80000000u;
  constexpr uint32_t kInfinity = 0x7f800000u;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const uint32_t magnitude = bits & ~kSign;
  if (magnitude > kInfinity) return 0;
  return bits > kSign ? ~bits : kSign + magnitude;
}

}  // namespace lite_attention
