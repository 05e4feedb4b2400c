// What one instantiation of the forward is made of: tile sizes, roles, register budget, layouts, shared memory.
#pragma once

#include <cutlass/numeric_types.h>

#include <cute/algorithm/functional.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "kernels/sm90/forward/params.cuh"
#include "rules/tile_shape.h"

namespace lite_attention::sm90 {

inline constexpr int kWarpThreads = 32;
inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupWarps = kWarpgroupThreads / kWarpThreads;
inline constexpr int kSwizzleColumns = 64;  // 128 bytes of a 16-bit type: the widest box the 128-byte swizzle takes

template <typename Element_, int kHeadDim_, Walk kWalk>
struct Config {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr TileShape kTile = walk_tile(kHeadDim, kWalk);
  static constexpr int kTileM = kTile.tile_m;
  static constexpr int kTileN = kTile.tile_n;
  static constexpr int kWarpgroups = kTile.visit_rows / kTileM;  // consumers; one more produces
  static constexpr int kThreads = (kWarpgroups + 1) * kWarpgroupThreads;
  // On one multiprocessor. A second one works while the only consumer of the first waits.
  static constexpr int kCtas = kWarpgroups == 1 ? 2 : 1;
  // As many as shared memory holds.
  static constexpr int kStages = kWarpgroups == 1 ? (kHeadDim <= 64 ? 6 : 3) : kHeadDim <= 64 ? 4 : 2;
  static constexpr int kWorkSlots = 2;
  static constexpr int kVisits = 16;  // how far the reading of the map may be ahead of the loads
  static constexpr int kSlabs = kHeadDim / kSwizzleColumns;
  // Scores, weights and output of one thread exceed 160 registers at 128 columns: three warpgroups there finish a tile
  // before they begin the next, each filling the tensor cores while the others do not.
  static constexpr bool kOverlap = kHeadDim != 128 || kWarpgroups != 3;
  // The output is staged in memory of its own where there is room, so that the next queries load during the epilogue.
  static constexpr bool kStagesOutput = kWarpgroups == 3;
  // setmaxnreg moves registers between warpgroups but makes none: a launch of 512 threads holds 128 each, 384 hold 168.
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : kWarpgroups == 2 ? 232 : 216;
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 40;
  static_assert(kTileM == 64, "a query tile is what one warpgroup's wgmma computes");
  static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <= (kWarpgroups == 3   ? 512
                                                                          : kWarpgroups == 2 ? 504
                                                                                             : 256));

  using QkAtom = decltype(cute::GMMA::ss_op_selector<Element, Element, float,
                                                     cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::_16>>());
  using PvAtom = decltype(cute::GMMA::rs_op_selector<Element, Element, float,
                                                     cute::Shape<cute::Int<kTileM>, cute::Int<kHeadDim>, cute::_16>,
                                                     cute::GMMA::Major::K, cute::GMMA::Major::MN>());
  using QkMma = decltype(cute::make_tiled_mma(QkAtom{}));
  using PvMma = decltype(cute::make_tiled_mma(PvAtom{}));
  static_assert(cute::tile_size<1>(QkMma{}) == kTileN && cute::tile_size<1>(PvMma{}) == kHeadDim,
                "one wgmma a step, not several small ones");

  // Slabs of 64 columns, each rows x 128 bytes swizzled: what a TMA box of 64 columns writes.
  using QueryLayout = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                                   cute::Shape<cute::Int<kTileM>, cute::Int<kHeadDim>>{}));
  using KeyLayout =
      decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                   cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  // V as stored, read as the transposed operand.
  using ValueLayout =
      decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Element>{},
                                   cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileN>, cute::Int<kStages>>{},
                                   cute::Step<cute::_2, cute::_1, cute::_3>{}));

  static constexpr int kQueryElements = kTileM * kHeadDim;  // of one warpgroup
  static constexpr int kTileElements = kTileN * kHeadDim;   // of one K or V tile
  static constexpr uint32_t kQueryBytes = kQueryElements * sizeof(Element);
  static constexpr uint32_t kTileBytes = kTileElements * sizeof(Element);
};

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

// One tile of a walk, from the warp that reads the map to the one that loads, and from that one to the consumers.
struct Visit {
  int32_t tile;  // kNoTile: the item has no tiles; kNoMoreWork ends the walk
  // Bit w: warpgroup w visits the tile. Bit kMaskedShift + w: and must mask it; then, from kKeysShift on, how many of
  // its keys exist. kFirstOfItem: the visit begins the next work item.
  uint32_t how;
};
inline constexpr int32_t kNoTile = -2;
inline constexpr int kMaskedShift = 8;
inline constexpr uint32_t kMaskedMask = 0xff;
inline constexpr int kKeysShift = 16;
inline constexpr uint32_t kKeysMask = 0xff;
inline constexpr uint32_t kFirstOfItem = 1u << 31;

struct StageVisit {
  int32_t tile;
  uint32_t how;           // as in Visit
  int64_t next_keep_row;  // as in WorkItem
};

template <typename Config>
struct alignas(1024) SharedStorage {
  typename Config::Element q[Config::kWarpgroups][Config::kQueryElements];
  typename Config::Element k[Config::kStages][Config::kTileElements];
  typename Config::Element v[Config::kStages][Config::kTileElements];
  typename Config::Element staged_out[Config::kStagesOutput ? Config::kWarpgroups : 0][Config::kQueryElements];
  uint64_t q_full[Config::kWarpgroups], q_empty[Config::kWarpgroups];
  uint64_t k_full[Config::kStages], k_empty[Config::kStages];
  uint64_t v_full[Config::kStages], v_empty[Config::kStages];
  uint64_t work_full[Config::kWorkSlots], work_empty[Config::kWorkSlots];
  uint64_t visit_full[Config::kVisits], visit_empty[Config::kVisits];
  WorkItem work[Config::kWorkSlots];
  Visit visits[Config::kVisits];
  uint32_t k_how[Config::kStages];      // how the tile in K's stage is visited, as in Visit
  StageVisit v_visit[Config::kStages];  // what V's stage holds, for the loader itself
  // Of each warp: a row of mine keeps the tile. Two rounds of stages, since a warpgroup may be a round ahead of the
  // loader.
  uint8_t verdicts[2][Config::kStages][Config::kWarpgroups][kWarpgroupWarps];
  // From the first CTA of a pair to the second: what to do next.
  uint64_t index_full[Config::kWorkSlots], index_empty[Config::kWorkSlots];
  int32_t index[Config::kWorkSlots];
  WorkItemMasks work_masks[Config::kWorkSlots];
  int32_t k_tile[Config::kStages];  // the tile in K's stage
};

}  // namespace lite_attention::sm90
