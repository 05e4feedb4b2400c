// The largest scores of each row as bits of a keep map: a selection finds the smallest key that is chosen, then one
// walk in index order sets the bits, so that of equal scores the first are chosen. One build serves every processor.

#include "kernels/cpu/top_k_map.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "kernels/cpu/common/simd.h"
#include "rules/rank_key.h"

namespace lite_attention::cpu {
namespace {

template <DataType dtype>
void choose_in_row(const TopKMapParams& params, int64_t row, uint32_t* keys) {
  using Storage = typename Element<dtype>::Storage;
  const Storage* scores = static_cast<const Storage*>(params.scores.data) + params.row_offset(row);
  const auto key_of = [&](int64_t column) { return rank_key(Element<dtype>::widen(scores[column])); };

  const int64_t chosen = params.chosen();
  for (int64_t column = 0; column < params.columns; ++column) keys[column] = key_of(column);
  uint32_t* const smallest_chosen = keys + chosen - 1;
  std::nth_element(keys, smallest_chosen, keys + params.columns, std::greater<>());
  const uint32_t threshold = *smallest_chosen;
  int64_t ties_left = chosen - std::count_if(keys, smallest_chosen, [&](uint32_t key) { return key > threshold; });

  int32_t* words = params.words + row * params.row_words();
  for (int64_t first = 0; first < params.columns; first += kTilesPerWord) {
    const int64_t bits = std::min(kTilesPerWord, params.columns - first);
    uint32_t word = 0;
    for (int64_t bit = 0; bit < bits; ++bit) {
      const uint32_t key = key_of(first + bit);
      const bool is_chosen_tie = key == threshold && ties_left > 0;
      ties_left -= is_chosen_tie;
      word |= static_cast<uint32_t>(key > threshold || is_chosen_tie) << bit;
    }
    words[first / kTilesPerWord] = static_cast<int32_t>(word);
  }
}

template <DataType dtype>
void choose_in_rows(const TopKMapParams& params, int64_t first, int64_t last, uint32_t* keys) {
  for (int64_t row = first; row < last; ++row) choose_in_row<dtype>(params, row, keys);
}

}  // namespace

void top_k_map(const TopKMapParams& params, int64_t max_workers, ParallelRun parallel_run) {
  if (params.rows() == 0 || params.columns == 0) return;
  const int64_t workers = std::max<int64_t>(1, std::min(max_workers, params.rows()));
  std::vector<uint32_t> keys(static_cast<size_t>(workers * params.columns));
  struct Context {
    const TopKMapParams& params;
    uint32_t* keys;
    int64_t workers;
  } context{params, keys.data(), workers};
  parallel_run(
      workers,
      [](void* opaque, int64_t worker) {
        const auto* shared = static_cast<const Context*>(opaque);
        const int64_t first = shared->params.rows() * worker / shared->workers;
        const int64_t last = shared->params.rows() * (worker + 1) / shared->workers;
        uint32_t* own = shared->keys + worker * shared->params.columns;
        switch (shared->params.dtype) {
          case DataType::kFloat32: return choose_in_rows<DataType::kFloat32>(shared->params, first, last, own);
          case DataType::kBFloat16: return choose_in_rows<DataType::kBFloat16>(shared->params, first, last, own);
          case DataType::kFloat16: return choose_in_rows<DataType::kFloat16>(shared->params, first, last, own);
        }
      },
      &context);
}

}  // namespace lite_attention::cpu
