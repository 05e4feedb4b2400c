#include "kernels/sm90/common/tensor_map.h"

#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>

#include "kernels/sm90/common/check.h"

namespace lite_attention::sm90 {
namespace {

constexpr int64_t kTensorMapAlignment = 16;  // bytes, of the first element and of every stride

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver by name: linking against it would keep the library from loading where there is none.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &found),
          "looking up cuTensorMapEncodeTiled in the driver");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver lacks cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(address);
  }();
  return function;
}

}  // namespace

CUtensorMap tensor_map(const char* name, const TensorView& view, DataType dtype, const TensorExtents& extents,
                       int rows) {
  if (reinterpret_cast<uintptr_t>(view.data) % kTensorMapAlignment != 0) {
    std::ostringstream message;
    message << name << " starts " << reinterpret_cast<uintptr_t>(view.data) % kTensorMapAlignment
            << " bytes past a 16-byte boundary, expected its first element on one";
    throw std::runtime_error(message.str());
  }
  const struct {
    const char* dimension;
    int64_t size, stride;
  } dimensions[] = {{"row", extents.length, view.row_stride},
                    {"head", extents.heads, view.head_stride},
                    {"batch", extents.batch, view.batch_stride}};
  cuuint64_t strides[3];
  for (int i = 0; i < 3; ++i) {
    const auto& [dimension, size, stride] = dimensions[i];
    // The stride of a single element means nothing: any legal one will do.
    strides[i] = static_cast<cuuint64_t>(size == 1 ? kTensorMapAlignment : stride * kElementBytes);
    if (strides[i] % kTensorMapAlignment != 0) {
      std::ostringstream message;
      message << name << " has " << dimension << " stride " << stride << ", expected a multiple of "
              << kTensorMapAlignment / kElementBytes << " elements";
      throw std::runtime_error(message.str());
    }
  }
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(extents.head_dim), static_cast<cuuint64_t>(extents.length),
                               static_cast<cuuint64_t>(extents.heads), static_cast<cuuint64_t>(extents.batch)};
  const cuuint32_t box[4] = {kSwizzleColumns, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      dtype == DataType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  CUtensorMap map;
  const CUresult result = encode_tiled()(&map, type, 4, const_cast<void*>(view.data), sizes, strides, box,
                                         element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::ostringstream message;
    message << name << " cannot be described to the copy engine: cuTensorMapEncodeTiled returned " << result;
    throw std::runtime_error(message.str());
  }
  return map;
}

}  // namespace lite_attention::sm90
