// Exact merge of partial attention results over disjoint key sets: bound by memory, one thread for 16 bytes of a row.

#include "kernels/sm90/merge.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/sm90/common/widen.cuh"
#include "rules/keep_map.h"

namespace lite_attention::sm90 {
namespace {

// The parts travel as a kernel argument, so that neither a copy nor a wait is needed; devices take 32 KB of it.
constexpr int kMaxParts = 64;
constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;

struct MergeKernelParams {
  int64_t chunks;  // of all rows together; a chunk is what one thread merges
  int64_t row_chunks;
  int64_t query_len;
  int64_t heads;
  int64_t parts;
  void* out;
  float* lse;
  TensorView outs[kMaxParts];
  TensorView lses[kMaxParts];
};

template <typename Element>
__device__ Element narrow(float value) {
  return static_cast<Element>(value);  // to nearest even
}

template <typename Element, int kElements>
struct alignas(sizeof(Element) * kElements) Chunk {
  Element elements[kElements];
};

template <typename Element, int kElements>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeKernelParams params) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= params.chunks) return;
  const int64_t chunk = item % params.row_chunks;
  const int64_t head = item / params.row_chunks % params.heads;
  const int64_t row = item / params.row_chunks / params.heads % params.query_len;
  const int64_t batch = item / params.row_chunks / params.heads / params.query_len;

  const auto lse_of = [&](int64_t part) {
    const TensorView& lse = params.lses[part];
    return static_cast<const float*>(
        lse.data)[batch * lse.batch_stride + head * lse.head_stride + row * lse.row_stride];
  };
  float max = -INFINITY;
  for (int64_t part = 0; part < params.parts; ++part) {
    const float lse = lse_of(part);
    if (lse > max || isnan(lse)) max = lse;
    if (isnan(max)) break;
  }
  float sums[kElements] = {};
  float total = 0.0f;
  if (max != -INFINITY) {
    for (int64_t part = 0; part < params.parts; ++part) {
      const float weight = expf(lse_of(part) - max);
      if (weight == 0.0f) continue;  // an empty part counts for nothing, whatever its rows hold
      total += weight;
      const TensorView& out = params.outs[part];
      const auto* source = static_cast<const Element*>(out.data) + batch * out.batch_stride + row * out.row_stride +
                           head * out.head_stride;
      const auto loaded = reinterpret_cast<const Chunk<Element, kElements>*>(source)[chunk];
#pragma unroll
      for (int i = 0; i < kElements; ++i) sums[i] += weight * widen(loaded.elements[i]);
    }
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  Chunk<Element, kElements> merged;
#pragma unroll
  for (int i = 0; i < kElements; ++i) merged.elements[i] = narrow<Element>(sums[i] * inverse);
  static_cast<Chunk<Element, kElements>*>(params.out)[item] = merged;  // chunks are counted in the output's order
  if (chunk == 0) {
    params.lse[(batch * params.heads + head) * params.query_len + row] = total == 0.0f ? -INFINITY : max + logf(total);
  }
}

template <typename Element, int kElements>
void launch(const MergeParams& params, cudaStream_t stream) {
  MergeKernelParams kernel_params;
  kernel_params.row_chunks = params.head_dim / kElements;
  kernel_params.chunks = params.batch * params.query_len * params.heads * kernel_params.row_chunks;
  kernel_params.query_len = params.query_len;
  kernel_params.heads = params.heads;
  kernel_params.parts = params.parts;
  kernel_params.out = params.out;
  kernel_params.lse = params.lse;
  std::copy_n(params.outs, params.parts, kernel_params.outs);
  std::copy_n(params.lses, params.parts, kernel_params.lses);
  const auto blocks = static_cast<unsigned int>(ceil_div(kernel_params.chunks, kThreads));
  merge_kernel<Element, kElements><<<blocks, kThreads, 0, stream>>>(kernel_params);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(std::string("the merge kernel cannot be launched: ") + cudaGetErrorString(error));
  }
}

// Whether every row of every part lies on 16-byte boundaries and is a multiple of them.
bool is_aligned(const MergeParams& params, int64_t element_bytes) {
  const auto fits = [&](int64_t size, int64_t stride) {
    return size == 1 || stride * element_bytes % kVectorBytes == 0;
  };
  return params.head_dim * element_bytes % kVectorBytes == 0 &&
         std::all_of(params.outs, params.outs + params.parts, [&](const TensorView& out) {
           return reinterpret_cast<uintptr_t>(out.data) % kVectorBytes == 0 && fits(params.batch, out.batch_stride) &&
                  fits(params.query_len, out.row_stride) && fits(params.heads, out.head_stride);
         });
}

template <typename Element>
void launch_widest(const MergeParams& params, cudaStream_t stream) {
  if (is_aligned(params, sizeof(Element))) {
    launch<Element, kVectorBytes / sizeof(Element)>(params, stream);
  } else {
    launch<Element, 1>(params, stream);
  }
}

}  // namespace

void merge(const MergeParams& params, cudaStream_t stream) {
  if (params.parts > kMaxParts) {
    throw std::runtime_error("outs has " + std::to_string(params.parts) + " tensors, expected at most " +
                             std::to_string(kMaxParts) + " on CUDA: merge them in groups, then the groups");
  }
  switch (params.dtype) {
    case DataType::kFloat32: return launch_widest<float>(params, stream);
    case DataType::kBFloat16: return launch_widest<__nv_bfloat16>(params, stream);
    case DataType::kFloat16: return launch_widest<__half>(params, stream);
  }
}

}  // namespace lite_attention::sm90
