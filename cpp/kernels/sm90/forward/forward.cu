#include "kernels/sm90/forward/forward.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "kernels/sm90/forward/launch.h"
#include "kernels/sm90/plan/plan.h"

namespace lite_attention::sm90 {
namespace {

constexpr int64_t kElementBytes = 2;
constexpr int64_t kTensorMapAlignment = 16;  // bytes, of the first element and of every stride
constexpr int kBoxColumns = 64;

void check(cudaError_t error, const char* action) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(action) + " failed: " + cudaGetErrorString(error));
}

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

// The [batch, length, heads, head_dim] tensor as the copy engine sees it, in boxes of `rows` rows by 64 columns. What a
// box reaches past an end reads as zero and is not written.
CUtensorMap tensor_map(const char* name, const TensorView& view, const ForwardParams& params, int64_t length,
                       int64_t heads, int rows) {
  if (reinterpret_cast<uintptr_t>(view.data) % kTensorMapAlignment != 0) {
    std::ostringstream message;
    message << name << " starts " << reinterpret_cast<uintptr_t>(view.data) % kTensorMapAlignment
            << " bytes past a 16-byte boundary, expected its first element on one";
    throw std::runtime_error(message.str());
  }
  const struct {
    const char* dimension;
    int64_t size, stride;
  } dimensions[] = {
      {"row", length, view.row_stride}, {"head", heads, view.head_stride}, {"batch", params.batch, view.batch_stride}};
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
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(params.head_dim), static_cast<cuuint64_t>(length),
                               static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(params.batch)};
  const cuuint32_t box[4] = {kBoxColumns, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      params.dtype == DataType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
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

int multiprocessors_of_current_device() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "asking for its multiprocessors");
  return count;
}

Launch& launch_for(const ForwardParams& params) {
  const bool bf16 = params.dtype == DataType::kBFloat16;
  if (params.head_dim <= 64) return bf16 ? launch_d64_bf16 : launch_d64_fp16;
  if (params.head_dim <= 128) return bf16 ? launch_d128_bf16 : launch_d128_fp16;
  return bf16 ? launch_d256_bf16 : launch_d256_fp16;
}

// Without a map or masks nothing has to be planned, and tiles of any size may serve.
Walk walk_of(const ForwardParams& params) {
  if (params.threshold != nullptr) return Walk::kMappedDecided;
  if (params.keep.words == nullptr && params.kv_tile_lens == nullptr && !params.token_mask.given()) return Walk::kAll;
  return params.tile.tile_n == tile_shape(params.head_dim).tile_n ? Walk::kMapped : Walk::kMappedFine;
}

ForwardParams as_walked(ForwardParams params, Walk walk) {
  params.tile = walk_tile(params.head_dim, walk);
  return params;
}

}  // namespace

int64_t workspace_bytes(const ForwardParams& params) {
  const Walk walk = walk_of(params);
  return walk == Walk::kAll ? static_cast<int64_t>(sizeof(int32_t)) : plan_bytes(as_walked(params, walk));
}

void forward(const ForwardParams& given, void* workspace, cudaStream_t stream) {
  const Walk walk = walk_of(given);
  const bool planned = walk != Walk::kAll;
  const ForwardParams params = as_walked(given, walk);
  const TileShape& tile = params.tile;
  const int multiprocessors = multiprocessors_of_current_device();
  const TensorView out{params.out, params.query_len * params.query_heads * params.head_dim,
                       params.query_heads * params.head_dim, params.head_dim};
  const int key_rows = planned ? tile.tile_n : tile.tile_n / 2;  // pairs of CTAs load half a tile each
  const int64_t groups = ceil_div(params.query_len, tile.visit_rows);
  const int64_t items = params.batch * params.query_heads * (planned ? groups : ceil_div(groups, 2));
  if (items > INT32_MAX) throw std::runtime_error("q has more tiles than one launch can number");

  KernelParams kernel{};
  kernel.q = tensor_map("q", params.q, params, params.query_len, params.query_heads, tile.tile_m);
  kernel.k = tensor_map("k", params.k, params, params.kv_len, params.kv_heads, key_rows);
  kernel.v = tensor_map("v", params.v, params, params.kv_len, params.kv_heads, key_rows);
  kernel.out = tensor_map("out", out, params, params.query_len, params.query_heads, tile.tile_m);
  kernel.forward = params;
  kernel.groups = static_cast<int32_t>(groups);
  kernel.work_items = static_cast<int32_t>(items);
  kernel.heads_per_kv_head = static_cast<int32_t>(params.query_heads / params.kv_heads);
  kernel.words = static_cast<int32_t>(params.words());
  kernel.scale_log2 = params.scale * 1.44269504088896340736f;
  if (planned) {
    kernel.workspace = lay_out(params, workspace);
    check(launch_plan(kernel, stream), "launching the plan of the keep map");
  } else {
    kernel.workspace.taken = static_cast<int32_t*>(workspace);
    check(cudaMemsetAsync(workspace, 0, sizeof(int32_t), stream), "clearing the count of work taken");
  }
  check(launch_for(params)(walk, kernel, multiprocessors, stream), "launching the forward kernel");
}

}  // namespace lite_attention::sm90
