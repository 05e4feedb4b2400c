#include "kernels/sm90/plan/plan.h"

#include <cuda_runtime.h>

#include <cstddef>

#include "kernels/sm90/common/device.cuh"
#include "kernels/sm90/common/lanes.cuh"
#include "kernels/sm90/plan/queue.h"
#include "rules/drop_rule.h"
#include "rules/token_mask.h"

namespace lite_attention::sm90 {
namespace {

constexpr int kPlanThreads = 128;
constexpr int kMaxGroupTiles = 3;  // query tiles of a visit group
constexpr uint32_t kNever = ~0u;

__device__ uint32_t word_of(const KeepMapView& map, int64_t batch, int64_t head, int64_t query_tile, int64_t word) {
  const KeepMapRow row(map, batch, head, query_tile);
  return row.given() ? row.word(word) : 0u;
}

// How many steps into the walk from first_tile the first of a word's tiles is met.
__device__ uint32_t first_step(uint32_t tiles, int64_t word, int64_t first_tile, int64_t kv_tiles) {
  if (tiles == 0) return kNever;
  const uint32_t from_first = tiles & ~tiles_below(first_tile, word);
  const int64_t tile = word * kTilesPerWord + __ffs(static_cast<int>(from_first != 0 ? from_first : tiles)) - 1;
  return static_cast<uint32_t>(tile >= first_tile ? tile - first_tile : tile - first_tile + kv_tiles);
}

// Of the KV tiles of one word: those that have keys, and those that have not all of them.
struct TileLengths {
  uint32_t exist;
  uint32_t partial;
};

// Of the warp's words, one a lane, from `first_word` on, each lane gets one.
__device__ TileLengths tile_lengths(const ForwardParams& forward, int64_t batch, int64_t first_word) {
  TileLengths mine{~0u, 0u};
  if (forward.visibility.kv_tile_lens == nullptr) return mine;
  const int lane = threadIdx.x % kWarpThreads;
  const int64_t words = min(static_cast<int64_t>(kWarpThreads), forward.problem.words() - first_word);
  for (int word = 0; word < words; ++word) {
    const int64_t tile = (first_word + word) * kTilesPerWord + lane;
    const int keys = tile < forward.problem.kv_tiles() ? forward.visibility.tile_len(batch, tile) : 0;
    const uint32_t exist = __ballot_sync(kAllLanes, keys > 0);
    const uint32_t partial = __ballot_sync(kAllLanes, keys < forward.problem.tile.tile_n);
    if (lane == word) mine = {exist, partial};
  }
  return mine;
}

// Of the KV tiles of one word, for one query tile: those of which some row sees a key, and those of which every row
// sees every key.
struct TileVisibility {
  uint32_t visible = ~0u;
  uint32_t whole = ~0u;
};

__device__ TileVisibility tile_visibility(const ForwardParams& forward, const HeadWindow& window,
                                          int64_t first_position, int64_t query_tile, int64_t word) {
  if (!forward.visibility.token_mask.given()) return {};
  const int64_t tile_m = forward.problem.tile.tile_m, tile_n = forward.problem.tile.tile_n;
  const int64_t first = first_position + query_tile * tile_m;
  const int64_t last = first_position + min((query_tile + 1) * tile_m, forward.problem.query_len) - 1;
  if (last < 0) return {0u, 0u};
  const uint32_t sink = tiles_below(ceil_div(window.sink_size, tile_n), word);
  const uint32_t recent = window.recent_size > 0 ? ~tiles_below(window.window_begin(first) / tile_n, word) : 0u;
  const WholeTiles whole = window.whole_tiles(first, last, tile_n);
  return {tiles_below(last / tile_n + 1, word) & (sink | recent),
          tiles_below(whole.sink_end, word) | (tiles_below(whole.end, word) & ~tiles_below(whole.begin, word))};
}

// One warp plans one visit group, its lanes reading neighbouring words.
__device__ GroupPlan plan_group(const PlanParams& params, int64_t batch, int64_t head, int group) {
  const ForwardParams& forward = params.forward;
  const int lane = threadIdx.x % kWarpThreads;
  const int group_tiles = forward.problem.tile.visit_rows / forward.problem.tile.tile_m;
  const int64_t query_tiles = forward.problem.query_tiles();
  const int64_t first_query_tile = static_cast<int64_t>(group) * group_tiles;
  const int64_t head_index = batch * forward.problem.query_heads + head;
  const int64_t keys = existing_keys(forward.problem, forward.visibility, batch);
  const int64_t existing_tiles = ceil_div(keys, forward.problem.tile.tile_n);
  const int64_t first_tile =
      first_visited_tile(first_query_tile, forward.problem.tile.tile_m, forward.problem.tile.tile_n,
                         forward.problem.tile.visit_rows, forward.problem.query_len, forward.problem.kv_len);
  const bool last_is_partial = keys % forward.problem.tile.tile_n != 0;
  const HeadWindow window(forward.visibility.token_mask, head);
  const int64_t first_position = forward.visibility.token_mask.first_position(forward.problem.query_len, keys);
  const int64_t first_word_of_group = (head_index * params.groups + group) * params.words * group_tiles;
  uint32_t* visited = params.workspace.visited + first_word_of_group;
  uint32_t* masked = params.workspace.masked + first_word_of_group;

  int tiles = 0, before_last = 0;
  bool differ = false, visits_last = false, masks_visits = false;
  uint32_t first_steps[kMaxGroupTiles];  // how far into the walk each query tile's first visit is
  for (uint32_t& step : first_steps) step = kNever;
  for (int64_t first_word = 0; first_word < params.words; first_word += kWarpThreads) {
    const TileLengths lengths = tile_lengths(forward, batch, first_word);
    const int64_t word = first_word + lane;
    if (word >= params.words) break;
    const uint32_t exist = tiles_below(existing_tiles, word) & lengths.exist;
    const uint32_t valid = tiles_below(forward.problem.kv_tiles(), word);
    const uint32_t last_existing = exist & ~tiles_below(existing_tiles - 1, word);
    uint32_t any = 0, first_row = 0;
#pragma unroll
    for (int tile = 0; tile < kMaxGroupTiles; ++tile) {
      if (tile >= group_tiles) break;
      const int64_t query_tile = first_query_tile + tile;
      uint32_t mine = 0, mine_masked = 0;
      if (query_tile < query_tiles) {
        const uint32_t keep = forward.visibility.keep.words == nullptr
                                  ? ~0u
                                  : word_of(forward.visibility.keep, batch, head, query_tile, word);
        const uint32_t must = word_of(forward.visibility.must_keep, batch, head, query_tile, word);
        const TileVisibility tiles_of_rows = tile_visibility(forward, window, first_position, query_tile, word);
        mine = (keep | must) & exist & tiles_of_rows.visible;
        if (params.workspace.masked != nullptr) {
          const uint32_t cut = mine & (lengths.partial | ~tiles_of_rows.whole);
          masks_visits |= cut != 0;
          mine_masked = cut | (last_is_partial ? mine & last_existing : 0u);
        }
        differ |= tile > 0 && mine != first_row;
        if (tile == 0) first_row = mine;
        if (forward.decision.next_keep != nullptr) {
          first_steps[tile] = min(first_steps[tile], first_step(mine, word, first_tile, forward.problem.kv_tiles()));
          forward.decision.next_keep[(head_index * query_tiles + query_tile) * params.words + word] =
              static_cast<int32_t>(undecided_bits(keep, must, exist, valid));
        }
      }
      visited[word * group_tiles + tile] = mine;
      if (params.workspace.masked != nullptr) masked[word * group_tiles + tile] = mine_masked;
      any |= mine;
    }
    tiles += __popc(any);
    before_last += __popc(any & tiles_below(existing_tiles - 1, word) & ~tiles_below(first_tile, word));
    visits_last |= (any & last_existing) != 0;
  }
  __syncwarp();
  if (forward.decision.next_keep != nullptr) {
#pragma unroll
    for (int tile = 0; tile < kMaxGroupTiles; ++tile) {
      const uint32_t step = __reduce_min_sync(kAllLanes, first_steps[tile]);
      if (step == kNever || lane != 0) continue;
      const int64_t first = (first_tile + step) % forward.problem.kv_tiles();
      forward.decision
          .next_keep[(head_index * query_tiles + first_query_tile + tile) * params.words + first / kTilesPerWord] |=
          1 << first % kTilesPerWord;
    }
  }
  tiles = __reduce_add_sync(kAllLanes, tiles);
  before_last = __reduce_add_sync(kAllLanes, before_last);
  GroupPlan plan{};
  plan.tiles = tiles;
  plan.first_tile = static_cast<int32_t>(first_tile);
  // A walk that starts past the last existing tile wraps at once and ends with it.
  plan.masked_from_end = !__any_sync(kAllLanes, visits_last && last_is_partial) ? 0
                         : first_tile < existing_tiles                          ? tiles - before_last
                                                                                : 1;
  plan.per_visit = __any_sync(kAllLanes, differ || masks_visits);
  return plan;
}

// One warp a visit group.
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ PlanParams params) {
  let_next_kernel_start();
  const int64_t heads = params.forward.problem.query_heads;
  const int64_t group_index =
      static_cast<int64_t>(blockIdx.x) * (kPlanThreads / kWarpThreads) + threadIdx.x / kWarpThreads;
  if (group_index >= params.work_items) return;
  const int64_t head_index = group_index / params.groups;
  const int64_t batch = head_index / heads;
  const GroupPlan plan =
      plan_group(params, batch, head_index - batch * heads, static_cast<int>(group_index - head_index * params.groups));
  if (threadIdx.x % kWarpThreads == 0) params.workspace.groups[group_index] = plan;
}

constexpr int64_t kAlignment = 16;

struct Sizes {
  int64_t groups, visited, masked, queue;
};

Sizes sizes_of(const ForwardParams& params) {
  const int64_t groups = ceil_div(params.problem.query_len, params.problem.tile.visit_rows) * params.problem.batch *
                         params.problem.query_heads;
  const int64_t group_tiles = params.problem.tile.visit_rows / params.problem.tile.tile_m;
  const auto aligned = [](int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; };
  const int64_t words = aligned(groups * params.problem.words() * group_tiles * static_cast<int64_t>(sizeof(uint32_t)));
  return {aligned(groups * static_cast<int64_t>(sizeof(GroupPlan))), words,
          params.decision.threshold == nullptr ? words : 0, aligned(groups * static_cast<int64_t>(sizeof(int32_t)))};
}

}  // namespace

int64_t plan_bytes(const ForwardParams& params) {
  const Sizes sizes = sizes_of(params);
  return sizes.groups + sizes.visited + sizes.masked + sizes.queue + kAlignment;
}

Workspace lay_out(const ForwardParams& params, void* memory) {
  const Sizes sizes = sizes_of(params);
  auto* next = static_cast<std::byte*>(memory);
  Workspace workspace{};
  workspace.groups = reinterpret_cast<GroupPlan*>(next);
  workspace.visited = reinterpret_cast<uint32_t*>(next += sizes.groups);
  workspace.masked = sizes.masked == 0 ? nullptr : reinterpret_cast<uint32_t*>(next + sizes.visited);
  workspace.queue = reinterpret_cast<int32_t*>(next += sizes.visited + sizes.masked);
  workspace.taken = reinterpret_cast<int32_t*>(next + sizes.queue);
  return workspace;
}

cudaError_t launch_plan(const PlanParams& params, cudaStream_t stream) {
  constexpr int kGroupsPerBlock = kPlanThreads / kWarpThreads;
  const auto blocks = static_cast<unsigned>(ceil_div(params.work_items, kGroupsPerBlock));
  plan_kernel<<<blocks, kPlanThreads, 0, stream>>>(params);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  return launch_queue(params, stream);
}

}  // namespace lite_attention::sm90
