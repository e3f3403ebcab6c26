// From tensors to problems: argument checks, layouts and the choice of the device. Shared by the
// operators (ops.cpp) and the weight bank (bank.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "fake_quantize.h"

namespace limpq {

/// How a call uses its scales; one entry per bit-width (grouped: per part) in the four lists.
/// It refers to lists that the caller keeps.
struct Quantization {
  at::IntArrayRef scale_rows;
  at::IntArrayRef quant_mins;
  at::IntArrayRef quant_maxs;
  at::ArrayRef<double> grad_factors;
  std::optional<int64_t> channel_axis;
  double scale_min;
  double scale_max;
  std::optional<double> relu_max = {};  // quantize min(relu(x), relu_max); every quant_min is 0

  int64_t count() const { return int64_t(scale_rows.size()); }
};

/// Raises TypeError, ValueError or IndexError where x, scale and `how` do not fit.
void check_arguments(const at::Tensor& x, const at::Tensor& scale, const Quantization& how);

/// The bit-widths of one problem: not too many, and no scale row twice.
void check_bit_widths(const Quantization& how);

/// x itself where its memory has no gaps, else a copy that keeps the order of the axes.
at::Tensor as_dense(const at::Tensor& x);

/// A gradient of x's shape laid out in memory as the dense x is; a copy only where it is not.
at::Tensor gradient_for(const at::Tensor& x, const at::Tensor& grad);

/// float64 for float64 tensors, else float32.
at::ScalarType compute_type_of(const at::Tensor& x);

/// `scale` contiguous and in the compute type of x; a copy only where it is not.
at::Tensor compute_scale_of(const at::Tensor& scale, const at::Tensor& x);

/// Fills the common part of a problem. x is dense, scale in the compute type and contiguous.
void describe(Problem& problem, const at::Tensor& x, const at::Tensor& scale,
              const Quantization& how);

/// Whether this build has kernels for the device. The dispatcher knows that for operators.
bool can_run_on(at::Device device);

/// Runs a list of problems, all on the device of `x`.
void run_forward(const ForwardProblem* problems, int64_t count, const at::Tensor& x);
/// The same; sets the workspaces.
void run_backward(BackwardProblem* problems, int64_t count, const at::Tensor& x);

}  // namespace limpq
