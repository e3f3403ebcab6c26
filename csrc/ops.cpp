// The operators: schemas, argument checks, dispatch to CPU and CUDA, and autograd.
//
// Autograd stands here and not in Python because a Python autograd function costs more than the
// kernels do on small tensors. Shapes for torch.compile (fake kernels) are in limpq_ext/ops.py.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "problems.h"

namespace limpq {
namespace {

using at::Tensor;

// --- one problem ------------------------------------------------------------------------------

/// A tensor laid out in memory as a dense one is. Spares the second trip through the dispatcher
/// that empty_like takes, and in_type_of the one of a conversion that changes nothing: on small
/// tensors these cost as much as the kernel.
Tensor empty_as(const Tensor& dense) {
  return at::empty_strided(dense.sizes(), dense.strides(), dense.options());
}

Tensor in_type_of(const Tensor& scale, Tensor dscale) {
  return dscale.scalar_type() == scale.scalar_type() ? dscale : dscale.to(scale.scalar_type());
}

/// Where a tensor on a GPU selects the bit-width: only one of the candidates is used.
void select(Problem& problem, const int64_t* selected) {
  if (selected == nullptr) return;
  problem.selected = selected;
  problem.count = 1;
}

/// Quantizes x into y, where each bit-width has memory that is laid out as x_dense is.
void forward_into(const Tensor& y, int64_t bytes_between, const Tensor& x_dense,
                  const Tensor& scale, const Quantization& how, const int64_t* selected = nullptr) {
  if (x_dense.numel() == 0) return;
  const Tensor compute_scale = compute_scale_of(scale, x_dense);
  ForwardProblem problem;
  describe(problem, x_dense, compute_scale, how);
  char* output = static_cast<char*>(y.mutable_data_ptr());
  for (int k = 0; k < problem.count; ++k) problem.y[k] = output + k * bytes_between;
  select(problem, selected);
  run_forward(&problem, 1, x_dense);
}

/// dx and dscale; an undefined gradient belongs to a bit-width that was not used.
std::tuple<Tensor, Tensor> backward_of(at::TensorList grads, const Tensor& x, const Tensor& scale,
                                       const Quantization& how, const int64_t* selected = nullptr) {
  check_arguments(x, scale, how);
  check_bit_widths(how);
  const int64_t used = selected == nullptr ? how.count() : 1;
  TORCH_CHECK_VALUE(int64_t(grads.size()) == used, "fake_quantize_backward: ", grads.size(),
                    " gradients for ", used, " bit-widths");
  const Tensor x_dense = as_dense(x);
  const Tensor compute_scale = compute_scale_of(scale, x);
  const Tensor dx = empty_as(x_dense);
  const Tensor dscale = empty_as(compute_scale);
  BackwardProblem problem;
  describe(problem, x_dense, compute_scale, how);
  c10::SmallVector<Tensor, 1> keep_alive;
  for (int64_t k = 0; k < how.count(); ++k) {
    problem.grad[k] = nullptr;
    problem.grad_factor[k] = how.grad_factors[k];
    if (k >= used) {
      problem.grad[k] = problem.grad[0];
    } else if (grads[k].defined()) {
      keep_alive.push_back(gradient_for(x_dense, grads[k]));
      problem.grad[k] = keep_alive.back().const_data_ptr();
    }
  }
  select(problem, selected);
  problem.dx = dx.mutable_data_ptr();
  problem.dscale = dscale.mutable_data_ptr();
  problem.adds_to_dscale = false;
  run_backward(&problem, 1, x_dense);
  return {dx, in_type_of(scale, dscale)};
}

Tensor fake_quantize(const Tensor& x, const Tensor& scale, int64_t scale_row, int64_t quant_min,
                     int64_t quant_max, std::optional<int64_t> channel_axis, double grad_factor,
                     double scale_min, double scale_max, std::optional<double> relu_max) {
  const Quantization how = {scale_row,    quant_min, quant_max, grad_factor,
                            channel_axis, scale_min, scale_max, relu_max};
  check_arguments(x, scale, how);
  const Tensor x_dense = as_dense(x);
  const Tensor y = empty_as(x_dense);
  forward_into(y, 0, x_dense, scale, how);
  return y;
}

std::tuple<Tensor, Tensor> fake_quantize_backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, int64_t scale_row, int64_t quant_min,
    int64_t quant_max, std::optional<int64_t> channel_axis, double grad_factor, double scale_min,
    double scale_max, std::optional<double> relu_max) {
  return backward_of(
      grad, x, scale,
      {scale_row, quant_min, quant_max, grad_factor, channel_axis, scale_min, scale_max, relu_max});
}

Tensor fake_quantize_multi(const Tensor& x, const Tensor& scale, at::IntArrayRef scale_rows,
                           at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs,
                           std::optional<int64_t> channel_axis, at::ArrayRef<double> grad_factors,
                           double scale_min, double scale_max, std::optional<double> relu_max) {
  const Quantization how = {scale_rows,   quant_mins, quant_maxs, grad_factors,
                            channel_axis, scale_min,  scale_max,  relu_max};
  check_arguments(x, scale, how);
  check_bit_widths(how);
  const Tensor x_dense = as_dense(x);
  // One buffer; each bit-width's slice is laid out in memory as x is.
  auto sizes = x.sizes().vec();
  auto strides = x_dense.strides().vec();
  sizes.insert(sizes.begin(), how.count());
  strides.insert(strides.begin(), std::max<int64_t>(x.numel(), 1));
  const Tensor y = at::empty_strided(sizes, strides, x.options());
  forward_into(y, x.numel() * x.element_size(), x_dense, scale, how);
  return y;
}

std::tuple<Tensor, Tensor> fake_quantize_multi_backward(
    const c10::List<std::optional<Tensor>>& grads, const Tensor& x, const Tensor& scale,
    at::IntArrayRef scale_rows, at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs,
    std::optional<int64_t> channel_axis, at::ArrayRef<double> grad_factors, double scale_min,
    double scale_max, std::optional<double> relu_max) {
  std::vector<Tensor> gradients;
  for (const std::optional<Tensor>& grad : grads) gradients.push_back(grad.value_or(Tensor()));
  return backward_of(gradients, x, scale,
                     {scale_rows, quant_mins, quant_maxs, grad_factors, channel_axis, scale_min,
                      scale_max, relu_max});
}

// --- one problem whose bit-width a tensor names --------------------------------------------------

/// The candidates of a call that uses one of them, and which.
struct Candidates {
  c10::SmallVector<int64_t, max_bit_widths> rows;
  Quantization all;

  Candidates(at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs,
             at::ArrayRef<double> grad_factors, std::optional<int64_t> channel_axis,
             double scale_min, double scale_max, std::optional<double> relu_max)
      : rows(quant_mins.size()), all{rows,         quant_mins, quant_maxs, grad_factors,
                                     channel_axis, scale_min,  scale_max,  relu_max} {
    for (size_t k = 0; k < rows.size(); ++k) rows[k] = int64_t(k);
    all.scale_rows = rows;
  }
  Candidates(const Candidates&) = delete;
  Candidates& operator=(const Candidates&) = delete;

  Quantization only(int64_t k) const {
    Quantization one = all;
    one.scale_rows = all.scale_rows.slice(k, 1);
    one.quant_mins = all.quant_mins.slice(k, 1);
    one.quant_maxs = all.quant_maxs.slice(k, 1);
    one.grad_factors = all.grad_factors.slice(k, 1);
    return one;
  }
};

void check_candidates(const Tensor& x, const Tensor& scale, const Tensor& selected,
                      const Candidates& candidates) {
  check_arguments(x, scale, candidates.all);
  check_bit_widths(candidates.all);
  TORCH_CHECK_TYPE(selected.scalar_type() == at::kLong,
                   "fake_quantize_selected: selected has dtype ", selected.scalar_type(),
                   ", expected int64");
  TORCH_CHECK_VALUE(selected.numel() == 1, "fake_quantize_selected: selected has shape ",
                    selected.sizes(), ", expected one element");
  TORCH_CHECK_VALUE(selected.device() == x.device(), "fake_quantize_selected: selected is on ",
                    selected.device(), " and x on ", x.device());
}

/// Which bit-width is meant, where reading it costs nothing; on a GPU the kernel reads it.
int64_t selected_on_cpu(const Tensor& selected, const Candidates& candidates) {
  const int64_t k = *selected.const_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(k >= 0 && k < candidates.all.count(), "fake_quantize_selected: selected is ", k,
                    ", expected 0 to ", candidates.all.count() - 1);
  return k;
}

Tensor fake_quantize_selected(const Tensor& x, const Tensor& scale, const Tensor& selected,
                              at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs,
                              std::optional<int64_t> channel_axis,
                              at::ArrayRef<double> grad_factors, double scale_min, double scale_max,
                              std::optional<double> relu_max) {
  const Candidates candidates(quant_mins, quant_maxs, grad_factors, channel_axis, scale_min,
                              scale_max, relu_max);
  check_candidates(x, scale, selected, candidates);
  const Tensor x_dense = as_dense(x);
  const Tensor y = empty_as(x_dense);
  if (x.is_cpu()) {
    forward_into(y, 0, x_dense, scale, candidates.only(selected_on_cpu(selected, candidates)));
  } else {
    forward_into(y, 0, x_dense, scale, candidates.all, selected.const_data_ptr<int64_t>());
  }
  return y;
}

std::tuple<Tensor, Tensor> fake_quantize_selected_backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& selected,
    at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs, std::optional<int64_t> channel_axis,
    at::ArrayRef<double> grad_factors, double scale_min, double scale_max,
    std::optional<double> relu_max) {
  const Candidates candidates(quant_mins, quant_maxs, grad_factors, channel_axis, scale_min,
                              scale_max, relu_max);
  check_candidates(x, scale, selected, candidates);
  if (!x.is_cpu()) {
    return backward_of(grad, x, scale, candidates.all, selected.const_data_ptr<int64_t>());
  }
  return backward_of(grad, x, scale, candidates.only(selected_on_cpu(selected, candidates)));
}

// --- a problem for each part of the batch axis --------------------------------------------------

void check_parts(const Tensor& x, const Tensor& scale, const Quantization& how) {
  check_arguments(x, scale, how);
  const int64_t parts = how.count();
  TORCH_CHECK_VALUE(parts >= 1 && parts <= max_parts, "fake_quantize_grouped: ", parts,
                    " parts in one call, expected 1 to ", max_parts);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(0) % parts == 0, "fake_quantize_grouped: x has shape ",
                    x.sizes(), ", its first axis does not split into ", parts, " equal parts");
  TORCH_CHECK_VALUE(!how.channel_axis || (*how.channel_axis != 0 && *how.channel_axis != -x.dim()),
                    "fake_quantize_grouped: channel_axis is the axis of the parts");
}

/// Dense with axis 0 outermost in memory, so that each part is one piece; else a copy.
Tensor as_dense_parts(const Tensor& x) {
  const Tensor dense = as_dense(x);
  const bool outermost = dense.stride(0) * dense.size(0) == dense.numel();
  return dense.numel() == 0 || outermost ? dense : dense.contiguous();
}

/// The part's own problem: count 1, one scale row.
template <typename P>
P part_problem(int64_t part, const Tensor& x_dense, const Tensor& compute_scale,
               const Quantization& how) {
  const auto one = [&](const auto& list) { return list.slice(part, 1); };
  const int64_t first_row = 0;
  P problem;
  describe(problem, x_dense, compute_scale,
           {first_row, one(how.quant_mins), one(how.quant_maxs), one(how.grad_factors),
            how.channel_axis, how.scale_min, how.scale_max, how.relu_max});
  problem.scale = static_cast<const char*>(problem.scale) +
                  how.scale_rows[part] * problem.channels * compute_scale.element_size();
  problem.scale_rows = 1;
  const int64_t parts = how.count();
  if (problem.channels == 1) {
    problem.inner /= parts;
  } else {
    problem.outer /= parts;
  }
  problem.x = static_cast<const char*>(problem.x) + part * problem.numel() * x_dense.element_size();
  return problem;
}

Tensor fake_quantize_grouped(const Tensor& x, const Tensor& scale, at::IntArrayRef scale_rows,
                             at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs,
                             std::optional<int64_t> channel_axis, at::ArrayRef<double> grad_factors,
                             double scale_min, double scale_max, std::optional<double> relu_max) {
  const Quantization how = {scale_rows,   quant_mins, quant_maxs, grad_factors,
                            channel_axis, scale_min,  scale_max,  relu_max};
  check_parts(x, scale, how);
  const Tensor x_dense = as_dense_parts(x);
  const Tensor y = empty_as(x_dense);
  if (x.numel() == 0) return y;
  const Tensor compute_scale = compute_scale_of(scale, x);
  std::vector<ForwardProblem> problems;
  char* output = static_cast<char*>(y.mutable_data_ptr());
  for (int64_t part = 0; part < how.count(); ++part) {
    auto problem = part_problem<ForwardProblem>(part, x_dense, compute_scale, how);
    problem.y[0] = output + part * problem.numel() * x.element_size();
    problems.push_back(problem);
  }
  run_forward(problems.data(), how.count(), x_dense);
  return y;
}

std::tuple<Tensor, Tensor> fake_quantize_grouped_backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, at::IntArrayRef scale_rows,
    at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs, std::optional<int64_t> channel_axis,
    at::ArrayRef<double> grad_factors, double scale_min, double scale_max,
    std::optional<double> relu_max) {
  const Quantization how = {scale_rows,   quant_mins, quant_maxs, grad_factors,
                            channel_axis, scale_min,  scale_max,  relu_max};
  check_parts(x, scale, how);
  const Tensor x_dense = as_dense_parts(x);
  const Tensor dx = empty_as(x_dense);
  const Tensor compute_scale = compute_scale_of(scale, x);
  if (x.numel() == 0) return {dx, in_type_of(scale, at::zeros_like(compute_scale))};
  const Tensor dense_grad = gradient_for(x_dense, grad);
  // Each part writes its own row; a row without a part has to be zeroed.
  const int64_t rows = compute_scale.dim() == (channel_axis ? 2 : 1) ? compute_scale.size(0) : 1;
  std::vector<bool> has_part(rows, false);
  for (const int64_t row : scale_rows) has_part[row] = true;
  const bool all_rows = std::find(has_part.begin(), has_part.end(), false) == has_part.end();
  const Tensor dscale = all_rows ? empty_as(compute_scale) : at::zeros_like(compute_scale);
  has_part.assign(rows, false);
  std::vector<BackwardProblem> problems;
  for (int64_t part = 0; part < how.count(); ++part) {
    auto problem = part_problem<BackwardProblem>(part, x_dense, compute_scale, how);
    const int64_t offset = part * problem.numel() * x.element_size();
    const int64_t row = scale_rows[part];
    problem.grad[0] = static_cast<const char*>(dense_grad.const_data_ptr()) + offset;
    problem.grad_factor[0] = grad_factors[part];
    problem.dx = static_cast<char*>(dx.mutable_data_ptr()) + offset;
    problem.dscale = static_cast<char*>(dscale.mutable_data_ptr()) +
                     row * problem.channels * dscale.element_size();
    problem.adds_to_dscale = has_part[row];
    has_part[row] = true;
    problems.push_back(problem);
  }
  run_backward(problems.data(), how.count(), x_dense);
  return {dx, in_type_of(scale, dscale)};
}

// --- autograd ---------------------------------------------------------------------------------

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
LIMPQ_OPERATOR(fake_quantize_selected)
LIMPQ_OPERATOR(fake_quantize_selected_backward)
LIMPQ_OPERATOR(fake_quantize_grouped)
LIMPQ_OPERATOR(fake_quantize_grouped_backward)
#undef LIMPQ_OPERATOR

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// The step back through an operator: `differentiate(grad, x, scale)` gives dx and dscale. Only x
/// is saved that is as large as x; v and the rounded value are computed again.
///
/// A node of its own and not a torch::autograd::Function, which stores every argument in a map of
/// its own and costs more than the kernel does on small tensors.
template <typename Differentiate>
class FakeQuantizeBackward final : public torch::autograd::Node {
 public:
  FakeQuantizeBackward(const Tensor& x, const Tensor& scale, Differentiate differentiate)
      : Node(torch::autograd::collect_next_edges(x, scale)),
        x_(x, /*is_output=*/false),
        scale_(scale, /*is_output=*/false),
        differentiate_(std::move(differentiate)) {}

  std::string name() const override { return "FakeQuantizeBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    // Without create_graph nothing has to refuse a second derivative.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    auto [dx, dscale] = differentiate_(grads[0], x_.unpack(), scale_.unpack());
    return {std::move(dx), std::move(dscale)};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x_.reset_data();
    scale_.reset_data();
  }

 private:
  SavedVariable x_;
  SavedVariable scale_;
  Differentiate differentiate_;
};

/// forward() with its step back recorded where a gradient is wanted.
template <typename Forward, typename Differentiate>
Tensor with_gradient(const Tensor& x, const Tensor& scale, Forward forward,
                     Differentiate differentiate) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !torch::autograd::isFwGradDefined(x) && !torch::autograd::isFwGradDefined(scale),
      "fake_quantize has no forward-mode derivative; use backward().");
  std::shared_ptr<torch::autograd::Node> node;
  if (torch::autograd::compute_requires_grad(x, scale)) {
    node = std::shared_ptr<torch::autograd::Node>(
        new FakeQuantizeBackward<Differentiate>(x, scale, std::move(differentiate)),
        torch::autograd::deleteNode);
  }
  Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    y = forward();
  }
  if (node) torch::autograd::set_history(y, node);
  return y;
}

Tensor fake_quantize_autograd(const Tensor& x, const Tensor& scale, int64_t scale_row,
                              int64_t quant_min, int64_t quant_max,
                              std::optional<int64_t> channel_axis, double grad_factor,
                              double scale_min, double scale_max, std::optional<double> relu_max) {
  return with_gradient(
      x, scale,
      [&] {
        return fake_quantize_operator().call(x, scale, scale_row, quant_min, quant_max,
                                             channel_axis, grad_factor, scale_min, scale_max,
                                             relu_max);
      },
      [=](const Tensor& grad, const Tensor& saved_x, const Tensor& saved_scale) {
        return fake_quantize_backward_operator().call(grad, saved_x, saved_scale, scale_row,
                                                      quant_min, quant_max, channel_axis,
                                                      grad_factor, scale_min, scale_max, relu_max);
      });
}

Tensor fake_quantize_multi_autograd(const Tensor& x, const Tensor& scale,
                                    at::IntArrayRef scale_rows, at::IntArrayRef quant_mins,
                                    at::IntArrayRef quant_maxs, std::optional<int64_t> channel_axis,
                                    at::ArrayRef<double> grad_factors, double scale_min,
                                    double scale_max, std::optional<double> relu_max) {
  return with_gradient(
      x, scale,
      [&] {
        return fake_quantize_multi_operator().call(x, scale, scale_rows, quant_mins, quant_maxs,
                                                   channel_axis, grad_factors, scale_min, scale_max,
                                                   relu_max);
      },
      [=, rows = scale_rows.vec(), mins = quant_mins.vec(), maxs = quant_maxs.vec(),
       factors = grad_factors.vec()](const Tensor& grad, const Tensor& saved_x,
                                     const Tensor& saved_scale) {
        c10::List<std::optional<Tensor>> by_bit_width;
        for (const Tensor& slice : grad.unbind(0)) by_bit_width.push_back(slice);
        return fake_quantize_multi_backward_operator().call(by_bit_width, saved_x, saved_scale,
                                                            rows, mins, maxs, channel_axis, factors,
                                                            scale_min, scale_max, relu_max);
      });
}

Tensor fake_quantize_selected_autograd(const Tensor& x, const Tensor& scale, const Tensor& selected,
                                       at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs,
                                       std::optional<int64_t> channel_axis,
                                       at::ArrayRef<double> grad_factors, double scale_min,
                                       double scale_max, std::optional<double> relu_max) {
  return with_gradient(
      x, scale,
      [&] {
        return fake_quantize_selected_operator().call(x, scale, selected, quant_mins, quant_maxs,
                                                      channel_axis, grad_factors, scale_min,
                                                      scale_max, relu_max);
      },
      [=, index = SavedVariable(selected, /*is_output=*/false), mins = quant_mins.vec(),
       maxs = quant_maxs.vec(), factors = grad_factors.vec()](
          const Tensor& grad, const Tensor& saved_x, const Tensor& saved_scale) {
        return fake_quantize_selected_backward_operator().call(
            grad, saved_x, saved_scale, index.unpack(), mins, maxs, channel_axis, factors,
            scale_min, scale_max, relu_max);
      });
}

Tensor fake_quantize_grouped_autograd(const Tensor& x, const Tensor& scale,
                                      at::IntArrayRef scale_rows, at::IntArrayRef quant_mins,
                                      at::IntArrayRef quant_maxs,
                                      std::optional<int64_t> channel_axis,
                                      at::ArrayRef<double> grad_factors, double scale_min,
                                      double scale_max, std::optional<double> relu_max) {
  return with_gradient(
      x, scale,
      [&] {
        return fake_quantize_grouped_operator().call(x, scale, scale_rows, quant_mins, quant_maxs,
                                                     channel_axis, grad_factors, scale_min,
                                                     scale_max, relu_max);
      },
      [=, rows = scale_rows.vec(), mins = quant_mins.vec(), maxs = quant_maxs.vec(),
       factors = grad_factors.vec()](const Tensor& grad, const Tensor& saved_x,
                                     const Tensor& saved_scale) {
        return fake_quantize_grouped_backward_operator().call(grad, saved_x, saved_scale, rows,
                                                              mins, maxs, channel_axis, factors,
                                                              scale_min, scale_max, relu_max);
      });
}

/// The backward operators have no derivative; asking for one is an error, not a wrong number.
class RefuseSecondDerivative : public torch::autograd::Function<RefuseSecondDerivative> {
 public:
  static variable_list forward(torch::autograd::AutogradContext*, const Tensor& dx,
                               const Tensor& dscale,
                               const Tensor& /*an input that needs a gradient*/) {
    return {dx.view_as(dx), dscale.view_as(dscale)};
  }
  static variable_list backward(torch::autograd::AutogradContext*, const variable_list&) {
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

std::tuple<Tensor, Tensor> fake_quantize_backward_autograd(
    const Tensor& grad, const Tensor& x, const Tensor& scale, int64_t scale_row, int64_t quant_min,
    int64_t quant_max, std::optional<int64_t> channel_axis, double grad_factor, double scale_min,
    double scale_max, std::optional<double> relu_max) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return fake_quantize_backward_operator().call(grad, x, scale, scale_row, quant_min, quant_max,
                                                  channel_axis, grad_factor, scale_min, scale_max,
                                                  relu_max);
  };
  return without_derivative(compute(), {grad, x, scale});
}

std::tuple<Tensor, Tensor> fake_quantize_multi_backward_autograd(
    const c10::List<std::optional<Tensor>>& grads, const Tensor& x, const Tensor& scale,
    at::IntArrayRef scale_rows, at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs,
    std::optional<int64_t> channel_axis, at::ArrayRef<double> grad_factors, double scale_min,
    double scale_max, std::optional<double> relu_max) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return fake_quantize_multi_backward_operator().call(grads, x, scale, scale_rows, quant_mins,
                                                        quant_maxs, channel_axis, grad_factors,
                                                        scale_min, scale_max, relu_max);
  };
  std::vector<Tensor> inputs = {x, scale};
  for (const std::optional<Tensor>& grad : grads) inputs.push_back(grad.value_or(Tensor()));
  return without_derivative(compute(), inputs);
}

std::tuple<Tensor, Tensor> fake_quantize_selected_backward_autograd(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& selected,
    at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs, std::optional<int64_t> channel_axis,
    at::ArrayRef<double> grad_factors, double scale_min, double scale_max,
    std::optional<double> relu_max) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return fake_quantize_selected_backward_operator().call(grad, x, scale, selected, quant_mins,
                                                           quant_maxs, channel_axis, grad_factors,
                                                           scale_min, scale_max, relu_max);
  };
  return without_derivative(compute(), {grad, x, scale});
}

std::tuple<Tensor, Tensor> fake_quantize_grouped_backward_autograd(
    const Tensor& grad, const Tensor& x, const Tensor& scale, at::IntArrayRef scale_rows,
    at::IntArrayRef quant_mins, at::IntArrayRef quant_maxs, std::optional<int64_t> channel_axis,
    at::ArrayRef<double> grad_factors, double scale_min, double scale_max,
    std::optional<double> relu_max) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return fake_quantize_grouped_backward_operator().call(grad, x, scale, scale_rows, quant_mins,
                                                          quant_maxs, channel_axis, grad_factors,
                                                          scale_min, scale_max, relu_max);
  };
  return without_derivative(compute(), {grad, x, scale});
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
      "int? channel_axis, float grad_factor, float scale_min, float scale_max, float? "
      "relu_max=None) "
      "-> Tensor");
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, int scale_row, int quant_min, "
      "int quant_max, int? channel_axis, float grad_factor, float scale_min, float scale_max, "
      "float? relu_max=None) -> (Tensor, Tensor)");
  m.def(
      "fake_quantize_selected(Tensor x, Tensor scale, Tensor selected, int[] quant_mins, "
      "int[] quant_maxs, int? channel_axis, float[] grad_factors, float scale_min, "
      "float scale_max, float? relu_max=None) -> Tensor");
  m.def(
      "fake_quantize_selected_backward(Tensor grad, Tensor x, Tensor scale, Tensor selected, "
      "int[] quant_mins, int[] quant_maxs, int? channel_axis, float[] grad_factors, "
      "float scale_min, float scale_max, float? relu_max=None) -> (Tensor, Tensor)");
  m.def(
      "fake_quantize_multi(Tensor x, Tensor scale, int[] scale_rows, int[] quant_mins, "
      "int[] quant_maxs, int? channel_axis, float[] grad_factors, float scale_min, "
      "float scale_max, float? relu_max=None) -> Tensor");
  m.def(
      "fake_quantize_multi_backward(Tensor?[] grads, Tensor x, Tensor scale, int[] scale_rows, "
      "int[] quant_mins, int[] quant_maxs, int? channel_axis, float[] grad_factors, "
      "float scale_min, float scale_max, float? relu_max=None) -> (Tensor, Tensor)");
  m.def(
      "fake_quantize_grouped(Tensor x, Tensor scale, int[] scale_rows, int[] quant_mins, "
      "int[] quant_maxs, int? channel_axis, float[] grad_factors, float scale_min, "
      "float scale_max, float? relu_max=None) -> Tensor");
  m.def(
      "fake_quantize_grouped_backward(Tensor grad, Tensor x, Tensor scale, int[] scale_rows, "
      "int[] quant_mins, int[] quant_maxs, int? channel_axis, float[] grad_factors, "
      "float scale_min, float scale_max, float? relu_max=None) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(limpq, CPU, m) {
  m.impl("fake_quantize", fake_quantize);
  m.impl("fake_quantize_backward", fake_quantize_backward);
  m.impl("fake_quantize_selected", fake_quantize_selected);
  m.impl("fake_quantize_selected_backward", fake_quantize_selected_backward);
  m.impl("fake_quantize_multi", fake_quantize_multi);
  m.impl("fake_quantize_multi_backward", fake_quantize_multi_backward);
  m.impl("fake_quantize_grouped", fake_quantize_grouped);
  m.impl("fake_quantize_grouped_backward", fake_quantize_grouped_backward);
}

#if defined(LIMPQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(limpq, CUDA, m) {
  m.impl("fake_quantize", fake_quantize);
  m.impl("fake_quantize_backward", fake_quantize_backward);
  m.impl("fake_quantize_selected", fake_quantize_selected);
  m.impl("fake_quantize_selected_backward", fake_quantize_selected_backward);
  m.impl("fake_quantize_multi", fake_quantize_multi);
  m.impl("fake_quantize_multi_backward", fake_quantize_multi_backward);
  m.impl("fake_quantize_grouped", fake_quantize_grouped);
  m.impl("fake_quantize_grouped_backward", fake_quantize_grouped_backward);
}
#endif

TORCH_LIBRARY_IMPL(limpq, Autograd, m) {
  m.impl("fake_quantize", fake_quantize_autograd);
  m.impl("fake_quantize_backward", fake_quantize_backward_autograd);
  m.impl("fake_quantize_selected", fake_quantize_selected_autograd);
  m.impl("fake_quantize_selected_backward", fake_quantize_selected_backward_autograd);
  m.impl("fake_quantize_multi", fake_quantize_multi_autograd);
  m.impl("fake_quantize_multi_backward", fake_quantize_multi_backward_autograd);
  m.impl("fake_quantize_grouped", fake_quantize_grouped_autograd);
  m.impl("fake_quantize_grouped_backward", fake_quantize_grouped_backward_autograd);
}

TORCH_LIBRARY_IMPL(limpq, FuncTorchBatched, m) {
  for (const char* name :
       {"fake_quantize", "fake_quantize_backward", "fake_quantize_selected",
        "fake_quantize_selected_backward", "fake_quantize_multi", "fake_quantize_multi_backward",
        "fake_quantize_grouped", "fake_quantize_grouped_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_vmap>());
  }
}

}  // namespace limpq
