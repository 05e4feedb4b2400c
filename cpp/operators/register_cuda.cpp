// The operators on CUDA tensors: a library of its own, loaded only where torch has CUDA.

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <stdexcept>

#include "kernels/sm90/forward/forward.h"
#include "kernels/sm90/merge.h"
#include "kernels/sm90/top_k_map.h"
#include "operators/attention.h"
#include "operators/merge_attention.h"
#include "operators/skip_attention.h"
#include "operators/top_k_map.h"

namespace lite_attention {
namespace {

constexpr int kHopperMajor = 9;
constexpr int kHopperMinor = 0;

// The kernels are machine code for compute capability 9.0 and run on nothing else, newer devices included.
void check_hopper(const Call& call) {
  static std::atomic<uint64_t> known_hoppers = 0;  // bit d: device d is one
  const auto device = call.device.index();
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((known_hoppers.load(std::memory_order_relaxed) & bit) != 0) return;
  cudaDeviceProp properties{};
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, device); error != cudaSuccess) {
    fail(call.op, "the properties of cuda:", device, " cannot be read: ", cudaGetErrorString(error));
  }
  if (properties.major != kHopperMajor || properties.minor != kHopperMinor) {
    fail(call.op, "cuda:", device, " is ", properties.name, " of compute capability ", properties.major, ".",
         properties.minor, ", expected a Hopper GPU, of ", kHopperMajor, ".", kHopperMinor);
  }
  known_hoppers.fetch_or(bit, std::memory_order_relaxed);
}

// Calls launch(stream) while the call's device is the current one, with that device's current stream.
template <typename Launch>
void run_on_device(const Call& call, const Launch& launch) {
  check_hopper(call);
  const torch::stable::accelerator::DeviceGuard guard(call.device.index());
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(call.device.index(), &stream) != AOTI_TORCH_SUCCESS) {
    fail(call.op, "torch does not tell the current stream of cuda:", call.device.index());
  }
  try {
    launch(static_cast<cudaStream_t>(stream));
  } catch (const std::runtime_error& error) {
    fail(call.op, error.what());  // the kernels do not know for which operator they run
  }
}

struct Cuda {
  static constexpr DeviceType kDevice = DeviceType::CUDA;

  static void forward(const Call& call, const ForwardParams& params) {
    // Given back on return, though the kernels may not have begun: torch hands it out again in this stream's order.
    const Tensor workspace = allocate(call, ScalarType::Byte, {sm90::workspace_bytes(params)});
    run_on_device(call, [&](cudaStream_t stream) { sm90::forward(params, workspace.mutable_data_ptr(), stream); });
  }

  static void merge(const Call& call, const MergeParams& params) {
    run_on_device(call, [&](cudaStream_t stream) { sm90::merge(params, stream); });
  }

  static void top_k_map(const Call& call, const TopKMapParams& params) {
    run_on_device(call, [&](cudaStream_t stream) { sm90::top_k_map(params, stream); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lite_attention, CUDA, library) {
  library.impl("attention", TORCH_BOX(&attention<Cuda>));
  library.impl("skip_attention", TORCH_BOX(&skip_attention<Cuda>));
  library.impl("merge_attention", TORCH_BOX(&merge_attention<Cuda>));
  library.impl("top_k_map", TORCH_BOX(&top_k_map<Cuda>));
}

}  // namespace lite_attention
