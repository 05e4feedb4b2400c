// What the top-k map is told.
#pragma once

#include <cstdint>

#include "params/operands.h"
#include "rules/keep_map.h"

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

}  // namespace lite_attention
