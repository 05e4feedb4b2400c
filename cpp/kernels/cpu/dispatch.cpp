// Picks the build of the forward kernel for this processor and runs it on the caller's threads.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#include "kernels/cpu/common/variants.h"
#include "kernels/cpu/forward.h"

namespace lite_attention::cpu {

#if defined(__x86_64__)
extern const ForwardKernel avx512;
extern const ForwardKernel avx2;
#endif
extern const ForwardKernel baseline;

namespace {

const ForwardKernel& selected_kernel() {
  static const ForwardKernel& kernel = []() -> const ForwardKernel& {
#if defined(__x86_64__)
    if (selected_variant() == "avx512") return avx512;
    if (selected_variant() == "avx2") return avx2;
#endif
    return baseline;
  }();
  return kernel;
}

constexpr std::align_val_t kCacheLine{64};
// 256 MiB: a wave is as many heads as fit, so that workers rarely wait for each other between waves, and at least one.
constexpr int64_t kMaxPackedFloats = int64_t{1} << 26;

struct AlignedDelete {
  void operator()(float* floats) const { ::operator delete[](floats, kCacheLine); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;

AlignedFloats allocate(int64_t floats) {
  return AlignedFloats(static_cast<float*>(::operator new[](static_cast<size_t>(floats) * sizeof(float), kCacheLine)));
}

// Scratch that outlives the call up to a size: pages fresh from the system cost more to touch than K and V to pack.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > floats_) {
      floats_ = 0;
      memory_.reset();
      memory_ = allocate(floats);
      floats_ = floats;
    }
    return memory_.get();
  }

  void release_if_large() {
    constexpr int64_t kMaxKeptFloats = int64_t{1} << 24;  // 64 MiB
    if (floats_ <= kMaxKeptFloats) return;
    memory_.reset();
    floats_ = 0;
  }

 private:
  AlignedFloats memory_;
  int64_t floats_ = 0;
};

}  // namespace

void forward(const ForwardParams& params, int64_t max_workers, ParallelRun parallel_run) {
  const ForwardKernel& kernel = selected_kernel();
  const int64_t kv_heads = params.problem.batch * params.problem.kv_heads;
  const int64_t packed_floats = kernel.packed_floats(params);
  const int64_t wave_heads = std::clamp<int64_t>(kMaxPackedFloats / packed_floats, 1, kv_heads);

  // Allocated here, not by the workers: running out of memory must not throw inside a parallel region.
  const int64_t scratch_floats = kernel.scratch_floats(params);
  const int64_t workers = std::min(max_workers, kernel.attend_items(params, {0, wave_heads, nullptr}));
  thread_local Scratch scratch;
  float* packed = scratch.get(wave_heads * packed_floats + workers * scratch_floats);

  struct Context {
    const ForwardParams& params;
    const ForwardKernel& kernel;
    Wave wave;
    float* scratch;
    int64_t scratch_floats;
    int64_t next_item;
  } context{params, kernel, {0, 0, packed}, packed + wave_heads * packed_floats, scratch_floats, 0};

  for (int64_t first = 0; first < kv_heads; first += wave_heads) {
    context.wave.first_kv_head = first;
    context.wave.kv_heads = std::min(wave_heads, kv_heads - first);
    context.next_item = 0;
    parallel_run(
        std::min(max_workers, kernel.pack_items(params, context.wave)),
        [](void* opaque, int64_t) {
          auto* shared = static_cast<Context*>(opaque);
          shared->kernel.pack(shared->params, shared->wave, &shared->next_item);
        },
        &context);
    context.next_item = 0;
    parallel_run(
        std::min(workers, kernel.attend_items(params, context.wave)),
        [](void* opaque, int64_t worker) {
          auto* shared = static_cast<Context*>(opaque);
          shared->kernel.attend(shared->params, shared->wave, shared->scratch + worker * shared->scratch_floats,
                                &shared->next_item);
        },
        &context);
  }
  scratch.release_if_large();
}

}  // namespace lite_attention::cpu
