// top_k_map, for a Backend that has
//   static constexpr DeviceType kDevice;
//   static void top_k_map(const Call& call, const TopKMapParams& params);
#pragma once

#include <cstdint>
#include <vector>

#include "operators/arguments.h"

namespace lite_attention {

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

}  // namespace lite_attention
