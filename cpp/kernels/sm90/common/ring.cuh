// Position in a ring of stages in shared memory. The phase, the parity of the round, is what its barriers are waited
// for by.
#pragma once

#include <cstdint>

namespace lite_attention::sm90 {

template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace lite_attention::sm90
