// merge_attention, for a Backend that has
//   static constexpr DeviceType kDevice;
//   static void merge(const Call& call, const MergeParams& params);
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "operators/arguments.h"

namespace lite_attention {

template <typename Backend>
std::tuple<Tensor, Tensor> merge_attention(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses) {
  constexpr const char* op = "merge_attention";
  if (outs.empty()) fail(op, "outs is empty, expected at least one partial result");
  const Call call = make_call(op, Backend::kDevice, outs[0]);
  MergeParams params;
  std::vector<TensorView> views;
  fill_merge(call, outs, lses, views, params);
  Tensor out = allocate(call, outs[0].scalar_type(), {params.batch, params.query_len, params.heads, params.head_dim});
  Tensor lse = allocate(call, ScalarType::Float, {params.batch, params.heads, params.query_len});
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  Backend::merge(call, params);
  return {std::move(out), std::move(lse)};
}

}  // namespace lite_attention
