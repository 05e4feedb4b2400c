// Picks the build of the forward kernel for this processor and runs it on the caller's threads.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "forward.h"
#include "variants.h"

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

struct AlignedDelete {
  void operator()(float* floats) const { ::operator delete[](floats, kCacheLine); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;

AlignedFloats allocate(int64_t floats) {
  return AlignedFloats(static_cast<float*>(::operator new[](static_cast<size_t>(floats) * sizeof(float), kCacheLine)));
}

}  // namespace

void forward(const ForwardParams& params, int64_t max_workers, ParallelRun parallel_run) {
  const ForwardKernel& kernel = selected_kernel();
  const int64_t workers = std::max<int64_t>(1, std::min(max_workers, kernel.work_items(params)));
  // Allocated here, not by the workers: running out of memory must not throw inside a parallel region.
  std::vector<AlignedFloats> scratch;
  for (int64_t worker = 0; worker < workers; ++worker) scratch.push_back(allocate(kernel.scratch_floats(params)));

  struct Context {
    const ForwardParams& params;
    const ForwardKernel& kernel;
    const std::vector<AlignedFloats>& scratch;
    int64_t next_item;
  } context{params, kernel, scratch, 0};
  parallel_run(
      workers,
      [](void* opaque, int64_t worker) {
        auto* shared = static_cast<Context*>(opaque);
        shared->kernel.run(shared->params, shared->scratch[static_cast<size_t>(worker)].get(), &shared->next_item);
      },
      &context);
}

}  // namespace lite_attention::cpu
