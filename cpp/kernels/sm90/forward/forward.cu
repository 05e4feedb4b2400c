#include "kernels/sm90/forward/forward.h"

#include <cuda_runtime.h>

#include <stdexcept>

#include "kernels/sm90/common/check.h"
#include "kernels/sm90/common/tensor_map.h"
#include "kernels/sm90/forward/launch.h"
#include "kernels/sm90/forward/shapes.cuh"
#include "kernels/sm90/plan/plan.h"
#include "rules/drop_rule.h"

namespace lite_attention::sm90 {
namespace {

int multiprocessors_of_current_device() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "asking for its multiprocessors");
  return count;
}

// Without a map or masks nothing has to be planned, and tiles of any size may serve.
Traversal traversal_of(const ForwardParams& params) {
  const Visibility& visibility = params.visibility;
  if (params.decision.threshold != nullptr) return kMappedDecided;
  if (visibility.keep.words == nullptr && visibility.kv_tile_lens == nullptr && !visibility.token_mask.given()) {
    return kDense;
  }
  return params.problem.tile.tile_n == tile_shape(params.problem.head_dim).tile_n ? kMapped : kMappedFine;
}

ForwardParams as_walked(ForwardParams params, const ForwardShape& shape) {
  params.problem.tile = shape.tile();
  return params;
}

template <DataType dtype>
cudaError_t launch_columns(int columns, Traversal traversal, const KernelParams& kernel, int multiprocessors,
                           cudaStream_t stream) {
  switch (columns) {
    case 64: return launch<dtype, 64>(traversal, kernel, multiprocessors, stream);
    case 128: return launch<dtype, 128>(traversal, kernel, multiprocessors, stream);
    case 256: return launch<dtype, 256>(traversal, kernel, multiprocessors, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

int64_t workspace_bytes(const ForwardParams& params) {
  const ForwardShape& shape = shape_of(params.problem.head_dim, traversal_of(params));
  return shape.traversal.planned() ? plan_bytes(as_walked(params, shape)) : static_cast<int64_t>(sizeof(int32_t));
}

void forward(const ForwardParams& given, void* workspace, cudaStream_t stream) {
  const ForwardShape& shape = shape_of(given.problem.head_dim, traversal_of(given));
  const Traversal traversal = shape.traversal;
  const ForwardParams params = as_walked(given, shape);
  const Problem& problem = params.problem;
  const Operands& operands = params.operands;
  const int multiprocessors = multiprocessors_of_current_device();
  const int64_t groups = ceil_div(problem.query_len, problem.tile.visit_rows);
  const int64_t items = problem.batch * problem.query_heads * ceil_div(groups, traversal.cluster_ctas());
  if (items > INT32_MAX) throw std::runtime_error("q has more tiles than one launch can number");

  const TensorExtents queries{problem.batch, problem.query_len, problem.query_heads, problem.head_dim};
  const TensorExtents keys{problem.batch, problem.kv_len, problem.kv_heads, problem.head_dim};
  const TensorView out{params.outputs.out, problem.query_len * problem.query_heads * problem.head_dim,
                       problem.query_heads * problem.head_dim, problem.head_dim};
  const int key_rows = shape.tile_n / traversal.cluster_ctas();  // pairs of CTAs load half a tile each
  KernelParams kernel{};
  kernel.q = tensor_map("q", operands.q, problem.dtype, queries, kTileM);
  kernel.k = tensor_map("k", operands.k, problem.dtype, keys, key_rows);
  kernel.v = tensor_map("v", operands.v, problem.dtype, keys, key_rows);
  kernel.out = tensor_map("out", out, problem.dtype, queries, kTileM);
  kernel.forward = params;
  kernel.groups = static_cast<int32_t>(groups);
  kernel.work_items = static_cast<int32_t>(items);
  kernel.words = static_cast<int32_t>(problem.words());
  kernel.heads_per_kv_head = static_cast<int32_t>(problem.query_heads / problem.kv_heads);
  kernel.scale_log2 = to_log2(problem.scale);
  if (traversal.planned()) {
    kernel.workspace = lay_out(params, workspace);
    check(launch_plan(kernel, stream), "launching the plan of the keep map");
  } else {
    kernel.workspace.taken = static_cast<int32_t*>(workspace);
    check(cudaMemsetAsync(workspace, 0, sizeof(int32_t), stream), "clearing the count of work taken");
  }
  const auto launch_dtype =
      problem.dtype == DataType::kBFloat16 ? launch_columns<DataType::kBFloat16> : launch_columns<DataType::kFloat16>;
  check(launch_dtype(shape.columns, traversal, kernel, multiprocessors, stream), "launching the forward kernel");
}

}  // namespace lite_attention::sm90
