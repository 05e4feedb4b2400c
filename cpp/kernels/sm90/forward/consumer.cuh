// A consumer warpgroup: a query tile against the tiles that the producer brings.
//
// There are two ways through the tiles. In sequence (128 columns): scores, softmax and output of one tile, then the
// next; the warpgroups drift apart, and the tensor cores work for one while another is at its softmax. Overlapped (64
// and 256 columns): the scores of a tile are computed while the output of the one before is accumulated.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "kernels/sm90/common/device.cuh"
#include "kernels/sm90/common/mask.cuh"
#include "kernels/sm90/common/ring.cuh"
#include "kernels/sm90/common/softmax.cuh"
#include "kernels/sm90/forward/decision.cuh"
#include "kernels/sm90/forward/epilogue.cuh"
#include "kernels/sm90/forward/params.cuh"
#include "kernels/sm90/forward/shared_storage.cuh"

namespace lite_attention::sm90 {

// Starts accumulator (+)= left x right and commits it as one group of asynchronous products.
template <bool kAccumulate, class Mma, class Left, class Right, class Accumulator>
__device__ __forceinline__ void start_product(Mma& mma, const Left& left, const Right& right,
                                              Accumulator& accumulator) {
  cute::warpgroup_fence_operand(accumulator);
  cute::warpgroup_arrive();
  mma.accumulate_ = kAccumulate ? cute::GMMA::ScaleOut::One : cute::GMMA::ScaleOut::Zero;
  CUTLASS_PRAGMA_UNROLL
  for (int step = 0; step < cute::size<2>(left); ++step) {
    cute::gemm(mma, left(cute::_, cute::_, step), right(cute::_, cute::_, step), accumulator);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
}

// Waits until at most kUnfinished groups of products are in flight; `accumulator` belongs to a finished one.
template <int kUnfinished, class Accumulator>
__device__ __forceinline__ void wait_product(Accumulator& accumulator) {
  cute::warpgroup_wait<kUnfinished>();
  cute::warpgroup_fence_operand(accumulator);
}

// Zeroes the rows of a V tile that hold no existing key: whatever lies there, their weight of 0 must make it nothing.
// Every warpgroup does so for itself, so that none waits for another.
template <class Config>
__device__ __forceinline__ void clear_missing_values(typename Config::Element* tile, int keys, int warpgroup) {
  constexpr int kRowPieces = kSwizzleColumns * sizeof(typename Config::Element) / sizeof(uint4);
  auto* pieces = reinterpret_cast<uint4*>(tile);
  CUTLASS_PRAGMA_NO_UNROLL
  for (int slab = 0; slab < Config::kSlabs; ++slab) {
    const int end = (slab + 1) * Config::kTileN * kRowPieces;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = (slab * Config::kTileN + keys) * kRowPieces + threadIdx.x % kWarpgroupThreads; i < end;
         i += kWarpgroupThreads) {
      pieces[i] = uint4{};
    }
  }
  fence_shared_writes();
  warpgroup_sync(warpgroup);
}

template <class Config>
__device__ __forceinline__ void consume(const KernelParams& params, SharedStorage<Config>& shared, int warpgroup) {
  using namespace cute;
  using Element = typename Config::Element;
  cutlass::arch::warpgroup_reg_alloc<Config::kShape.consumer_registers>();

  typename Config::QkMma score_mma;
  typename Config::PvMma output_mma;
  // Descriptors of shared memory: the same for every thread of the warpgroup.
  const Tensor query = score_mma.get_slice(0).partition_fragment_A(
      make_tensor(make_smem_ptr(shared.q[warpgroup]), typename Config::QueryLayout{}));
  const Tensor keys = score_mma.get_slice(0).partition_fragment_B(
      make_tensor(make_smem_ptr(shared.k[0]), typename Config::KeyLayout{}));
  const Tensor values = output_mma.get_slice(0).partition_fragment_B(
      make_tensor(make_smem_ptr(shared.v[0]), typename Config::ValueLayout{}));
  Tensor output = partition_fragment_C(output_mma, Shape<Int<Config::kTileM>, Int<Config::kHeadDim>>{});
  Tensor weights = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<Config::kTileN / 16>>>{});

  const float scale_log2 = params.scale_log2;
  const int lane = threadIdx.x % kWarpThreads;
  RingPosition<Config::kStages> ring;
  RingPosition<Config::kWorkSlots> work;
  uint32_t q_phase = 0;

  // One arrival a warp; with shared loads at both CTAs of the pair, since each fills a part of the other's stage.
  const auto release = [&](AnyBarrier* empty) {
    if constexpr (Config::kPaired) {
      if (lane < Config::kClusterCtas) barrier_arrive_at(empty, lane);
    } else {
      if (lane == 0) barrier_arrive(empty);
    }
  };

  for (;; work.advance()) {
    barrier_wait(&shared.work_full[work.stage], work.phase);
    const WorkItem& item = shared.work[work.stage];
    const int tiles = __shfl_sync(kAllLanes, item.tiles, 0);
    if (tiles == kNoMoreWork) break;

    Softmax softmax;
    RunningBest best(static_cast<int>(params.forward.problem.query_len) - first_row_of_thread(item, warpgroup));
    clear(output);
    float maxima[kRowsPerThread], correction[kRowsPerThread];

    const auto mask = [&](auto per_visit, auto& scores) {
      if constexpr (per_visit && Config::kMasksVisits) {
        // Read by the lane that hands the stage back, as in `visits`.
        const int keys = __shfl_sync(kAllLanes, lane == 0 ? shared.k_flags[ring.stage].keys() : 0, 0);
        const int tile = __shfl_sync(kAllLanes, lane == 0 ? shared.k_tile[ring.stage] : 0, 0);
        if (params.forward.visibility.token_mask.given()) {
          const WorkItemMasks& masks = shared.work_masks[work.stage];
          mask_tokens(scores, keys, tile * Config::kTileN, masks.first_position + first_row_of_thread(item, warpgroup),
                      masks.window);
        } else {
          mask_keys(scores, keys);
        }
      } else {
        mask_keys(scores, item.masked_keys);
      }
    };
    // Once V is in the ring's stage.
    const auto clear_missing = [&](auto per_visit) {
      if constexpr (per_visit && Config::kMasksVisits) {
        // Read by the lane that hands the stage back, as in `visits`.
        const int keys = __shfl_sync(kAllLanes, lane == 0 ? shared.v_visit[ring.stage].flags.keys() : 0, 0);
        clear_missing_values<Config>(shared.v[ring.stage], keys, warpgroup);
      } else if (params.forward.visibility.kv_lens != nullptr) {
        clear_missing_values<Config>(shared.v[ring.stage], item.masked_keys, warpgroup);
      }
    };
    // Leaves the verdict on the tile in the ring's stage for the loader, who writes it down when the stage comes back.
    const auto decide = [&] {
      if constexpr (Config::kDecides) {
        const bool keeps = best.take(maxima, item.threshold, scale_log2);
        store_byte_if(lane == 0,
                      &shared.verdicts[ring.phase][ring.stage][warpgroup][threadIdx.x / kWarpThreads % kWarpgroupWarps],
                      keeps);
      }
    };
    // Whether this warpgroup visits the tile in the ring's stage. Waits for its K.
    const auto visits = [&](auto per_visit) {
      barrier_wait(&shared.k_full[ring.stage], ring.phase);
      if constexpr (per_visit && Config::kWarpgroups > 1) {
        // Read by the lane that hands the stage back, so that the one comes before the other.
        return __any_sync(kAllLanes, lane == 0 && shared.k_flags[ring.stage].visits(warpgroup)) != 0;
      } else {
        return true;
      }
    };
    // Whether it must mask the tile, `left` visits before the end. `flags` lie beside the tile's K or V.
    const auto masks = [&](auto per_visit, int left, const VisitFlags& flags) {
      if constexpr (per_visit && Config::kMasksVisits) {
        return __any_sync(kAllLanes, lane == 0 && flags.masks(warpgroup)) != 0;
      } else {
        return left == item.masked_from_end;
      }
    };
    // Hands back a tile that this warpgroup does not visit. V too must have arrived: a stage released before its load
    // is complete would be filled twice in one phase.
    const auto pass_over = [&] {
      release(&shared.k_empty[ring.stage]);
      barrier_wait(&shared.v_full[ring.stage], ring.phase);
      release(&shared.v_empty[ring.stage]);
      ring.advance();
    };

    const auto walk_in_sequence = [&](auto per_visit) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (int left = tiles; left > 0; --left) {
        if (!visits(per_visit)) {
          pass_over();
          continue;
        }
        Tensor scores = partition_fragment_C(score_mma, Shape<Int<Config::kTileM>, Int<Config::kTileN>>{});
        start_product<false>(score_mma, query, keys(_, _, _, ring.stage), scores);
        wait_product<0>(scores);
        if (masks(per_visit, left, shared.k_flags[ring.stage])) mask(per_visit, scores);
        tile_maxima<Config::kDecides>(scores, maxima);
        decide();
        if (softmax.move_reference(maxima, scale_log2, correction)) scale_rows(output, correction);
        release(&shared.k_empty[ring.stage]);
        softmax.weigh(scores, scale_log2);
        convert(scores, weights);
        barrier_wait(&shared.v_full[ring.stage], ring.phase);
        if (masks(per_visit, left, shared.v_visit[ring.stage].flags)) clear_missing(per_visit);
        start_product<true>(output_mma, weights, values(_, _, _, ring.stage), output);
        wait_product<0>(output);
        release(&shared.v_empty[ring.stage]);
        ring.advance();
      }
    };

    const auto walk_overlapped = [&](auto per_visit) {
      int left = tiles;
      RingPosition<Config::kStages> pending;  // where V of the tile is whose weights have not met it yet
      const auto finish = [&] {
        barrier_wait(&shared.v_full[pending.stage], pending.phase);
        start_product<true>(output_mma, weights, values(_, _, _, pending.stage), output);
        wait_product<0>(output);
        release(&shared.v_empty[pending.stage]);
      };
      CUTLASS_PRAGMA_NO_UNROLL
      while (left > 0) {
        if (!visits(per_visit)) {
          pass_over();
          --left;
          continue;
        }
        {  // a tile with nothing to overlap with: the first, one after a gap, or one that must be masked
          Tensor scores = partition_fragment_C(score_mma, Shape<Int<Config::kTileM>, Int<Config::kTileN>>{});
          start_product<false>(score_mma, query, keys(_, _, _, ring.stage), scores);
          wait_product<0>(scores);
          if (masks(per_visit, left, shared.k_flags[ring.stage])) {
            mask(per_visit, scores);
            barrier_wait(&shared.v_full[ring.stage], ring.phase);
            clear_missing(per_visit);
          }
          tile_maxima<Config::kDecides>(scores, maxima);
          decide();
          const bool rescale = softmax.move_reference(maxima, scale_log2, correction);
          release(&shared.k_empty[ring.stage]);
          softmax.weigh(scores, scale_log2);
          convert(scores, weights);
          if (rescale) scale_rows(output, correction);
          pending = ring;
          ring.advance();
          --left;
        }
        CUTLASS_PRAGMA_NO_UNROLL
        for (; left > 0 && visits(per_visit) && !masks(per_visit, left, shared.k_flags[ring.stage]); --left) {
          Tensor scores = partition_fragment_C(score_mma, Shape<Int<Config::kTileM>, Int<Config::kTileN>>{});
          start_product<false>(score_mma, query, keys(_, _, _, ring.stage), scores);
          barrier_wait(&shared.v_full[pending.stage], pending.phase);
          start_product<true>(output_mma, weights, values(_, _, _, pending.stage), output);
          wait_product<1>(scores);
          tile_maxima<Config::kDecides>(scores, maxima);
          decide();
          const bool rescale = softmax.move_reference(maxima, scale_log2, correction);
          release(&shared.k_empty[ring.stage]);
          softmax.weigh(scores, scale_log2);
          wait_product<0>(output);
          release(&shared.v_empty[pending.stage]);
          convert(scores, weights);
          if (rescale) scale_rows(output, correction);
          pending = ring;
          ring.advance();
        }
        finish();
      }
    };

    const auto walk = [&](auto per_visit) {
      if constexpr (Config::kShape.way == Way::kOverlapped) {
        walk_overlapped(per_visit);
      } else {
        walk_in_sequence(per_visit);
      }
    };
    barrier_wait(&shared.q_full[warpgroup], q_phase);
    q_phase ^= 1;
    if (Config::kPlanned && __any_sync(kAllLanes, item.per_visit)) {
      if constexpr (Config::kPlanned) walk(true_type{});
    } else {
      walk(false_type{});
    }
    if constexpr (Config::kStagesOutput) {
      if (lane == 0) barrier_arrive(&shared.q_empty[warpgroup]);
    }

    finish_rows<Config>(params, shared, item, warpgroup, softmax, output);
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.work_empty[work.stage]);
  }
}

}  // namespace lite_attention::sm90
