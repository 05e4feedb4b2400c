// The grain of the keep map: one constexpr table, the same on every backend and for every dtype.
#pragma once

#include <array>
#include <cstdint>

namespace lite_attention {

struct TileShape {
  int32_t max_head_dim;  // the row of the table serves head dims up to and including this one
  int32_t tile_m;        // query rows per query tile
  int32_t tile_n;        // keys per KV tile
  int32_t visit_rows;    // query rows that one kernel work item walks together; they share the first visited tile
};

// 64 rows are what one Hopper warpgroup decides alone; 192 (three warpgroups) share each K/V load. Above 128 columns
// the accumulators leave room for two warpgroups and 64 keys.
inline constexpr std::array<TileShape, 2> kTileShapes{{
    {128, 64, 128, 192},
    {256, 64, 64, 128},
}};

// Maps may have this grain along the keys too, at any head dim: what selects blocks of 64 tokens needs no wider one.
inline constexpr int32_t kFineTileN = 64;

inline constexpr int32_t kMaxHeadDim = kTileShapes.back().max_head_dim;
inline constexpr int32_t kHeadDimMultiple = 8;  // 16-byte rows in the 16-bit dtypes

// head_dim must lie in [1, kMaxHeadDim].
constexpr const TileShape& tile_shape(int64_t head_dim) {
  for (const TileShape& shape : kTileShapes) {
    if (head_dim <= shape.max_head_dim) return shape;
  }
  return kTileShapes.back();
}

}  // namespace lite_attention
