// Threads by what the hardware makes of them: lanes of a warp, warps of a warpgroup.
#pragma once

namespace lite_attention::sm90 {

inline constexpr int kWarpThreads = 32;
inline constexpr int kWarpgroupWarps = 4;  // what one wgmma computes with
inline constexpr int kWarpgroupThreads = kWarpgroupWarps * kWarpThreads;
inline constexpr unsigned int kAllLanes = 0xffffffffu;

}  // namespace lite_attention::sm90
