// Masks by token: causal, and of causal heads those that see only the first keys (sink) and the most recent ones.
//
// A query row has a position p: the last key it may see. With a window it sees the keys below sink_size and the
// recent_size keys up to and including p, both cut at p. Rows of a query tile have consecutive positions, so whole
// tiles are told apart from those that a mask cuts by looking at the first and the last row alone.
#pragma once

#include <cstdint>

#include "rules/keep_map.h"

namespace lite_attention {

enum class CausalAlignment : int32_t {
  kNone,         // not causal: every row sees every key
  kTopLeft,      // row i is at position i
  kBottomRight,  // the last row is at the last existing key
};

// As torch hands the masks over.
struct TokenMask {
  CausalAlignment alignment = CausalAlignment::kNone;
  const int32_t* head_windows = nullptr;  // [query heads, 2]: sink_size, recent_size; null: causal heads see all keys
  int64_t head_stride = 0;
  int64_t stride = 1;

  LITE_ATTENTION_INLINE bool given() const { return alignment != CausalAlignment::kNone; }

  // Of query row 0, in a batch entry of which so many keys exist.
  LITE_ATTENTION_INLINE int64_t first_position(int64_t query_len, int64_t keys) const {
    return alignment == CausalAlignment::kBottomRight ? keys - query_len : 0;
  }
};

// The tiles of a query tile that need no mask: those below sink_end, and those from begin up to end.
struct WholeTiles {
  int32_t sink_end;
  int32_t begin;
  int32_t end;

  LITE_ATTENTION_INLINE bool contain(int64_t tile) const { return tile < sink_end || (tile >= begin && tile < end); }
};

// What one head's rows see.
struct HeadWindow {
  int32_t sink_size;
  int32_t recent_size;

  LITE_ATTENTION_INLINE HeadWindow(const TokenMask& mask, int64_t head) : sink_size(0), recent_size(INT32_MAX) {
    if (mask.head_windows == nullptr) return;
    const int32_t* window = mask.head_windows + head * mask.head_stride;
    // A GPU operator cannot refuse negative sizes without waiting: they count as 0.
    sink_size = window[0] < 0 ? 0 : window[0];
    recent_size = window[mask.stride] < 0 ? 0 : window[mask.stride];
  }

  // The first key of the window of the row at a position; keys from sink_size up to it are hidden.
  LITE_ATTENTION_INLINE int64_t window_begin(int64_t position) const {
    const int64_t begin = position - recent_size + 1;
    return begin < 0 ? 0 : begin;
  }

  LITE_ATTENTION_INLINE bool sees(int64_t position, int64_t key) const {
    return key <= position && (key < sink_size || key >= window_begin(position));
  }

  // Whether some row at positions first to last sees some key of [begin, end).
  LITE_ATTENTION_INLINE bool any_sees(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    return begin <= last && (begin < sink_size || (recent_size > 0 && end > window_begin(first)));
  }

  // The tiles of which every row at positions first to last sees every key.
  LITE_ATTENTION_INLINE WholeTiles whole_tiles(int64_t first, int64_t last, int64_t tile_n) const {
    const int64_t end = first < 0 ? 0 : (first + 1) / tile_n;
    const int64_t begin = sink_size >= window_begin(last) ? 0 : ceil_div(window_begin(last), tile_n);
    const int64_t sink_end = sink_size / tile_n;
    return {static_cast<int32_t>(sink_end < end ? sink_end : end), static_cast<int32_t>(begin),
            static_cast<int32_t>(end)};
  }
};

}  // namespace lite_attention
