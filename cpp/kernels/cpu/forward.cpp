// Attention over kept tiles on the CPU, compiled once per instruction set (LITE_ATTENTION_CPU_VARIANT names the build).
//
// Two phases for each wave of KV heads (dispatch.cpp): workers pack the wave's K and V tiles (packed_kv.h), then claim
// visit groups. A work item is the visit group of one (batch, head): up to visit_rows query rows. It walks the KV tiles
// that any of its query tiles visits, in the map's order, one panel of rows at a time (panel.h); tiles that no query
// tile visits cost a bit test.

#include <cmath>

#include "kernels/cpu/common/packed_kv.h"
#include "kernels/cpu/forward.h"
#include "rules/drop_rule.h"

namespace lite_attention {
namespace {

using cpu::ForwardKernel;
using cpu::Wave;

// Where a worker keeps what one work item needs; all in fp32.
struct Workspace {
  int64_t panel_floats;       // head_dim * kPanelRows
  int64_t query_tile_floats;  // all panels of a query tile
  float* q;                   // [query tile][panel][head_dim][row]
  float* accumulated;         // the same
  float* row_max;             // [query tile][row]
  float* row_sum;             // [query tile][row]
  float* scores;              // [tile_n][row] of one panel

  // Lays the parts out from `base` on; returns the size. With a null base only the size is meant.
  int64_t lay_out(const ForwardParams& params, float* base) {
    const int64_t rows = params.problem.tile.visit_rows;
    const int64_t query_tiles = rows / params.problem.tile.tile_m;
    panel_floats = params.problem.head_dim * kPanelRows;
    query_tile_floats = params.problem.head_dim * params.problem.tile.tile_m;
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* part = base == nullptr ? nullptr : base + used;
      used += floats;  // every size is a multiple of a cache line's
      return part;
    };
    q = take(query_tiles * query_tile_floats);
    accumulated = take(query_tiles * query_tile_floats);
    row_max = take(rows);
    row_sum = take(rows);
    scores = take(params.problem.tile.tile_n * kPanelRows);
    return used;
  }
};

template <DataType dtype>
class VisitGroup {
  using Storage = typename Element<dtype>::Storage;

 public:
  // packed: the KV tiles of this (batch, KV head), one after the other.
  VisitGroup(const ForwardParams& params, const Workspace& workspace, const PackedTileLayout& layout,
             const float* packed, int64_t batch, int64_t head, int64_t group)
      : params_(params),
        problem_(params.problem),
        visibility_(params.visibility),
        decision_(params.decision),
        workspace_(workspace),
        layout_(layout),
        packed_(packed),
        batch_(batch),
        head_(head),
        first_query_tile_(group * (params.problem.tile.visit_rows / params.problem.tile.tile_m)),
        query_tiles_(smaller(params.problem.tile.visit_rows / params.problem.tile.tile_m,
                             params.problem.query_tiles() - first_query_tile_)),
        kv_len_(existing_keys(params.problem, params.visibility, batch)),
        window_(params.visibility.token_mask, head),
        first_position_(params.visibility.token_mask.first_position(params.problem.query_len, kv_len_)) {}

  void run() {
    load_queries();
    begin_next_keep();
    for (int64_t step = 0; step < problem_.kv_tiles(); ++step) visit(tile_at(step));
    store_outputs();
  }

 private:
  static constexpr int kMaxQueryTiles = 3;

  static constexpr bool suits_every_tile_shape() {
    for (const TileShape& shape : kTileShapes) {
      if (shape.tile_m % kPanelRows != 0 || shape.visit_rows % shape.tile_m != 0) return false;
      if (shape.visit_rows / shape.tile_m > kMaxQueryTiles) return false;
    }
    return kHeadDimMultiple % 4 == 0;  // transpose_4x4
  }
  static_assert(suits_every_tile_shape());

  int64_t panels() const { return problem_.tile.tile_m / kPanelRows; }
  int64_t valid_rows(int64_t query_tile) const {
    return smaller(problem_.tile.tile_m, problem_.query_len - (first_query_tile_ + query_tile) * problem_.tile.tile_m);
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
    return decision_.next_keep +
           ((batch_ * problem_.query_heads + head_) * problem_.query_tiles() + first_query_tile_ + query_tile) *
               problem_.words();
  }

  void set_next_keep(int64_t query_tile, int64_t tile) {
    int32_t* word = next_keep_row(query_tile) + tile / kTilesPerWord;
    *word = static_cast<int32_t>(static_cast<uint32_t>(*word) | 1u << (tile % kTilesPerWord));
  }

  // Writes each word whole; the walk adds bits.
  void begin_next_keep() {
    if (decision_.next_keep == nullptr) return;
    for (int64_t query_tile = 0; query_tile < query_tiles_; ++query_tile) {
      const KeepMapRow keep = map_row(visibility_.keep, query_tile);
      const KeepMapRow must_keep = map_row(visibility_.must_keep, query_tile);
      int32_t* next = next_keep_row(query_tile);
      for (int64_t word = 0; word < problem_.words(); ++word) {
        next[word] = static_cast<int32_t>(undecided_bits(keep.word(word), must_keep.given() ? must_keep.word(word) : 0u,
                                                         tiles_below(existing_tiles(), word),
                                                         tiles_below(problem_.kv_tiles(), word)));
      }
    }
  }

  int64_t existing_tiles() const { return ceil_div(kv_len_, problem_.tile.tile_n); }

  // The KV tile of a step of the walk: up from the diagonal to the last tile, then on from tile 0.
  int64_t tile_at(int64_t step) const {
    const int64_t first = first_visited_tile(first_query_tile_, problem_.tile.tile_m, problem_.tile.tile_n,
                                             problem_.tile.visit_rows, problem_.query_len, problem_.kv_len);
    return first + step < problem_.kv_tiles() ? first + step : first + step - problem_.kv_tiles();
  }

  bool must_keep(int64_t query_tile, int64_t tile) const {
    const KeepMapRow row = map_row(visibility_.must_keep, query_tile);
    return row.given() && row.bit(tile);
  }

  // How many of a tile's keys exist, the first ones.
  int64_t keys_of(int64_t tile) const {
    const int64_t keys = smaller(problem_.tile.tile_n, kv_len_ - tile * problem_.tile.tile_n);
    return visibility_.kv_tile_lens == nullptr ? keys : smaller(keys, visibility_.tile_len(batch_, tile));
  }

  int64_t first_row(int64_t query_tile) const { return (first_query_tile_ + query_tile) * problem_.tile.tile_m; }
  int64_t position(int64_t query_tile, int64_t row) const { return first_position_ + first_row(query_tile) + row; }

  bool some_row_sees(int64_t query_tile, int64_t tile) const {
    const int64_t begin = tile * problem_.tile.tile_n;
    return !visibility_.token_mask.given() ||
           window_.any_sees(position(query_tile, 0), position(query_tile, valid_rows(query_tile) - 1), begin,
                            begin + keys_of(tile));
  }

  bool every_row_sees(int64_t query_tile, int64_t tile) const {
    return !visibility_.token_mask.given() ||
           window_
               .whole_tiles(position(query_tile, 0), position(query_tile, valid_rows(query_tile) - 1),
                            problem_.tile.tile_n)
               .contain(tile);
  }

  bool visits(int64_t query_tile, int64_t tile) const {
    if (keys_of(tile) <= 0 || !some_row_sees(query_tile, tile)) return false;
    const KeepMapRow keep = map_row(visibility_.keep, query_tile);
    return !keep.given() || keep.bit(tile) || must_keep(query_tile, tile);
  }

  void load_queries() {
    for (int64_t query_tile = 0; query_tile < query_tiles_; ++query_tile) {
      const int64_t valid = valid_rows(query_tile);
      for (int64_t row = 0; row < problem_.tile.tile_m; row += 4) {
        float rows[4][kMaxHeadDim] = {};  // rows past the last query stay zero: harmless and never stored
        for (int64_t i = 0; i < smaller(4, valid - row); ++i) {
          widen_row<dtype>(row_of<dtype>(params_.operands.q, batch_, first_row(query_tile) + row + i, head_),
                           problem_.head_dim, rows[i]);
        }
        float* target = panel_rows(workspace_.q, query_tile, row);
        for (int64_t d = 0; d < problem_.head_dim; d += 4) {
          transpose_4x4(rows[0] + d, kMaxHeadDim, target + d * kPanelRows, kPanelRows);
        }
      }
      for (int64_t row = 0; row < problem_.tile.tile_m; ++row) {
        workspace_.row_max[query_tile * problem_.tile.tile_m + row] = -kInfinity;
        workspace_.row_sum[query_tile * problem_.tile.tile_m + row] = 0.0f;
      }
      visited_any_[query_tile] = false;
    }
    std::memset(workspace_.accumulated, 0,
                static_cast<size_t>(query_tiles_ * workspace_.query_tile_floats) * sizeof(float));
  }

  void visit(int64_t tile) {
    for (int64_t query_tile = 0; query_tile < query_tiles_; ++query_tile) {
      if (!visits(query_tile, tile)) continue;
      const bool matters = attend(query_tile, tile);
      const bool first = !visited_any_[query_tile];
      if (decision_.next_keep != nullptr && (first || matters)) set_next_keep(query_tile, tile);
      visited_any_[query_tile] = true;
    }
  }

  // Scores of keys that the token mask hides from a row of the panel become -inf.
  void hide_keys(int64_t query_tile, int64_t first_row, int64_t tile, int64_t keys) const {
    const int64_t first_key = tile * problem_.tile.tile_n;
    for (int64_t row = 0; row < kPanelRows; ++row) {
      const int64_t row_position = position(query_tile, first_row + row);
      for (int64_t key = 0; key < keys; ++key) {
        if (!window_.sees(row_position, first_key + key)) workspace_.scores[key * kPanelRows + row] = -kInfinity;
      }
    }
  }

  // Computes a tile for a query tile; returns whether it matters to some row (drop_rule.h).
  bool attend(int64_t query_tile, int64_t tile) {
    const float threshold =
        decision_.threshold == nullptr ? kInfinity : decision_.threshold[head_ * decision_.threshold_stride];
    const int64_t keys = keys_of(tile);
    const int64_t valid = valid_rows(query_tile);
    const bool masked = !every_row_sees(query_tile, tile);
    const float* k = packed_ + tile * layout_.floats;
    const float* v = k + layout_.v_offset;
    bool matters = false;
    for (int64_t first_row = 0; first_row < valid; first_row += kPanelRows) {
      const int64_t rows = query_tile * problem_.tile.tile_m + first_row;
      Floats correction[kPanelVectors];
      score_tile(panel_rows(workspace_.q, query_tile, first_row), k, layout_.k_stride, keys, problem_.head_dim,
                 workspace_.scores);
      if (masked) hide_keys(query_tile, first_row, tile, keys);
      matters |= softmax_tile(workspace_.scores, keys, valid - first_row, params_.problem.scale, threshold,
                              workspace_.row_max + rows, workspace_.row_sum + rows, correction);
      accumulate_tile(workspace_.scores, v, layout_.v_block_stride, keys, problem_.head_dim, correction,
                      panel_rows(workspace_.accumulated, query_tile, first_row));
    }
    return matters;
  }

  void store_outputs() const {
    for (int64_t query_tile = 0; query_tile < query_tiles_; ++query_tile) {
      const int64_t valid = valid_rows(query_tile);
      for (int64_t row = 0; row < valid; row += 4) {
        const float* source = panel_rows(workspace_.accumulated, query_tile, row);
        float rows[4][kMaxHeadDim];
        for (int64_t d = 0; d < problem_.head_dim; d += 4) {
          transpose_4x4(source + d * kPanelRows, kPanelRows, rows[0] + d, kMaxHeadDim);
        }
        for (int64_t i = 0; i < smaller(4, valid - row); ++i) store_row(query_tile, row + i, rows[i]);
      }
    }
  }

  void store_row(int64_t query_tile, int64_t row, float* values) const {
    const int64_t query_row = first_row(query_tile) + row;
    const float sum = workspace_.row_sum[query_tile * problem_.tile.tile_m + row];
    const float max = workspace_.row_max[query_tile * problem_.tile.tile_m + row];
    Storage* __restrict target =
        static_cast<Storage*>(params_.outputs.out) +
        ((batch_ * problem_.query_len + query_row) * problem_.query_heads + head_) * problem_.head_dim;
    if (sum == 0.0f) {
      // No key, or none with a score above -inf: what weights of 0 have made of V is nothing, even where it is NaN.
      for (int64_t d = 0; d < problem_.head_dim; ++d) target[d] = Element<dtype>::narrow(0.0f);
    } else {
      const float inverse = 1.0f / sum;
      for (int64_t d = 0; d < problem_.head_dim; ++d) target[d] = Element<dtype>::narrow(values[d] * inverse);
    }
    params_.outputs.lse[(batch_ * problem_.query_heads + head_) * problem_.query_len + query_row] =
        max * params_.problem.scale + ::logf(sum);
  }

  const ForwardParams& params_;
  const Problem& problem_;
  const Visibility& visibility_;
  const Decision& decision_;
  const Workspace& workspace_;
  const PackedTileLayout& layout_;
  const float* packed_;
  const int64_t batch_;
  const int64_t head_;
  const int64_t first_query_tile_;
  const int64_t query_tiles_;
  const int64_t kv_len_;
  const HeadWindow window_;
  const int64_t first_position_;  // of query row 0, where a token mask is given
  bool visited_any_[kMaxQueryTiles];
};

int64_t visit_groups(const ForwardParams& params) {
  return ceil_div(params.problem.query_len, params.problem.tile.visit_rows);
}

int64_t scratch_floats(const ForwardParams& params) { return Workspace{}.lay_out(params, nullptr); }

int64_t packed_floats(const ForwardParams& params) {
  return params.problem.kv_tiles() * PackedTileLayout(params).floats;
}

int64_t pack_items(const ForwardParams& params, const Wave& wave) { return wave.kv_heads * params.problem.kv_tiles(); }

template <DataType dtype>
void pack_as(const ForwardParams& params, const Wave& wave, int64_t* next_item) {
  const PackedTileLayout layout(params);
  for (;;) {
    const int64_t item = __atomic_fetch_add(next_item, 1, __ATOMIC_RELAXED);
    if (item >= pack_items(params, wave)) return;
    // Heads first: in the usual layouts the heads of a token are neighbours in memory.
    const int64_t wave_head = item % wave.kv_heads;
    const int64_t tile = item / wave.kv_heads;
    const int64_t kv_head = wave.first_kv_head + wave_head;
    pack_tile<dtype>(params, layout, kv_head / params.problem.kv_heads, kv_head % params.problem.kv_heads, tile,
                     wave.packed + wave_head * packed_floats(params) + tile * layout.floats);
  }
}

int64_t attend_items(const ForwardParams& params, const Wave& wave) {
  return wave.kv_heads * (params.problem.query_heads / params.problem.kv_heads) * visit_groups(params);
}

template <DataType dtype>
void attend_as(const ForwardParams& params, const Wave& wave, float* scratch, int64_t* next_item) {
  const PackedTileLayout layout(params);
  Workspace workspace{};
  workspace.lay_out(params, scratch);
  const int64_t sharing_heads = params.problem.query_heads / params.problem.kv_heads;
  for (;;) {
    const int64_t item = __atomic_fetch_add(next_item, 1, __ATOMIC_RELAXED);
    if (item >= attend_items(params, wave)) return;
    const int64_t group = item % visit_groups(params);
    const int64_t wave_head = item / visit_groups(params);  // query heads of the wave, those of one KV head together
    const int64_t kv_head = wave.first_kv_head + wave_head / sharing_heads;
    const int64_t head = kv_head % params.problem.kv_heads * sharing_heads + wave_head % sharing_heads;
    const float* packed = wave.packed + wave_head / sharing_heads * packed_floats(params);
    VisitGroup<dtype>(params, workspace, layout, packed, kv_head / params.problem.kv_heads, head, group).run();
  }
}

void pack(const ForwardParams& params, const Wave& wave, int64_t* next_item) {
  switch (params.problem.dtype) {
    case DataType::kFloat32: return pack_as<DataType::kFloat32>(params, wave, next_item);
    case DataType::kBFloat16: return pack_as<DataType::kBFloat16>(params, wave, next_item);
    case DataType::kFloat16: return pack_as<DataType::kFloat16>(params, wave, next_item);
  }
}

void attend(const ForwardParams& params, const Wave& wave, float* scratch, int64_t* next_item) {
  switch (params.problem.dtype) {
    case DataType::kFloat32: return attend_as<DataType::kFloat32>(params, wave, scratch, next_item);
    case DataType::kBFloat16: return attend_as<DataType::kBFloat16>(params, wave, scratch, next_item);
    case DataType::kFloat16: return attend_as<DataType::kFloat16>(params, wave, scratch, next_item);
  }
}

}  // namespace

namespace cpu {

extern const ForwardKernel LITE_ATTENTION_CPU_VARIANT;
const ForwardKernel LITE_ATTENTION_CPU_VARIANT{packed_floats, scratch_floats, pack_items, pack, attend_items, attend};

}  // namespace cpu
}  // namespace lite_attention
