// Before a launch that walks a keep map: what each visit group has to do, and in which order the groups are taken.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params/forward.h"

namespace lite_attention::sm90 {

// What is found out about one visit group.
struct GroupPlan {
  int32_t tiles;       // visited by at least one of its query tiles
  int32_t first_tile;  // where the walk starts
  int32_t
      masked_from_end;  // which visit, counted from the last (1), is of the tile that not all keys of exist; 0: none
  int32_t per_visit;    // whether the consumers must look at each visit: some are not for all of them, or masked
};

// Device memory of one call; every part is written here before it is read.
struct Workspace {
  GroupPlan* groups;  // [batch, heads, groups]
  uint32_t* visited;  // [batch, heads, groups, words, query tiles of a group]: what is to be visited
  uint32_t* masked;   // as visited: which of those need a mask; null where the drop rule decides
  int32_t* queue;     // the groups, as indices into `groups`, in the order they are to be taken
  int32_t* taken;     // how many were taken, beyond those that the CTAs begin with
};

// Aligned as what follows it in KernelParams, without which nvcc reads the parameters in other words.
struct alignas(64) PlanParams {
  ForwardParams forward;
  Workspace workspace;
  int32_t groups;      // visit groups of one head
  int32_t work_items;  // all that there is to do: visit groups, or pairs of them for pairs of CTAs
  int32_t words;       // of one row of the keep map
};

int64_t plan_bytes(const ForwardParams& params);
Workspace lay_out(const ForwardParams& params, void* memory);

// Fills the workspace, and next_keep with what the drop rule asks no row about.
cudaError_t launch_plan(const PlanParams& params, cudaStream_t stream);

}  // namespace lite_attention::sm90
