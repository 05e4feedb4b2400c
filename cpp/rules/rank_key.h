// The order in which top_k_map ranks scores.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules/keep_map.h"

namespace lite_attention {

// Unsigned integers in the order of the scores: -0 and 0 give the same one, NaN the highest, so that it is chosen and
// shows. No score gives 0. In bits throughout, since the processor may be set to take subnormal numbers for 0.
LITE_ATTENTION_INLINE inline uint32_t rank_key(float score) {
  constexpr uint32_t kSign = 0x80000000u;
  constexpr uint32_t kInfinity = 0x7f800000u;
  constexpr uint32_t kNan = 0xffc00000u;  // above infinity's key in the bits of the 16-bit types, too
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const uint32_t magnitude = bits & ~kSign;
  if (magnitude > kInfinity) return kNan;
  return bits > kSign ? ~bits : kSign + magnitude;
}

}  // namespace lite_attention
