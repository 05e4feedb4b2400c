// What the forward is told: plain pointers, sizes and strides. Kernels include this and know nothing of torch.
#pragma once

#include <cstdint>

#include "params/operands.h"
#include "rules/keep_map.h"
#include "rules/tile_shape.h"
#include "rules/token_mask.h"

namespace lite_attention {

struct ForwardParams {
  DataType dtype = DataType::kFloat32;
  int64_t batch = 0;
  int64_t query_len = 0;
  int64_t kv_len = 0;
  int64_t query_heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  float scale = 1.0f;
  TileShape tile{};

  TensorView q, k, v;
  const int32_t* kv_lens = nullptr;  // [batch], or null: every sequence has kv_len keys
  int64_t kv_lens_stride = 1;

  const int32_t* kv_tile_lens = nullptr;  // [batch, KV tiles], or null: every tile has all of its keys
  int64_t kv_tile_lens_batch_stride = 0;
  int64_t kv_tile_lens_stride = 1;
  TokenMask token_mask;

  KeepMapView keep;       // words null: every tile is visited
  KeepMapView must_keep;  // words null: none

  const float* threshold = nullptr;  // one value, or one a head; null: no drop decisions are taken
  int64_t threshold_stride = 0;      // 0: one value for all heads
  int32_t* next_keep = nullptr;      // contiguous [batch, heads, query tiles, words]; null with threshold

  void* out = nullptr;   // contiguous [batch, query_len, query_heads, head_dim]
  float* lse = nullptr;  // contiguous [batch, query_heads, query_len]

  LITE_ATTENTION_INLINE int64_t query_tiles() const { return ceil_div(query_len, tile.tile_m); }
  LITE_ATTENTION_INLINE int64_t kv_tiles() const { return ceil_div(kv_len, tile.tile_n); }
  LITE_ATTENTION_INLINE int64_t existing_keys(int64_t entry) const {
    return kv_lens == nullptr ? kv_len : kv_lens[entry * kv_lens_stride];
  }
  LITE_ATTENTION_INLINE int64_t words() const { return ceil_div(kv_tiles(), kTilesPerWord); }
  // What the first query row of a batch entry with so many keys is aligned to.
  LITE_ATTENTION_INLINE int64_t first_position(int64_t keys) const {
    return token_mask.alignment == CausalAlignment::kBottomRight ? keys - query_len : 0;
  }
};

}  // namespace lite_attention
