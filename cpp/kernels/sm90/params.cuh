// What the kernels are launched with.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../../params.h"

namespace lite_attention::sm90 {

// Which tiles a launch visits.
enum class Walk {
  kAll,            // every existing KV tile; pairs of CTAs share each K/V load
  kMapped,         // those of the keep map
  kMappedDecided,  // those of the keep map, and the drop rule decides which of them the next map keeps
};

// The tiles of a walk. Those of a map are the map's. A dense walk is free to choose: at 128 columns, two warpgroups
// with wider tiles, which leave registers to overlap the scores of a tile with the output of the one before.
constexpr TileShape walk_tile(int64_t head_dim, Walk walk) {
  const TileShape& shape = tile_shape(head_dim);
  if (walk == Walk::kAll && head_dim > 64 && head_dim <= 128) return {128, 64, 176, 128};
  return shape;
}

// What plan.cu finds out about one visit group.
struct GroupPlan {
  int32_t tiles;       // visited by at least one of its query tiles
  int32_t first_tile;  // where the walk starts
  int32_t
      masked_from_end;    // which visit, counted from the last (1), is of the tile that not all keys of exist; 0: none
  int32_t per_warpgroup;  // whether its query tiles visit different tiles
};

// Device memory of one call; every part is written by plan.cu before it is read.
struct Workspace {
  GroupPlan* groups;  // [batch, heads, groups]
  uint32_t*
      visited;     // [batch, heads, groups, words, query tiles of a group]: keep | must_keep, of the tiles that exist
  int32_t* queue;  // the groups, as indices into `groups`, in the order they are to be taken
  int32_t* taken;  // how many were taken, beyond those that the CTAs begin with
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

// How many keys of a batch entry exist. kv_lens cannot be checked before the launch, so what lies outside is clamped.
__device__ __forceinline__ int64_t existing_keys(const ForwardParams& params, int64_t entry) {
  if (params.kv_lens == nullptr) return params.kv_len;
  const int64_t keys = params.kv_lens[entry * params.kv_lens_stride];
  return keys < 0 ? 0 : keys < params.kv_len ? keys : params.kv_len;
}

}  // namespace lite_attention::sm90
