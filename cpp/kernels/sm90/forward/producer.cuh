// The producer warpgroup: finds work, tells the consumers what it is, and has the copy engine bring Q, K and V.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "kernels/sm90/common/device.cuh"
#include "kernels/sm90/common/ring.cuh"
#include "kernels/sm90/forward/params.cuh"
#include "kernels/sm90/forward/shared_storage.cuh"

namespace lite_attention::sm90 {

// Has the copy engine bring what a work item needs. One thread runs it.
template <class Config>
struct Loader {
  const KernelParams& params;
  SharedStorage<Config>& shared;
  RingPosition<Config::kStages> ring{};
  uint32_t q_phase = 0;

  __device__ __forceinline__ void load_queries(const WorkItem& item) {
    // Into the L2 cache at once: when the warpgroups let go of the last queries, little time is left.
    CUTLASS_PRAGMA_NO_UNROLL
    for (int row = 0; row < Config::kGroupRows; row += Config::kTileM) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (int slab = 0; slab < Config::kSlabs; ++slab) {
        prefetch_box(params.q, slab * kSwizzleColumns, item.first_row + row, item.head, item.batch);
      }
    }
    CUTLASS_PRAGMA_NO_UNROLL
    for (int warpgroup = 0; warpgroup < Config::kWarpgroups; ++warpgroup) {
      barrier_wait(&shared.q_empty[warpgroup], q_phase ^ 1);
      AnyBarrier* full = &shared.q_full[warpgroup];
      barrier_arrive_expecting(full, Config::kQueryBytes);
      CUTLASS_PRAGMA_NO_UNROLL
      for (int slab = 0; slab < Config::kSlabs; ++slab) {
        load_box(params.q, full, kEvictFirst, shared.q[warpgroup] + slab * Config::kTileM * kSwizzleColumns,
                 slab * kSwizzleColumns, item.first_row + warpgroup * Config::kTileM, item.head, item.batch);
      }
    }
    q_phase ^= 1;
  }

  // Fills a stage with one tile of K or V. Of a pair, each CTA loads one half of the rows into both.
  __device__ __forceinline__ void load_tile(const CUtensorMap& map, AnyBarrier* full, typename Config::Element* stage,
                                            int tile, const WorkItem& item) {
    constexpr int kRows = Config::kTileN / Config::kClusterCtas;
    const int part = Config::kPaired ? static_cast<int>(cute::block_rank_in_cluster()) : 0;
    barrier_arrive_expecting(full, Config::kTileBytes);
    CUTLASS_PRAGMA_UNROLL
    for (int slab = 0; slab < Config::kSlabs; ++slab) {
      auto* destination = stage + (slab * Config::kTileN + part * kRows) * kSwizzleColumns;
      const int row = tile * Config::kTileN + part * kRows;
      if constexpr (Config::kPaired) {
        load_box_to_pair(map, full, kEvictLast, destination, slab * kSwizzleColumns, row, item.kv_head, item.batch);
      } else {
        load_box(map, full, kEvictLast, destination, slab * kSwizzleColumns, row, item.kv_head, item.batch);
      }
    }
  }

  // Sets the next map's bits of a tile that was in the ring's stage a round ago, for the query tiles a row of which
  // keeps it. To be called once V's stage has come back.
  __device__ __forceinline__ void write_next_keep(const StageVisit& visit) {
    const auto& verdicts = shared.verdicts[ring.phase ^ 1][ring.stage];
    CUTLASS_PRAGMA_UNROLL
    for (int warpgroup = 0; warpgroup < Config::kWarpgroups; ++warpgroup) {
      const bool kept = *reinterpret_cast<const uint32_t*>(verdicts[warpgroup]) != 0;
      if (kept && visit.flags.visits(warpgroup)) {
        atomicOr(params.forward.decision.next_keep + visit.next_keep_row + warpgroup * params.words +
                     visit.tile / kTilesPerWord,
                 1 << visit.tile % kTilesPerWord);
      }
    }
  }

  // K, with an item's first tile its queries, and V.
  __device__ __forceinline__ void load(const WorkItem& item, const Visit& visit, bool first) {
    barrier_wait(&shared.k_empty[ring.stage], ring.phase ^ 1);
    if constexpr (Config::kPlanned) shared.k_flags[ring.stage] = visit.flags;
    if constexpr (Config::kMasksVisits) shared.k_tile[ring.stage] = visit.tile;
    load_tile(params.k, &shared.k_full[ring.stage], shared.k[ring.stage], visit.tile, item);
    if (first) load_queries(item);
    barrier_wait(&shared.v_empty[ring.stage], ring.phase ^ 1);
    if constexpr (Config::kMasksVisits) shared.v_visit[ring.stage].flags = visit.flags;
    load_tile(params.v, &shared.v_full[ring.stage], shared.v[ring.stage], visit.tile, item);
    if constexpr (Config::kDecides) {
      write_next_keep(shared.v_visit[ring.stage]);  // after the load, which others wait for
      shared.v_visit[ring.stage] = {visit.tile, visit.flags, item.next_keep_row};
    }
    ring.advance();
  }

  // How many keys of a tile exist, where `keys` of the batch entry do.
  __device__ __forceinline__ uint32_t keys_of_tile(int batch, int keys, int tile) const {
    const Visibility& visibility = params.forward.visibility;
    const int left = min(Config::kTileN, keys - tile * Config::kTileN);
    return visibility.kv_tile_lens == nullptr ? left : min(left, visibility.tile_len(batch, tile));
  }

  // Every tile of the items dealt, the last one first: where it must be masked, nothing can be overlapped with it
  // anyway.
  __device__ __forceinline__ void load_all() {
    RingPosition<Config::kWorkSlots> work;
    CUTLASS_PRAGMA_NO_UNROLL
    for (;; work.advance()) {
      barrier_wait(&shared.work_full[work.stage], work.phase);
      const WorkItem& item = shared.work[work.stage];
      const int tiles = item.tiles;
      if (tiles == kNoMoreWork) return;
      if (tiles == 0) load_queries(item);
      CUTLASS_PRAGMA_NO_UNROLL
      for (int i = 0; i < tiles; ++i) load(item, {i == 0 ? tiles - 1 : i - 1, {}}, i == 0);
    }
  }

  // What the walk says.
  __device__ __forceinline__ void load_visits() {
    RingPosition<Config::kVisits> position;
    RingPosition<Config::kWorkSlots> work{Config::kWorkSlots - 1};  // one before the first
    CUTLASS_PRAGMA_NO_UNROLL
    for (;; position.advance()) {
      barrier_wait(&shared.visit_full[position.stage], position.phase);
      Visit visit = shared.visits[position.stage];
      barrier_arrive(&shared.visit_empty[position.stage]);
      if (visit.tile == kNoMoreWork) break;
      const bool first = visit.flags.first_of_item();
      if (first) work.advance();
      const WorkItem& item = shared.work[work.stage];
      if (visit.tile == kNoTile) {
        load_queries(item);
        continue;
      }
      if (Config::kMasksVisits && visit.flags.is_masked()) {
        visit.flags.bits |= keys_of_tile(item.batch, shared.work_masks[work.stage].keys, visit.tile)
                            << VisitFlags::kKeysShift;
      }
      load(item, visit, first);
    }
    if constexpr (Config::kDecides) {
      for (int stage = 0; stage < Config::kStages; ++stage, ring.advance()) {
        barrier_wait(&shared.v_empty[ring.stage], ring.phase ^ 1);
        write_next_keep(shared.v_visit[ring.stage]);
      }
    }
  }
};

// Takes work and says what it is, ahead of the loads. Of the map it walks the rows of the group it took; a warp runs
// it, so that 32 neighbouring words are read at once.
template <class Config>
struct Walker {
  static constexpr int kWordTiles = static_cast<int>(kTilesPerWord);

  const KernelParams& params;
  SharedStorage<Config>& shared;
  RingPosition<Config::kWorkSlots> work{};
  RingPosition<Config::kVisits> position{};

  __device__ __forceinline__ int lane() const { return threadIdx.x % kWarpThreads; }

  // The next slot for a work item, once the consumers are done with what it held. It is filled in place, field by
  // field: a copy would take a third of the warp's registers.
  __device__ __forceinline__ WorkItem& next_slot() {
    barrier_wait(&shared.work_empty[work.stage], work.phase ^ 1);
    return shared.work[work.stage];
  }

  __device__ __forceinline__ void publish() {
    barrier_arrive(&shared.work_full[work.stage]);
    work.advance();
  }

  __device__ __forceinline__ void pass_on(const Visit& visit) {
    if (lane() == 0) {
      barrier_wait(&shared.visit_empty[position.stage], position.phase ^ 1);
      shared.visits[position.stage] = visit;
      barrier_arrive(&shared.visit_full[position.stage]);
    }
    position.advance();
  }

  // Every group, in pairs for pairs of CTAs: the first CTA of a pair asks what is next and tells the second. One thread
  // runs this.
  __device__ __forceinline__ void deal_all() {
    const int rank = static_cast<int>(cute::block_rank_in_cluster());
    const int pairs = (params.groups + 1) / 2;
    const int heads = static_cast<int>(params.forward.problem.query_heads);
    RingPosition<Config::kWorkSlots> told;
    int index = blockIdx.x / 2;
    CUTLASS_PRAGMA_NO_UNROLL
    while (index < params.work_items) {
      WorkItem& item = next_slot();
      const int head_index = index / pairs;
      const int batch = head_index / heads;
      const int keys = static_cast<int>(existing_keys(params.forward.problem, params.forward.visibility, batch));
      item.tiles = (keys + Config::kTileN - 1) / Config::kTileN;
      item.masked_keys = keys % Config::kTileN;
      item.masked_from_end = keys % Config::kTileN == 0 ? 0 : item.tiles;  // the first
      item.batch = batch;
      item.head = head_index - batch * heads;
      item.kv_head = item.head / params.heads_per_kv_head;
      item.first_row = ((index - head_index * pairs) * 2 + rank) * Config::kGroupRows;
      publish();
      next_slot();  // not before the item after this one can be dealt: see walk_queue
      if (rank == 0) {
        index = atomicAdd(params.workspace.taken, 1) + gridDim.x / 2;
        barrier_wait(&shared.index_empty[told.stage], told.phase ^ 1);
        send_to_peer(&shared.index[told.stage], index, &shared.index_full[told.stage]);
      } else {
        barrier_arrive_expecting(&shared.index_full[told.stage], sizeof(int32_t));
        barrier_wait(&shared.index_full[told.stage], told.phase);
        index = shared.index[told.stage];
        barrier_arrive_at(&shared.index_empty[told.stage], 0);
      }
      told.advance();
    }
    next_slot().tiles = kNoMoreWork;
    publish();
  }

  // The groups of the queue, each CTA taking the next one when it is done.
  __device__ __forceinline__ void walk_queue() {
    int index = blockIdx.x;
    CUTLASS_PRAGMA_NO_UNROLL
    while (index < params.work_items) {
      const int group_index = params.workspace.queue[index];
      const GroupPlan plan = params.workspace.groups[group_index];
      if (lane() == 0) deal(group_index, plan);
      if (plan.tiles == 0) {
        pass_on({kNoTile, {VisitFlags::kFirstOfItem}});
      } else {
        walk_group(group_index, plan.first_tile);
      }
      // Asked for as late as that: what is taken early and lies waiting, others cannot take when they run out.
      if (lane() == 0) index = atomicAdd(params.workspace.taken, 1) + gridDim.x;
      index = __shfl_sync(kAllLanes, index, 0);
    }
    if (lane() == 0) {
      next_slot().tiles = kNoMoreWork;
      publish();
    }
    pass_on({kNoMoreWork, {}});
  }

  __device__ __forceinline__ void deal(int group_index, const GroupPlan& plan) {
    const ForwardParams& forward = params.forward;
    const int heads = static_cast<int>(forward.problem.query_heads);
    WorkItem& item = next_slot();
    item.tiles = plan.tiles;
    item.masked_from_end = plan.masked_from_end;
    item.per_visit = plan.per_visit;
    const int head_index = group_index / params.groups;
    const int group = group_index - head_index * params.groups;
    item.first_row = group * Config::kGroupRows;
    item.batch = head_index / heads;
    item.head = head_index - item.batch * heads;
    item.kv_head = item.head / params.heads_per_kv_head;
    const int keys = static_cast<int>(existing_keys(forward.problem, forward.visibility, item.batch));
    item.masked_keys = keys % Config::kTileN;
    if constexpr (Config::kMasksVisits) {
      shared.work_masks[work.stage] = {
          keys, static_cast<int>(forward.visibility.token_mask.first_position(forward.problem.query_len, keys)),
          HeadWindow(forward.visibility.token_mask, item.head)};
    }
    if constexpr (Config::kDecides) {
      item.threshold = forward.decision.threshold[item.head * forward.decision.threshold_stride];
      item.next_keep_row = (head_index * forward.problem.query_tiles() + group * Config::kWarpgroups) * params.words;
    }
    publish();
  }

  // The walk meets its first word twice: at the start its tiles from the first on, at the very end those before it.
  __device__ __forceinline__ void walk_group(int group_index, int first_tile) {
    const uint32_t before_first = (1u << first_tile % kWordTiles) - 1;
    uint32_t first = VisitFlags::kFirstOfItem;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int chunk = 0; chunk <= params.words; chunk += kWarpThreads) {
      const int step = chunk + lane();
      int word = first_tile / kWordTiles + step;
      if (word >= params.words) word -= params.words;
      const uint32_t in_walk = step == 0              ? ~before_first
                               : step < params.words  ? ~0u
                               : step == params.words ? before_first
                                                      : 0u;
      uint32_t any = 0;
      if (in_walk != 0) {
        const uint32_t* words = params.workspace.visited + place_of(group_index, word);
        CUTLASS_PRAGMA_UNROLL
        for (int warpgroup = 0; warpgroup < Config::kWarpgroups; ++warpgroup) any |= words[warpgroup];
        any &= in_walk;
      }
      CUTLASS_PRAGMA_NO_UNROLL
      for (uint32_t lanes = __ballot_sync(kAllLanes, any != 0); lanes != 0; lanes &= lanes - 1) {
        const int source = __ffs(lanes) - 1;
        const int found = __shfl_sync(kAllLanes, word, source);
        const uint32_t answers = answers_of_lane(group_index, found);
        CUTLASS_PRAGMA_NO_UNROLL
        for (uint32_t tiles = __shfl_sync(kAllLanes, any, source); tiles != 0; tiles &= tiles - 1) {
          const int bit = __ffs(tiles) - 1;
          pass_on({found * kWordTiles + bit, {__ballot_sync(kAllLanes, answers >> bit & 1) | first}});
          first = 0;
        }
      }
    }
  }

  // Where the plan has a word of the group's first query tile; those of the others follow.
  __device__ __forceinline__ int64_t place_of(int group_index, int word) const {
    return (static_cast<int64_t>(group_index) * params.words + word) * Config::kWarpgroups;
  }

  // Each lane answers for one bit of VisitFlags, for the tiles of a word: lane w whether warpgroup w visits them,
  // lane kMaskedShift + w whether it must mask them.
  __device__ __forceinline__ uint32_t answers_of_lane(int group_index, int word) const {
    const int warpgroup = lane() % VisitFlags::kMaskedShift;
    if (warpgroup >= Config::kWarpgroups || lane() >= 2 * VisitFlags::kMaskedShift) return 0;
    const bool of_masks = lane() >= VisitFlags::kMaskedShift;
    if (of_masks && !Config::kMasksVisits) return 0;
    return (of_masks ? params.workspace.masked : params.workspace.visited)[place_of(group_index, word) + warpgroup];
  }
};

template <class Config>
__device__ __forceinline__ void produce(const KernelParams& params, SharedStorage<Config>& shared) {
  cutlass::arch::warpgroup_reg_dealloc<Config::kShape.producer_registers>();
  if constexpr (Config::kPlanned) wait_for_previous_kernel();  // the plan
  const int warp = threadIdx.x / kWarpThreads;
  if (warp == 0 && threadIdx.x == 0) {
    Loader<Config> loader{params, shared};
    if constexpr (Config::kPlanned) {
      loader.load_visits();
    } else {
      loader.load_all();
    }
  } else if (warp == 1) {
    Walker<Config> walker{params, shared};
    if constexpr (Config::kPlanned) {
      walker.walk_queue();
    } else if (threadIdx.x == kWarpThreads) {
      walker.deal_all();
    }
  }
}

}  // namespace lite_attention::sm90
