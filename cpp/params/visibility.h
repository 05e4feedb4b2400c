// Which keys a query row sees: all, less what lengths, token mask and keep map leave out.
#pragma once

#include <cstdint>

#include "params/problem.h"
#include "rules/keep_map.h"
#include "rules/token_mask.h"

namespace lite_attention {

struct Visibility {
  const int32_t* kv_lens = nullptr;  // [batch], or null: every sequence has kv_len keys
  int64_t kv_lens_stride = 1;

  const int32_t* kv_tile_lens = nullptr;  // [batch, KV tiles], or null: every tile has all of its keys
  int64_t kv_tile_lens_batch_stride = 0;
  int64_t kv_tile_lens_stride = 1;

  TokenMask token_mask;

  KeepMapView keep;       // words null: every tile is visited
  KeepMapView must_keep;  // words null: none

  // With kv_tile_lens: how many keys of a tile exist, the first ones.
  LITE_ATTENTION_INLINE int32_t tile_len(int64_t entry, int64_t tile) const {
    return kv_tile_lens[entry * kv_tile_lens_batch_stride + tile * kv_tile_lens_stride];
  }
};

// How many keys of a batch entry exist. A GPU operator cannot refuse a length without waiting: it is clamped.
LITE_ATTENTION_INLINE inline int64_t existing_keys(const Problem& problem, const Visibility& visibility,
                                                   int64_t entry) {
  if (visibility.kv_lens == nullptr) return problem.kv_len;
  const int64_t keys = visibility.kv_lens[entry * visibility.kv_lens_stride];
  return keys < 0 ? 0 : keys < problem.kv_len ? keys : problem.kv_len;
}

}  // namespace lite_attention
