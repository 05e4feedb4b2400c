// The largest scores of each row as bits of a keep map.
//
// One warp per row. Lane l holds the keys (see rank_key) of columns l, l + 32, l + 64 and so on, so that a ballot over
// one key of each lane is a word of the map. The range of keys that holds the smallest chosen one is halved, each time
// by counting the keys in its upper half, until what lies above it is exactly what is chosen or one key is left. Of the
// columns with that key the first are chosen. The row is read once, into registers; longer rows are read once a round.

#include "kernels/sm90/top_k_map.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <iterator>
#include <stdexcept>
#include <string>

#include "kernels/sm90/common/lanes.cuh"
#include "kernels/sm90/common/widen.cuh"
#include "rules/rank_key.h"

namespace lite_attention::sm90 {
namespace {

constexpr int kThreads = 128;
constexpr int kRowsPerBlock = kThreads / kWarpThreads;
// What a lane may hold in registers: the build is the smallest that fits the row. 48 is 720p video in blocks of 64.
constexpr int kKeysPerLane[] = {16, 24, 32, 48, 64, 128};

// Key bits that are the same for every number of the type: there is nothing to halve in them.
template <typename Element>
constexpr int kUnusedBits = 0;
template <>
constexpr int kUnusedBits<__nv_bfloat16> = 16;
template <>
constexpr int kUnusedBits<__half> = 13;

// The keys of one lane. Past the last column they are 0, lower than any score's: never chosen.
template <typename Element>
struct KeysInMemory {
  const Element* scores;
  int columns;
  int lane;

  __device__ KeysInMemory(const Element* scores, int columns)
      : scores(scores), columns(columns), lane(threadIdx.x % kWarpThreads) {}

  __device__ uint32_t key(int column) const {
    return column < columns ? rank_key(widen(scores[column])) >> kUnusedBits<Element> : 0u;
  }

  // visit(word, key) for each word of the row's map, in order.
  template <typename Visit>
  __device__ void for_each(Visit visit) const {
    for (int word = 0; word < ceil_div(columns, kWarpThreads); ++word) {
      visit(word, key(word * kWarpThreads + lane));
    }
  }
};

template <typename Element, int kKeys>
struct KeysInRegisters {
  int columns;
  uint32_t keys[kKeys];

  __device__ KeysInRegisters(const Element* scores, int columns) : columns(columns) {
    const KeysInMemory<Element> memory(scores, columns);
#pragma unroll
    for (int word = 0; word < kKeys; ++word) keys[word] = memory.key(word * kWarpThreads + memory.lane);
  }

  // Words past the row's last one are visited too.
  template <typename Visit>
  __device__ void for_each(Visit visit) const {
#pragma unroll
    for (int word = 0; word < kKeys; ++word) visit(word, keys[word]);
  }
};

template <typename Keys>
__device__ unsigned int count_from(const Keys& keys, uint32_t limit) {
  unsigned int count = 0;
  keys.for_each([&](int, uint32_t key) { count += key >= limit; });
  return __reduce_add_sync(kAllLanes, count);
}

// All keys from `sure` on are chosen, and the first `ties` of those in [tied, sure), which are equal.
struct Choice {
  uint32_t sure;
  uint32_t tied;
  unsigned int ties;
};

template <typename Keys>
__device__ Choice choose(const Keys& keys, unsigned int chosen) {
  uint32_t low = 0xffffffffu;
  uint32_t high = 0;
  const int lane = threadIdx.x % kWarpThreads;
  keys.for_each([&](int word, uint32_t key) {
    if (word * kWarpThreads + lane < keys.columns) low = min(low, key);
    high = max(high, key);
  });
  // At least `chosen` keys are in [low, ...), at most as many, namely `above`, in [high, ...).
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high) + 1;
  unsigned int above = 0;
  while (above < chosen && high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const unsigned int count = count_from(keys, middle);
    if (count > chosen) {
      low = middle;
    } else {
      high = middle;
      above = count;
    }
  }
  return {high, low, chosen - above};
}

template <typename Keys>
__device__ void write_words(const Keys& keys, Choice choice, int32_t* words) {
  const int lane = threadIdx.x % kWarpThreads;
  const unsigned int lower_lanes = (1u << lane) - 1;
  const int row_words = static_cast<int>(ceil_div(keys.columns, kWarpThreads));
  unsigned int own_word = 0;
  keys.for_each([&](int word, uint32_t key) {
    unsigned int bits = __ballot_sync(kAllLanes, key >= choice.sure);
    if (choice.ties > 0) {
      const unsigned int tied = __ballot_sync(kAllLanes, key >= choice.tied) & ~bits;
      const unsigned int rank = __popc(tied & lower_lanes);
      const unsigned int first = __ballot_sync(kAllLanes, (tied >> lane & 1u) && rank < choice.ties);
      choice.ties -= __popc(first);
      bits |= first;
    }
    // Each lane keeps one of 32 words, so that they are written together.
    if (lane == word % kWarpThreads) own_word = bits;
    const int first_word = word - word % kWarpThreads;
    if ((word % kWarpThreads == kWarpThreads - 1 || word == row_words - 1) && first_word + lane < row_words) {
      words[first_word + lane] = static_cast<int32_t>(own_word);
    }
  });
}

template <typename Element, typename Keys>
__global__ void __launch_bounds__(kThreads) top_k_map_kernel(const __grid_constant__ TopKMapParams params) {
  const int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kWarpThreads;
  if (row >= params.rows()) return;
  const Keys keys(static_cast<const Element*>(params.scores.data) + params.row_offset(row),
                  static_cast<int>(params.columns));
  const Choice choice = choose(keys, static_cast<unsigned int>(params.chosen()));
  write_words(keys, choice, params.words + row * params.row_words());
}

template <typename Element, typename Keys>
void launch_with(const TopKMapParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned int>(ceil_div(params.rows(), kRowsPerBlock));
  top_k_map_kernel<Element, Keys><<<blocks, kThreads, 0, stream>>>(params);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(std::string("the top-k kernel cannot be launched: ") + cudaGetErrorString(error));
  }
}

template <typename Element, size_t build = 0>
void launch(const TopKMapParams& params, cudaStream_t stream) {
  if constexpr (build == std::size(kKeysPerLane)) {
    launch_with<Element, KeysInMemory<Element>>(params, stream);
  } else if (params.columns <= kKeysPerLane[build] * kWarpThreads) {
    launch_with<Element, KeysInRegisters<Element, kKeysPerLane[build]>>(params, stream);
  } else {
    launch<Element, build + 1>(params, stream);
  }
}

}  // namespace

void top_k_map(const TopKMapParams& params, cudaStream_t stream) {
  if (params.rows() == 0 || params.columns == 0) return;
  switch (params.dtype) {
    case DataType::kFloat32: return launch<float>(params, stream);
    case DataType::kBFloat16: return launch<__nv_bfloat16>(params, stream);
    case DataType::kFloat16: return launch<__half>(params, stream);
  }
}

}  // namespace lite_attention::sm90
