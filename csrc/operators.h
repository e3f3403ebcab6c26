// The operators of one device: from torch's tensors to problems. The CPU and the CUDA library both
// instantiate Operators, each with a device of its own; neither knows the other's.
//
// Only torch's stable ABI is used, so a binary that was built with one torch loads in every later
// one. What that ABI lacks is in Python (limpq_ext/kernels/ops.py): autograd, shapes for
// torch.compile, and the types of exceptions.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fake_quantize.h"

namespace limpq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
template <typename T>
using List = torch::headeronly::HeaderOnlyArrayRef<T>;

// --- errors -------------------------------------------------------------------------------------

/// Raises an error that limpq_ext/kernels/ops.py turns into the named Python exception.
template <typename... Parts>
[[noreturn]] void refuse(const char* exception, const Parts&... parts) {
  std::ostringstream message;
  message << "limpq_ext " << exception << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define LIMPQ_CHECK(exception, condition, ...) \
  if (!(condition)) refuse(exception, __VA_ARGS__)

struct Shape {
  List<int64_t> sizes;
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << "[";
  for (size_t i = 0; i < shape.sizes.size(); ++i) out << (i == 0 ? "" : ", ") << shape.sizes[i];
  return out << "]";
}

inline Shape shape_of(const Tensor& tensor) {
  return {tensor.sizes()};
}

// --- tensors ------------------------------------------------------------------------------------

inline bool same(List<int64_t> a, List<int64_t> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline Tensor empty_strided(List<int64_t> sizes, List<int64_t> strides, ScalarType type,
                            const Tensor& like) {
  const auto to_shim = [](auto value) {
    return torch::stable::detail::to<int32_t>(torch::stable::detail::from(value));
  };
  const auto device = like.device();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                  strides.data(), to_shim(type),
                                                  to_shim(device.type()), device.index(), &handle));
  return Tensor(handle);
}

/// A tensor laid out in memory as a dense one is.
inline Tensor empty_as(const Tensor& dense) {
  return empty_strided(dense.sizes(), dense.strides(), dense.scalar_type(), dense);
}

inline Tensor empty_bytes(int64_t bytes, const Tensor& like) {
  const int64_t one = 1;
  return empty_strided(bytes, one, ScalarType::Byte, like);
}

inline void fill_with_zeros(const Tensor& tensor) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(tensor.get()));
}

/// Whether the memory has neither gaps nor overlaps. An empty tensor has to be contiguous.
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  const auto sizes = x.sizes(), strides = x.strides();
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride and size, of those that take a step
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return false;
    if (sizes[i] > 1) axes.emplace_back(strides[i], sizes[i]);
  }
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

/// x itself where its memory has no gaps, else a copy that keeps the order of the axes.
inline Tensor as_dense(const Tensor& x) {
  return is_dense(x) ? x : torch::stable::clone(x);
}

/// The range of memory that a tensor's elements take, first byte and end.
struct Extent {
  const char* begin;
  const char* end;
};

inline Extent extent_of(const Tensor& tensor) {
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {begin, begin + (last + 1) * int64_t(tensor.element_size())};
}

/// A tensor may be longer than its storage, which was resized or freed under it.
inline void check_storage(const char* what, const Tensor& tensor) {
  const Extent extent = extent_of(tensor);
  int64_t stored;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &stored));
  const int64_t needed =
      tensor.storage_offset() * int64_t(tensor.element_size()) + (extent.end - extent.begin);
  LIMPQ_CHECK("ValueError", extent.begin == extent.end || needed <= stored, what, " has memory of ",
              stored, " bytes, but its elements take ", needed);
}

// --- one call -----------------------------------------------------------------------------------

/// How a call uses its scales; an entry per bit-width in the lists. It refers to lists that the
/// caller keeps.
struct Quantization {
  List<int64_t> scale_rows;
  List<int64_t> quant_mins;
  List<int64_t> quant_maxs;
  std::optional<List<double>> grad_factors;  // none: LSQ's own, 1 / sqrt(N * quant_max)
  std::optional<int64_t> channel_axis;
  double scale_min;
  double scale_max;
  std::optional<double> relu_max = {};  // quantize min(relu(x), relu_max); every quant_min is 0

  int64_t count() const { return int64_t(scale_rows.size()); }
};

/// The rows 0, 1, 2, ... of a call that uses all bit-widths in order.
inline List<int64_t> first_rows(size_t count) {
  static const auto rows = [] {
    std::array<int64_t, max_bit_widths + 1> all{};
    for (size_t k = 0; k < all.size(); ++k) all[k] = int64_t(k);
    return all;
  }();
  return List<int64_t>(rows.data(), std::min(count, rows.size()));
}

inline DataType data_type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DataType::float32;
    case ScalarType::Double:
      return DataType::float64;
    case ScalarType::Half:
      return DataType::float16;
    case ScalarType::BFloat16:
      return DataType::bfloat16;
    default:
      refuse("TypeError", "fake_quantize: x has dtype ",
             torch::headeronly::toString(x.scalar_type()),
             ", expected float32, float64, float16 or bfloat16");
  }
}

/// float64 for float64 tensors, else float32.
inline ScalarType compute_type_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// A number as the kernels compute with it: a double for float64 tensors, else a float.
inline double in_compute_type(const Tensor& x, double value) {
  return x.scalar_type() == ScalarType::Double ? value : double(float(value));
}

/// The ceiling as a value of x's dtype, as PyTorch's hardtanh gives it.
inline double ceiling_of(const Tensor& x, double ceiling) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return ceiling;
    case ScalarType::Half:
      return double(float(torch::headeronly::Half(float(ceiling))));
    case ScalarType::BFloat16:
      return double(float(torch::headeronly::BFloat16(float(ceiling))));
    default:
      return double(float(ceiling));
  }
}

/// The channel axis counted from the front.
inline int64_t channel_axis_of(const Tensor& x, int64_t axis) {
  LIMPQ_CHECK("IndexError", axis >= -x.dim() && axis < x.dim(), "fake_quantize: channel_axis is ",
              axis, ", but x has ", x.dim(), " dimensions");
  return axis < 0 ? axis + x.dim() : axis;
}

/// Elements of x that share a scale.
inline int64_t shared_elements(const Tensor& x, const Quantization& how) {
  const int64_t numel = x.numel();
  return numel == 0 || !how.channel_axis ? numel
                                         : numel / x.size(channel_axis_of(x, *how.channel_axis));
}

/// Raises TypeError, ValueError or IndexError where x, scale and `how` do not fit.
inline void check_arguments(const Tensor& x, const Tensor& scale, const Quantization& how) {
  // round() in lsq.h is exact up to this magnitude; 16 bits, the most that is used, need 2^16.
  constexpr int64_t largest_threshold = int64_t(1) << 22;
  data_type_of(x);
  LIMPQ_CHECK("TypeError", is_floating(scale.scalar_type()), "fake_quantize: scale has dtype ",
              torch::headeronly::toString(scale.scalar_type()),
              ", expected a floating-point dtype");
  LIMPQ_CHECK("ValueError", x.device() == scale.device(),
              "fake_quantize: x and scale are on different devices");
  check_storage("fake_quantize: x", x);
  check_storage("fake_quantize: scale", scale);
  const int64_t count = how.count();
  LIMPQ_CHECK("ValueError", count >= 1 && count <= max_bit_widths, "fake_quantize: ", count,
              " bit-widths in one call, expected 1 to ", max_bit_widths);
  const auto check_length = [&](const char* name, size_t length) {
    LIMPQ_CHECK("ValueError", int64_t(length) == count, "fake_quantize: ", name, " has ", length,
                " entries for ", count, " bit-widths");
  };
  check_length("quant_mins", how.quant_mins.size());
  check_length("quant_maxs", how.quant_maxs.size());
  if (how.grad_factors) check_length("grad_factors", how.grad_factors->size());
  int64_t channels = 1;
  if (how.channel_axis) {
    channels = x.size(channel_axis_of(x, *how.channel_axis));
    LIMPQ_CHECK("ValueError", scale.dim() >= 1 && scale.size(scale.dim() - 1) == channels,
                "fake_quantize: scale has shape ", shape_of(scale), " for ", channels,
                " channels along axis ", *how.channel_axis);
    LIMPQ_CHECK("ValueError", scale.dim() <= 2, "fake_quantize: scale has shape ", shape_of(scale),
                ", expected [channels] or [bit-widths, channels]");
  } else {
    LIMPQ_CHECK("ValueError", scale.dim() <= 1, "fake_quantize: scale has shape ", shape_of(scale),
                ", expected a scalar or [bit-widths]; pass channel_axis to quantize per channel");
  }
  const int64_t rows =
      channels == 0 ? (scale.dim() == 2 ? scale.size(0) : 1) : scale.numel() / channels;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t row = how.scale_rows[k];
    LIMPQ_CHECK("IndexError", row >= 0 && row < rows, "fake_quantize: scale row ", row,
                " does not exist, scale has ", rows, " rows");
    for (int64_t other = 0; other < k; ++other) {
      LIMPQ_CHECK("ValueError", how.scale_rows[other] != row, "fake_quantize: scale row ", row,
                  " is used for two bit-widths");
    }
    const int64_t quant_min = how.quant_mins[k], quant_max = how.quant_maxs[k];
    LIMPQ_CHECK("ValueError", quant_min <= 0 && quant_max > 0, "fake_quantize: thresholds are ",
                quant_min, " and ", quant_max, ", expected quant_min <= 0 < quant_max");
    LIMPQ_CHECK("ValueError", !how.relu_max || quant_min == 0, "fake_quantize: quant_min is ",
                quant_min, ", expected 0 with relu_max");
    LIMPQ_CHECK("ValueError", quant_min >= -largest_threshold && quant_max <= largest_threshold,
                "fake_quantize: thresholds are ", quant_min, " and ", quant_max,
                ", beyond the largest magnitude, ", largest_threshold);
  }
  LIMPQ_CHECK("ValueError", !how.relu_max || *how.relu_max > 0, "fake_quantize: relu_max is ",
              *how.relu_max, ", expected a positive number");
  LIMPQ_CHECK("ValueError", how.scale_min > 0 && in_compute_type(x, how.scale_min) > 0,
              "fake_quantize: scale_min is ", how.scale_min,
              ", expected a number that is positive in the type that is computed with");
  LIMPQ_CHECK("ValueError", how.scale_max >= how.scale_min, "fake_quantize: scale_max is ",
              how.scale_max, ", below scale_min ", how.scale_min);
}

/// A gradient of x's shape laid out in memory as the dense x is; a copy only where it is not.
inline Tensor gradient_for(const Tensor& x, const Tensor& grad) {
  LIMPQ_CHECK("ValueError", same(grad.sizes(), x.sizes()),
              "fake_quantize_backward: gradient has shape ", shape_of(grad), ", x has ",
              shape_of(x));
  LIMPQ_CHECK("ValueError", grad.device() == x.device(),
              "fake_quantize_backward: gradient and x are on different devices");
  check_storage("fake_quantize_backward: gradient", grad);
  if (grad.scalar_type() == x.scalar_type() && same(grad.strides(), x.strides())) return grad;
  const Tensor copy = empty_as(x);
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), grad.get(), 0));
  return copy;
}

/// `scale` contiguous and in the compute type of x; a copy only where it is not.
inline Tensor compute_scale_of(const Tensor& scale, const Tensor& x) {
  const bool converted = scale.scalar_type() == compute_type_of(x);
  // A call that changes nothing still takes a microsecond through the dispatcher.
  if (converted && scale.is_contiguous()) return scale;
  return torch::stable::contiguous(converted ? scale
                                             : torch::stable::to(scale, compute_type_of(x)));
}

inline Tensor in_type_of(const Tensor& scale, const Tensor& dscale) {
  if (dscale.scalar_type() == scale.scalar_type()) return dscale;
  return torch::stable::to(dscale, scale.scalar_type());
}

/// Fills the common part of a problem. x is dense and not empty, scale contiguous and in the
/// compute type.
inline void describe(Problem& problem, const Tensor& x, const Tensor& scale,
                     const Quantization& how) {
  problem.dtype = data_type_of(x);
  problem.outer = problem.channels = 1;
  problem.inner = x.numel();
  if (how.channel_axis) {
    const int64_t axis = channel_axis_of(x, *how.channel_axis);
    problem.channels = x.size(axis);
    // In memory without gaps, the stride of an axis counts the elements of everything inside it.
    if (problem.channels > 1) {
      problem.inner = x.stride(axis);
      problem.outer = x.numel() / (problem.channels * problem.inner);
    }
  }
  problem.count = problem.candidates = int(how.count());
  problem.selected = nullptr;
  problem.x = x.const_data_ptr();
  problem.scale = scale.const_data_ptr();
  problem.scale_rows = scale.numel() / problem.channels;
  for (int64_t k = 0; k < how.count(); ++k) {
    problem.scale_row[k] = how.scale_rows[k];
    problem.quant_min[k] = double(how.quant_mins[k]);
    problem.quant_max[k] = double(how.quant_maxs[k]);
  }
  problem.scale_min = how.scale_min;
  problem.scale_max = how.scale_max;
  if (how.relu_max) problem.relu_max = ceiling_of(x, *how.relu_max);
}

/// The factors of the scales' gradients, for a problem that describe() filled.
inline void set_grad_factors(BackwardProblem& problem, const Tensor& x, const Quantization& how) {
  for (int64_t k = 0; k < how.count(); ++k) {
    problem.grad_factor[k] =
        how.grad_factors
            ? (*how.grad_factors)[k]
            : std::pow(double(shared_elements(x, how)) * double(how.quant_maxs[k]), -0.5);
  }
}

/// Sets the workspace of each problem, from one allocation or, where the CPU needs little, from
/// the stack, and calls run().
template <typename Device, typename AnyProblem, typename Run>
void with_workspaces(AnyProblem* problems, int64_t count, const Tensor& like, Run run) {
  const auto aligned = [&](int64_t i) {
    return (Device::workspace_bytes(problems[i]) + 15) / 16 * 16;
  };
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) bytes += aligned(i);
  alignas(16) char on_stack[1024];
  std::optional<Tensor> allocated;
  char* at = on_stack;
  if (!Device::uses_host_memory || bytes > int64_t(sizeof on_stack)) {
    allocated = empty_bytes(bytes, like);
    at = static_cast<char*>(allocated->mutable_data_ptr());
  }
  for (int64_t i = 0; i < count; ++i) {
    problems[i].workspace = at;
    at += aligned(i);
  }
  run();
}

// --- the operators ------------------------------------------------------------------------------

/// Device has run_forward(problems, count, like), run_backward(problems, count, like),
/// run_error_sums(problem, like), workspace_bytes(problem) and uses_host_memory: whether the host
/// may read tensors.
template <typename Device>
struct Operators {
  // --- one problem, whose arguments are checked

  /// Where a tensor on a GPU selects the bit-width: only one of the candidates is used.
  static void select(Problem& problem, const int64_t* selected) {
    if (selected == nullptr) return;
    problem.selected = selected;
    problem.count = 1;
  }

  /// Quantizes x into y, where each bit-width has memory that is laid out as x_dense is. Where a
  /// tensor selects, all candidates have the one output.
  static void forward_into(const Tensor& y, const Tensor& x_dense, const Tensor& scale,
                           const Quantization& how, const int64_t* selected = nullptr) {
    if (x_dense.numel() == 0) return;
    const Tensor compute_scale = compute_scale_of(scale, x_dense);
    ForwardProblem problem;
    describe(problem, x_dense, compute_scale, how);
    char* output = static_cast<char*>(y.mutable_data_ptr());
    const int64_t bytes =
        selected == nullptr ? x_dense.numel() * int64_t(x_dense.element_size()) : 0;
    for (int k = 0; k < problem.count; ++k) problem.y[k] = output + k * bytes;
    select(problem, selected);
    Device::run_forward(&problem, 1, x_dense);
  }

  static Tensor forward_of(const Tensor& x, const Tensor& scale, const Quantization& how,
                           const int64_t* selected = nullptr) {
    const Tensor x_dense = as_dense(x);
    const Tensor y = empty_as(x_dense);
    forward_into(y, x_dense, scale, how, selected);
    return y;
  }

  /// dx and dscale. `grads` are those of the bit-widths. Where a tensor selects, all candidates
  /// have the one gradient.
  static std::tuple<Tensor, Tensor> backward_of(List<Tensor> grads, const Tensor& x,
                                                const Tensor& scale, const Quantization& how,
                                                const int64_t* selected = nullptr) {
    const Tensor x_dense = as_dense(x);
    std::vector<Tensor> dense_grads;
    for (const Tensor& grad : grads) dense_grads.push_back(gradient_for(x_dense, grad));
    const Tensor compute_scale = compute_scale_of(scale, x_dense);
    const Tensor dx = empty_as(x_dense);
    const Tensor dscale = empty_as(compute_scale);
    if (x_dense.numel() == 0) {
      fill_with_zeros(dscale);
      return {dx, in_type_of(scale, dscale)};
    }
    BackwardProblem problem;
    describe(problem, x_dense, compute_scale, how);
    set_grad_factors(problem, x_dense, how);
    for (int k = 0; k < problem.count; ++k) {
      problem.grad[k] = dense_grads[selected == nullptr ? k : 0].const_data_ptr();
    }
    select(problem, selected);
    problem.dx = dx.mutable_data_ptr();
    problem.dscale = dscale.mutable_data_ptr();
    run_backward(&problem, 1, x_dense);
    return {dx, in_type_of(scale, dscale)};
  }

  static void run_backward(BackwardProblem* problems, int64_t count, const Tensor& like) {
    with_workspaces<Device>(problems, count, like,
                            [&] { Device::run_backward(problems, count, like); });
  }

  // --- a list of bit-widths

  static void check_list(const Tensor& x, const Tensor& scale, const Quantization& how,
                         bool stacked) {
    check_arguments(x, scale, how);
    LIMPQ_CHECK("ValueError", stacked || how.count() == 1, "fake_quantize: ", how.count(),
                " bit-widths, expected 1 where they are not stacked");
  }

  /// [bit-widths, *x.shape]; of one bit-width that is not stacked, x's shape.
  static Tensor fake_quantize(const Tensor& x, const Tensor& scale,
                              const std::vector<int64_t>& scale_rows,
                              const std::vector<int64_t>& quant_mins,
                              const std::vector<int64_t>& quant_maxs,
                              std::optional<int64_t> channel_axis,
                              const std::optional<std::vector<double>>& /* grad_factors */,
                              double scale_min, double scale_max, std::optional<double> relu_max,
                              bool stacked) {
    const Quantization how = {scale_rows,   quant_mins, quant_maxs, std::nullopt,
                              channel_axis, scale_min,  scale_max,  relu_max};
    check_list(x, scale, how, stacked);
    if (!stacked) return forward_of(x, scale, how);
    const Tensor x_dense = as_dense(x);
    // One buffer; each bit-width's slice is laid out in memory as x is.
    std::vector<int64_t> sizes = {how.count()}, strides = {std::max<int64_t>(x.numel(), 1)};
    for (const int64_t size : x.sizes()) sizes.push_back(size);
    for (const int64_t stride : x_dense.strides()) strides.push_back(stride);
    const Tensor y = empty_strided(sizes, strides, x.scalar_type(), x);
    forward_into(y, x_dense, scale, how);
    return y;
  }

  /// `grad` has the shape of what fake_quantize gave.
  static std::tuple<Tensor, Tensor> fake_quantize_backward(
      const Tensor& grad, const Tensor& x, const Tensor& scale,
      const std::vector<int64_t>& scale_rows, const std::vector<int64_t>& quant_mins,
      const std::vector<int64_t>& quant_maxs, std::optional<int64_t> channel_axis,
      const std::optional<std::vector<double>>& grad_factors, double scale_min, double scale_max,
      std::optional<double> relu_max, bool stacked) {
    const Quantization how = {scale_rows,   quant_mins, quant_maxs, grad_factors,
                              channel_axis, scale_min,  scale_max,  relu_max};
    check_list(x, scale, how, stacked);
    if (!stacked) return backward_of(grad, x, scale, how);
    LIMPQ_CHECK("ValueError", grad.dim() == x.dim() + 1 && grad.size(0) == how.count(),
                "fake_quantize_backward: gradient has shape ", shape_of(grad), " for ", how.count(),
                " bit-widths of ", shape_of(x));
    std::vector<Tensor> slices;
    for (int64_t k = 0; k < how.count(); ++k) {
      slices.push_back(torch::stable::select(grad, 0, k));
    }
    return backward_of(slices, x, scale, how);
  }

  // --- a bit-width that a tensor names

  /// Checks the candidates; leaves only the selected one where the host may read which it is.
  static void check_selection(const Tensor& x, const Tensor& scale, const Tensor& selected,
                              Quantization& how) {
    check_arguments(x, scale, how);
    LIMPQ_CHECK("TypeError", selected.scalar_type() == ScalarType::Long,
                "fake_quantize_selected: selected has dtype ",
                torch::headeronly::toString(selected.scalar_type()), ", expected int64");
    LIMPQ_CHECK("ValueError", selected.numel() == 1, "fake_quantize_selected: selected has shape ",
                shape_of(selected), ", expected one element");
    LIMPQ_CHECK("ValueError", selected.device() == x.device(),
                "fake_quantize_selected: selected and x are on different devices");
    check_storage("fake_quantize_selected: selected", selected);
    if (!Device::uses_host_memory) return;
    const int64_t k = *static_cast<const int64_t*>(selected.const_data_ptr());
    LIMPQ_CHECK("IndexError", k >= 0 && k < how.count(), "fake_quantize_selected: selected is ", k,
                ", expected 0 to ", how.count() - 1);
    how.scale_rows = how.scale_rows.slice(k, 1);
    how.quant_mins = how.quant_mins.slice(k, 1);
    how.quant_maxs = how.quant_maxs.slice(k, 1);
    if (how.grad_factors) how.grad_factors = how.grad_factors->slice(k, 1);
  }

  static const int64_t* on_device(const Tensor& selected) {
    return Device::uses_host_memory ? nullptr
                                    : static_cast<const int64_t*>(selected.const_data_ptr());
  }

  static Tensor fake_quantize_selected(const Tensor& x, const Tensor& scale, const Tensor& selected,
                                       const std::vector<int64_t>& quant_mins,
                                       const std::vector<int64_t>& quant_maxs,
                                       std::optional<int64_t> channel_axis,
                                       const std::optional<std::vector<double>>& /* grad_factors */,
                                       double scale_min, double scale_max,
                                       std::optional<double> relu_max) {
    Quantization how = {first_rows(quant_mins.size()),
                        quant_mins,
                        quant_maxs,
                        std::nullopt,
                        channel_axis,
                        scale_min,
                        scale_max,
                        relu_max};
    check_selection(x, scale, selected, how);
    return forward_of(x, scale, how, on_device(selected));
  }

  static std::tuple<Tensor, Tensor> fake_quantize_selected_backward(
      const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& selected,
      const std::vector<int64_t>& quant_mins, const std::vector<int64_t>& quant_maxs,
      std::optional<int64_t> channel_axis, const std::optional<std::vector<double>>& grad_factors,
      double scale_min, double scale_max, std::optional<double> relu_max) {
    Quantization how = {first_rows(quant_mins.size()),
                        quant_mins,
                        quant_maxs,
                        grad_factors,
                        channel_axis,
                        scale_min,
                        scale_max,
                        relu_max};
    check_selection(x, scale, selected, how);
    return backward_of(grad, x, scale, how, on_device(selected));
  }

  // --- the weight bank: all layers at all their bit-widths in one call

  /// The layers of a bank as flat lists: layer i has counts[i] bit-widths, whose thresholds follow
  /// those of the layers before it, and uses the scale rows 0 .. counts[i] - 1.
  struct Bank {
    const std::vector<Tensor>& weights;
    const std::vector<Tensor>& scales;
    const std::vector<int64_t>& counts;
    const std::vector<int64_t>& quant_mins;
    const std::vector<int64_t>& quant_maxs;
    const std::vector<int64_t>& channel_axes;  // no_axis: one scale per bit-width
    const std::vector<double>& scale_mins;
    const std::vector<double>& scale_maxs;

    static constexpr int64_t no_axis = INT64_MIN;

    size_t layers() const { return weights.size(); }
    int64_t total() const { return int64_t(quant_mins.size()); }

    void check_lengths() const {
      int64_t sum = 0;
      for (const int64_t count : counts) {
        LIMPQ_CHECK("ValueError", count >= 1 && count <= max_bit_widths, "weight bank: ", count,
                    " bit-widths of a layer, expected 1 to ", max_bit_widths);
        sum += count;
      }
      const bool fit = scales.size() == layers() && counts.size() == layers() &&
                       channel_axes.size() == layers() && scale_mins.size() == layers() &&
                       scale_maxs.size() == layers() && sum == total() &&
                       int64_t(quant_maxs.size()) == total();
      LIMPQ_CHECK("ValueError", fit, "weight bank: the lists have different lengths");
    }

    Quantization how(size_t i, int64_t first) const {
      const auto part = [&](const std::vector<int64_t>& list) {
        return List<int64_t>(list.data() + first, size_t(counts[i]));
      };
      Quantization how = {first_rows(size_t(counts[i])),
                          part(quant_mins),
                          part(quant_maxs),
                          std::nullopt,
                          std::nullopt,
                          scale_mins[i],
                          scale_maxs[i]};
      if (channel_axes[i] != no_axis) how.channel_axis = channel_axes[i];
      return how;
    }

    /// Checks a layer; its weight has to be dense and on the device of the first.
    void check(size_t i, const Quantization& how) const {
      check_arguments(weights[i], scales[i], how);
      LIMPQ_CHECK("ValueError", is_dense(weights[i]), "weight bank: the memory of weight ", i,
                  " has gaps or overlaps");
      LIMPQ_CHECK("ValueError", weights[i].device() == weights[0].device(), "weight bank: weight ",
                  i, " is on another device than weight 0");
    }
  };

  static void bank_forward(const std::vector<Tensor>& weights, const std::vector<Tensor>& scales,
                           const std::vector<Tensor>& outputs, const std::vector<int64_t>& counts,
                           const std::vector<int64_t>& quant_mins,
                           const std::vector<int64_t>& quant_maxs,
                           const std::vector<int64_t>& channel_axes,
                           const std::vector<double>& scale_mins,
                           const std::vector<double>& scale_maxs) {
    const Bank bank = {weights,    scales,       counts,     quant_mins,
                       quant_maxs, channel_axes, scale_mins, scale_maxs};
    bank.check_lengths();
    LIMPQ_CHECK("ValueError", int64_t(outputs.size()) == bank.total(),
                "weight bank: ", outputs.size(), " outputs for ", bank.total(),
                " quantized weights");
    if (weights.empty()) return;
    std::vector<ForwardProblem> problems;
    std::vector<Tensor> compute_scales;
    std::vector<std::pair<Extent, bool>> extents;  // and whether it is written
    int64_t first = 0;
    for (size_t i = 0; i < bank.layers(); first += counts[i], ++i) {
      const Tensor& weight = weights[i];
      const Quantization how = bank.how(i, first);
      bank.check(i, how);
      compute_scales.push_back(compute_scale_of(scales[i], weight));
      extents.emplace_back(extent_of(weight), false);
      extents.emplace_back(extent_of(compute_scales.back()), false);
      for (int64_t k = 0; k < counts[i]; ++k) {
        const Tensor& output = outputs[first + k];
        LIMPQ_CHECK(
            "ValueError",
            same(output.sizes(), weight.sizes()) && same(output.strides(), weight.strides()) &&
                output.scalar_type() == weight.scalar_type() && output.device() == weight.device(),
            "weight bank: output ", k, " of weight ", i, " is not laid out as the weight is");
        check_storage("weight bank: an output", output);
        extents.emplace_back(extent_of(output), true);
      }
      if (weight.numel() == 0) continue;
      ForwardProblem problem;
      describe(problem, weight, compute_scales.back(), how);
      for (int64_t k = 0; k < counts[i]; ++k) {
        problem.y[k] = outputs[first + k].mutable_data_ptr();
      }
      problems.push_back(problem);
    }
    check_apart(std::move(extents));
    if (problems.empty()) return;
    Device::run_forward(problems.data(), int64_t(problems.size()), weights[0]);
  }

  /// What is written overlaps nothing else.
  static void check_apart(std::vector<std::pair<Extent, bool>> extents) {
    const std::less<const char*> before;
    extents.erase(std::remove_if(extents.begin(), extents.end(),
                                 [](const auto& e) { return e.first.begin == e.first.end; }),
                  extents.end());
    std::sort(extents.begin(), extents.end(),
              [&](const auto& a, const auto& b) { return before(a.first.begin, b.first.begin); });
    const char* read_end = nullptr;
    const char* written_end = nullptr;
    for (const auto& [extent, written] : extents) {
      const bool overlaps =
          before(extent.begin, written_end) || (written && before(extent.begin, read_end));
      LIMPQ_CHECK("ValueError", !overlaps,
                  "weight bank: an output shares memory with another tensor of the bank");
      const char*& end = written ? written_end : read_end;
      end = std::max(end, extent.end, before);
    }
  }

  /// The gradients of the weights and of the scales, of those layers that have a gradient in
  /// `grads`, in order. `places` says which quantized weight each gradient belongs to, ascending.
  static std::tuple<std::vector<Tensor>, std::vector<Tensor>> bank_backward(
      const std::vector<Tensor>& grads, const std::vector<int64_t>& places,
      const std::vector<Tensor>& weights, const std::vector<Tensor>& scales,
      const std::vector<int64_t>& counts, const std::vector<int64_t>& quant_mins,
      const std::vector<int64_t>& quant_maxs, const std::vector<int64_t>& channel_axes,
      const std::vector<double>& scale_mins, const std::vector<double>& scale_maxs) {
    const Bank bank = {weights,    scales,       counts,     quant_mins,
                       quant_maxs, channel_axes, scale_mins, scale_maxs};
    bank.check_lengths();
    LIMPQ_CHECK("ValueError", grads.size() == places.size(), "weight bank: ", grads.size(),
                " gradients for ", places.size(), " quantized weights");
    for (size_t i = 0; i < places.size(); ++i) {
      const int64_t lowest = i == 0 ? 0 : places[i - 1] + 1;
      LIMPQ_CHECK("IndexError", places[i] >= lowest && places[i] < bank.total(),
                  "weight bank: quantized weight ", places[i], " of ", bank.total(),
                  " is none or out of order");
    }
    std::vector<Tensor> dweights, dscales, kept;
    std::vector<BackwardProblem> problems;
    std::vector<size_t> used;  // the layers that have a gradient
    size_t next = 0;
    int64_t first = 0;
    for (size_t i = 0; i < bank.layers(); first += counts[i], ++i) {
      if (next == places.size() || places[next] >= first + counts[i]) continue;
      used.push_back(i);
      const Tensor& weight = weights[i];
      const Quantization how = bank.how(i, first);
      bank.check(i, how);
      const Tensor compute_scale = compute_scale_of(scales[i], weight);
      const Tensor dscale = empty_as(compute_scale);
      dweights.push_back(empty_as(weight));
      dscales.push_back(dscale);
      BackwardProblem problem;
      std::fill_n(problem.grad, max_bit_widths, nullptr);
      for (; next < places.size() && places[next] < first + counts[i]; ++next) {
        kept.push_back(gradient_for(weight, grads[next]));
        problem.grad[places[next] - first] = kept.back().const_data_ptr();
      }
      if (weight.numel() == 0) {
        fill_with_zeros(dscale);
        continue;
      }
      describe(problem, weight, compute_scale, how);
      set_grad_factors(problem, weight, how);
      kept.push_back(compute_scale);
      problem.dx = dweights.back().mutable_data_ptr();
      problem.dscale = dscale.mutable_data_ptr();
      problems.push_back(problem);
    }
    if (!problems.empty()) run_backward(problems.data(), int64_t(problems.size()), weights[0]);
    for (size_t at = 0; at < used.size(); ++at) {
      dscales[at] = in_type_of(scales[used[at]], dscales[at]);
    }
    return {std::move(dweights), std::move(dscales)};
  }

  // --- what the errors add to the loss

  /// The scales as a row for each bit-width with the one scale of the tensor for each of `groups`.
  static Tensor repeated(const Tensor& scale, int64_t rows, int64_t groups) {
    const int64_t sizes[] = {rows, groups}, strides[] = {groups, 1}, column[] = {rows, 1};
    const Tensor row_for_each = empty_strided({sizes, 2}, {strides, 2}, scale.scalar_type(), scale);
    const Tensor source = torch::stable::view(scale, {column, 2});
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(row_for_each.get(), source.get(), 0));
    return row_for_each;
  }

  /// [2, bit-widths, groups]: the sums of grad * error and of its square.
  static Tensor quantization_error_sums(const Tensor& x, const Tensor& grad, const Tensor& scale,
                                        const std::vector<int64_t>& quant_mins,
                                        const std::vector<int64_t>& quant_maxs,
                                        std::optional<int64_t> channel_axis,
                                        std::optional<int64_t> sum_axis, double scale_min,
                                        double scale_max, std::optional<double> relu_max) {
    Quantization how = {first_rows(quant_mins.size()),
                        quant_mins,
                        quant_maxs,
                        std::nullopt,
                        channel_axis,
                        scale_min,
                        scale_max,
                        relu_max};
    check_arguments(x, scale, how);
    if (sum_axis) {
      LIMPQ_CHECK("IndexError", *sum_axis >= -x.dim() && *sum_axis < x.dim(),
                  "quantization_error_sums: sum_axis is ", *sum_axis, ", but x has ", x.dim(),
                  " dimensions");
      const bool fit =
          !channel_axis || channel_axis_of(x, *channel_axis) == channel_axis_of(x, *sum_axis);
      LIMPQ_CHECK("ValueError", fit, "quantization_error_sums: sum_axis is ", *sum_axis,
                  ", but the scales are along axis ", channel_axis.value_or(0));
    }
    const Tensor x_dense = as_dense(x);
    const Tensor dense_grad = gradient_for(x_dense, grad);
    Tensor compute_scale = compute_scale_of(scale, x_dense);
    how.channel_axis = channel_axis ? channel_axis : sum_axis;
    const int64_t groups = how.channel_axis ? x.size(channel_axis_of(x, *how.channel_axis)) : 1;
    const int64_t sizes[] = {2, how.count(), groups};
    const int64_t strides[] = {how.count() * groups, groups, 1};
    const Tensor sums = empty_strided({sizes, 3}, {strides, 3}, ScalarType::Double, x);
    if (x.numel() == 0) {
      fill_with_zeros(sums);
      return sums;
    }
    if (sum_axis && !channel_axis) compute_scale = repeated(compute_scale, scale.numel(), groups);
    ErrorSumsProblem problem;
    describe(problem, x_dense, compute_scale, how);
    problem.grad = dense_grad.const_data_ptr();
    problem.sums = static_cast<double*>(sums.mutable_data_ptr());
    with_workspaces<Device>(&problem, 1, x_dense,
                            [&] { Device::run_error_sums(problem, x_dense); });
    return sums;
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
    m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
    m.impl("fake_quantize_selected", TORCH_BOX(&fake_quantize_selected));
    m.impl("fake_quantize_selected_backward", TORCH_BOX(&fake_quantize_selected_backward));
    m.impl("bank_forward", TORCH_BOX(&bank_forward));
    m.impl("bank_backward", TORCH_BOX(&bank_backward));
    m.impl("quantization_error_sums", TORCH_BOX(&quantization_error_sums));
  }
};

}  // namespace limpq
