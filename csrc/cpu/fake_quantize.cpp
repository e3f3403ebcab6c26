#include "fake_quantize.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "span_kernels.h"

namespace limpq::cpu {
namespace {

enum class Capability { baseline, avx2, avx512 };

Capability best_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512) return Capability::avx512;
  if (has_avx2) return Capability::avx2;
#endif
  return Capability::baseline;
}

const std::string& name_of(Capability capability) {
  static const std::string names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(capability)];
}

Capability choose_capability() {
  const Capability best = best_capability();
  const char* wanted = std::getenv("LIMPQ_CPU_CAPABILITY");
  if (wanted == nullptr) return best;
  for (Capability candidate : {Capability::baseline, Capability::avx2, Capability::avx512}) {
    if (name_of(candidate) == wanted) return std::min(candidate, best);
  }
  throw std::runtime_error(std::string("LIMPQ_CPU_CAPABILITY is '") + wanted +
                           "', expected 'baseline', 'avx2' or 'avx512'");
}

Capability current_capability() {
  static const Capability chosen = choose_capability();
  return chosen;
}

template <typename T>
const SpanKernels<T>& kernels() {
#if defined(__x86_64__)
  switch (current_capability()) {
    case Capability::avx512:
      return avx512::span_kernels<T>();
    case Capability::avx2:
      return avx2::span_kernels<T>();
    case Capability::baseline:
      break;
  }
#endif
  return baseline::span_kernels<T>();
}

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// A fixed partition of [outer, channels, inner] into tasks of about task_size elements. It depends
/// on the sizes alone, so the partial sums, and with them the result, do not depend on the threads.
struct Partition {
  static constexpr int64_t task_size = 16384;
  // More blocks of the outer axis would make the partial sums as large as the tensor.
  static constexpr int64_t max_outer_blocks = 256;

  int64_t outer, channels, inner;
  int64_t outer_step, channel_step, inner_step;
  int64_t outer_blocks, channel_blocks, inner_blocks;

  explicit Partition(const Problem& problem) {
    const bool per_tensor = problem.channels == 1;
    outer = per_tensor ? 1 : problem.outer;
    channels = problem.channels;
    inner = per_tensor ? problem.outer * problem.inner : problem.inner;
    inner_step = std::min(inner, task_size);
    channel_step = std::min(channels, task_size / inner_step);
    outer_step =
        std::max(task_size / (inner_step * channel_step), divide_up(outer, max_outer_blocks));
    outer_blocks = divide_up(outer, outer_step);
    channel_blocks = divide_up(channels, channel_step);
    inner_blocks = divide_up(inner, inner_step);
  }

  int64_t tasks() const { return outer_blocks * channel_blocks * inner_blocks; }
  /// Partial sums per channel and bit-width.
  int64_t partials() const { return outer_blocks * inner_blocks; }
};

/// The box of elements that one task works on.
struct Task {
  int64_t partial;  // which partial sum of its channels it writes
  int64_t outer_begin, outer_end;
  int64_t channel_begin, channel_end;
  int64_t inner_begin, inner_end;

  Task(const Partition& p, int64_t index) {
    const int64_t inner_block = index % p.inner_blocks;
    const int64_t channel_block = index / p.inner_blocks % p.channel_blocks;
    const int64_t outer_block = index / p.inner_blocks / p.channel_blocks;
    partial = outer_block * p.inner_blocks + inner_block;
    outer_begin = outer_block * p.outer_step;
    outer_end = std::min(p.outer, outer_begin + p.outer_step);
    channel_begin = channel_block * p.channel_step;
    channel_end = std::min(p.channels, channel_begin + p.channel_step);
    inner_begin = inner_block * p.inner_step;
    inner_end = std::min(p.inner, inner_begin + p.inner_step);
  }
};

/// The guarded scales and thresholds of a call in the compute type: steps[channel * count + k], and
/// scales[k * channels + channel] for the kernels that take a scale per element.
template <typename C>
struct Scales {
  std::vector<Step<C>> steps;
  std::vector<C> by_channel;
  Range<C> ranges[max_bit_widths];

  explicit Scales(const Problem& p) : steps(p.channels * p.count) {
    const C* scale = static_cast<const C*>(p.scale);
    if (p.channels > 1 && p.inner == 1) by_channel.resize(p.channels * p.count);
    for (int k = 0; k < p.count; ++k) {
      ranges[k] = {C(p.quant_min[k]), C(p.quant_max[k])};
      for (int64_t channel = 0; channel < p.channels; ++channel) {
        const C guarded = guard_scale(scale[p.scale_row[k] * p.channels + channel], C(p.scale_min),
                                      C(p.scale_max));
        steps[channel * p.count + k] = {guarded, ranges[k]};
        if (!by_channel.empty()) by_channel[k * p.channels + channel] = guarded;
      }
    }
  }
  bool elementwise() const { return !by_channel.empty(); }
};

template <typename T>
void forward(const ForwardProblem& problem, const Parallel& parallel) {
  using C = typename ComputeType<T>::type;
  const Partition partition(problem);
  const Scales<C> scales(problem);
  const SpanKernels<T>& span = kernels<T>();
  const int count = problem.count;
  parallel(partition.tasks(), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Task task(partition, index);
      for (int64_t o = task.outer_begin; o < task.outer_end; ++o) {
        T* y[max_bit_widths];
        if (scales.elementwise()) {
          const int64_t offset = o * partition.channels + task.channel_begin;
          const C* scale[max_bit_widths];
          for (int k = 0; k < count; ++k) {
            y[k] = static_cast<T*>(problem.y[k]) + offset;
            scale[k] = &scales.by_channel[k * partition.channels + task.channel_begin];
          }
          span.forward_elementwise(static_cast<const T*>(problem.x) + offset, y,
                                   task.channel_end - task.channel_begin, scale, scales.ranges,
                                   count);
          continue;
        }
        for (int64_t c = task.channel_begin; c < task.channel_end; ++c) {
          const int64_t offset = (o * partition.channels + c) * partition.inner + task.inner_begin;
          for (int k = 0; k < count; ++k) y[k] = static_cast<T*>(problem.y[k]) + offset;
          span.forward(static_cast<const T*>(problem.x) + offset, y,
                       task.inner_end - task.inner_begin, &scales.steps[c * count], count);
        }
      }
    }
  });
}

/// dscale from the partial sums, [partials, channels, count], added in the order of the partials.
template <typename C>
void finish_scale_gradients(const BackwardProblem& p, const double* partial, int64_t partials) {
  const C* scale = static_cast<const C*>(p.scale);
  C* dscale = static_cast<C*>(p.dscale);
  std::fill_n(dscale, p.scale_rows * p.channels, C(0));
  for (int64_t channel = 0; channel < p.channels; ++channel) {
    for (int k = 0; k < p.count; ++k) {
      const int64_t at = p.scale_row[k] * p.channels + channel;
      if (!scale_is_free(scale[at], C(p.scale_min), C(p.scale_max))) continue;
      double sum = 0;
      for (int64_t i = 0; i < partials; ++i) {
        sum += partial[(i * p.channels + channel) * p.count + k];
      }
      dscale[at] = C(sum * p.grad_factor[k]);
    }
  }
}

template <typename T>
void backward(const BackwardProblem& problem, const Parallel& parallel) {
  using C = typename ComputeType<T>::type;
  const Partition partition(problem);
  const Scales<C> scales(problem);
  const SpanKernels<T>& span = kernels<T>();
  const int count = problem.count;
  double* partial = static_cast<double*>(problem.workspace);
  parallel(partition.tasks(), [&](int64_t begin, int64_t end) {
    std::vector<double> column_sums;
    for (int64_t index = begin; index < end; ++index) {
      const Task task(partition, index);
      const int64_t channels = task.channel_end - task.channel_begin;
      double* sums = partial + (task.partial * partition.channels + task.channel_begin) * count;
      std::fill_n(sums, channels * count, 0.0);
      if (scales.elementwise()) column_sums.assign(channels * count, 0.0);
      for (int64_t o = task.outer_begin; o < task.outer_end; ++o) {
        const T* grad[max_bit_widths];
        const auto set_grad = [&](int64_t offset) {
          for (int k = 0; k < count; ++k) {
            const T* base = static_cast<const T*>(problem.grad[k]);
            grad[k] = base == nullptr ? nullptr : base + offset;
          }
        };
        if (scales.elementwise()) {
          const int64_t offset = o * partition.channels + task.channel_begin;
          const C* scale[max_bit_widths];
          double* column_sum[max_bit_widths];
          for (int k = 0; k < count; ++k) {
            scale[k] = &scales.by_channel[k * partition.channels + task.channel_begin];
            column_sum[k] = &column_sums[k * channels];
          }
          set_grad(offset);
          span.backward_elementwise(static_cast<const T*>(problem.x) + offset, grad,
                                    static_cast<T*>(problem.dx) + offset, channels, scale,
                                    scales.ranges, count, column_sum);
          continue;
        }
        for (int64_t c = task.channel_begin; c < task.channel_end; ++c) {
          const int64_t offset = (o * partition.channels + c) * partition.inner + task.inner_begin;
          set_grad(offset);
          span.backward(static_cast<const T*>(problem.x) + offset, grad,
                        static_cast<T*>(problem.dx) + offset, task.inner_end - task.inner_begin,
                        &scales.steps[c * count], count, sums + (c - task.channel_begin) * count);
        }
      }
      for (int64_t i = 0; i < int64_t(column_sums.size()); ++i) {
        sums[i % channels * count + i / channels] = column_sums[i];
      }
    }
  });
  finish_scale_gradients<C>(problem, partial, partition.partials());
}

template <typename P>
void dispatch(const P& problem, const Parallel& parallel,
              void (*run_float)(const P&, const Parallel&),
              void (*run_double)(const P&, const Parallel&),
              void (*run_half)(const P&, const Parallel&),
              void (*run_bfloat16)(const P&, const Parallel&)) {
  switch (problem.dtype) {
    case DataType::float32:
      return run_float(problem, parallel);
    case DataType::float64:
      return run_double(problem, parallel);
    case DataType::float16:
      return run_half(problem, parallel);
    case DataType::bfloat16:
      return run_bfloat16(problem, parallel);
  }
}

}  // namespace

const std::string& capability() {
  return name_of(current_capability());
}

void fake_quantize_forward(const ForwardProblem& problem, const Parallel& parallel) {
  if (problem.numel() == 0) return;
  dispatch(problem, parallel, forward<float>, forward<double>, forward<Float16>, forward<BFloat16>);
}

void fake_quantize_backward(const BackwardProblem& problem, const Parallel& parallel) {
  if (problem.numel() == 0) {
    const int64_t size = problem.dtype == DataType::float64 ? sizeof(double) : sizeof(float);
    std::fill_n(static_cast<char*>(problem.dscale), problem.scale_rows * problem.channels * size,
                char(0));
    return;
  }
  dispatch(problem, parallel, backward<float>, backward<double>, backward<Float16>,
           backward<BFloat16>);
}

int64_t backward_workspace_bytes(const BackwardProblem& problem) {
  if (problem.numel() == 0) return 0;
  return Partition(problem).partials() * problem.channels * problem.count * int64_t(sizeof(double));
}

}  // namespace limpq::cpu
