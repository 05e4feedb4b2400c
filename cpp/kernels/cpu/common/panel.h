// The arithmetic of one panel of query rows against one KV tile: scores, softmax, weighted sum of V.
//
// All per-query state is kept transposed, query rows along the vector lanes, a panel of kPanelRows rows at a time:
//
//     scores[key][row]      = sum over d of  k[key][d]    * q[d][row]      (broadcast k, vector q)
//     accumulated[d][row]  += sum over keys  v[key][d]    * p[key][row]    (broadcast v, vector p)
//
// so that neither K nor V is transposed and the softmax needs no reduction across lanes. Both products hold
// kPanelVectors x kBlock accumulators in registers; V's columns are stored kBlock at a time, so that it streams.
#pragma once

#include "kernels/cpu/common/simd.h"
#include "rules/drop_rule.h"

namespace lite_attention {
namespace {

constexpr int kPanelVectors = 2;
constexpr int kPanelRows = kPanelVectors * kLanes;
// Two registers hold the panel's operand, one the broadcast; the rest accumulate.
constexpr int kBlock = kVectorRegisters == 32 ? 12 : 6;
constexpr float kInfinity = __builtin_inff();

// scores[i][row] for kKeys keys.
template <int kKeys>
inline void score_block(const float* __restrict q_panel, const float* __restrict k, int64_t k_stride, int64_t head_dim,
                        float* __restrict scores) {
  Floats sums[kKeys][kPanelVectors] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    Floats q[kPanelVectors];
#pragma GCC unroll 4
    for (int vec = 0; vec < kPanelVectors; ++vec) q[vec] = load(q_panel + d * kPanelRows + vec * kLanes);
#pragma GCC unroll 16
    for (int key = 0; key < kKeys; ++key) {
      const Floats factor = broadcast(k[key * k_stride + d]);
#pragma GCC unroll 4
      for (int vec = 0; vec < kPanelVectors; ++vec) sums[key][vec] += factor * q[vec];
    }
  }
#pragma GCC unroll 16
  for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 4
    for (int vec = 0; vec < kPanelVectors; ++vec) store(scores + key * kPanelRows + vec * kLanes, sums[key][vec]);
  }
}

// accumulated[c][row] = accumulated[c][row] * correction[row] + sum over keys of v[key][c] * p[key][row], for kColumns
// of a block's columns.
template <int kColumns>
inline void accumulate_block(const float* __restrict probabilities, const float* __restrict v, int64_t keys,
                             const Floats* correction, float* __restrict accumulated) {
  // The tile's sum on its own first: small terms would be lost one by one beside a large total.
  Floats sums[kColumns][kPanelVectors] = {};
  for (int64_t key = 0; key < keys; ++key) {
    Floats p[kPanelVectors];
#pragma GCC unroll 4
    for (int vec = 0; vec < kPanelVectors; ++vec) p[vec] = load(probabilities + key * kPanelRows + vec * kLanes);
#pragma GCC unroll 16
    for (int column = 0; column < kColumns; ++column) {
      const Floats factor = broadcast(v[key * kBlock + column]);
#pragma GCC unroll 4
      for (int vec = 0; vec < kPanelVectors; ++vec) sums[column][vec] += factor * p[vec];
    }
  }
#pragma GCC unroll 16
  for (int column = 0; column < kColumns; ++column) {
#pragma GCC unroll 4
    for (int vec = 0; vec < kPanelVectors; ++vec) {
      float* total = accumulated + column * kPanelRows + vec * kLanes;
      store(total, load(total) * correction[vec] + sums[column][vec]);
    }
  }
}

inline void score_tile(const float* q_panel, const float* k, int64_t k_stride, int64_t keys, int64_t head_dim,
                       float* scores) {
  int64_t key = 0;
  for (; key + kBlock <= keys; key += kBlock) {
    score_block<kBlock>(q_panel, k + key * k_stride, k_stride, head_dim, scores + key * kPanelRows);
  }
  for (; key + 4 <= keys; key += 4) {
    score_block<4>(q_panel, k + key * k_stride, k_stride, head_dim, scores + key * kPanelRows);
  }
  for (; key < keys; ++key) {
    score_block<1>(q_panel, k + key * k_stride, k_stride, head_dim, scores + key * kPanelRows);
  }
}

// v: [block of columns][tile_n][kBlock]; v_block_stride floats from one block of columns to the next.
inline void accumulate_tile(const float* probabilities, const float* v, int64_t v_block_stride, int64_t keys,
                            int64_t head_dim, const Floats* correction, float* accumulated) {
  int64_t column = 0;
  for (; column + kBlock <= head_dim; column += kBlock, v += v_block_stride) {
    accumulate_block<kBlock>(probabilities, v, keys, correction, accumulated + column * kPanelRows);
  }
  for (int64_t part = 0; column < head_dim;) {
    if (head_dim - column >= 4) {
      accumulate_block<4>(probabilities, v + part, keys, correction, accumulated + column * kPanelRows);
      part += 4;
      column += 4;
    } else {
      accumulate_block<2>(probabilities, v + part, keys, correction, accumulated + column * kPanelRows);
      part += 2;
      column += 2;
    }
  }
}

// Turns scores into probabilities in place and carries the rows' maximum and sum on. Returns whether the tile matters
// to some valid row (drop_rule.h).
inline bool softmax_tile(float* scores, int64_t keys, int64_t valid_rows, float scale, float threshold, float* row_max,
                         float* row_sum, Floats* correction) {
  const float scale_log2 = to_log2(scale);
  // Two chains a vector, for the maxima and the sums: one operation waits on the last for as long as two take to issue.
  constexpr int kChains = 2;
  Floats maxima[kChains][kPanelVectors];
  for (auto& chain : maxima) {
    for (Floats& lanes : chain) lanes = broadcast(-kInfinity);
  }
  const auto look = [&](int64_t key, int chain) {
    for (int vec = 0; vec < kPanelVectors; ++vec) {
      maxima[chain][vec] = max(maxima[chain][vec], load(scores + key * kPanelRows + vec * kLanes));
    }
  };
  for (int64_t key = 0; key + 1 < keys; key += 2) {
    look(key, 0);
    look(key + 1, 1);
  }
  if (keys % 2 != 0) look(keys - 1, 0);

  bool some_row_keeps = false;
  Floats reference[kPanelVectors];  // what scores are taken relative to: the maximum so far
  for (int vec = 0; vec < kPanelVectors; ++vec) {
    const Floats tile_max = max(maxima[0][vec], maxima[1][vec]);
    const Floats old_max = load(row_max + vec * kLanes);
    const Ints valid = lane_numbers() + vec * kLanes < static_cast<int32_t>(valid_rows);
    some_row_keeps |= any(matters(tile_max, old_max, scale_log2, threshold) & valid);

    const Floats new_max = max(old_max, tile_max);
    store(row_max + vec * kLanes, new_max);
    // A row that has met nothing but scores of -inf: any finite reference makes its probabilities 0 instead of NaN.
    reference[vec] = new_max == -kInfinity ? Floats{} : new_max;
    correction[vec] = exp2_nonpositive((old_max - reference[vec]) * scale_log2);
  }

  Floats sums[kChains][kPanelVectors] = {};
  const auto take = [&](int64_t key, int chain) {
    for (int vec = 0; vec < kPanelVectors; ++vec) {
      float* score = scores + key * kPanelRows + vec * kLanes;
      const Floats p = exp2_nonpositive((load(score) - reference[vec]) * scale_log2);
      store(score, p);
      sums[chain][vec] += p;
    }
  };
  for (int64_t key = 0; key + 1 < keys; key += 2) {
    take(key, 0);
    take(key + 1, 1);
  }
  if (keys % 2 != 0) take(keys - 1, 0);
  for (int vec = 0; vec < kPanelVectors; ++vec) {
    float* total = row_sum + vec * kLanes;
    store(total, load(total) * correction[vec] + (sums[0][vec] + sums[1][vec]));
  }
  return some_row_keeps;
}

}  // namespace
}  // namespace lite_attention
