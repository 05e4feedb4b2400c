// A shape for one element type: matrix instructions and the layouts of shared memory.
#pragma once

#ifndef CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#error "wgmma of 176 columns exists only where this is defined before any header of CuTe"
#endif

#include <cutlass/numeric_types.h>

#include <cute/algorithm/functional.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "kernels/sm90/forward/shapes.cuh"

namespace lite_attention::sm90 {

template <typename Element_, int kColumns, Traversal kTraversal>
struct Config {
  using Element = Element_;
  static constexpr ForwardShape kShape = shape_of(kColumns, kTraversal);
  // Constants, not calls: nvcc folds them before it schedules.
  static constexpr bool kPlanned = kTraversal.planned();
  static constexpr bool kPaired = kTraversal.paired();
  static constexpr int kClusterCtas = kTraversal.cluster_ctas();
  static constexpr bool kMasksVisits = kTraversal.masks_visits();
  static constexpr bool kDecides = kTraversal.decides;
  static constexpr int kHeadDim = kColumns;
  static constexpr int kTileM = sm90::kTileM;
  static constexpr int kTileN = kShape.tile_n;
  static constexpr int kWarpgroups = kShape.warpgroups;
  static constexpr int kGroupRows = kWarpgroups * kTileM;
  static constexpr int kThreads = kShape.threads();
  static constexpr int kStages = kShape.stages;
  static constexpr int kWorkSlots = 2;
  static constexpr int kVisits = 16;  // how far the reading of the map may be ahead of the loads
  static constexpr int kSlabs = kHeadDim / kSwizzleColumns;
  static constexpr bool kStagesOutput = kShape.staging == Staging::kOwnMemory;
  static_assert(sizeof(Element) == kElementBytes);

  using QkAtom = decltype(cute::GMMA::ss_op_selector<Element, Element, float,
                                                     cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::_16>>());
  using PvAtom = decltype(cute::GMMA::rs_op_selector<Element, Element, float,
                                                     cute::Shape<cute::Int<kTileM>, cute::Int<kHeadDim>, cute::_16>,
                                                     cute::GMMA::Major::K, cute::GMMA::Major::MN>());
  using QkMma = decltype(cute::make_tiled_mma(QkAtom{}));
  using PvMma = decltype(cute::make_tiled_mma(PvAtom{}));
  static_assert(cute::tile_size<1>(QkMma{}) == kTileN && cute::tile_size<1>(PvMma{}) == kHeadDim,
                "one wgmma a step, not several small ones");

  // Slabs of kSwizzleColumns, each rows x 128 bytes swizzled: what a TMA box writes.
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

}  // namespace lite_attention::sm90
