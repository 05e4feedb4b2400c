#include "operators/arguments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>
#include <cmath>
#include <string>
#include <utility>

namespace lite_attention {
namespace {

constexpr int64_t kMaxLength = int64_t{1} << 31;  // keeps every product of sizes well inside 64 bits

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

std::string shape_of(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t dim = 0; dim < sizes.size(); ++dim) text << (dim == 0 ? "" : ", ") << sizes[dim];
  text << ']';
  return text.str();
}

std::string shape_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) sizes.push_back(tensor.size(dim));
  return shape_of(sizes);
}

bool has_shape(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (tensor.size(static_cast<int64_t>(dim)) != sizes[dim]) return false;
  }
  return true;
}

bool is_host(const Call& call) { return call.device.type() == DeviceType::CPU; }

std::string name_of(const torch::stable::Device& device) {
  const std::string type = device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "another device";
  return device.has_index() ? type + ":" + std::to_string(device.index()) : type;
}

void check_device(const Call& call, const char* argument, const Tensor& tensor) {
  if (is_host(call)) {
    if (!tensor.is_cpu()) fail(call.op, argument, " is not on the CPU, expected every argument on one device");
  } else if (tensor.device() != call.device) {
    fail(call.op, argument, " is on ", name_of(tensor.device()), ", expected ", name_of(call.device),
         ", every argument's device");
  }
}

void check_dtype(const Call& call, const char* argument, const Tensor& tensor, ScalarType expected) {
  if (tensor.scalar_type() != expected) {
    fail(call.op, argument, " has dtype ", name_of(tensor.scalar_type()), ", expected ", name_of(expected));
  }
}

void check_shape(const Call& call, const char* argument, const Tensor& tensor, const std::vector<int64_t>& expected,
                 const char* meaning) {
  if (!has_shape(tensor, expected)) {
    fail(call.op, argument, " has shape ", shape_of(tensor), ", expected ", shape_of(expected), " (", meaning, ")");
  }
}

// A dtype that a kernel reads; tensor cores, and with them the CUDA forward, take the 16-bit ones only.
DataType data_type(const Call& call, const char* argument, const Tensor& tensor, bool float32) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      if (float32) return DataType::kFloat32;
      break;
    case ScalarType::BFloat16: return DataType::kBFloat16;
    case ScalarType::Half: return DataType::kFloat16;
    default: break;
  }
  fail(call.op, argument, " has dtype ", name_of(tensor.scalar_type()), ", expected ",
       float32 ? "float32, bfloat16 or float16" : "bfloat16 or float16 on CUDA");
}

// A [batch, length, heads, head_dim] tensor the kernels can read in place.
void check_bshd(const Call& call, const char* argument, const Tensor& tensor) {
  check_device(call, argument, tensor);
  if (tensor.dim() != 4) {
    fail(call.op, argument, " has ", tensor.dim(), " dimensions, expected 4: [batch, length, heads, head_dim]");
  }
  const char* dimensions[] = {"batch", "length", "heads", "head_dim"};
  for (int64_t dim = 0; dim < 4; ++dim) {
    if (tensor.size(dim) == 0) fail(call.op, argument, " has ", dimensions[dim], " 0, expected at least 1");
  }
  if (tensor.size(3) > 1 && tensor.stride(3) != 1) {
    fail(call.op, argument, " has stride ", tensor.stride(3), " in its last dimension, expected 1");
  }
}

TensorView view_bshd(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

KeepMapView view_map(const Call& call, const char* argument, const Tensor& map, const ForwardParams& params,
                     bool broadcast) {
  check_device(call, argument, map);
  check_dtype(call, argument, map, ScalarType::Int);
  if (map.dim() != 4) {
    fail(call.op, argument, " has ", map.dim(), " dimensions, expected 4: [batch, query heads, query tiles, words]");
  }
  const int64_t expected[] = {params.problem.batch, params.problem.query_heads, params.problem.query_tiles()};
  const char* dimensions[] = {"batch", "heads", "query tiles"};
  int64_t strides[3];
  for (int64_t dim = 0; dim < 3; ++dim) {
    const bool broadcasts = broadcast && map.size(dim) == 1;
    if (map.size(dim) != expected[dim] && !broadcasts) {
      fail(call.op, argument, " has ", dimensions[dim], " ", map.size(dim), ", expected ", if_so(broadcast, "1 or "),
           expected[dim],
           if_so(dim == 2, " for Sq=", params.problem.query_len, " and tile_m=", params.problem.tile.tile_m));
    }
    strides[dim] = map.size(dim) == 1 ? 0 : map.stride(dim);
  }
  if (map.size(3) != params.problem.words()) {
    fail(call.op, argument, " has ", map.size(3), " words per row, expected ", params.problem.words(),
         " for Sk=", params.problem.kv_len, " and tile_n=", params.problem.tile.tile_n);
  }
  return {map.const_data_ptr<int32_t>(), strides[0], strides[1], strides[2], map.stride(3)};
}

// What the C functions below torch::stable call a dtype or a type of device.
template <typename T>
int32_t shim_code(T value) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(value));
}

}  // namespace

Call make_call(const char* op, DeviceType backend, const Tensor& first_argument) {
  const torch::stable::Device device = first_argument.device();
  return {op, device.type() == backend ? device : torch::stable::Device(backend)};
}

void fill_qkv(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
              ForwardParams& params) {
  check_bshd(call, "q", q);
  check_bshd(call, "k", k);
  check_bshd(call, "v", v);
  params.problem.dtype = data_type(call, "q", q, is_host(call));
  check_dtype(call, "k", k, q.scalar_type());
  check_dtype(call, "v", v, q.scalar_type());
  params.problem.batch = q.size(0);
  params.problem.query_len = q.size(1);
  params.problem.query_heads = q.size(2);
  params.problem.head_dim = q.size(3);
  params.problem.kv_len = k.size(1);
  params.problem.kv_heads = k.size(2);
  if (params.problem.head_dim > kMaxHeadDim || params.problem.head_dim % kHeadDimMultiple != 0) {
    fail(call.op, "q has head_dim ", params.problem.head_dim, ", expected a multiple of ", kHeadDimMultiple, " up to ",
         kMaxHeadDim);
  }
  if (k.size(0) != params.problem.batch)
    fail(call.op, "k has batch ", k.size(0), ", expected ", params.problem.batch, " as q");
  if (k.size(3) != params.problem.head_dim)
    fail(call.op, "k has head_dim ", k.size(3), ", expected ", params.problem.head_dim, " as q");
  if (params.problem.query_heads % params.problem.kv_heads != 0) {
    fail(call.op, "k has ", params.problem.kv_heads, " heads, expected a divisor of q's ", params.problem.query_heads);
  }
  check_shape(call, "v", v,
              {params.problem.batch, params.problem.kv_len, params.problem.kv_heads, params.problem.head_dim},
              "k's shape");
  for (const auto& [name, length] : {std::pair{"q", params.problem.query_len}, std::pair{"k", params.problem.kv_len}}) {
    if (length > kMaxLength) fail(call.op, name, " has length ", length, ", expected at most ", kMaxLength);
  }
  params.problem.scale = static_cast<float>(scale);
  if (!std::isnormal(params.problem.scale) || !(params.problem.scale > 0.0f)) {
    fail(call.op, "scale is ", scale, ", expected a number above 0 that is finite in fp32");
  }
  params.problem.tile = tile_shape(params.problem.head_dim);
  params.operands.q = view_bshd(q);
  params.operands.k = view_bshd(k);
  params.operands.v = view_bshd(v);
}

void fill_kv_lens(const Call& call, const std::optional<Tensor>& kv_lens, ForwardParams& params) {
  if (!kv_lens.has_value()) return;
  check_device(call, "kv_lens", *kv_lens);
  check_dtype(call, "kv_lens", *kv_lens, ScalarType::Int);
  check_shape(call, "kv_lens", *kv_lens, {params.problem.batch}, "one length a batch entry");
  params.visibility.kv_lens = kv_lens->const_data_ptr<int32_t>();
  params.visibility.kv_lens_stride = kv_lens->stride(0);
  if (!is_host(call)) return;  // to read a value would be to wait for the device
  for (int64_t entry = 0; entry < params.problem.batch; ++entry) {
    const int64_t keys = params.visibility.kv_lens[entry * params.visibility.kv_lens_stride];
    if (keys < 0 || keys > params.problem.kv_len) {
      fail(call.op, "kv_lens[", entry, "] is ", keys, ", expected 0 to ", params.problem.kv_len, ", k's length");
    }
  }
}

void choose_tile(const Call& call, std::optional<int64_t> tile_n, ForwardParams& params) {
  if (!tile_n.has_value()) return;
  const int32_t coarse = params.problem.tile.tile_n;
  if (*tile_n != coarse && *tile_n != kFineTileN) {
    fail(call.op, "tile_n is ", *tile_n, ", expected ", coarse, if_so(coarse != kFineTileN, " or ", kFineTileN),
         " for head_dim ", params.problem.head_dim);
  }
  params.problem.tile.tile_n = static_cast<int32_t>(*tile_n);
}

void fill_kv_tile_lens(const Call& call, const std::optional<Tensor>& kv_tile_lens, ForwardParams& params) {
  if (!kv_tile_lens.has_value()) return;
  const Tensor& lens = *kv_tile_lens;
  check_device(call, "kv_tile_lens", lens);
  check_dtype(call, "kv_tile_lens", lens, ScalarType::Int);
  const bool per_batch = lens.dim() == 2;
  if (!has_shape(lens, {params.problem.kv_tiles()}) &&
      !has_shape(lens, {params.problem.batch, params.problem.kv_tiles()})) {
    fail(call.op, "kv_tile_lens has shape ", shape_of(lens), ", expected [", params.problem.kv_tiles(), "] or [",
         params.problem.batch, ", ", params.problem.kv_tiles(),
         "], one length a KV tile, for Sk=", params.problem.kv_len, " and tile_n=", params.problem.tile.tile_n);
  }
  params.visibility.kv_tile_lens = lens.const_data_ptr<int32_t>();
  params.visibility.kv_tile_lens_batch_stride = per_batch ? lens.stride(0) : 0;
  params.visibility.kv_tile_lens_stride = lens.stride(per_batch ? 1 : 0);
  if (!is_host(call)) return;  // as for kv_lens
  for (int64_t entry = 0; entry < (per_batch ? params.problem.batch : 1); ++entry) {
    for (int64_t tile = 0; tile < params.problem.kv_tiles(); ++tile) {
      const int32_t keys = params.visibility.kv_tile_lens[entry * params.visibility.kv_tile_lens_batch_stride +
                                                          tile * params.visibility.kv_tile_lens_stride];
      if (keys < 0 || keys > params.problem.tile.tile_n) {
        fail(call.op, "kv_tile_lens[", if_so(per_batch, entry, ", "), tile, "] is ", keys, ", expected 0 to ",
             params.problem.tile.tile_n, ", tile_n");
      }
    }
  }
}

void fill_token_mask(const Call& call, const std::optional<std::string>& causal,
                     const std::optional<Tensor>& head_windows, ForwardParams& params) {
  TokenMask& mask = params.visibility.token_mask;
  if (causal.has_value()) {
    if (*causal == "top-left") {
      mask.alignment = CausalAlignment::kTopLeft;
    } else if (*causal == "bottom-right") {
      mask.alignment = CausalAlignment::kBottomRight;
    } else {
      fail(call.op, "causal is '", *causal, "', expected 'top-left' or 'bottom-right'");
    }
  }
  if (!head_windows.has_value()) return;
  check_device(call, "head_windows", *head_windows);
  check_dtype(call, "head_windows", *head_windows, ScalarType::Int);
  check_shape(call, "head_windows", *head_windows, {params.problem.query_heads, 2},
              "sink_size and recent_size of each head");
  if (!mask.given()) {
    fail(call.op, "head_windows is given and causal is not, expected causal to be 'top-left' or 'bottom-right'");
  }
  mask.head_windows = head_windows->const_data_ptr<int32_t>();
  mask.head_stride = head_windows->stride(0);
  mask.stride = head_windows->stride(1);
  if (!is_host(call)) return;  // as for kv_lens
  for (int64_t head = 0; head < params.problem.query_heads; ++head) {
    for (int64_t size = 0; size < 2; ++size) {
      const int32_t value = mask.head_windows[head * mask.head_stride + size * mask.stride];
      if (value < 0) fail(call.op, "head_windows[", head, ", ", size, "] is ", value, ", expected 0 or more keys");
    }
  }
}

void fill_threshold(const Call& call, const Tensor& threshold, ForwardParams& params) {
  check_device(call, "threshold", threshold);
  check_dtype(call, "threshold", threshold, ScalarType::Float);
  if (threshold.dim() != 0 && !has_shape(threshold, {params.problem.query_heads})) {
    fail(call.op, "threshold has shape ", shape_of(threshold), ", expected [] or [", params.problem.query_heads,
         "], one a query head");
  }
  params.decision.threshold = threshold.const_data_ptr<float>();
  params.decision.threshold_stride = threshold.dim() == 0 ? 0 : threshold.stride(0);
  if (!is_host(call)) return;  // as for kv_lens
  for (int64_t head = 0; head < (threshold.dim() == 0 ? 1 : params.problem.query_heads); ++head) {
    if (std::isnan(params.decision.threshold[head * params.decision.threshold_stride])) {
      fail(call.op, "threshold is NaN", if_so(threshold.dim() != 0, " for head ", head),
           ", expected a number in log2 units");
    }
  }
}

KeepMapView view_keep_map(const Call& call, const char* argument, const Tensor& map, const ForwardParams& params) {
  return view_map(call, argument, map, params, false);
}

KeepMapView view_broadcast_keep_map(const Call& call, const char* argument, const Tensor& map,
                                    const ForwardParams& params) {
  return view_map(call, argument, map, params, true);
}

void fill_merge(const Call& call, const std::vector<Tensor>& outs, const std::vector<Tensor>& lses,
                std::vector<TensorView>& views, MergeParams& params) {
  if (lses.size() != outs.size()) {
    fail(call.op, "lses has ", lses.size(), " tensors, expected ", outs.size(), ", one for each of outs");
  }
  const size_t parts = outs.size();
  views.resize(2 * parts);
  for (size_t part = 0; part < parts; ++part) {
    const std::string out_name = "outs[" + std::to_string(part) + "]";
    const std::string lse_name = "lses[" + std::to_string(part) + "]";
    const Tensor& out = outs[part];
    const Tensor& lse = lses[part];
    check_bshd(call, out_name.c_str(), out);
    if (part == 0) {
      params.dtype = data_type(call, out_name.c_str(), out, true);
      params.batch = out.size(0);
      params.query_len = out.size(1);
      params.heads = out.size(2);
      params.head_dim = out.size(3);
    }
    check_dtype(call, out_name.c_str(), out, outs[0].scalar_type());
    check_shape(call, out_name.c_str(), out, {params.batch, params.query_len, params.heads, params.head_dim},
                "outs[0]'s shape");
    check_device(call, lse_name.c_str(), lse);
    check_dtype(call, lse_name.c_str(), lse, ScalarType::Float);
    check_shape(call, lse_name.c_str(), lse, {params.batch, params.heads, params.query_len},
                "batch, heads and length of outs");
    views[part] = view_bshd(out);
    views[parts + part] = {lse.const_data_ptr(), lse.stride(0), lse.stride(2), lse.stride(1)};
  }
  params.parts = static_cast<int64_t>(parts);
  params.outs = views.data();
  params.lses = views.data() + parts;
}

void fill_scores(const Call& call, const Tensor& scores, int64_t count, TopKMapParams& params) {
  check_device(call, "scores", scores);
  params.dtype = data_type(call, "scores", scores, true);
  const int64_t dims = scores.dim();
  if (dims < 1 || dims > static_cast<int64_t>(kMaxDimensions)) {
    fail(call.op, "scores has ", dims, " dimensions, expected 1 to ", kMaxDimensions);
  }
  if (count < 1) fail(call.op, "count is ", count, ", expected at least 1");
  params.columns = scores.size(dims - 1);
  params.count = count;
  if (params.columns < 1 || params.columns > kMaxColumns) {
    fail(call.op, "scores has ", params.columns, " columns, expected 1 to ", kMaxColumns);
  }
  if (params.columns > 1 && scores.stride(dims - 1) != 1) {
    fail(call.op, "scores has stride ", scores.stride(dims - 1), " in its last dimension, expected 1");
  }
  const auto size = [&](int64_t from_end) { return dims > from_end ? scores.size(dims - 1 - from_end) : 1; };
  const auto stride = [&](int64_t from_end) { return dims > from_end ? scores.stride(dims - 1 - from_end) : 0; };
  params.query_tiles = size(1);
  params.heads = size(2);
  params.batch = size(3);
  params.scores = {scores.const_data_ptr(), stride(3), stride(1), stride(2)};
}

// torch::stable::new_empty would do, but finds its operator by name at every call: 2 us more.
Tensor allocate(const Call& call, ScalarType dtype, const std::vector<int64_t>& sizes) {
  std::array<int64_t, kMaxDimensions> strides;
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= sizes[dim];
  }
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), shim_code(dtype),
                               shim_code(call.device.type()), call.device.index(), &handle) != AOTI_TORCH_SUCCESS) {
    // The exception itself does not cross the stable interface.
    fail(call.op, "torch cannot allocate a tensor of shape ", shape_of(sizes), " on ", name_of(call.device),
         ", it wrote why to the standard error stream");
  }
  return Tensor(handle);
}

std::tuple<Tensor, Tensor> allocate_results(const Call& call, const Tensor& q, ForwardParams& params) {
  Tensor out =
      allocate(call, q.scalar_type(),
               {params.problem.batch, params.problem.query_len, params.problem.query_heads, params.problem.head_dim});
  Tensor lse =
      allocate(call, ScalarType::Float, {params.problem.batch, params.problem.query_heads, params.problem.query_len});
  params.outputs.out = out.mutable_data_ptr();
  params.outputs.lse = lse.mutable_data_ptr<float>();
  return {std::move(out), std::move(lse)};
}

}  // namespace lite_attention
