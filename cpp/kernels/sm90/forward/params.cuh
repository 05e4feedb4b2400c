// What the kernels are launched with.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "params/forward.h"

namespace lite_attention::sm90 {

// Which tiles a launch visits.
enum class Walk {
  kAll,            // every existing KV tile; pairs of CTAs share each K/V load
  kMapped,         // those that the keep map and the masks leave
  kMappedFine,     // the same by tiles of 64 keys, where those are not the head dim's own
  kMappedDecided,  // those of the keep map, and the drop rule decides which of them the next map keeps
};

// The tiles of a walk. Those of a map are the map's. A dense walk is free to choose: at 128 columns, two warpgroups
// with wider tiles, which leave registers to overlap the scores of a tile with the output of the one before.
constexpr TileShape walk_tile(int64_t head_dim, Walk walk) {
  const TileShape& shape = tile_shape(head_dim);
  if (walk == Walk::kMappedFine) return {shape.max_head_dim, shape.tile_m, kFineTileN, shape.tile_m};
  if (walk == Walk::kAll && head_dim > 64 && head_dim <= 128) return {128, 64, 176, 128};
  return shape;
}

// What plan.cu finds out about one visit group.
struct GroupPlan {
  int32_t tiles;       // visited by at least one of its query tiles
  int32_t first_tile;  // where the walk starts
  int32_t
      masked_from_end;  // which visit, counted from the last (1), is of the tile that not all keys of exist; 0: none
  int32_t per_visit;    // whether the consumers must look at each visit: some are not for all of them, or masked
};

// Device memory of one call; every part is written by plan.cu before it is read.
struct Workspace {
  GroupPlan* groups;  // [batch, heads, groups]
  uint32_t* visited;  // [batch, heads, groups, words, query tiles of a group]: what is to be visited
  uint32_t* masked;   // as visited: which of those need a mask; null where the drop rule decides
  int32_t* queue;     // the groups, as indices into `groups`, in the order they are to be taken
  int32_t* taken;     // how many were taken, beyond those that the CTAs begin with
};

struct KernelParams {
  CUtensorMap q, k, v, out;
  ForwardParams forward;
  Workspace workspace;
  int32_t groups;      // visit groups of one head
  int32_t work_items;  // all that there is to do: visit groups, or pairs of them with Walk::kAll
  int32_t words;       // of one row of the keep map
  int32_t heads_per_kv_head;
  float scale_log2;  // scale * log2(e)
};

// Whether each visit says how it is masked. Otherwise only the last existing tile may be.
constexpr bool masks_visits(Walk walk) { return walk == Walk::kMapped || walk == Walk::kMappedFine; }

// How many keys of a batch entry exist. kv_lens cannot be checked before the launch, so what lies outside is clamped.
__device__ __forceinline__ int64_t existing_keys(const ForwardParams& params, int64_t entry) {
  if (params.kv_lens == nullptr) return params.kv_len;
  const int64_t keys = params.kv_lens[entry * params.kv_lens_stride];
  return keys < 0 ? 0 : keys < params.kv_len ? keys : params.kv_len;
}

}  // namespace lite_attention::sm90
