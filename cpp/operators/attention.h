// attention, for a Backend that has
//   static constexpr DeviceType kDevice;
//   static void forward(const Call& call, const ForwardParams& params);
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "operators/arguments.h"

namespace lite_attention {

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
  if (keep.has_value()) params.visibility.keep = view_keep_map(call, "keep", *keep, params);
  auto results = allocate_results(call, q, params);
  Backend::forward(call, params);
  return results;
}

}  // namespace lite_attention
