// What is multiplied: plain pointers and strides.
#pragma once

#include <cstdint>

namespace lite_attention {

enum class DataType : int32_t { kFloat32, kBFloat16, kFloat16 };

// A [batch, length, heads, head_dim] tensor whose last stride is 1; strides in elements.
struct TensorView {
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

struct Operands {
  TensorView q, k, v;
};

}  // namespace lite_attention
