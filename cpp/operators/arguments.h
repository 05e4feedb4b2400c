// The operators' arguments as torch hands them over: checked, and turned into what the kernels are told. All backends
// share this, texts included.
//
// Errors are std::runtime_error, a RuntimeError in Python, whose text starts with the operator's name and names the
// argument, what it was and what was expected.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "params/forward.h"
#include "params/merge.h"
#include "params/top_k_map.h"

namespace lite_attention {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The part of a text that is there only sometimes.
template <typename... Parts>
std::string if_so(bool condition, const Parts&... parts) {
  return condition ? text_of(parts...) : std::string();
}

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  throw std::runtime_error(text_of(op, ": ", parts...));
}

// One call of an operator: its name, and the device that every argument must be on.
struct Call {
  const char* op;
  torch::stable::Device device;
};

// The device is that of the first argument, or where the backend works if the argument is elsewhere: an error to come.
Call make_call(const char* op, DeviceType backend, const Tensor& first_argument);

void fill_qkv(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v, double scale, ForwardParams& params);

// These need params to hold q, k and v.
void choose_tile(const Call& call, std::optional<int64_t> tile_n, ForwardParams& params);
void fill_kv_lens(const Call& call, const std::optional<Tensor>& kv_lens, ForwardParams& params);
void fill_threshold(const Call& call, const Tensor& threshold, ForwardParams& params);
void fill_kv_tile_lens(const Call& call, const std::optional<Tensor>& kv_tile_lens, ForwardParams& params);
void fill_token_mask(const Call& call, const std::optional<std::string>& causal,
                     const std::optional<Tensor>& head_windows, ForwardParams& params);
KeepMapView view_keep_map(const Call& call, const char* argument, const Tensor& map, const ForwardParams& params);
KeepMapView view_broadcast_keep_map(const Call& call, const char* argument, const Tensor& map,
                                    const ForwardParams& params);

// The params point into the views, which are filled too.
void fill_merge(const Call& call, const std::vector<Tensor>& outs, const std::vector<Tensor>& lses,
                std::vector<TensorView>& views, MergeParams& params);

void fill_scores(const Call& call, const Tensor& scores, int64_t count, TopKMapParams& params);

// A contiguous tensor of at most kMaxDimensions dimensions on the call's device, its contents whatever was there.
inline constexpr size_t kMaxDimensions = 4;
Tensor allocate(const Call& call, ScalarType dtype, const std::vector<int64_t>& sizes);

// out and lse, which params then point to.
std::tuple<Tensor, Tensor> allocate_results(const Call& call, const Tensor& q, ForwardParams& params);

}  // namespace lite_attention
