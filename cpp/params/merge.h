// What the merge of partial results is told.
#pragma once

#include <cstdint>

#include "params/operands.h"

namespace lite_attention {

struct MergeParams {
  DataType dtype = DataType::kFloat32;
  int64_t parts = 0;
  int64_t batch = 0;
  int64_t query_len = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  const TensorView* outs = nullptr;  // [parts]
  const TensorView* lses = nullptr;  // [parts], fp32 [batch, heads, query_len]; row_stride is the last dimension's
  void* out = nullptr;               // contiguous [batch, query_len, heads, head_dim]
  float* lse = nullptr;              // contiguous [batch, heads, query_len]
};

}  // namespace lite_attention
