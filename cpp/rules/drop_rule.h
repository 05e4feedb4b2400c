// The drop rule of skip_attention: which of the tiles that a pass visits the next pass visits too.
//
// A query tile keeps a tile that it must keep, the first one it visits, and each that matters to one of its rows: in
// which the row's largest score exceeds, in powers of two, its largest in the tiles visited before by more than the
// threshold. That is at most 0, and a tile at exactly that distance is dropped: 0 keeps only what raises a maximum.
//
// NaN never drops: a difference that is no number keeps the tile, be it from a score, from infinities or from the
// threshold. A maximum over scores of which one is NaN is NaN, so a row keeps that tile and all that it visits after.
#pragma once

#include <cstdint>

#include "rules/keep_map.h"

namespace lite_attention {

inline constexpr float kLog2E = 1.44269504088896340736f;

// From q.k to powers of two, the unit of thresholds.
LITE_ATTENTION_INLINE constexpr float to_log2(float scale) { return scale * kLog2E; }

// Whether a tile matters to a row: `tile_max` is the row's largest q.k in it, `best` the largest in the tiles visited
// before, -inf if there are none. Asked only of rows that exist. Row is a float, or a vector with a row in each lane,
// which gives a mask.
template <typename Row>
LITE_ATTENTION_INLINE inline auto matters(Row tile_max, Row best, float scale_log2, float threshold) {
  return !((tile_max - best) * scale_log2 <= threshold);
}

// The bits of 32 tiles in the next map before any row has been asked: visited tiles that must be kept, and tiles
// without keys, which pass on what they had. Arguments are bits of the same tiles, of which `valid` are in the map at
// all.
LITE_ATTENTION_INLINE constexpr uint32_t undecided_bits(uint32_t keep, uint32_t must_keep, uint32_t exist,
                                                        uint32_t valid) {
  return (must_keep & exist) | (keep & valid & ~exist);
}

}  // namespace lite_attention
