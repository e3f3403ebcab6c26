// The operators: schemas, argument checks, dispatch to CPU and CUDA, and autograd.
//
// Autograd stands here and not in Python because a Python autograd function costs more than the
// kernels do on small tensors. Shapes for torch.compile (fake kernels) are in limpq_ext/ops.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/fake_quantize.h"
#if defined(LIMPQ_WITH_CUDA)
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <utility>

#include "cuda/fake_quantize.h"
#endif

namespace limpq {
namespace {

using at::Tensor;

// --- arguments --------------------------------------------------------------------------------

/// How a call uses its scales; one entry per bit-width in the four lists.
struct Quantization {
  std::vector<int64_t> scale_rows;
  std::vector<int64_t> quant_mins;
  std::vector<int64_t> quant_maxs;
  std::vector<double> grad_factors;
  std::optional<int64_t> channel_axis;
  double scale_min;
  double scale_max;

  int64_t count() const { return int64_t(scale_rows.size()); }
};

// round() in lsq.h is exact up to this magnitude; 16 bits, the most that is used, need 2^16.
constexpr int64_t largest_threshold = int64_t(1) << 22;

DataType data_type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DataType::float32;
    case at::kDouble:
      return DataType::float64;
    case at::kHalf:
      return DataType::float16;
    case at::kBFloat16:
      return DataType::bfloat16;
    default:
      TORCH_CHECK_TYPE(false, "fake_quantize: x has dtype ", x.scalar_type(),
                       ", expected float32, float64, float16 or bfloat16");
  }
}

at::ScalarType compute_type_of(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// The channel axis counted from the front, checked.
int64_t channel_axis_of(const Tensor& x, int64_t axis) {
  TORCH_CHECK_INDEX(axis >= -x.dim() && axis < x.dim(), "fake_quantize: channel_axis is ", axis,
                    ", but x has ", x.dim(), " dimensions");
  return axis < 0 ? axis + x.dim() : axis;
}

void check_arguments(const Tensor& x, const Tensor& scale, const Quantization& how) {
  data_type_of(x);
  TORCH_CHECK_TYPE(at::isFloatingType(scale.scalar_type()), "fake_quantize: scale has dtype ",
                   scale.scalar_type(), ", expected a floating-point dtype");
  TORCH_CHECK_VALUE(x.device() == scale.device(), "fake_quantize: x is on ", x.device(),
                    " and scale on ", scale.device());
  const int64_t count = how.count();
  TORCH_CHECK_VALUE(count >= 1 && count <= max_bit_widths, "fake_quantize: ", count,
                    " bit-widths in one call, expected 1 to ", max_bit_widths);
  TORCH_CHECK_VALUE(int64_t(how.quant_mins.size()) == count, "fake_quantize: quant_mins has ",
                    how.quant_mins.size(), " entries for ", count, " bit-widths");
  TORCH_CHECK_VALUE(int64_t(how.quant_maxs.size()) == count, "fake_quantize: quant_maxs has ",
                    how.quant_maxs.size(), " entries for ", count, " bit-widths");
  TORCH_CHECK_VALUE(int64_t(how.grad_factors.size()) == count, "fake_quantize: grad_factors has ",
                    how.grad_factors.size(), " entries for ", count, " bit-widths");
  int64_t channels = 1;
  if (how.channel_axis) {
    channels = x.size(channel_axis_of(x, *how.channel_axis));
    TORCH_CHECK_VALUE(scale.dim() >= 1 && scale.size(-1) == channels,
                      "fake_quantize: scale has shape ", scale.sizes(), " for ", channels,
                      " channels along axis ", *how.channel_axis);
    TORCH_CHECK_VALUE(scale.dim() <= 2, "fake_quantize: scale has shape ", scale.sizes(),
                      ", expected [channels] or [bit-widths, channels]");
  } else {
    TORCH_CHECK_VALUE(scale.dim() <= 1, "fake_quantize: scale has shape ", scale.sizes(),
                      ", expected a scalar or [bit-widths]; pass channel_axis to quantize per "
                      "channel");
  }
  const int64_t rows =
      channels == 0 ? (scale.dim() == 2 ? scale.size(0) : 1) : scale.numel() / channels;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t row = how.scale_rows[k];
    TORCH_CHECK_INDEX(row >= 0 && row < rows, "fake_quantize: scale row ", row,
                      " does not exist, scale has ", rows, " rows");
    for (int64_t other = 0; other < k; ++other) {
      TORCH_CHECK_VALUE(how.scale_rows[other] != row, "fake_quantize: scale row ", row,
                        " is used for two bit-widths");
    }
    const int64_t quant_min = how.quant_mins[k], quant_max = how.quant_maxs[k];
    TORCH_CHECK_VALUE(quant_min <= 0 && quant_max > 0, "fake_quantize: thresholds are ", quant_min,
                      " and ", quant_max, ", expected quant_min <= 0 < quant_max");
    TORCH_CHECK_VALUE(quant_min >= -largest_threshold && quant_max <= largest_threshold,
                      "fake_quantize: thresholds are ", quant_min, " and ", quant_max,
                      ", beyond the largest magnitude, ", largest_threshold);
  }
  TORCH_CHECK_VALUE(how.scale_min > 0, "fake_quantize: scale_min is ", how.scale_min,
                    ", expected a positive number");
  TORCH_CHECK_VALUE(how.scale_max >= how.scale_min, "fake_quantize: scale_max is ", how.scale_max,
                    ", below scale_min ", how.scale_min);
}

/// x itself where its memory has no gaps, else a copy that keeps the order of the axes.
Tensor as_dense(const Tensor& x) {
  return x.is_non_overlapping_and_dense() ? x : at::clone(x, at::MemoryFormat::Preserve);
}

/// `grad` laid out in memory as `x` is; a copy only where it is not.
Tensor with_layout_of(const Tensor& grad, const Tensor& x) {
  if (grad.strides() == x.strides() && grad.scalar_type() == x.scalar_type()) return grad;
  return at::empty_like(x).copy_(grad);
}

void describe(Problem& problem, const Tensor& x, const Tensor& scale, const Quantization& how) {
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
  problem.count = int(how.count());
  problem.x = x.const_data_ptr();
  problem.scale = scale.const_data_ptr();
  problem.scale_rows = problem.channels == 0 ? 0 : scale.numel() / problem.channels;
  for (int64_t k = 0; k < how.count(); ++k) {
    problem.scale_row[k] = how.scale_rows[k];
    problem.quant_min[k] = double(how.quant_mins[k]);
    problem.quant_max[k] = double(how.quant_maxs[k]);
  }
  problem.scale_min = how.scale_min;
  problem.scale_max = how.scale_max;
}

// --- devices ----------------------------------------------------------------------------------

void run_on_cpu(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, tasks, 1, body);
}

#if defined(LIMPQ_WITH_CUDA)
/// Zeroed counters for a backward call (see cuda/fake_quantize.h): one buffer per device and
/// stream, kept, or one of its own for a call that is being captured into a graph.
Tensor counters_for(const Tensor& x, int64_t bytes) {
  const auto zeros = [&] { return at::zeros({bytes}, x.options().dtype(at::kByte)); };
  if (bytes == 0) return Tensor();
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return zeros();
  }
  static std::mutex mutex;
  // Never destroyed: at the end of the process the CUDA driver may be gone first.
  static auto& held = *new std::map<std::pair<int, c10::StreamId>, Tensor>();
  const std::lock_guard<std::mutex> lock(mutex);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  Tensor& counters = held[{stream.device_index(), stream.id()}];
  if (!counters.defined() || counters.numel() < bytes) counters = zeros();
  return counters;
}
#endif

void run_forward(const ForwardProblem& problem, const Tensor& x) {
#if defined(LIMPQ_WITH_CUDA)
  if (x.is_cuda()) {
    const c10::cuda::CUDAGuard guard(x.device());
    return cuda::fake_quantize_forward(problem, c10::cuda::getCurrentCUDAStream());
  }
#endif
  cpu::fake_quantize_forward(problem, run_on_cpu);
}

void run_backward(BackwardProblem& problem, const Tensor& x) {
  const auto bytes = x.options().dtype(at::kByte);
#if defined(LIMPQ_WITH_CUDA)
  if (x.is_cuda()) {
    const c10::cuda::CUDAGuard guard(x.device());
    const Tensor workspace = at::empty({cuda::backward_workspace_bytes(problem)}, bytes);
    problem.workspace = workspace.mutable_data_ptr();
    const Tensor counters = counters_for(x, cuda::backward_counter_bytes(problem));
    problem.counters = counters.defined() ? counters.mutable_data_ptr() : nullptr;
    return cuda::fake_quantize_backward(problem, c10::cuda::getCurrentCUDAStream());
  }
#endif
  const Tensor workspace = at::empty({cpu::backward_workspace_bytes(problem)}, bytes);
  problem.workspace = workspace.mutable_data_ptr();
  cpu::fake_quantize_backward(problem, run_on_cpu);
}

/// Quantizes x into `outputs`, which are laid out as x_dense is.
void forward_into(const Tensor& x_dense, const Tensor& scale, const Quantization& how,
                  const std::vector<Tensor>& outputs) {
  const Tensor compute_scale = scale.to(compute_type_of(x_dense)).contiguous();
  ForwardProblem problem;
  describe(problem, x_dense, compute_scale, how);
  for (size_t k = 0; k < outputs.size(); ++k) problem.y[k] = outputs[k].mutable_data_ptr();
  run_forward(problem, x_dense);
}

/// dx and dscale; an undefined gradient belongs to a bit-width that was not used.
std::tuple<Tensor, Tensor> backward_of(const std::vector<Tensor>& grads, const Tensor& x,
                                       const Tensor& scale, const Quantization& how) {
  check_arguments(x, scale, how);
  TORCH_CHECK_VALUE(int64_t(grads.size()) == how.count(), "fake_quantize_backward: ", grads.size(),
                    " gradients for ", how.count(), " bit-widths");
  const Tensor x_dense = as_dense(x);
  const Tensor compute_scale = scale.to(compute_type_of(x)).contiguous();
  const Tensor dx = at::empty_like(x_dense);
  const Tensor dscale = at::empty_like(compute_scale);
  BackwardProblem problem;
  describe(problem, x_dense, compute_scale, how);
  std::vector<Tensor> keep_alive;
  for (int64_t k = 0; k < how.count(); ++k) {
    problem.grad[k] = nullptr;
    problem.grad_factor[k] = how.grad_factors[k];
    if (!grads[k].defined()) continue;
    TORCH_CHECK_VALUE(grads[k].sizes() == x.sizes(), "fake_quantize_backward: gradient has shape ",
                      grads[k].sizes(), ", x has ", x.sizes());
    keep_alive.push_back(with_layout_of(grads[k], x_dense));
    problem.grad[k] = keep_alive.back().const_data_ptr();
  }
  problem.dx = dx.mutable_data_ptr();
  problem.dscale = dscale.mutable_data_ptr();
  run_backward(problem, x_dense);
  return {dx, dscale.to(scale.scalar_type())};
}

// --- operators --------------------------------------------------------------------------------

Quantization one_bit_width(int64_t scale_row, int64_t quant_min, int64_t quant_max,
                           std::optional<int64_t> channel_axis, double grad_factor,
                           double scale_min, double scale_max) {
  return {{scale_row}, {quant_min}, {quant_max}, {grad_factor}, channel_axis, scale_min, scale_max};
}

Quantization many_bit_widths(at::IntArrayRef scale_rows, at::IntArrayRef quant_mins,
                             at::IntArrayRef quant_maxs, std::optional<int64_t> channel_axis,
                             at::ArrayRef<double> grad_factors, double scale_min,
                             double scale_max) {
  return {scale_rows.vec(), quant_mins.vec(), quant_maxs.vec(), grad_factors.vec(),
          channel_axis,     scale_min,        scale_max};
}

Tensor fake_quantize(const Tensor& x, const Tensor& scale, int64_t scale_row, int64_t quant_min,
                     int64_t quant_max, std::optional<int64_t> channel_axis, double grad_factor,
                     double scale_min, double scale_max) {
  const auto how = one_bit_width(scale_row, quant_min, quant_max, channel_axis, grad_factor,
                                 scale_min, scale_max);
  check_arguments(x, scale, how);
  const Tensor x_dense = as_dense(x);
  const Tensor y = at::empty_like(x_dense);
  forward_into(x_dense, scale, how, {y});
  return y;
}

std::tuple<Tensor, Tensor> fake_quantize_backward(const Tensor& grad, const Tensor& x,
                                                  const Tensor& scale, int64_t scale_row,
                                                  int64_t quant_min, int64_t quant_max,
                                                  std::optional<int64_t> channel_axis,
                                                  double grad_factor, double scale_min,
                                                  double scale_max) {
  return backward_of({grad}, x, scale,
                     one_bit_width(scale_row, quant_min, quant_max, channel_axis, grad_factor,
                                   scale_min, scale_max));
}

Tensor fake_quantize_multi(const Tensor& x, const Tensor& scale, at::IntArrayRef scale_rows,
                           at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs,
                           std::optional<int64_t> channel_axis, at::ArrayRef<double> grad_factors,
                           double scale_min, double scale_max) {
  const auto how = many_bit_widths(scale_rows, quant_mins, quant_maxs, channel_axis, grad_factors,
                                   scale_min, scale_max);
  check_arguments(x, scale, how);
  const Tensor x_dense = as_dense(x);
  // One buffer; each bit-width's slice is laid out in memory as x is.
  auto sizes = x.sizes().vec();
  auto strides = x_dense.strides().vec();
  sizes.insert(sizes.begin(), how.count());
  strides.insert(strides.begin(), std::max<int64_t>(x.numel(), 1));
  const Tensor y = at::empty_strided(sizes, strides, x.options());
  forward_into(x_dense, scale, how, y.unbind(0));
  return y;
}

std::tuple<Tensor, Tensor> fake_quantize_multi_backward(
    const c10::List<std::optional<Tensor>>& grads, const Tensor& x, const Tensor& scale,
    at::IntArrayRef scale_rows, at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs,
    std::optional<int64_t> channel_axis, at::ArrayRef<double> grad_factors, double scale_min,
    double scale_max) {
  std::vector<Tensor> gradients;
  for (const std::optional<Tensor>& grad : grads) gradients.push_back(grad.value_or(Tensor()));
  return backward_of(gradients, x, scale,
                     many_bit_widths(scale_rows, quant_mins, quant_maxs, channel_axis, grad_factors,
                                     scale_min, scale_max));
}

// --- autograd ---------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

#define LIMPQ_OPERATOR(function)                                              \
  const c10::TypedOperatorHandle<decltype(function)>& function##_operator() { \
    static const auto found = c10::Dispatcher::singleton()                    \
                                  .findSchemaOrThrow("limpq::" #function, "") \
                                  .typed<decltype(function)>();               \
    return found;                                                             \
  }
LIMPQ_OPERATOR(fake_quantize)
LIMPQ_OPERATOR(fake_quantize_backward)
LIMPQ_OPERATOR(fake_quantize_multi)
LIMPQ_OPERATOR(fake_quantize_multi_backward)
#undef LIMPQ_OPERATOR

void save_channel_axis(AutogradContext* context, std::optional<int64_t> channel_axis) {
  context->saved_data["channel_axis"] = c10::IValue(channel_axis);
}

/// Only x is saved that is as large as x; v and the rounded value are computed again.
class FakeQuantize : public torch::autograd::Function<FakeQuantize> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& scale,
                        int64_t scale_row, int64_t quant_min, int64_t quant_max,
                        std::optional<int64_t> channel_axis, double grad_factor, double scale_min,
                        double scale_max) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, scale});
    auto& saved = context->saved_data;
    saved["scale_row"] = scale_row;
    saved["quant_min"] = quant_min;
    saved["quant_max"] = quant_max;
    save_channel_axis(context, channel_axis);
    saved["grad_factor"] = grad_factor;
    saved["scale_min"] = scale_min;
    saved["scale_max"] = scale_max;
    return fake_quantize_operator().call(x, scale, scale_row, quant_min, quant_max, channel_axis,
                                         grad_factor, scale_min, scale_max);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& saved = context->saved_data;
    const auto tensors = context->get_saved_variables();
    auto [dx, dscale] = fake_quantize_backward_operator().call(
        grads[0], tensors[0], tensors[1], saved["scale_row"].toInt(), saved["quant_min"].toInt(),
        saved["quant_max"].toInt(), saved["channel_axis"].toOptional<int64_t>(),
        saved["grad_factor"].toDouble(), saved["scale_min"].toDouble(),
        saved["scale_max"].toDouble());
    return {dx, dscale, {}, {}, {}, {}, {}, {}, {}};
  }
};

class FakeQuantizeMulti : public torch::autograd::Function<FakeQuantizeMulti> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& scale,
                        at::IntArrayRef scale_rows, at::IntArrayRef quant_mins,
                        at::IntArrayRef quant_maxs, std::optional<int64_t> channel_axis,
                        at::ArrayRef<double> grad_factors, double scale_min, double scale_max) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, scale});
    auto& saved = context->saved_data;
    saved["scale_rows"] = scale_rows.vec();
    saved["quant_mins"] = quant_mins.vec();
    saved["quant_maxs"] = quant_maxs.vec();
    save_channel_axis(context, channel_axis);
    saved["grad_factors"] = grad_factors.vec();
    saved["scale_min"] = scale_min;
    saved["scale_max"] = scale_max;
    return fake_quantize_multi_operator().call(x, scale, scale_rows, quant_mins, quant_maxs,
                                               channel_axis, grad_factors, scale_min, scale_max);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& saved = context->saved_data;
    const auto tensors = context->get_saved_variables();
    c10::List<std::optional<Tensor>> by_bit_width;
    for (const Tensor& grad : grads[0].unbind(0)) by_bit_width.push_back(grad);
    auto [dx, dscale] = fake_quantize_multi_backward_operator().call(
        by_bit_width, tensors[0], tensors[1], saved["scale_rows"].toIntVector(),
        saved["quant_mins"].toIntVector(), saved["quant_maxs"].toIntVector(),
        saved["channel_axis"].toOptional<int64_t>(), saved["grad_factors"].toDoubleVector(),
        saved["scale_min"].toDouble(), saved["scale_max"].toDouble());
    return {dx, dscale, {}, {}, {}, {}, {}, {}, {}};
  }
};

Tensor fake_quantize_autograd(const Tensor& x, const Tensor& scale, int64_t scale_row,
                              int64_t quant_min, int64_t quant_max,
                              std::optional<int64_t> channel_axis, double grad_factor,
                              double scale_min, double scale_max) {
  return FakeQuantize::apply(x, scale, scale_row, quant_min, quant_max, channel_axis, grad_factor,
                             scale_min, scale_max);
}

Tensor fake_quantize_multi_autograd(const Tensor& x, const Tensor& scale,
                                    at::IntArrayRef scale_rows, at::IntArrayRef quant_mins,
                                    at::IntArrayRef quant_maxs, std::optional<int64_t> channel_axis,
                                    at::ArrayRef<double> grad_factors, double scale_min,
                                    double scale_max) {
  return FakeQuantizeMulti::apply(x, scale, scale_rows, quant_mins, quant_maxs, channel_axis,
                                  grad_factors, scale_min, scale_max);
}

/// The backward operators have no derivative; asking for one is an error, not a wrong number.
class RefuseSecondDerivative : public torch::autograd::Function<RefuseSecondDerivative> {
 public:
  static variable_list forward(AutogradContext*, const Tensor& dx, const Tensor& dscale,
                               const Tensor& /*an input that needs a gradient*/) {
    return {dx.view_as(dx), dscale.view_as(dscale)};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "fake_quantize has no second derivative: its straight-through gradient is not the "
        "derivative of any function. Call backward() without create_graph=True.");
  }
};

std::tuple<Tensor, Tensor> without_derivative(std::tuple<Tensor, Tensor> gradients,
                                              const std::vector<Tensor>& inputs) {
  if (!at::GradMode::is_enabled()) return gradients;
  const auto input = std::find_if(inputs.begin(), inputs.end(),
                                  [](const Tensor& t) { return t.defined() && t.requires_grad(); });
  if (input == inputs.end()) return gradients;
  const auto refused =
      RefuseSecondDerivative::apply(std::get<0>(gradients), std::get<1>(gradients), *input);
  return {refused[0], refused[1]};
}

std::tuple<Tensor, Tensor> fake_quantize_backward_autograd(const Tensor& grad, const Tensor& x,
                                                           const Tensor& scale, int64_t scale_row,
                                                           int64_t quant_min, int64_t quant_max,
                                                           std::optional<int64_t> channel_axis,
                                                           double grad_factor, double scale_min,
                                                           double scale_max) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return fake_quantize_backward_operator().call(grad, x, scale, scale_row, quant_min, quant_max,
                                                  channel_axis, grad_factor, scale_min, scale_max);
  };
  return without_derivative(compute(), {grad, x, scale});
}

std::tuple<Tensor, Tensor> fake_quantize_multi_backward_autograd(
    const c10::List<std::optional<Tensor>>& grads, const Tensor& x, const Tensor& scale,
    at::IntArrayRef scale_rows, at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs,
    std::optional<int64_t> channel_axis, at::ArrayRef<double> grad_factors, double scale_min,
    double scale_max) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return fake_quantize_multi_backward_operator().call(grads, x, scale, scale_rows, quant_mins,
                                                        quant_maxs, channel_axis, grad_factors,
                                                        scale_min, scale_max);
  };
  std::vector<Tensor> inputs = {x, scale};
  for (const std::optional<Tensor>& grad : grads) inputs.push_back(grad.value_or(Tensor()));
  return without_derivative(compute(), inputs);
}

/// torch.vmap would fall back to a loop over slices, each with a launch of its own and each taking
/// its own share of the gradient factor's N: refused, since it is neither fast nor the same thing.
void refuse_vmap(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              " does not support torch.vmap: one call quantizes a whole batch; "
                              "for several scales use channel_axis or fake_quantize_multi.");
}

}  // namespace

TORCH_LIBRARY(limpq, m) {
  m.def(
      "fake_quantize(Tensor x, Tensor scale, int scale_row, int quant_min, int quant_max, "
      "int? channel_axis, float grad_factor, float scale_min, float scale_max) -> Tensor");
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, int scale_row, int quant_min, "
      "int quant_max, int? channel_axis, float grad_factor, float scale_min, float scale_max) "
      "-> (Tensor, Tensor)");
  m.def(
      "fake_quantize_multi(Tensor x, Tensor scale, int[] scale_rows, int[] quant_mins, "
      "int[] quant_maxs, int? channel_axis, float[] grad_factors, float scale_min, "
      "float scale_max) -> Tensor");
  m.def(
      "fake_quantize_multi_backward(Tensor?[] grads, Tensor x, Tensor scale, int[] scale_rows, "
      "int[] quant_mins, int[] quant_maxs, int? channel_axis, float[] grad_factors, "
      "float scale_min, float scale_max) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(limpq, CPU, m) {
  m.impl("fake_quantize", fake_quantize);
  m.impl("fake_quantize_backward", fake_quantize_backward);
  m.impl("fake_quantize_multi", fake_quantize_multi);
  m.impl("fake_quantize_multi_backward", fake_quantize_multi_backward);
}

#if defined(LIMPQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(limpq, CUDA, m) {
  m.impl("fake_quantize", fake_quantize);
  m.impl("fake_quantize_backward", fake_quantize_backward);
  m.impl("fake_quantize_multi", fake_quantize_multi);
  m.impl("fake_quantize_multi_backward", fake_quantize_multi_backward);
}
#endif

TORCH_LIBRARY_IMPL(limpq, Autograd, m) {
  m.impl("fake_quantize", fake_quantize_autograd);
  m.impl("fake_quantize_backward", fake_quantize_backward_autograd);
  m.impl("fake_quantize_multi", fake_quantize_multi_autograd);
  m.impl("fake_quantize_multi_backward", fake_quantize_multi_backward_autograd);
}

TORCH_LIBRARY_IMPL(limpq, FuncTorchBatched, m) {
  for (const char* name : {"fake_quantize", "fake_quantize_backward", "fake_quantize_multi",
                           "fake_quantize_multi_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_vmap>());
  }
}

}  // namespace limpq
