// What a fake-quantization kernel is told, the same on every device. No torch headers here.
//
// A problem quantizes one dense tensor to `count` bit-widths in one pass (count 1 is the plain
// quantizer). Memory is seen as [outer, channels, inner]: one scale per channel and bit-width;
// channels == 1 is per tensor. All pointers are to memory of the device that runs the kernel.
//
// A call takes a list of problems, each with sizes, scales and a data type of its own, and runs
// them as one: the plain and the multi-bit operators pass one problem, a bank one for each layer.
// They run at the same time: what one writes no other one reads or writes.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>

namespace limpq {

template <typename C>
struct Relu;  // in lsq.h, for the kernels

enum class DataType { float32, float64, float16, bfloat16 };

/// Bits run from 2 to 16, so no quantizer has more than 15 bit-widths.
constexpr int max_bit_widths = 15;

/// What forward and backward share.
struct Problem {
  DataType dtype;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int count;  // bit-widths in this call, 1 .. max_bit_widths
  // CUDA only, else null: the place of the one bit-width that is used, on the device. Then count is
  // 1, and the arrays have an entry for each candidate.
  const int64_t* selected;
  int candidates;     // entries of the arrays; count where `selected` is null
  const void* x;      // [outer, channels, inner], in dtype
  const void* scale;  // [scale_rows, channels], in the compute type: double for float64, else float
  int64_t scale_rows;
  int64_t scale_row[max_bit_widths];  // the row of `scale` that bit-width k uses; no row twice
  double quant_min[max_bit_widths];
  double quant_max[max_bit_widths];
  double scale_min;  // the scale used is max(min(scale, scale_max), scale_min)
  double scale_max;
  // min(max(x, 0), relu_max) is quantized, and every quant_min is 0; rounded to dtype.
  std::optional<double> relu_max;

  int64_t numel() const { return outer * channels * inner; }

  template <typename C>
  Relu<C> relu() const {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    return {C(relu_max ? 0.0 : -infinity), C(relu_max.value_or(infinity))};
  }
};

struct ForwardProblem : Problem {
  void* y[max_bit_widths];  // [outer, channels, inner] each, in dtype
};

struct BackwardProblem : Problem {
  const void* grad[max_bit_widths];    // gradient of y[k]; null where bit-width k was not used
  double grad_factor[max_bit_widths];  // dscale is multiplied by it once, after the sum
  void* dx;         // in dtype: the sum over k, added in the compute type in the order of k
  void* dscale;     // [scale_rows, channels], in the compute type; rows not in scale_row become 0
  void* workspace;  // backward_workspace_bytes(problem) bytes, 16-byte aligned, uninitialised
};

/// The sums of t = grad * (y[k] - x) and of t * t over each channel; with relu_max, of the x' that
/// is quantized in the place of x. A channel here is what has a sum of its own: for sums over
/// samples the caller makes a row of scales that has the tensor's scale for each sample.
struct ErrorSumsProblem : Problem {
  const void* grad;  // [outer, channels, inner], in dtype
  double* sums;      // [2, count, channels]: of t, then of t * t
  void* workspace;   // error_sums_workspace_bytes(problem) bytes, as for backward
};

}  // namespace limpq
