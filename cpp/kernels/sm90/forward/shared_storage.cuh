// What the roles of a CTA tell each other through shared memory.
#pragma once

#include <cstdint>

#include "kernels/sm90/common/device.cuh"
#include "kernels/sm90/forward/config.cuh"
#include "kernels/sm90/plan/plan.h"
#include "rules/token_mask.h"

namespace lite_attention::sm90 {

// What the producer tells the consumers about one visit group.
struct WorkItem {
  int32_t tiles;  // how many are visited; kNoMoreWork ends the kernel
  int32_t
      masked_from_end;  // which visit, counted from the last (1), is of the tile that not all keys of exist; 0: none
  int32_t masked_keys;  // how many of its keys exist
  int32_t per_visit;    // as in GroupPlan; if set, each visit says itself how it is masked
  int32_t batch;
  int32_t head;
  int32_t kv_head;
  int32_t first_row;
  float threshold;
  int64_t next_keep_row;  // words of next_keep before the group's first query tile
};
inline constexpr int32_t kNoMoreWork = -1;

// The rest of it, for walks whose visits are masked one by one. Apart from what every walk needs: with it in WorkItem,
// ptxas spills registers of walks that never read it.
struct WorkItemMasks {
  int32_t keys;            // how many exist
  int32_t first_position;  // of query row 0, where a token mask is given
  HeadWindow window;
};

// How a tile is visited.
struct VisitFlags {
  // Bit w: warpgroup w visits the tile. Bit kMaskedShift + w: and must mask it; then, from kKeysShift on, how many of
  // its keys exist. kFirstOfItem: the visit begins the next work item.
  uint32_t bits;

  static constexpr int kMaskedShift = 8;
  static constexpr int kKeysShift = 16;
  static constexpr uint32_t kByte = 0xff;
  static constexpr uint32_t kFirstOfItem = 1u << 31;

  __device__ __forceinline__ bool visits(int warpgroup) const { return bits >> warpgroup & 1; }
  __device__ __forceinline__ bool masks(int warpgroup) const { return bits >> (kMaskedShift + warpgroup) & 1; }
  __device__ __forceinline__ bool is_masked() const { return (bits >> kMaskedShift & kByte) != 0; }
  __device__ __forceinline__ uint32_t keys() const { return bits >> kKeysShift & kByte; }
  __device__ __forceinline__ bool first_of_item() const { return bits & kFirstOfItem; }
};

// One tile of a walk, from the warp that reads the map to the one that loads, and from that one to the consumers.
struct Visit {
  int32_t tile;  // kNoTile: the item has no tiles; kNoMoreWork ends the walk
  VisitFlags flags;
};
inline constexpr int32_t kNoTile = -2;

struct StageVisit {
  int32_t tile;
  VisitFlags flags;
  int64_t next_keep_row;  // as in WorkItem
};

template <typename Config>
struct alignas(1024) SharedStorage {
  typename Config::Element q[Config::kWarpgroups][Config::kQueryElements];
  typename Config::Element k[Config::kStages][Config::kTileElements];
  typename Config::Element v[Config::kStages][Config::kTileElements];
  typename Config::Element staged_out[Config::kStagesOutput ? Config::kWarpgroups : 0][Config::kQueryElements];

  // Barriers, of so many arrivals a phase. Full: what it is named for may be read. Empty: it may be written again.
  static constexpr int kConsumerWarps = Config::kWarpgroups * kWarpgroupWarps;
  // A pair's consumers arrive at the barriers of both CTAs, since each CTA loads a half of both their stages.
  static constexpr int kReleases = kConsumerWarps * Config::kClusterCtas;
  // arrive: the loader, and the copy engine with Q's bytes. wait: the warpgroup.
  Barrier<1> q_full[Config::kWarpgroups];
  // arrive: each warp of the warpgroup, after the item's last tile; where the output is staged in Q's place, its first
  // thread, once that has been read out. wait: the loader.
  Barrier<Config::kStagesOutput ? kWarpgroupWarps : 1> q_empty[Config::kWarpgroups];
  // arrive: the loader, and the copy engine with the tile's bytes, in a pair those of both CTAs. wait: the consumers.
  Barrier<1> k_full[Config::kStages];
  // arrive: each consumer warp, its scores computed. wait: the loader.
  Barrier<kReleases> k_empty[Config::kStages];
  // arrive and wait: as for K.
  Barrier<1> v_full[Config::kStages];
  // arrive: each consumer warp, its product with V finished. wait: the loader.
  Barrier<kReleases> v_empty[Config::kStages];
  // arrive: the walker. wait: the consumers; where nothing is planned, the loader too.
  Barrier<1> work_full[Config::kWorkSlots];
  // arrive: each consumer warp, its rows on their way out. wait: the walker.
  Barrier<kConsumerWarps> work_empty[Config::kWorkSlots];
  // arrive: the walker. wait: the loader.
  Barrier<1> visit_full[Config::kVisits];
  // arrive: the loader, the visit read. wait: the walker.
  Barrier<1> visit_empty[Config::kVisits];

  WorkItem work[Config::kWorkSlots];
  Visit visits[Config::kVisits];
  VisitFlags k_flags[Config::kStages];  // how the tile in K's stage is visited
  StageVisit v_visit[Config::kStages];  // what V's stage holds, for the loader itself
  // Of each warp: a row of mine keeps the tile. Two rounds of stages, since a warpgroup may be a round ahead of the
  // loader.
  uint8_t verdicts[2][Config::kStages][Config::kWarpgroups][kWarpgroupWarps];
  // From the first CTA of a pair to the second: what to do next.
  // arrive: the second's walker, and the four bytes that the first's sends. wait: the second's walker.
  Barrier<1> index_full[Config::kWorkSlots];
  // arrive: the second's walker, from afar. wait: the first's walker.
  Barrier<1> index_empty[Config::kWorkSlots];
  int32_t index[Config::kWorkSlots];
  WorkItemMasks work_masks[Config::kWorkSlots];
  int32_t k_tile[Config::kStages];  // the tile in K's stage
};

}  // namespace lite_attention::sm90
