// What each forward kernel is made of: one line a kernel, for bf16 and fp16 alike. docs/kernel.md says how they were
// found.
#pragma once

#include <cstdint>
#include <iterator>
#include <stdexcept>

#include "kernels/sm90/common/accumulator.cuh"
#include "kernels/sm90/common/lanes.cuh"
#include "kernels/sm90/common/tensor_map.h"
#include "kernels/sm90/forward/traversal.h"
#include "rules/tile_shape.h"

namespace lite_attention::sm90 {

inline constexpr int kTileM = kWarpgroupRows;  // of a query tile: what one warpgroup decides alone

// The way through the tiles: one after the other, or the scores of a tile while the output of the one before is
// accumulated. That takes more registers: scores, weights and output of one thread exceed 160 at 128 columns.
enum class Way { kInSequence, kOverlapped };

// Where the output is staged: in memory of its own, so that the next queries load during the epilogue, or in Q's place.
enum class Staging { kOwnMemory, kQueryMemory };

struct ForwardShape {
  int columns;  // of the head dim as compiled: smaller ones are filled up with zeros
  Traversal traversal;
  int warpgroups;  // that consume, each a query tile of the visit group; one more produces
  int tile_n;
  int stages;              // of K and of V
  int ctas;                // on one multiprocessor: a second one works while the only consumer of the first waits
  int consumer_registers;  // a thread
  int producer_registers;
  Way way;
  Staging staging;

  constexpr int threads() const { return (warpgroups + 1) * kWarpgroupThreads; }
  constexpr TileShape tile() const { return {columns, kTileM, tile_n, warpgroups * kTileM}; }

  constexpr int query_bytes() const { return warpgroups * kTileM * columns * kElementBytes; }
  constexpr int shared_bytes() const {
    constexpr int kRestBytes = 1024;  // barriers, slots, visits, verdicts: less than that
    return query_bytes() * (staging == Staging::kOwnMemory ? 2 : 1) + 2 * stages * tile_n * columns * kElementBytes +
           kRestBytes;
  }
};

inline constexpr ForwardShape kShapes[] = {
    // clang-format off
    // columns, traversal,  warpgroups, keys, stages, CTAs, registers, way,              output staged in
    { 64, kDense,           3,          128,  4,      1,    160, 32,   Way::kOverlapped, Staging::kOwnMemory},
    { 64, kMapped,          3,          128,  4,      1,    160, 32,   Way::kOverlapped, Staging::kOwnMemory},
    { 64, kMappedFine,      1,           64,  6,      2,    216, 40,   Way::kOverlapped, Staging::kQueryMemory},
    { 64, kMappedDecided,   3,          128,  4,      1,    160, 32,   Way::kOverlapped, Staging::kOwnMemory},
    {128, kDense,           2,          176,  2,      1,    232, 40,   Way::kOverlapped, Staging::kQueryMemory},
    {128, kMapped,          3,          128,  2,      1,    160, 32,   Way::kInSequence, Staging::kOwnMemory},
    {128, kMappedFine,      1,           64,  3,      2,    216, 40,   Way::kOverlapped, Staging::kQueryMemory},
    {128, kMappedDecided,   3,          128,  2,      1,    160, 32,   Way::kInSequence, Staging::kOwnMemory},
    {256, kDense,           2,           64,  2,      1,    232, 40,   Way::kOverlapped, Staging::kQueryMemory},
    {256, kMapped,          2,           64,  2,      1,    232, 40,   Way::kOverlapped, Staging::kQueryMemory},
    {256, kMappedDecided,   2,           64,  2,      1,    232, 40,   Way::kOverlapped, Staging::kQueryMemory},
    // clang-format on
};

// The shape that serves a head dim. Grain::kFine exists where that is not the head dim's own.
constexpr const ForwardShape& shape_of(int64_t head_dim, Traversal traversal) {
  for (const ForwardShape& shape : kShapes) {  // ascending in columns
    if (head_dim <= shape.columns && shape.traversal == traversal) return shape;
  }
  throw std::logic_error("no forward kernel is compiled for this head dim and traversal");
}

// setmaxnreg moves registers between warpgroups but makes none.
constexpr bool registers_fit(const ForwardShape& shape) {
  constexpr int kRegisters = 65536;  // of a multiprocessor
  constexpr int kGranule = 8;
  const int at_launch = kRegisters / (shape.ctas * shape.threads()) / kGranule * kGranule;
  return shape.producer_registers + shape.warpgroups * shape.consumer_registers <= (shape.warpgroups + 1) * at_launch;
}

constexpr bool shared_memory_fits(const ForwardShape& shape) {
  constexpr int kBytes = 228 * 1024;    // of a multiprocessor
  constexpr int kReservedBytes = 1024;  // of it a CTA's own
  return shape.ctas * (shape.shared_bytes() + kReservedBytes) <= kBytes;
}

// Tiles and groups of a planned walk are the map's. A dense one is free to choose.
constexpr bool tile_is_the_maps(const ForwardShape& shape) {
  if (!shape.traversal.planned()) return true;
  const TileShape& map = tile_shape(shape.columns);
  const bool fine = shape.traversal.grain == Grain::kFine;
  return map.tile_m == kTileM && shape.tile_n == (fine ? kFineTileN : map.tile_n) &&
         shape.tile().visit_rows == (fine ? kTileM : map.visit_rows);
}

constexpr bool every(bool (*holds)(const ForwardShape&)) {
  for (const ForwardShape& shape : kShapes) {
    if (!holds(shape)) return false;
  }
  return true;
}
static_assert(every(registers_fit));
static_assert(every(shared_memory_fits));
static_assert(every(tile_is_the_maps));

}  // namespace lite_attention::sm90
