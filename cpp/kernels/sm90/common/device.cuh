// The machine's own words: barriers, bulk copies, fences and exponentials that CUDA C++ has no name for.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/sm90/common/lanes.cuh"

namespace lite_attention::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Without a branch, which would part the instructions before from those after.
__device__ __forceinline__ void store_byte_if(bool condition, void* address, bool value) {
  asm volatile(
      "{\n"
      ".reg .pred condition;\n"
      "setp.ne.u32 condition, %0, 0;\n"
      "@condition st.shared.u8 [%1], %2;\n"
      "}" ::"r"(static_cast<uint32_t>(condition)),
      "r"(shared_address(address)), "r"(static_cast<uint32_t>(value)));
}

// ---- memory barriers in shared memory ------------------------------------------------------------------------------

struct AnyBarrier {
  uint64_t word;
};

// A phase of it completes with so many arrivals, and the bytes that they announced.
template <int kArrivals>
struct Barrier : AnyBarrier {};

template <int kArrivals>
__device__ __forceinline__ void barrier_init(Barrier<kArrivals>* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(kArrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other CTA of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(AnyBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the same barrier of another CTA of the cluster. For barriers that release what was only read: release
// semantics over the cluster would cost a fence of the whole GPU each time.
__device__ __forceinline__ void barrier_arrive_at(AnyBarrier* barrier, uint32_t cta) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(cta)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(AnyBarrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Writes a word to the second CTA of a pair and tells that CTA's barrier, which expects its bytes.
__device__ __forceinline__ void send_to_peer(int32_t* word, int32_t value, AnyBarrier* full) {
  asm volatile(
      "{\n"
      ".reg .b32 remote_word, remote_barrier;\n"
      "mapa.shared::cluster.u32 remote_word, %0, 1;\n"
      "mapa.shared::cluster.u32 remote_barrier, %2, 1;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.s32 [remote_word], %1, [remote_barrier];\n"
      "}" ::"r"(shared_address(word)),
      "r"(value), "r"(shared_address(full))
      : "memory");
}

// Returns once the phase of the given parity has completed.
__device__ __forceinline__ void barrier_wait(AnyBarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A barrier among the threads of one consumer warpgroup. Barrier 0 is __syncthreads.
__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, %1;" ::"r"(warpgroup + 1), "n"(kWarpgroupThreads) : "memory");
}

// ---- bulk tensor copies --------------------------------------------------------------------------------------------

// One stage of K and V serves many CTAs, a query tile is read once.
inline constexpr uint64_t kEvictFirst = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
inline constexpr uint64_t kEvictLast = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
}

__device__ __forceinline__ void load_box(const CUtensorMap& map, AnyBarrier* barrier, uint64_t hint, void* destination,
                                         int32_t column, int32_t row, int32_t head, int32_t batch) {
  cute::SM90_TMA_LOAD_4D::copy(&map, &barrier->word, hint, destination, column, row, head, batch);
}

__device__ __forceinline__ void prefetch_box(const CUtensorMap& map, int32_t column, int32_t row, int32_t head,
                                             int32_t batch) {
  cute::SM90_TMA_LOAD_4D::PREFETCH::copy(&map, column, row, head, batch);
}

// Loads the box into both CTAs of a pair, at the same shared address, and tells the barriers of both.
__device__ __forceinline__ void load_box_to_pair(const CUtensorMap& map, AnyBarrier* barrier, uint64_t hint,
                                                 void* destination, int32_t column, int32_t row, int32_t head,
                                                 int32_t batch) {
  cute::SM90_TMA_LOAD_MULTICAST_4D::copy(&map, &barrier->word, uint16_t{0b11}, hint, destination, column, row, head,
                                         batch);
}

__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* source, int32_t column, int32_t row,
                                          int32_t head, int32_t batch) {
  cute::SM90_TMA_STORE_4D::copy(&map, source, column, row, head, batch);
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until the copy engine has read the memory it stores from.
__device__ __forceinline__ void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Orders this thread's own writes to shared memory before what the copy engine and the tensor cores do with it.
__device__ __forceinline__ void fence_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- dependent launches --------------------------------------------------------------------------------------------

// Lets the next kernel in the stream start while this one still runs.
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }

// Until the kernel before in the stream has finished. Only what a kernel does after this may touch what that one wrote.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- arithmetic ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// fmaxf passes over NaN; here it wins. One instruction too.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// ---- matrices to shared memory -------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane i names the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

}  // namespace lite_attention::sm90
