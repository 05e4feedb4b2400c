// The operators on CPU tensors: check the arguments, allocate the results, fill params, run the kernel.
//
// Schemas, fakes and autograd are in python/lite_attention/_library.py. Errors are std::runtime_error, a RuntimeError
// in Python, whose text starts with the operator's name and names the argument, what it was and what was expected.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cpu/forward.h"
#include "params.h"

namespace lite_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxLength = int64_t{1} << 31;  // keeps every product of sizes well inside 64 bits

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) text << (dim == 0 ? "" : ", ") << tensor.size(dim);
  text << ']';
  return text.str();
}

std::string shape_of(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t dim = 0; dim < sizes.size(); ++dim) text << (dim == 0 ? "" : ", ") << sizes[dim];
  text << ']';
  return text.str();
}

bool has_shape(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (tensor.size(static_cast<int64_t>(dim)) != sizes[dim]) return false;
  }
  return true;
}

void check_cpu(const char* op, const char* argument, const Tensor& tensor) {
  if (!tensor.is_cpu()) fail(op, argument, " is not on the CPU, expected every argument on one device");
}

void check_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType expected) {
  if (tensor.scalar_type() != expected) {
    fail(op, argument, " has dtype ", name_of(tensor.scalar_type()), ", expected ", name_of(expected));
  }
}

void check_shape(const char* op, const char* argument, const Tensor& tensor, const std::vector<int64_t>& expected,
                 const char* meaning) {
  if (!has_shape(tensor, expected)) {
    fail(op, argument, " has shape ", shape_of(tensor), ", expected ", shape_of(expected), " (", meaning, ")");
  }
}

DataType data_type(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DataType::kFloat32;
    case ScalarType::BFloat16: return DataType::kBFloat16;
    case ScalarType::Half: return DataType::kFloat16;
    default:
      fail(op, argument, " has dtype ", name_of(tensor.scalar_type()), ", expected float32, bfloat16 or float16");
  }
}

// A [batch, length, heads, head_dim] tensor the kernels can read in place.
void check_bshd(const char* op, const char* argument, const Tensor& tensor) {
  check_cpu(op, argument, tensor);
  if (tensor.dim() != 4) {
    fail(op, argument, " has ", tensor.dim(), " dimensions, expected 4: [batch, length, heads, head_dim]");
  }
  const char* dimensions[] = {"batch", "length", "heads", "head_dim"};
  for (int64_t dim = 0; dim < 4; ++dim) {
    if (tensor.size(dim) == 0) fail(op, argument, " has ", dimensions[dim], " 0, expected at least 1");
  }
  if (tensor.size(3) > 1 && tensor.stride(3) != 1) {
    fail(op, argument, " has stride ", tensor.stride(3), " in its last dimension, expected 1");
  }
}

TensorView view_bshd(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void fill_qkv(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double scale, ForwardParams& params) {
  check_bshd(op, "q", q);
  check_bshd(op, "k", k);
  check_bshd(op, "v", v);
  params.dtype = data_type(op, "q", q);
  check_dtype(op, "k", k, q.scalar_type());
  check_dtype(op, "v", v, q.scalar_type());
  params.batch = q.size(0);
  params.query_len = q.size(1);
  params.query_heads = q.size(2);
  params.head_dim = q.size(3);
  params.kv_len = k.size(1);
  params.kv_heads = k.size(2);
  if (params.head_dim > kMaxHeadDim || params.head_dim % kHeadDimMultiple != 0) {
    fail(op, "q has head_dim ", params.head_dim, ", expected a multiple of ", kHeadDimMultiple, " up to ", kMaxHeadDim);
  }
  if (k.size(0) != params.batch) fail(op, "k has batch ", k.size(0), ", expected ", params.batch, " as q");
  if (k.size(3) != params.head_dim) fail(op, "k has head_dim ", k.size(3), ", expected ", params.head_dim, " as q");
  if (params.query_heads % params.kv_heads != 0) {
    fail(op, "k has ", params.kv_heads, " heads, expected a divisor of q's ", params.query_heads);
  }
  check_shape(op, "v", v, {params.batch, params.kv_len, params.kv_heads, params.head_dim}, "k's shape");
  for (const auto& [name, length] : {std::pair{"q", params.query_len}, std::pair{"k", params.kv_len}}) {
    if (length > kMaxLength) fail(op, name, " has length ", length, ", expected at most ", kMaxLength);
  }
  params.scale = static_cast<float>(scale);
  if (!std::isnormal(params.scale) || !(params.scale > 0.0f)) {
    fail(op, "scale is ", scale, ", expected a number above 0 that is finite in fp32");
  }
  params.tile = tile_shape(params.head_dim);
  params.q = view_bshd(q);
  params.k = view_bshd(k);
  params.v = view_bshd(v);
}

void fill_kv_lens(const char* op, const std::optional<Tensor>& kv_lens, ForwardParams& params) {
  if (!kv_lens.has_value()) return;
  check_cpu(op, "kv_lens", *kv_lens);
  check_dtype(op, "kv_lens", *kv_lens, ScalarType::Int);
  check_shape(op, "kv_lens", *kv_lens, {params.batch}, "one length a batch entry");
  params.kv_lens = kv_lens->const_data_ptr<int32_t>();
  params.kv_lens_stride = kv_lens->stride(0);
  for (int64_t entry = 0; entry < params.batch; ++entry) {
    const int64_t keys = params.existing_keys(entry);
    if (keys < 0 || keys > params.kv_len) {
      fail(op, "kv_lens[", entry, "] is ", keys, ", expected 0 to ", params.kv_len, ", k's length");
    }
  }
}

KeepMapView view_keep_map(const char* op, const char* argument, const Tensor& map, const ForwardParams& params,
                          bool broadcast) {
  check_cpu(op, argument, map);
  check_dtype(op, argument, map, ScalarType::Int);
  if (map.dim() != 4) {
    fail(op, argument, " has ", map.dim(), " dimensions, expected 4: [batch, query heads, query tiles, words]");
  }
  const int64_t expected[] = {params.batch, params.query_heads, params.query_tiles()};
  const char* dimensions[] = {"batch", "heads", "query tiles"};
  int64_t strides[3];
  for (int64_t dim = 0; dim < 3; ++dim) {
    const bool broadcasts = broadcast && map.size(dim) == 1;
    if (map.size(dim) != expected[dim] && !broadcasts) {
      fail(op, argument, " has ", dimensions[dim], " ", map.size(dim), ", expected ", broadcast ? "1 or " : "",
           expected[dim], dim == 2 ? " for Sq=" : "", dim == 2 ? std::to_string(params.query_len) : "",
           dim == 2 ? " and tile_m=" : "", dim == 2 ? std::to_string(params.tile.tile_m) : "");
    }
    strides[dim] = map.size(dim) == 1 ? 0 : map.stride(dim);
  }
  if (map.size(3) != params.words()) {
    fail(op, argument, " has ", map.size(3), " words per row, expected ", params.words(), " for Sk=", params.kv_len,
         " and tile_n=", params.tile.tile_n);
  }
  return {map.const_data_ptr<int32_t>(), strides[0], strides[1], strides[2], map.stride(3)};
}

void fill_threshold(const char* op, const Tensor& threshold, ForwardParams& params) {
  check_cpu(op, "threshold", threshold);
  check_dtype(op, "threshold", threshold, ScalarType::Float);
  if (threshold.dim() != 0 && !has_shape(threshold, {params.query_heads})) {
    fail(op, "threshold has shape ", shape_of(threshold), ", expected [] or [", params.query_heads,
         "], one a query head");
  }
  params.threshold = threshold.const_data_ptr<float>();
  params.threshold_stride = threshold.dim() == 0 ? 0 : threshold.stride(0);
  for (int64_t head = 0; head < (threshold.dim() == 0 ? 1 : params.query_heads); ++head) {
    if (std::isnan(params.threshold[head * params.threshold_stride])) {
      fail(op, "threshold is NaN", threshold.dim() == 0 ? "" : " for head ",
           threshold.dim() == 0 ? "" : std::to_string(head), ", expected a number in log2 units");
    }
  }
}

void parallel_run(int64_t workers, void (*body)(void* context, int64_t worker), void* context) {
  torch::stable::parallel_for(0, workers, 1, [=](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) body(context, worker);
  });
}

std::tuple<Tensor, Tensor> allocate_results(const Tensor& q, ForwardParams& params) {
  Tensor out = torch::stable::new_empty(q, {params.batch, params.query_len, params.query_heads, params.head_dim});
  Tensor lse = torch::stable::new_empty(q, {params.batch, params.query_heads, params.query_len}, ScalarType::Float);
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  return {std::move(out), std::move(lse)};
}

void run_forward(const char* op, const ForwardParams& params) {
  try {
    cpu::forward(params, torch::stable::get_num_threads(), parallel_run);
  } catch (const std::bad_alloc&) {
    fail(op, "k has length ", params.kv_len, ", too long: a working copy of its heads does not fit into memory");
  }
}

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const std::optional<Tensor>& keep, const std::optional<Tensor>& kv_lens,
                                         double scale) {
  constexpr const char* op = "attention";
  ForwardParams params;
  fill_qkv(op, q, k, v, scale, params);
  fill_kv_lens(op, kv_lens, params);
  if (keep.has_value()) params.keep = view_keep_map(op, "keep", *keep, params, false);
  auto results = allocate_results(q, params);
  run_forward(op, params);
  return results;
}

std::tuple<Tensor, Tensor, Tensor> skip_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor& keep, const std::optional<Tensor>& must_keep,
                                                      const std::optional<Tensor>& kv_lens, const Tensor& threshold,
                                                      double scale) {
  constexpr const char* op = "skip_attention";
  ForwardParams params;
  fill_qkv(op, q, k, v, scale, params);
  fill_kv_lens(op, kv_lens, params);
  params.keep = view_keep_map(op, "keep", keep, params, false);
  if (must_keep.has_value()) params.must_keep = view_keep_map(op, "must_keep", *must_keep, params, true);
  fill_threshold(op, threshold, params);
  auto [out, lse] = allocate_results(q, params);
  Tensor next_keep =
      torch::stable::new_empty(keep, {params.batch, params.query_heads, params.query_tiles(), params.words()});
  params.next_keep = next_keep.mutable_data_ptr<int32_t>();
  run_forward(op, params);
  return {std::move(out), std::move(lse), std::move(next_keep)};
}

std::tuple<Tensor, Tensor> merge_attention_cpu(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses) {
  constexpr const char* op = "merge_attention";
  if (outs.empty()) fail(op, "outs is empty, expected at least one partial result");
  if (lses.size() != outs.size()) {
    fail(op, "lses has ", lses.size(), " tensors, expected ", outs.size(), ", one for each of outs");
  }
  MergeParams params;
  std::vector<TensorView> out_views;
  std::vector<TensorView> lse_views;
  for (size_t part = 0; part < outs.size(); ++part) {
    const std::string out_name = "outs[" + std::to_string(part) + "]";
    const std::string lse_name = "lses[" + std::to_string(part) + "]";
    const Tensor& out = outs[part];
    const Tensor& lse = lses[part];
    check_bshd(op, out_name.c_str(), out);
    if (part == 0) {
      params.dtype = data_type(op, out_name.c_str(), out);
      params.batch = out.size(0);
      params.query_len = out.size(1);
      params.heads = out.size(2);
      params.head_dim = out.size(3);
    }
    check_dtype(op, out_name.c_str(), out, outs[0].scalar_type());
    check_shape(op, out_name.c_str(), out, {params.batch, params.query_len, params.heads, params.head_dim},
                "outs[0]'s shape");
    check_cpu(op, lse_name.c_str(), lse);
    check_dtype(op, lse_name.c_str(), lse, ScalarType::Float);
    check_shape(op, lse_name.c_str(), lse, {params.batch, params.heads, params.query_len},
                "batch, heads and length of outs");
    out_views.push_back(view_bshd(out));
    lse_views.push_back({lse.const_data_ptr(), lse.stride(0), lse.stride(2), lse.stride(1)});
  }
  params.parts = static_cast<int64_t>(outs.size());
  params.outs = out_views.data();
  params.lses = lse_views.data();
  Tensor out = torch::stable::new_empty(outs[0], {params.batch, params.query_len, params.heads, params.head_dim});
  Tensor lse = torch::stable::new_empty(lses[0], {params.batch, params.heads, params.query_len});
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  cpu::merge(params, torch::stable::get_num_threads(), parallel_run);
  return {std::move(out), std::move(lse)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lite_attention, CPU, library) {
  library.impl("attention", TORCH_BOX(&attention_cpu));
  library.impl("skip_attention", TORCH_BOX(&skip_attention_cpu));
  library.impl("merge_attention", TORCH_BOX(&merge_attention_cpu));
}

}  // namespace lite_attention
