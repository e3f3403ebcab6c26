#include "problems.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>

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

/// The ceiling as a value of x's dtype, as PyTorch's hardtanh gives it.
double ceiling_of(const Tensor& x, double ceiling) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return ceiling;
    case at::kHalf:
      return at::Half(float(ceiling));
    case at::kBFloat16:
      return at::BFloat16(float(ceiling));
    default:
      return float(ceiling);
  }
}

/// The channel axis counted from the front, checked.
int64_t channel_axis_of(const Tensor& x, int64_t axis) {
  TORCH_CHECK_INDEX(axis >= -x.dim() && axis < x.dim(), "fake_quantize: channel_axis is ", axis,
                    ", but x has ", x.dim(), " dimensions");
  return axis < 0 ? axis + x.dim() : axis;
}

}  // namespace

void check_arguments(const Tensor& x, const Tensor& scale, const Quantization& how) {
  data_type_of(x);
  TORCH_CHECK_TYPE(at::isFloatingType(scale.scalar_type()), "fake_quantize: scale has dtype ",
                   scale.scalar_type(), ", expected a floating-point dtype");
  TORCH_CHECK_VALUE(x.device() == scale.device(), "fake_quantize: x is on ", x.device(),
                    " and scale on ", scale.device());
  const int64_t count = how.count();
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
    const int64_t quant_min = how.quant_mins[k], quant_max = how.quant_maxs[k];
    TORCH_CHECK_VALUE(quant_min <= 0 && quant_max > 0, "fake_quantize: thresholds are ", quant_min,
                      " and ", quant_max, ", expected quant_min <= 0 < quant_max");
    TORCH_CHECK_VALUE(!how.relu_max || quant_min == 0, "fake_quantize: quant_min is ", quant_min,
                      ", expected 0 with relu_max");
    TORCH_CHECK_VALUE(quant_min >= -largest_threshold && quant_max <= largest_threshold,
                      "fake_quantize: thresholds are ", quant_min, " and ", quant_max,
                      ", beyond the largest magnitude, ", largest_threshold);
  }
  TORCH_CHECK_VALUE(!how.relu_max || *how.relu_max > 0, "fake_quantize: relu_max is ",
                    *how.relu_max, ", expected a positive number");
  TORCH_CHECK_VALUE(how.scale_min > 0, "fake_quantize: scale_min is ", how.scale_min,
                    ", expected a positive number");
  TORCH_CHECK_VALUE(how.scale_max >= how.scale_min, "fake_quantize: scale_max is ", how.scale_max,
                    ", below scale_min ", how.scale_min);
}

void check_bit_widths(const Quantization& how) {
  TORCH_CHECK_VALUE(how.count() >= 1 && how.count() <= max_bit_widths,
                    "fake_quantize: ", how.count(), " bit-widths in one call, expected 1 to ",
                    max_bit_widths);
  for (int64_t k = 0; k < how.count(); ++k) {
    for (int64_t other = 0; other < k; ++other) {
      TORCH_CHECK_VALUE(how.scale_rows[other] != how.scale_rows[k], "fake_quantize: scale row ",
                        how.scale_rows[k], " is used for two bit-widths");
    }
  }
}

Tensor as_dense(const Tensor& x) {
  return x.is_non_overlapping_and_dense() ? x : at::clone(x, at::MemoryFormat::Preserve);
}

Tensor gradient_for(const Tensor& x, const Tensor& grad) {
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), "fake_quantize_backward: gradient has shape ",
                    grad.sizes(), ", x has ", x.sizes());
  TORCH_CHECK_VALUE(grad.device() == x.device(), "fake_quantize_backward: gradient is on ",
                    grad.device(), ", x on ", x.device());
  if (grad.strides() == x.strides() && grad.scalar_type() == x.scalar_type()) return grad;
  return at::empty_like(x).copy_(grad);
}

at::ScalarType compute_type_of(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor compute_scale_of(const Tensor& scale, const Tensor& x) {
  if (scale.scalar_type() == compute_type_of(x) && scale.is_contiguous()) return scale;
  return scale.to(compute_type_of(x)).contiguous();
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
  problem.count = problem.candidates = int(how.count());
  problem.selected = nullptr;
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
  if (how.relu_max) problem.relu_max = ceiling_of(x, *how.relu_max);
}

// --- devices ----------------------------------------------------------------------------------

namespace {

void run_on_cpu(int64_t tasks, int64_t grain, cpu::TaskRange body, const void* context) {
  if (tasks <= grain) return body(context, 0, tasks);
  at::parallel_for(0, tasks, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

/// Calls run() with a workspace for each problem, from one allocation or, where little is needed
/// by the CPU, from the stack.
template <typename Bytes, typename Run>
void with_workspaces(BackwardProblem* problems, int64_t count, const Tensor& x, Bytes bytes_of,
                     Run run) {
  const auto aligned = [&](int64_t i) { return (bytes_of(problems[i]) + 15) / 16 * 16; };
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) bytes += aligned(i);
  alignas(16) char on_stack[1024];
  Tensor allocated;
  char* at = on_stack;
  if (x.is_cuda() || bytes > int64_t(sizeof on_stack)) {
    allocated = at::empty({bytes}, x.options().dtype(at::kByte));
    at = static_cast<char*>(allocated.mutable_data_ptr());
  }
  for (int64_t i = 0; i < count; ++i) {
    problems[i].workspace = at;
    at += aligned(i);
  }
  run();
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

}  // namespace

bool can_run_on(at::Device device) {
#if defined(LIMPQ_WITH_CUDA)
  if (device.is_cuda()) return true;
#endif
  return device.is_cpu();
}

void run_forward(const ForwardProblem* problems, int64_t count, const Tensor& x) {
#if defined(LIMPQ_WITH_CUDA)
  if (x.is_cuda()) {
    const c10::cuda::CUDAGuard guard(x.device());
    return cuda::fake_quantize_forward(problems, count, c10::cuda::getCurrentCUDAStream());
  }
#endif
  cpu::fake_quantize_forward(problems, count, run_on_cpu);
}

void run_backward(BackwardProblem* problems, int64_t count, const Tensor& x) {
#if defined(LIMPQ_WITH_CUDA)
  if (x.is_cuda()) {
    const c10::cuda::CUDAGuard guard(x.device());
    const Tensor counters = counters_for(x, cuda::backward_counter_bytes(problems, count));
    void* const zeros = counters.defined() ? counters.mutable_data_ptr() : nullptr;
    return with_workspaces(problems, count, x, cuda::backward_workspace_bytes, [&] {
      cuda::fake_quantize_backward(problems, count, zeros, c10::cuda::getCurrentCUDAStream());
    });
  }
#endif
  with_workspaces(problems, count, x, cpu::backward_workspace_bytes,
                  [&] { cpu::fake_quantize_backward(problems, count, run_on_cpu); });
}

}  // namespace limpq
