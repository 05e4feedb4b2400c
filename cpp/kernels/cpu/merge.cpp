// Exact merge of partial attention results over disjoint key sets: bound by memory, so one build serves every
// processor.

#include "kernels/cpu/merge.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/common/simd.h"

namespace lite_attention::cpu {
namespace {

template <DataType dtype>
void merge_row(const MergeParams& params, int64_t batch, int64_t row, int64_t head, float* sums) {
  using Storage = typename Element<dtype>::Storage;
  constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
  const auto lse_of = [&](int64_t part) {
    const TensorView& lse = params.lses[part];
    return static_cast<const float*>(
        lse.data)[batch * lse.batch_stride + head * lse.head_stride + row * lse.row_stride];
  };

  float max = kNegativeInfinity;
  for (int64_t part = 0; part < params.parts; ++part) {
    const float lse = lse_of(part);
    if (lse > max || std::isnan(lse)) max = lse;
    if (std::isnan(max)) break;
  }
  std::fill(sums, sums + params.head_dim, 0.0f);
  float total = 0.0f;
  if (max != kNegativeInfinity) {
    for (int64_t part = 0; part < params.parts; ++part) {
      const float weight = std::exp(lse_of(part) - max);
      if (weight == 0.0f) continue;  // an empty part counts for nothing, whatever its rows hold
      total += weight;
      const TensorView& out = params.outs[part];
      const Storage* source = static_cast<const Storage*>(out.data) + batch * out.batch_stride + row * out.row_stride +
                              head * out.head_stride;
      for (int64_t d = 0; d < params.head_dim; ++d) sums[d] += weight * Element<dtype>::widen(source[d]);
    }
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  Storage* target =
      static_cast<Storage*>(params.out) + ((batch * params.query_len + row) * params.heads + head) * params.head_dim;
  for (int64_t d = 0; d < params.head_dim; ++d) target[d] = Element<dtype>::narrow(sums[d] * inverse);
  params.lse[(batch * params.heads + head) * params.query_len + row] =
      total == 0.0f ? kNegativeInfinity : max + std::log(total);
}

template <DataType dtype>
void merge_rows(const MergeParams& params, int64_t first, int64_t last, float* sums) {
  for (int64_t item = first; item < last; ++item) {
    const int64_t batch_row = item / params.heads;
    merge_row<dtype>(params, batch_row / params.query_len, batch_row % params.query_len, item % params.heads, sums);
  }
}

}  // namespace

void merge(const MergeParams& params, int64_t max_workers, ParallelRun parallel_run) {
  const int64_t items = params.batch * params.query_len * params.heads;
  const int64_t workers = std::max<int64_t>(1, std::min(max_workers, items));
  std::vector<float> sums(static_cast<size_t>(workers * params.head_dim));
  struct Context {
    const MergeParams& params;
    float* sums;
    int64_t items;
    int64_t workers;
  } context{params, sums.data(), items, workers};
  parallel_run(
      workers,
      [](void* opaque, int64_t worker) {
        const auto* shared = static_cast<const Context*>(opaque);
        const int64_t first = shared->items * worker / shared->workers;
        const int64_t last = shared->items * (worker + 1) / shared->workers;
        float* own = shared->sums + worker * shared->params.head_dim;
        switch (shared->params.dtype) {
          case DataType::kFloat32: return merge_rows<DataType::kFloat32>(shared->params, first, last, own);
          case DataType::kBFloat16: return merge_rows<DataType::kBFloat16>(shared->params, first, last, own);
          case DataType::kFloat16: return merge_rows<DataType::kFloat16>(shared->params, first, last, own);
        }
      },
      &context);
}

}  // namespace lite_attention::cpu
