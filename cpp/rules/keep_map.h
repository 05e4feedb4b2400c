// The keep map as kernels see it: bit j % 32 of word j / 32 says whether KV tile j is computed for a query tile.
//
// Functions here are always inlined: the CPU kernels are compiled once per instruction set, and an out-of-line copy
// made for one of them must never serve another. CUDA kernels use them too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LITE_ATTENTION_INLINE [[gnu::always_inline]] __host__ __device__
#else
#define LITE_ATTENTION_INLINE [[gnu::always_inline]]
#endif

namespace lite_attention {

inline constexpr int64_t kTilesPerWord = 32;

LITE_ATTENTION_INLINE constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// A view of int32 [batch, heads, query tiles, words]; strides in words, 0 where a dimension is broadcast.
struct KeepMapView {
  const int32_t* words = nullptr;  // null: no map given
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t query_tile_stride = 0;
  int64_t word_stride = 1;
};

// The map's row of one query tile.
struct KeepMapRow {
  const int32_t* words;
  int64_t word_stride;

  LITE_ATTENTION_INLINE KeepMapRow(const KeepMapView& map, int64_t batch, int64_t head, int64_t query_tile)
      : words(map.words == nullptr
                  ? nullptr
                  : map.words + batch * map.batch_stride + head * map.head_stride + query_tile * map.query_tile_stride),
        word_stride(map.word_stride) {}

  LITE_ATTENTION_INLINE bool given() const { return words != nullptr; }

  LITE_ATTENTION_INLINE uint32_t word(int64_t index) const { return static_cast<uint32_t>(words[index * word_stride]); }

  LITE_ATTENTION_INLINE bool bit(int64_t tile) const {
    return word(tile / kTilesPerWord) >> (tile % kTilesPerWord) & 1u;
  }
};

// Bits of word `word` that stand for tiles below `end`.
LITE_ATTENTION_INLINE constexpr uint32_t tiles_below(int64_t end, int64_t word) {
  const int64_t bits = end - word * kTilesPerWord;
  return bits <= 0 ? 0u : bits >= kTilesPerWord ? ~0u : (1u << bits) - 1;
}

// The KV tile a query tile visits first: the one on the diagonal of its visit group.
LITE_ATTENTION_INLINE constexpr int64_t first_visited_tile(int64_t query_tile, int64_t tile_m, int64_t tile_n,
                                                           int64_t visit_rows, int64_t query_len, int64_t kv_len) {
  const int64_t first_row = query_tile * tile_m / visit_rows * visit_rows;
  return first_row * kv_len / query_len / tile_n;
}

}  // namespace lite_attention
