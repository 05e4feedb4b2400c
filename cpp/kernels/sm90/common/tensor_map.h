// Tensors as the copy engine (TMA) sees them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "params/operands.h"

namespace lite_attention::sm90 {

inline constexpr int64_t kElementBytes = 2;  // bf16 and fp16
// The widest box that the 128-byte swizzle takes: what shared memory holds of a tile lies in slabs of so many columns.
inline constexpr int kSwizzleColumns = 128 / kElementBytes;

struct TensorExtents {
  int64_t batch, length, heads, head_dim;
};

// Boxes of `rows` rows by kSwizzleColumns columns. What a box reaches past an end reads as zero and is not written.
// Throws std::runtime_error, naming the tensor, for addresses and strides that the engine cannot take.
CUtensorMap tensor_map(const char* name, const TensorView& view, DataType dtype, const TensorExtents& extents,
                       int rows);

}  // namespace lite_attention::sm90
