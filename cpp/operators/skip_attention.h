// skip_attention, for a Backend as in attention.h.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include "operators/arguments.h"

namespace lite_attention {

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> skip_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keep,
                                                  const std::optional<Tensor>& must_keep,
                                                  const std::optional<Tensor>& kv_lens, const Tensor& threshold,
                                                  double scale) {
  const Call call = make_call("skip_attention", Backend::kDevice, q);
  ForwardParams params;
  fill_qkv(call, q, k, v, scale, params);
  fill_kv_lens(call, kv_lens, params);
  params.visibility.keep = view_keep_map(call, "keep", keep, params);
  if (must_keep.has_value())
    params.visibility.must_keep = view_broadcast_keep_map(call, "must_keep", *must_keep, params);
  fill_threshold(call, threshold, params);
  auto [out, lse] = allocate_results(call, q, params);
  Tensor next_keep = allocate(
      call, ScalarType::Int,
      {params.problem.batch, params.problem.query_heads, params.problem.query_tiles(), params.problem.words()});
  params.decision.next_keep = next_keep.mutable_data_ptr<int32_t>();
  Backend::forward(call, params);
  return {std::move(out), std::move(lse), std::move(next_keep)};
}

}  // namespace lite_attention
