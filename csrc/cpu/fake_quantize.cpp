#include "fake_quantize.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

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

/// Elements that short spans of a channel are gathered to, and channels that are read together.
constexpr int64_t gathered_elements = block_size;
constexpr int64_t tile_channels = 8;
constexpr int64_t longest_gathered = gathered_elements / 8;

/// A fixed partition of [outer, channels, inner] into tasks of about task_size elements. It depends
/// on the sizes alone, so the partial sums, and with them the result, do not depend on the threads.
struct Partition {
  static constexpr int64_t task_size = 16384;
  // More blocks of the outer axis would make the partial sums as large as the tensor.
  static constexpr int64_t max_outer_blocks = 256;

  int64_t outer, channels, inner;
  int64_t outer_step, channel_step, inner_step;
  int64_t outer_blocks, channel_blocks, inner_blocks;

  explicit Partition(const Problem& problem) : Partition(problem, task_size) {}

  /// Sums of many short spans take few channels, so that a task has enough of each to put together.
  explicit Partition(const ErrorSumsProblem& problem)
      : Partition(problem, problem.inner <= longest_gathered ? tile_channels : task_size) {}

  Partition(const Problem& problem, int64_t most_channels) {
    const bool per_tensor = problem.channels == 1;
    outer = per_tensor ? 1 : problem.outer;
    channels = problem.channels;
    inner = per_tensor ? problem.outer * problem.inner : problem.inner;
    if (problem.numel() == 0) {
      outer_blocks = channel_blocks = inner_blocks = 0;
      return;
    }
    inner_step = std::min(inner, task_size);
    if (elementwise()) most_channels = task_size;
    channel_step = std::min({channels, task_size / inner_step, most_channels});
    outer_step =
        std::max(task_size / (inner_step * channel_step), divide_up(outer, max_outer_blocks));
    outer_blocks = divide_up(outer, outer_step);
    channel_blocks = divide_up(channels, channel_step);
    inner_blocks = divide_up(inner, inner_step);
  }

  int64_t tasks() const { return outer_blocks * channel_blocks * inner_blocks; }
  /// Partial sums per channel and bit-width.
  int64_t partials() const { return outer_blocks * inner_blocks; }
  /// Whether neighbours in memory have scales of their own.
  bool elementwise() const { return channels > 1 && inner == 1; }
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

/// The bit-widths of a problem in its compute type, for one channel after another. Guarding a scale
/// again in every task costs less than a table of guarded scales, which would need memory.
template <typename C>
struct BitWidths {
  const Problem& problem;
  const C* scale[max_bit_widths];  // the rows
  Range<C> ranges[max_bit_widths];
  Guard<C> guard;
  Step<C> steps[max_bit_widths];

  explicit BitWidths(const Problem& p) : problem(p), guard{C(p.scale_min), C(p.scale_max)} {
    for (int k = 0; k < p.count; ++k) {
      scale[k] = static_cast<const C*>(p.scale) + p.scale_row[k] * p.channels;
      ranges[k] = {C(p.quant_min[k]), C(p.quant_max[k])};
    }
  }

  const Step<C>* of_channel(int64_t channel) {
    for (int k = 0; k < problem.count; ++k) {
      steps[k] = {guard_scale(scale[k][channel], guard.scale_min, guard.scale_max), ranges[k]};
    }
    return steps;
  }
};

template <typename T>
void forward_task(const ForwardProblem& problem, const Partition& partition, const Task& task) {
  using C = typename ComputeType<T>::type;
  const SpanKernels<T>& span = kernels<T>();
  const int count = problem.count;
  const T* x = static_cast<const T*>(problem.x);
  const Relu<C> relu = problem.relu<C>();
  BitWidths<C> widths(problem);
  T* y[max_bit_widths];
  const auto set_outputs = [&](int64_t offset) {
    for (int k = 0; k < count; ++k) y[k] = static_cast<T*>(problem.y[k]) + offset;
  };
  if (partition.elementwise()) {
    const C* scale[max_bit_widths];
    for (int k = 0; k < count; ++k) scale[k] = widths.scale[k] + task.channel_begin;
    for (int64_t o = task.outer_begin; o < task.outer_end; ++o) {
      const int64_t offset = o * partition.channels + task.channel_begin;
      set_outputs(offset);
      span.forward_elementwise(x + offset, y, task.channel_end - task.channel_begin, relu, scale,
                               widths.guard, widths.ranges, count);
    }
    return;
  }
  for (int64_t c = task.channel_begin; c < task.channel_end; ++c) {
    const Step<C>* steps = widths.of_channel(c);
    for (int64_t o = task.outer_begin; o < task.outer_end; ++o) {
      const int64_t offset = (o * partition.channels + c) * partition.inner + task.inner_begin;
      set_outputs(offset);
      span.forward(x + offset, y, task.inner_end - task.inner_begin, relu, steps, count);
    }
  }
}

/// Writes the task's elements of dx and its partial sums of dscale, [partials, count, channels].
template <typename T>
void backward_task(const BackwardProblem& problem, const Partition& partition, const Task& task) {
  using C = typename ComputeType<T>::type;
  const SpanKernels<T>& span = kernels<T>();
  const int count = problem.count;
  const T* x = static_cast<const T*>(problem.x);
  T* dx = static_cast<T*>(problem.dx);
  const Relu<C> relu = problem.relu<C>();
  BitWidths<C> widths(problem);
  const T* grad[max_bit_widths];
  const auto set_gradients = [&](int64_t offset) {
    for (int k = 0; k < count; ++k) {
      const T* base = static_cast<const T*>(problem.grad[k]);
      grad[k] = base == nullptr ? nullptr : base + offset;
    }
  };
  double* partial[max_bit_widths];  // of channel_begin
  for (int k = 0; k < count; ++k) {
    partial[k] = static_cast<double*>(problem.workspace) +
                 (task.partial * count + k) * partition.channels + task.channel_begin;
  }
  if (partition.elementwise()) {
    const int64_t channels = task.channel_end - task.channel_begin;
    const C* scale[max_bit_widths];
    for (int k = 0; k < count; ++k) {
      scale[k] = widths.scale[k] + task.channel_begin;
      std::fill_n(partial[k], channels, 0.0);
    }
    for (int64_t o = task.outer_begin; o < task.outer_end; ++o) {
      const int64_t offset = o * partition.channels + task.channel_begin;
      set_gradients(offset);
      span.backward_elementwise(x + offset, grad, dx + offset, channels, relu, scale, widths.guard,
                                widths.ranges, count, partial);
    }
    return;
  }
  for (int64_t c = task.channel_begin; c < task.channel_end; ++c) {
    const Step<C>* steps = widths.of_channel(c);
    double sums[max_bit_widths] = {};
    for (int64_t o = task.outer_begin; o < task.outer_end; ++o) {
      const int64_t offset = (o * partition.channels + c) * partition.inner + task.inner_begin;
      set_gradients(offset);
      span.backward(x + offset, grad, dx + offset, task.inner_end - task.inner_begin, relu, steps,
                    count, sums);
    }
    for (int k = 0; k < count; ++k) partial[k][c - task.channel_begin] = sums[k];
  }
}

/// dscale from the partial sums, added in the order of the partials.
template <typename C>
void finish_scale_gradients(const BackwardProblem& p) {
  const double* partial = static_cast<const double*>(p.workspace);
  const int64_t partials = Partition(p).partials();
  const C* scale = static_cast<const C*>(p.scale);
  C* dscale = static_cast<C*>(p.dscale);
  std::fill_n(dscale, p.scale_rows * p.channels, C(0));
  for (int k = 0; k < p.count; ++k) {
    for (int64_t channel = 0; channel < p.channels; ++channel) {
      const int64_t at = p.scale_row[k] * p.channels + channel;
      if (!scale_is_free(scale[at], C(p.scale_min), C(p.scale_max))) continue;
      double sum = 0;
      for (int64_t i = 0; i < partials; ++i)
        sum += partial[(i * p.count + k) * p.channels + channel];
      dscale[at] += C(sum * p.grad_factor[k]);
    }
  }
}

/// Writes the task's partial sums, [partials, 2, count, channels].
template <typename T>
void error_sums_task(const ErrorSumsProblem& problem, const Partition& partition,
                     const Task& task) {
  using C = typename ComputeType<T>::type;
  const SpanKernels<T>& span = kernels<T>();
  const int count = problem.count;
  const T* x = static_cast<const T*>(problem.x);
  const T* grad = static_cast<const T*>(problem.grad);
  const Relu<C> relu = problem.relu<C>();
  BitWidths<C> widths(problem);
  double* partial[2 * max_bit_widths];  // of channel_begin
  for (int i = 0; i < 2 * count; ++i) {
    partial[i] = static_cast<double*>(problem.workspace) +
                 (task.partial * 2 * count + i) * partition.channels + task.channel_begin;
  }
  if (partition.elementwise()) {
    const int64_t channels = task.channel_end - task.channel_begin;
    const C* scale[max_bit_widths];
    for (int k = 0; k < count; ++k) scale[k] = widths.scale[k] + task.channel_begin;
    for (int i = 0; i < 2 * count; ++i) std::fill_n(partial[i], channels, 0.0);
    for (int64_t o = task.outer_begin; o < task.outer_end; ++o) {
      const int64_t offset = o * partition.channels + task.channel_begin;
      span.error_sums_elementwise(x + offset, grad + offset, channels, relu, scale, widths.guard,
                                  widths.ranges, count, partial, partial + count);
    }
    return;
  }
  const int64_t inner = task.inner_end - task.inner_begin;
  // Spans of neighbouring channels lie beside each other, so they are read together, and short ones
  // are gathered: each block has sums to add up at its end.
  const bool gathers = inner <= longest_gathered;
  T gathered_x[tile_channels][gathered_elements];
  T gathered_grad[tile_channels][gathered_elements];
  for (int64_t first = task.channel_begin; first < task.channel_end; first += tile_channels) {
    const int64_t channels = std::min(tile_channels, task.channel_end - first);
    double sums[tile_channels][2 * max_bit_widths] = {};
    const auto add = [&](int64_t i, const T* from_x, const T* from_grad, int64_t n) {
      span.error_sums(from_x, from_grad, n, relu, widths.of_channel(first + i), count, sums[i],
                      sums[i] + count);
    };
    int64_t gathered = 0;
    for (int64_t o = task.outer_begin; o < task.outer_end; ++o) {
      const int64_t start = (o * partition.channels + first) * partition.inner + task.inner_begin;
      for (int64_t i = 0; i < channels; ++i) {
        const int64_t offset = start + i * partition.inner;
        if (gathers) {
          std::copy_n(x + offset, inner, gathered_x[i] + gathered);
          std::copy_n(grad + offset, inner, gathered_grad[i] + gathered);
        } else {
          add(i, x + offset, grad + offset, inner);
        }
      }
      if (!gathers) continue;
      gathered += inner;
      if (gathered + inner <= gathered_elements && o + 1 < task.outer_end) continue;
      // Whole lanes: what has no gradient adds nothing.
      const int64_t whole =
          std::min(gathered_elements, divide_up(gathered, lane_count) * lane_count);
      for (int64_t i = 0; i < channels; ++i) {
        std::fill(gathered_x[i] + gathered, gathered_x[i] + whole, T());
        std::fill(gathered_grad[i] + gathered, gathered_grad[i] + whole, T());
        add(i, gathered_x[i], gathered_grad[i], whole);
      }
      gathered = 0;
    }
    for (int64_t i = 0; i < channels; ++i) {
      for (int k = 0; k < 2 * count; ++k) {
        partial[k][first + i - task.channel_begin] = sums[i][k];
      }
    }
  }
}

/// The sums from the partial sums, added in the order of the partials.
void finish_error_sums(const ErrorSumsProblem& p) {
  const double* partial = static_cast<const double*>(p.workspace);
  const int64_t partials = Partition(p).partials();
  const int64_t items = 2 * p.count * p.channels;
  for (int64_t item = 0; item < items; ++item) {
    double sum = 0;
    for (int64_t i = 0; i < partials; ++i) sum += partial[i * items + item];
    p.sums[item] = sum;
  }
}

/// Calls visit(T()) with the type that stores one element.
template <typename Visit>
void with_type(DataType dtype, Visit visit) {
  switch (dtype) {
    case DataType::float32:
      return visit(float());
    case DataType::float64:
      return visit(double());
    case DataType::float16:
      return visit(Float16());
    case DataType::bfloat16:
      return visit(BFloat16());
  }
}

/// A list of problems; the tasks are numbered through it.
template <typename P>
struct ProblemList {
  const P* problems;
  int64_t count;

  int64_t tasks() const {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += Partition(problems[i]).tasks();
    return total;
  }

  /// Tasks of a thread at least: waking another thread for less takes longer than it helps.
  int64_t grain() const { return count == 0 ? 1 : std::max(1, 4 / problems[0].count); }

  /// Calls run(problem, partition, task) for the tasks begin .. end.
  template <typename Run>
  void run_tasks(int64_t begin, int64_t end, Run run) const {
    int64_t first = 0;
    for (int64_t i = 0; i < count && first < end; ++i) {
      const Partition partition(problems[i]);
      const int64_t last = first + partition.tasks();
      for (int64_t index = std::max(begin, first); index < std::min(end, last); ++index) {
        run(problems[i], partition, Task(partition, index - first));
      }
      first = last;
    }
  }
};

void forward_tasks(const void* context, int64_t begin, int64_t end) {
  static_cast<const ProblemList<ForwardProblem>*>(context)->run_tasks(
      begin, end, [](const ForwardProblem& problem, const Partition& partition, const Task& task) {
        with_type(problem.dtype,
                  [&](auto zero) { forward_task<decltype(zero)>(problem, partition, task); });
      });
}

void backward_tasks(const void* context, int64_t begin, int64_t end) {
  static_cast<const ProblemList<BackwardProblem>*>(context)->run_tasks(
      begin, end, [](const BackwardProblem& problem, const Partition& partition, const Task& task) {
        with_type(problem.dtype,
                  [&](auto zero) { backward_task<decltype(zero)>(problem, partition, task); });
      });
}

void error_sums_tasks(const void* context, int64_t begin, int64_t end) {
  static_cast<const ProblemList<ErrorSumsProblem>*>(context)->run_tasks(
      begin, end,
      [](const ErrorSumsProblem& problem, const Partition& partition, const Task& task) {
        with_type(problem.dtype,
                  [&](auto zero) { error_sums_task<decltype(zero)>(problem, partition, task); });
      });
}

}  // namespace

const std::string& capability() {
  return name_of(current_capability());
}

void fake_quantize_forward(const ForwardProblem* problems, int64_t count, Parallel parallel) {
  const ProblemList<ForwardProblem> list{problems, count};
  parallel(list.tasks(), list.grain(), forward_tasks, &list);
}

void fake_quantize_backward(const BackwardProblem* problems, int64_t count, Parallel parallel) {
  const ProblemList<BackwardProblem> list{problems, count};
  parallel(list.tasks(), list.grain(), backward_tasks, &list);
  for (int64_t i = 0; i < count; ++i) {
    with_type(problems[i].dtype, [&](auto zero) {
      finish_scale_gradients<typename ComputeType<decltype(zero)>::type>(problems[i]);
    });
  }
}

int64_t backward_workspace_bytes(const BackwardProblem& problem) {
  return Partition(problem).partials() * problem.channels * problem.count * int64_t(sizeof(double));
}

void error_sums(const ErrorSumsProblem& problem, Parallel parallel) {
  const ProblemList<ErrorSumsProblem> list{&problem, 1};
  parallel(list.tasks(), list.grain(), error_sums_tasks, &list);
  finish_error_sums(problem);
}

int64_t error_sums_workspace_bytes(const ErrorSumsProblem& problem) {
  return 2 * Partition(problem).partials() * problem.channels * problem.count *
         int64_t(sizeof(double));
}

}  // namespace limpq::cpu
