// The operators on CPU tensors.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <new>

#include "kernels/cpu/forward.h"
#include "kernels/cpu/merge.h"
#include "kernels/cpu/top_k_map.h"
#include "operators/attention.h"
#include "operators/merge_attention.h"
#include "operators/skip_attention.h"
#include "operators/top_k_map.h"

namespace lite_attention {
namespace {

void parallel_run(int64_t workers, void (*body)(void* context, int64_t worker), void* context) {
  torch::stable::parallel_for(0, workers, 1, [=](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) body(context, worker);
  });
}

struct Cpu {
  static constexpr DeviceType kDevice = DeviceType::CPU;

  static void forward(const Call& call, const ForwardParams& params) {
    try {
      cpu::forward(params, torch::stable::get_num_threads(), parallel_run);
    } catch (const std::bad_alloc&) {
      fail(call.op, "k has length ", params.problem.kv_len,
           ", too long: a working copy of its heads does not fit into memory");
    }
  }

  static void merge(const Call&, const MergeParams& params) {
    cpu::merge(params, torch::stable::get_num_threads(), parallel_run);
  }

  static void top_k_map(const Call&, const TopKMapParams& params) {
    cpu::top_k_map(params, torch::stable::get_num_threads(), parallel_run);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lite_attention, CPU, library) {
  library.impl("attention", TORCH_BOX(&attention<Cpu>));
  library.impl("skip_attention", TORCH_BOX(&skip_attention<Cpu>));
  library.impl("merge_attention", TORCH_BOX(&merge_attention<Cpu>));
  library.impl("top_k_map", TORCH_BOX(&top_k_map<Cpu>));
}

}  // namespace lite_attention
