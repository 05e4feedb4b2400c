// K and V in fp32 scratch, in the layout that the panel products stream: packed once, read by every visit group.
//
// Reading K and V in place costs more than it looks: rows of one head lie a power of two apart, where a cache of few
// ways keeps only some of them, and 16-bit rows would be widened again for every group.
#pragma once

#include "kernels/cpu/common/panel.h"
#include "params/forward.h"

namespace lite_attention {
namespace {

// One KV tile: K as [tile_n][k_stride], then V as [block of columns][tile_n][kBlock].
struct PackedTileLayout {
  int64_t k_stride;  // an odd number of cache lines, so that rows spread over all of a cache's sets
  int64_t v_offset;
  int64_t v_block_stride;  // tile_n * kBlock, and room for the last key's vectors to spill over
  int64_t floats;

  explicit PackedTileLayout(const ForwardParams& params) {
    constexpr int64_t kCacheLineFloats = 16;
    k_stride = (ceil_div(params.problem.head_dim, 2 * kCacheLineFloats) * 2 + 1) * kCacheLineFloats;
    v_offset = params.problem.tile.tile_n * k_stride;
    v_block_stride = params.problem.tile.tile_n * kBlock + kCacheLineFloats;
    floats = v_offset + ceil_div(params.problem.head_dim, kBlock) * v_block_stride;
  }
};

template <DataType dtype>
inline const typename Element<dtype>::Storage* row_of(const TensorView& tensor, int64_t batch, int64_t row,
                                                      int64_t head) {
  return static_cast<const typename Element<dtype>::Storage*>(tensor.data) + batch * tensor.batch_stride +
         row * tensor.row_stride + head * tensor.head_stride;
}

template <DataType dtype>
inline void prefetch_row(const typename Element<dtype>::Storage* row, int64_t head_dim) {
  constexpr int64_t kCacheLineElements = 64 / sizeof(*row);
  for (int64_t d = 0; d < head_dim; d += kCacheLineElements) __builtin_prefetch(row + d);
}

template <DataType dtype>
inline void pack_tile(const ForwardParams& params, const PackedTileLayout& layout, int64_t batch, int64_t kv_head,
                      int64_t tile, float* target) {
  constexpr int64_t kPrefetchedRows = 8;  // rows of one head lie apart, which the processor's own prefetcher misses
  constexpr int kVectorBlock = (kBlock + kLanes - 1) / kLanes * kLanes;  // a block in whole vectors
  const int64_t first_key = tile * params.problem.tile.tile_n;
  const int64_t keys =
      smaller(params.problem.tile.tile_n, existing_keys(params.problem, params.visibility, batch) - first_key);
  for (int64_t key = 0; key < keys; ++key) {
    if (key + kPrefetchedRows < keys) {
      prefetch_row<dtype>(row_of<dtype>(params.operands.k, batch, first_key + key + kPrefetchedRows, kv_head),
                          params.problem.head_dim);
      prefetch_row<dtype>(row_of<dtype>(params.operands.v, batch, first_key + key + kPrefetchedRows, kv_head),
                          params.problem.head_dim);
    }
    widen_row<dtype>(row_of<dtype>(params.operands.k, batch, first_key + key, kv_head), params.problem.head_dim,
                     target + key * layout.k_stride);

    const auto* v = row_of<dtype>(params.operands.v, batch, first_key + key, kv_head);
    float* v_target = target + layout.v_offset + key * kBlock;
    int64_t d = 0;
    for (; d + kVectorBlock <= params.problem.head_dim; d += kBlock, v_target += layout.v_block_stride) {
      // Whole vectors: what spills over a key's part of the block is the next key's, written after this one's.
      for (int64_t column = 0; column < kVectorBlock; column += kLanes) {
        store(v_target + column, widen_vector<dtype>(v + d + column));
      }
    }
    for (; d < params.problem.head_dim; d += kBlock, v_target += layout.v_block_stride) {
      widen_row<dtype>(v + d, smaller(kBlock, params.problem.head_dim - d), v_target);
    }
  }
}

}  // namespace
}  // namespace lite_attention
