// Attention over kept tiles on the CPU, compiled once per instruction set (LITE_ATTENTION_CPU_VARIANT names the build).
//
// One work item is the visit group of one (batch, head): up to visit_rows query rows. It walks the KV tiles that any of
// its query tiles visits, in the map's order; a tile's keys and values are brought into fp32 scratch once and shared by
// the query tiles. The copy is what makes strides harmless: rows of many heads lie a power of two apart, which is where
// a cache of few ways keeps only some of them.
//
// All per-query state is kept transposed, query rows along the vector lanes, a panel of kPanelRows rows at a time:
//
//     scores[key][row]      = sum over d of  k[key][d]    * q[d][row]      (broadcast k, vector q)
//     accumulated[d][row]  += sum over keys  v[key][d]    * p[key][row]    (broadcast v, vector p)
//
// so that neither K nor V is transposed and the softmax needs no reduction across lanes. Both products hold
// kPanelVectors x kBlock accumulators in registers; V's columns are stored kBlock at a time, so that it streams.

#include <cmath>

#include "forward.h"
#include "simd.h"

namespace lite_attention {
namespace {

constexpr int kPanelVectors = 2;
constexpr int kPanelRows = kPanelVectors * kLanes;
// Two registers hold the panel's operand, one the broadcast; the rest accumulate.
constexpr int kBlock = kVectorRegisters == 32 ? 12 : 6;
constexpr float kLog2E = 1.44269504088896340736f;
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
  Floats sums[kColumns][kPanelVectors];
#pragma GCC unroll 16
  for (int column = 0; column < kColumns; ++column) {
#pragma GCC unroll 4
    for (int vec = 0; vec < kPanelVectors; ++vec) {
      sums[column][vec] = load(accumulated + column * kPanelRows + vec * kLanes) * correction[vec];
    }
  }
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
      store(accumulated + column * kPanelRows + vec * kLanes, sums[column][vec]);
    }
  }
}

void score_tile(const float* q_panel, const float* k, int64_t k_stride, int64_t keys, int64_t head_dim, float* scores) {
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
void accumulate_tile(const float* probabilities, const float* v, int64_t v_block_stride, int64_t keys, int64_t head_dim,
                     const Floats* correction, float* accumulated) {
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

// Turns scores into probabilities in place and carries the rows' maximum and sum on. Returns whether the drop rule
// keeps the tile for the next pass: some valid row's maximum in the tile reaches within `threshold` of its running
// maximum.
bool softmax_tile(float* scores, int64_t keys, int64_t valid_rows, float scale, float threshold, float* row_max,
                  float* row_sum, Floats* correction) {
  const float scale_log2 = scale * kLog2E;
  // Two chains a vector: one maximum waits on the last for as long as two of them take to issue.
  constexpr int kChains = 2;
  Floats maxima[kChains][kPanelVectors];
  for (auto& chain : maxima) {
    for (Floats& lanes : chain) lanes = broadcast(-kInfinity);
  }
  for (int64_t key = 0; key < keys; ++key) {
    for (int vec = 0; vec < kPanelVectors; ++vec) {
      const Floats score = load(scores + key * kPanelRows + vec * kLanes);
      maxima[0][vec] = max(maxima[0][vec], score);
    }
    if (++key == keys) break;
    for (int vec = 0; vec < kPanelVectors; ++vec) {
      const Floats score = load(scores + key * kPanelRows + vec * kLanes);
      maxima[1][vec] = max(maxima[1][vec], score);
    }
  }

  bool keep = false;
  Floats new_max[kPanelVectors];
  Floats sums[kPanelVectors];
  for (int vec = 0; vec < kPanelVectors; ++vec) {
    const Floats tile_max = max(maxima[0][vec], maxima[1][vec]);
    const Floats old_max = load(row_max + vec * kLanes);
    const Ints valid = lane_numbers() + vec * kLanes < static_cast<int32_t>(valid_rows);
    keep |= any(((tile_max - old_max) * scale_log2 > threshold) & valid);

    new_max[vec] = max(old_max, tile_max);
    store(row_max + vec * kLanes, new_max[vec]);
    // -inf before the first visited tile: the correction then scales zeros.
    correction[vec] = exp2_nonpositive((old_max - new_max[vec]) * scale_log2);
    sums[vec] = load(row_sum + vec * kLanes) * correction[vec];
  }
  for (int64_t key = 0; key < keys; ++key) {
    for (int vec = 0; vec < kPanelVectors; ++vec) {
      float* score = scores + key * kPanelRows + vec * kLanes;
      const Floats p = exp2_nonpositive((load(score) - new_max[vec]) * scale_log2);
      store(score, p);
      sums[vec] += p;
    }
  }
  for (int vec = 0; vec < kPanelVectors; ++vec) store(row_sum + vec * kLanes, sums[vec]);
  return keep;
}

// Where a worker keeps what one work item needs; all in fp32.
struct Workspace {
  int64_t panel_floats;       // head_dim * kPanelRows
  int64_t query_tile_floats;  // all panels of a query tile
  int64_t k_stride;           // an odd number of cache lines, so that rows spread over all of a cache's sets
  int64_t v_block_stride;     // tile_n * kBlock, and room for the last key's vectors to spill over
  float* q;                   // [query tile][panel][head_dim][row]
  float* accumulated;         // the same
  float* row_max;             // [query tile][row]
  float* row_sum;             // [query tile][row]
  float* scores;              // [tile_n][row] of one panel
  float* k;                   // [tile_n][k_stride]
  float* v;                   // [block of columns][tile_n][kBlock]

  // Lays the parts out from `base` on; returns the size. With a null base only the size is meant.
  int64_t lay_out(const ForwardParams& params, float* base) {
    constexpr int64_t kCacheLineFloats = 16;
    const int64_t rows = params.tile.visit_rows;
    const int64_t query_tiles = rows / params.tile.tile_m;
    panel_floats = params.head_dim * kPanelRows;
    query_tile_floats = params.head_dim * params.tile.tile_m;
    k_stride = (ceil_div(params.head_dim, 2 * kCacheLineFloats) * 2 + 1) * kCacheLineFloats;
    v_block_stride = params.tile.tile_n * kBlock + kCacheLineFloats;
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* part = base == nullptr ? nullptr : base + used;
      used += ceil_div(floats, kCacheLineFloats) * kCacheLineFloats;
      return part;
    };
    q = take(query_tiles * query_tile_floats);
    accumulated = take(query_tiles * query_tile_floats);
    row_max = take(rows);
    row_sum = take(rows);
    scores = take(params.tile.tile_n * kPanelRows);
    k = take(params.tile.tile_n * k_stride);
    v = take(ceil_div(params.head_dim, kBlock) * v_block_stride);
    return used;
  }
};

template <DataType dtype>
class VisitGroup {
  using Storage = typename Element<dtype>::Storage;

 public:
  VisitGroup(const ForwardParams& params, const Workspace& workspace, int64_t batch, int64_t head, int64_t group)
      : params_(params),
        workspace_(workspace),
        batch_(batch),
        head_(head),
        kv_head_(head / (params.query_heads / params.kv_heads)),
        first_query_tile_(group * (params.tile.visit_rows / params.tile.tile_m)),
        query_tiles_(smaller(params.tile.visit_rows / params.tile.tile_m, params.query_tiles() - first_query_tile_)),
        kv_len_(params.kv_lens == nullptr ? params.kv_len : params.kv_lens[batch]) {}

  void run() {
    load_queries();
    const int64_t tiles = params_.kv_tiles();
    const int64_t existing_tiles = ceil_div(kv_len_, params_.tile.tile_n);
    clear_next_keep();
    const int64_t first = first_visited_tile(first_query_tile_, params_.tile.tile_m, params_.tile.tile_n,
                                             params_.tile.visit_rows, params_.query_len, params_.kv_len);
    for (int64_t step = 0; step < tiles; ++step) {
      const int64_t tile = first + step < tiles ? first + step : first + step - tiles;
      if (tile < existing_tiles) {
        visit(tile);
      } else {
        pass_on(tile);
      }
    }
    store_outputs();
  }

 private:
  static constexpr int kMaxQueryTiles = 4;

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  int64_t panels() const { return params_.tile.tile_m / kPanelRows; }
  int64_t valid_rows(int64_t query_tile) const {
    return smaller(params_.tile.tile_m, params_.query_len - (first_query_tile_ + query_tile) * params_.tile.tile_m);
  }
  const Storage* rows_of(const TensorView& tensor, int64_t row, int64_t head) const {
    return static_cast<const Storage*>(tensor.data) + batch_ * tensor.batch_stride + row * tensor.row_stride +
           head * tensor.head_stride;
  }
  // Where `row` of a query tile begins in a [query tile][panel][head_dim][row] part of the workspace.
  float* panel_rows(float* part, int64_t query_tile, int64_t row) const {
    return part + query_tile * workspace_.query_tile_floats + row / kPanelRows * workspace_.panel_floats +
           row % kPanelRows;
  }
  KeepMapRow map_row(const KeepMapView& map, int64_t query_tile) const {
    return KeepMapRow(map, batch_, head_, first_query_tile_ + query_tile);
  }
  int32_t* next_keep_row(int64_t query_tile) const {
    return params_.next_keep +
           ((batch_ * params_.query_heads + head_) * params_.query_tiles() + first_query_tile_ + query_tile) *
               params_.words();
  }

  void set_next_keep(int64_t query_tile, int64_t tile) {
    int32_t* word = next_keep_row(query_tile) + tile / kTilesPerWord;
    *word = static_cast<int32_t>(static_cast<uint32_t>(*word) | 1u << (tile % kTilesPerWord));
  }

  void clear_next_keep() {
    if (params_.next_keep == nullptr) return;
    for (int64_t query_tile = 0; query_tile < query_tiles_; ++query_tile) {
      std::memset(next_keep_row(query_tile), 0, static_cast<size_t>(params_.words()) * sizeof(int32_t));
    }
  }

  // A tile past the sequence's keys is not visited; its bit stays as it was.
  void pass_on(int64_t tile) {
    if (params_.next_keep == nullptr) return;
    for (int64_t query_tile = 0; query_tile < query_tiles_; ++query_tile) {
      const KeepMapRow keep = map_row(params_.keep, query_tile);
      if (keep.given() && keep.bit(tile)) set_next_keep(query_tile, tile);
    }
  }

  void load_queries() {
    for (int64_t query_tile = 0; query_tile < query_tiles_; ++query_tile) {
      const int64_t valid = valid_rows(query_tile);
      const int64_t first_row = (first_query_tile_ + query_tile) * params_.tile.tile_m;
      for (int64_t row = 0; row < params_.tile.tile_m; row += 4) {
        float rows[4][kMaxHeadDim] = {};  // rows past the last query stay zero: harmless and never stored
        for (int64_t i = 0; i < smaller(4, valid - row); ++i) {
          widen_row<dtype>(rows_of(params_.q, first_row + row + i, head_), params_.head_dim, rows[i]);
        }
        float* target = panel_rows(workspace_.q, query_tile, row);
        for (int64_t d = 0; d < params_.head_dim; d += 4) {
          transpose_4x4(rows[0] + d, kMaxHeadDim, target + d * kPanelRows, kPanelRows);
        }
      }
      for (int64_t row = 0; row < params_.tile.tile_m; ++row) {
        workspace_.row_max[query_tile * params_.tile.tile_m + row] = -kInfinity;
        workspace_.row_sum[query_tile * params_.tile.tile_m + row] = 0.0f;
      }
      visited_any_[query_tile] = false;
    }
    std::memset(workspace_.accumulated, 0,
                static_cast<size_t>(query_tiles_ * workspace_.query_tile_floats) * sizeof(float));
  }

  void visit(int64_t tile) {
    const int64_t keys = smaller(params_.tile.tile_n, kv_len_ - tile * params_.tile.tile_n);
    bool loaded = false;
    for (int64_t query_tile = 0; query_tile < query_tiles_; ++query_tile) {
      const KeepMapRow keep = map_row(params_.keep, query_tile);
      const KeepMapRow must_keep = map_row(params_.must_keep, query_tile);
      const bool must = must_keep.given() && must_keep.bit(tile);
      if (keep.given() && !keep.bit(tile) && !must) continue;
      if (!loaded) {
        load_kv(tile, keys);
        loaded = true;
      }
      const bool near_maximum = attend(query_tile, keys);
      if (params_.next_keep != nullptr && (must || !visited_any_[query_tile] || near_maximum)) {
        set_next_keep(query_tile, tile);
      }
      visited_any_[query_tile] = true;
    }
  }

  void prefetch_row(const Storage* row) const {
    constexpr int64_t kCacheLineElements = 64 / sizeof(Storage);
    for (int64_t d = 0; d < params_.head_dim; d += kCacheLineElements) __builtin_prefetch(row + d);
  }

  void load_kv(int64_t tile, int64_t keys) {
    constexpr int64_t kPrefetchedRows = 8;  // rows of one head lie apart, which the processor's own prefetcher misses
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t row = tile * params_.tile.tile_n + key;
      if (key + kPrefetchedRows < keys) {
        prefetch_row(rows_of(params_.k, row + kPrefetchedRows, kv_head_));
        prefetch_row(rows_of(params_.v, row + kPrefetchedRows, kv_head_));
      }
      widen_row<dtype>(rows_of(params_.k, row, kv_head_), params_.head_dim, workspace_.k + key * workspace_.k_stride);

      float values[kMaxHeadDim + kBlock + kLanes];
      widen_row<dtype>(rows_of(params_.v, row, kv_head_), params_.head_dim, values);
      float* target = workspace_.v + key * kBlock;
      for (int64_t d = 0; d < params_.head_dim; d += kBlock, target += workspace_.v_block_stride) {
        // Whole vectors: what spills over a key's part of the block is the next key's, written after this one's.
        for (int64_t column = 0; column < kBlock; column += kLanes) store(target + column, load(values + d + column));
      }
    }
  }

  bool attend(int64_t query_tile, int64_t keys) {
    const float threshold =
        params_.threshold == nullptr ? kInfinity : params_.threshold[head_ * params_.threshold_stride];
    const int64_t valid = valid_rows(query_tile);
    bool keep = false;
    for (int64_t panel = 0; panel < panels(); ++panel) {
      const int64_t first_row = panel * kPanelRows;
      if (first_row >= valid) break;
      const int64_t offset = query_tile * workspace_.query_tile_floats + panel * workspace_.panel_floats;
      const int64_t rows = query_tile * params_.tile.tile_m + first_row;
      Floats correction[kPanelVectors];
      score_tile(workspace_.q + offset, workspace_.k, workspace_.k_stride, keys, params_.head_dim, workspace_.scores);
      keep |= softmax_tile(workspace_.scores, keys, valid - first_row, params_.scale, threshold,
                           workspace_.row_max + rows, workspace_.row_sum + rows, correction);
      accumulate_tile(workspace_.scores, workspace_.v, workspace_.v_block_stride, keys, params_.head_dim, correction,
                      workspace_.accumulated + offset);
    }
    return keep;
  }

  void store_outputs() const {
    for (int64_t query_tile = 0; query_tile < query_tiles_; ++query_tile) {
      const int64_t valid = valid_rows(query_tile);
      for (int64_t row = 0; row < valid; row += 4) {
        const float* source = panel_rows(workspace_.accumulated, query_tile, row);
        float rows[4][kMaxHeadDim];
        for (int64_t d = 0; d < params_.head_dim; d += 4) {
          transpose_4x4(source + d * kPanelRows, kPanelRows, rows[0] + d, kMaxHeadDim);
        }
        for (int64_t i = 0; i < smaller(4, valid - row); ++i) store_row(query_tile, row + i, rows[i]);
      }
    }
  }

  void store_row(int64_t query_tile, int64_t row, float* values) const {
    const int64_t position = (first_query_tile_ + query_tile) * params_.tile.tile_m + row;
    const float sum = workspace_.row_sum[query_tile * params_.tile.tile_m + row];
    const float max = workspace_.row_max[query_tile * params_.tile.tile_m + row];
    const float inverse = visited_any_[query_tile] ? 1.0f / sum : 0.0f;
    Storage* __restrict target =
        static_cast<Storage*>(params_.out) +
        ((batch_ * params_.query_len + position) * params_.query_heads + head_) * params_.head_dim;
    for (int64_t d = 0; d < params_.head_dim; ++d) target[d] = Element<dtype>::narrow(values[d] * inverse);
    params_.lse[(batch_ * params_.query_heads + head_) * params_.query_len + position] =
        visited_any_[query_tile] ? max * params_.scale + ::logf(sum) : -kInfinity;
  }

  const ForwardParams& params_;
  const Workspace& workspace_;
  const int64_t batch_;
  const int64_t head_;
  const int64_t kv_head_;
  const int64_t first_query_tile_;
  const int64_t query_tiles_;
  const int64_t kv_len_;
  bool visited_any_[kMaxQueryTiles];
};

int64_t visit_groups(const ForwardParams& params) { return ceil_div(params.query_len, params.tile.visit_rows); }

int64_t work_items(const ForwardParams& params) { return params.batch * params.query_heads * visit_groups(params); }

int64_t scratch_floats(const ForwardParams& params) { return Workspace{}.lay_out(params, nullptr); }

template <DataType dtype>
void run_items(const ForwardParams& params, const Workspace& workspace, int64_t* next_item) {
  const int64_t items = work_items(params);
  const int64_t groups = visit_groups(params);
  for (;;) {
    const int64_t item = __atomic_fetch_add(next_item, 1, __ATOMIC_RELAXED);
    if (item >= items) return;
    const int64_t batch_head = item / groups;
    VisitGroup<dtype>(params, workspace, batch_head / params.query_heads, batch_head % params.query_heads,
                      item % groups)
        .run();
  }
}

void run(const ForwardParams& params, float* scratch, int64_t* next_item) {
  Workspace workspace{};
  workspace.lay_out(params, scratch);
  switch (params.dtype) {
    case DataType::kFloat32: return run_items<DataType::kFloat32>(params, workspace, next_item);
    case DataType::kBFloat16: return run_items<DataType::kBFloat16>(params, workspace, next_item);
    case DataType::kFloat16: return run_items<DataType::kFloat16>(params, workspace, next_item);
  }
}

}  // namespace

namespace cpu {

extern const ForwardKernel LITE_ATTENTION_CPU_VARIANT;
const ForwardKernel LITE_ATTENTION_CPU_VARIANT{work_items, scratch_floats, run};

}  // namespace cpu
}  // namespace lite_attention
