// What is computed: how large an attention, of which numbers, with which grain of its keep map.
#pragma once

#include <cstdint>

#include "params/operands.h"
#include "rules/keep_map.h"
#include "rules/tile_shape.h"

namespace lite_attention {

struct Problem {
  DataType dtype = DataType::kFloat32;
  int64_t batch = 0;
  int64_t query_len = 0;
  int64_t kv_len = 0;
  int64_t query_heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  float scale = 1.0f;  // of q.k, before the softmax
  TileShape tile{};

  LITE_ATTENTION_INLINE int64_t query_tiles() const { return ceil_div(query_len, tile.tile_m); }
  LITE_ATTENTION_INLINE int64_t kv_tiles() const { return ceil_div(kv_len, tile.tile_n); }
  LITE_ATTENTION_INLINE int64_t words() const { return ceil_div(kv_tiles(), kTilesPerWord); }
};

}  // namespace lite_attention
