// How a launch goes through the KV tiles: the answers to three questions, each known when the kernel is compiled.
#pragma once

namespace lite_attention::sm90 {

// Which tiles are visited.
enum class Tiles {
  kAll,      // every existing one
  kPlanned,  // those that the plan names: what the keep map and the masks leave
};

// How many keys a tile has.
enum class Grain {
  kOwn,   // what suits the head dim
  kFine,  // kFineTileN
};

struct Traversal {
  Tiles tiles;
  Grain grain;
  bool decides;  // whether the drop rule decides which tiles the next map keeps

  constexpr bool planned() const { return tiles == Tiles::kPlanned; }

  // Where all CTAs of a head visit the same tiles, two of them share each K and V load.
  constexpr bool paired() const { return !planned(); }
  constexpr int cluster_ctas() const { return paired() ? 2 : 1; }

  // Whether each visit says how it is masked. Otherwise only the last existing tile may be: decisions come without
  // masks.
  constexpr bool masks_visits() const { return planned() && !decides; }

  friend constexpr bool operator==(const Traversal&, const Traversal&) = default;
};

inline constexpr Traversal kDense{Tiles::kAll, Grain::kOwn, false};
inline constexpr Traversal kMapped{Tiles::kPlanned, Grain::kOwn, false};
inline constexpr Traversal kMappedFine{Tiles::kPlanned, Grain::kFine, false};
inline constexpr Traversal kMappedDecided{Tiles::kPlanned, Grain::kOwn, true};

}  // namespace lite_attention::sm90
