// The top-k map: what its kernels are told, and the order in which they rank scores.
#pragma once

#include <cstdint>
#include <cstring>

#include "params.h"

namespace lite_attention {

inline constexpr int64_t kMaxColumns = int64_t{1} << 30;  // the kernels count in 32 bits

struct TopKMapParams {
  DataType dtype = DataType::kFloat32;
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t query_tiles = 0;
  int64_t columns = 0;       // at most kMaxColumns
  int64_t count = 0;         // at least 1; what is past columns counts as columns
  TensorView scores;         // [batch, heads, query_tiles, columns]; row_stride is the query tiles'
  int32_t* words = nullptr;  // contiguous [batch, heads, query_tiles, row_words]

  LITE_ATTENTION_INLINE int64_t rows() const { return batch * heads * query_tiles; }
  LITE_ATTENTION_INLINE int64_t row_words() const { return ceil_div(columns, kTilesPerWord); }
  LITE_ATTENTION_INLINE int64_t chosen() const { return count < columns ? count : columns; }
  // Where a row's scores start, in elements; rows are counted in the map's order.
  LITE_ATTENTION_INLINE int64_t row_offset(int64_t row) const {
    return row / query_tiles / heads * scores.batch_stride + row / query_tiles % heads * scores.head_stride +
           row % query_tiles * scores.row_stride;
  }
};

// Unsigned integers in the order of the scores: -0 and 0 give the same one, NaN the lowest, which no number gives. In
// bits throughout, since the processor may be set to take subnormal numbers for 0.
LITE_ATTENTION_INLINE inline uint32_t rank_key(float score) {
  constexpr uint32_t kSign = 0x80000000u;
  constexpr uint32_t kInfinity = 0x7f800000u;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const uint32_t magnitude = bits & ~kSign;
  if (magnitude > kInfinity) return 0;
  return bits > kSign ? ~bits : kSign + magnitude;
}

}  // namespace lite_attention
