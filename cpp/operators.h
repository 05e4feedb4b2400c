// The operators, for any backend: check the arguments, allocate the results, fill params, run the backend's kernel.
//
// Schemas, fakes and autograd are in python/lite_attention/ops/_library.py. A Backend has
//   static constexpr DeviceType kDevice;
//   static void forward(const Call& call, const ForwardParams& params);
//   static void merge(const Call& call, const MergeParams& params);
//   static void top_k_map(const Call& call, const TopKMapParams& params);
#pragma once

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"

namespace lite_attention {

inline std::tuple<Tensor, Tensor> allocate_results(const Call& call, const Tensor& q, ForwardParams& params) {
  Tensor out = allocate(call, q.scalar_type(), {params.batch, params.query_len, params.query_heads, params.head_dim});
  Tensor lse = allocate(call, ScalarType::Float, {params.batch, params.query_heads, params.query_len});
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  return {std::move(out), std::move(lse)};
}

template <typename Backend>
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& keep, const std::optional<Tensor>& kv_lens,
                                     double scale, std::optional<int64_t> tile_n,
                                     const std::optional<Tensor>& kv_tile_lens,
                                     const std::optional<std::string>& causal,
                                     const std::optional<Tensor>& head_windows) {
  const Call call = make_call("attention", Backend::kDevice, q);
  ForwardParams params;
  fill_qkv(call, q, k, v, scale, params);
  choose_tile(call, tile_n, params);
  fill_kv_lens(call, kv_lens, params);
  fill_kv_tile_lens(call, kv_tile_lens, params);
  fill_token_mask(call, causal, head_windows, params);
  if (keep.has_value()) params.keep = view_keep_map(call, "keep", *keep, params);
  auto results = allocate_results(call, q, params);
  Backend::forward(call, params);
  return results;
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> skip_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keep,
                                                  const std::optional<Tensor>& must_keep,
                                                  const std::optional<Tensor>& kv_lens, const Tensor& threshold,
                                                  double scale) {
  const Call call = make_call("skip_attention", Backend::kDevice, q);
  ForwardParams params;
  fill_qkv(call, q, k, v, scale, params);
  fill_kv_lens(call, kv_lens, params);
  params.keep = view_keep_map(call, "keep", keep, params);
  if (must_keep.has_value()) params.must_keep = view_broadcast_keep_map(call, "must_keep", *must_keep, params);
  fill_threshold(call, threshold, params);
  auto [out, lse] = allocate_results(call, q, params);
  Tensor next_keep =
      allocate(call, ScalarType::Int, {params.batch, params.query_heads, params.query_tiles(), params.words()});
  params.next_keep = next_keep.mutable_data_ptr<int32_t>();
  Backend::forward(call, params);
  return {std::move(out), std::move(lse), std::move(next_keep)};
}

template <typename Backend>
Tensor top_k_map(const Tensor& scores, int64_t count) {
  const Call call = make_call("top_k_map", Backend::kDevice, scores);
  TopKMapParams params;
  fill_scores(call, scores, count, params);
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim + 1 < scores.dim(); ++dim) sizes.push_back(scores.size(dim));
  sizes.push_back(params.row_words());
  Tensor map = allocate(call, ScalarType::Int, sizes);
  params.words = map.mutable_data_ptr<int32_t>();
  if (params.rows() > 0) Backend::top_k_map(call, params);
  return map;
}

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
