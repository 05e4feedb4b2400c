// Attention over kept tiles on the CPU, compiled once per instruction set (LITE_ATTENTION_CPU_VARIANT names the build).
//
// Two phases for each wave of KV heads (dispatch.cpp): workers pack the wave's K and V tiles (packed_kv.h), then claim
// visit groups. A work item is the visit group of one (batch, head): up to visit_rows query rows. It walks the KV tiles
// that any of its query tiles visits, in the map's order, one panel of rows at a time (panel.h); tiles that no query
// tile visits cost a bit test.

#include <cmath>

#include "kernels/cpu/common/packed_kv.h"
#include "kernels/cpu/forward.h"

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
    const int64_t rows = params.tile.visit_rows;
    const int64_t query_tiles = rows / params.tile.tile_m;
    panel_floats = params.head_dim * kPanelRows;
    query_tile_floats = params.head_dim * params.tile.tile_m;
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
    scores = take(params.tile.tile_n * kPanelRows);
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
        workspace_(workspace),
        layout_(layout),
        packed_(packed),
        batch_(batch),
        head_(head),
        first_query_tile_(group * (params.tile.visit_rows / params.tile.tile_m)),
        query_tiles_(smaller(params.tile.visit_rows / params.tile.tile_m, params.query_tiles() - first_query_tile_)),
        kv_len_(params.existing_keys(batch)),
        window_(params.token_mask, head),
        first_position_(params.first_position(kv_len_)) {}

  void run() {
    load_queries();
    clear_next_keep();
    for (int64_t step = 0; step < params_.kv_tiles(); ++step) visit(tile_at(step));
    pass_on_tiles_past_the_end();
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

  int64_t panels() const { return params_.tile.tile_m / kPanelRows; }
  int64_t valid_rows(int64_t query_tile) const {
    return smaller(params_.tile.tile_m, params_.query_len - (first_query_tile_ + query_tile) * params_.tile.tile_m);
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

  // Tiles past the sequence's keys are not visited; their bits stay as they were.
  void pass_on_tiles_past_the_end() {
    if (params_.next_keep == nullptr) return;
    for (int64_t query_tile = 0; query_tile < query_tiles_; ++query_tile) {
      const KeepMapRow keep = map_row(params_.keep, query_tile);
      for (int64_t tile = existing_tiles(); tile < params_.kv_tiles(); ++tile) {
        if (keep.bit(tile)) set_next_keep(query_tile, tile);
      }
    }
  }

  int64_t existing_tiles() const { return ceil_div(kv_len_, params_.tile.tile_n); }

  // The KV tile of a step of the walk: up from the diagonal to the last tile, then on from tile 0.
  int64_t tile_at(int64_t step) const {
    const int64_t first = first_visited_tile(first_query_tile_, params_.tile.tile_m, params_.tile.tile_n,
                                             params_.tile.visit_rows, params_.query_len, params_.kv_len);
    return first + step < params_.kv_tiles() ? first + step : first + step - params_.kv_tiles();
  }

  bool must_keep(int64_t query_tile, int64_t tile) const {
    const KeepMapRow row = map_row(params_.must_keep, query_tile);
    return row.given() && row.bit(tile);
  }

  // How many of a tile's keys exist, the first ones.
  int64_t keys_of(int64_t tile) const {
    const int64_t keys = smaller(params_.tile.tile_n, kv_len_ - tile * params_.tile.tile_n);
    return params_.kv_tile_lens == nullptr
               ? keys
               : smaller(keys, params_.kv_tile_lens[batch_ * params_.kv_tile_lens_batch_stride +
                                                    tile * params_.kv_tile_lens_stride]);
  }

  int64_t first_row(int64_t query_tile) const { return (first_query_tile_ + query_tile) * params_.tile.tile_m; }
  int64_t position(int64_t query_tile, int64_t row) const { return first_position_ + first_row(query_tile) + row; }

  bool some_row_sees(int64_t query_tile, int64_t tile) const {
    const int64_t begin = tile * params_.tile.tile_n;
    return !params_.token_mask.given() ||
           window_.any_sees(position(query_tile, 0), position(query_tile, valid_rows(query_tile) - 1), begin,
                            begin + keys_of(tile));
  }

  bool every_row_sees(int64_t query_tile, int64_t tile) const {
    return !params_.token_mask.given() ||
           window_
               .whole_tiles(position(query_tile, 0), position(query_tile, valid_rows(query_tile) - 1),
                            params_.tile.tile_n)
               .contain(tile);
  }

  bool visits(int64_t query_tile, int64_t tile) const {
    if (keys_of(tile) <= 0 || !some_row_sees(query_tile, tile)) return false;
    const KeepMapRow keep = map_row(params_.keep, query_tile);
    return !keep.given() || keep.bit(tile) || must_keep(query_tile, tile);
  }

  void load_queries() {
    for (int64_t query_tile = 0; query_tile < query_tiles_; ++query_tile) {
      const int64_t valid = valid_rows(query_tile);
      for (int64_t row = 0; row < params_.tile.tile_m; row += 4) {
        float rows[4][kMaxHeadDim] = {};  // rows past the last query stay zero: harmless and never stored
        for (int64_t i = 0; i < smaller(4, valid - row); ++i) {
          widen_row<dtype>(row_of<dtype>(params_.q, batch_, first_row(query_tile) + row + i, head_), params_.head_dim,
                           rows[i]);
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
    for (int64_t query_tile = 0; query_tile < query_tiles_; ++query_tile) {
      if (!visits(query_tile, tile)) continue;
      const bool near_maximum = attend(query_tile, tile);
      if (params_.next_keep != nullptr && (!visited_any_[query_tile] || near_maximum || must_keep(query_tile, tile))) {
        set_next_keep(query_tile, tile);
      }
      visited_any_[query_tile] = true;
    }
  }

  // Scores of keys that the token mask hides from a row of the panel become -inf.
  void hide_keys(int64_t query_tile, int64_t first_row, int64_t tile, int64_t keys) const {
    const int64_t first_key = tile * params_.tile.tile_n;
    for (int64_t row = 0; row < kPanelRows; ++row) {
      const int64_t row_position = position(query_tile, first_row + row);
      for (int64_t key = 0; key < keys; ++key) {
        if (!window_.sees(row_position, first_key + key)) workspace_.scores[key * kPanelRows + row] = -kInfinity;
      }
    }
  }

  // Computes a tile for a query tile; returns whether some row's maximum in it is near the row's maximum so far.
  bool attend(int64_t query_tile, int64_t tile) {
    const float threshold =
        params_.threshold == nullptr ? kInfinity : params_.threshold[head_ * params_.threshold_stride];
    const int64_t keys = keys_of(tile);
    const int64_t valid = valid_rows(query_tile);
    const bool masked = !every_row_sees(query_tile, tile);
    const float* k = packed_ + tile * layout_.floats;
    const float* v = k + layout_.v_offset;
    bool near_maximum = false;
    for (int64_t first_row = 0; first_row < valid; first_row += kPanelRows) {
      const int64_t rows = query_tile * params_.tile.tile_m + first_row;
      Floats correction[kPanelVectors];
      score_tile(panel_rows(workspace_.q, query_tile, first_row), k, layout_.k_stride, keys, params_.head_dim,
                 workspace_.scores);
      if (masked) hide_keys(query_tile, first_row, tile, keys);
      near_maximum |= softmax_tile(workspace_.scores, keys, valid - first_row, params_.scale, threshold,
                                   workspace_.row_max + rows, workspace_.row_sum + rows, correction);
      accumulate_tile(workspace_.scores, v, layout_.v_block_stride, keys, params_.head_dim, correction,
                      panel_rows(workspace_.accumulated, query_tile, first_row));
    }
    return near_maximum;
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
    const int64_t query_row = first_row(query_tile) + row;
    const float sum = workspace_.row_sum[query_tile * params_.tile.tile_m + row];
    const float max = workspace_.row_max[query_tile * params_.tile.tile_m + row];
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: no key, or none with a finite score
    Storage* __restrict target =
        static_cast<Storage*>(params_.out) +
        ((batch_ * params_.query_len + query_row) * params_.query_heads + head_) * params_.head_dim;
    for (int64_t d = 0; d < params_.head_dim; ++d) target[d] = Element<dtype>::narrow(values[d] * inverse);
    params_.lse[(batch_ * params_.query_heads + head_) * params_.query_len + query_row] =
        max * params_.scale + ::logf(sum);
  }

  const ForwardParams& params_;
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

int64_t visit_groups(const ForwardParams& params) { return ceil_div(params.query_len, params.tile.visit_rows); }

int64_t scratch_floats(const ForwardParams& params) { return Workspace{}.lay_out(params, nullptr); }

int64_t packed_floats(const ForwardParams& params) { return params.kv_tiles() * PackedTileLayout(params).floats; }

int64_t pack_items(const ForwardParams& params, const Wave& wave) { return wave.kv_heads * params.kv_tiles(); }

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
    pack_tile<dtype>(params, layout, kv_head / params.kv_heads, kv_head % params.kv_heads, tile,
                     wave.packed + wave_head * packed_floats(params) + tile * layout.floats);
  }
}

int64_t attend_items(const ForwardParams& params, const Wave& wave) {
  return wave.kv_heads * (params.query_heads / params.kv_heads) * visit_groups(params);
}

template <DataType dtype>
void attend_as(const ForwardParams& params, const Wave& wave, float* scratch, int64_t* next_item) {
  const PackedTileLayout layout(params);
  Workspace workspace{};
  workspace.lay_out(params, scratch);
  const int64_t sharing_heads = params.query_heads / params.kv_heads;
  for (;;) {
    const int64_t item = __atomic_fetch_add(next_item, 1, __ATOMIC_RELAXED);
    if (item >= attend_items(params, wave)) return;
    const int64_t group = item % visit_groups(params);
    const int64_t wave_head = item / visit_groups(params);  // query heads of the wave, those of one KV head together
    const int64_t kv_head = wave.first_kv_head + wave_head / sharing_heads;
    const int64_t head = kv_head % params.kv_heads * sharing_heads + wave_head % sharing_heads;
    const float* packed = wave.packed + wave_head / sharing_heads * packed_floats(params);
    VisitGroup<dtype>(params, workspace, layout, packed, kv_head / params.kv_heads, head, group).run();
  }
}

void pack(const ForwardParams& params, const Wave& wave, int64_t* next_item) {
  switch (params.dtype) {
    case DataType::kFloat32: return pack_as<DataType::kFloat32>(params, wave, next_item);
    case DataType::kBFloat16: return pack_as<DataType::kBFloat16>(params, wave, next_item);
    case DataType::kFloat16: return pack_as<DataType::kFloat16>(params, wave, next_item);
  }
}

void attend(const ForwardParams& params, const Wave& wave, float* scratch, int64_t* next_item) {
  switch (params.dtype) {
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
