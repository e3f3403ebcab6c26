// Backward: x and the gradients are read once, dx is written once, and the scales' gradients are
// summed in the same launch.
//
// The idea, without vectors and threads:
//
//   for each element i of x, in its channel c:
//     for k in 0 .. count:
//       terms = fake_quantize_backward(grad[k][i], relu.value(x[i]),
//                                      guarded scale[scale_row[k], c], range[k])
//       dx[i] += relu.passes(x[i]) ? terms.dx : 0
//       dscale[scale_row[k], c] += terms.dscale
//   dscale *= grad_factor, 0 where the guard replaced the scale
//
// How the sums go is said in sums.cuh.
#pragma once

#include <tuple>
#include <type_traits>

#include "sums.cuh"
#include "table.cuh"

namespace limpq::cuda {

template <typename T>
struct BackwardWidth : Quantizer<ComputeType<T>> {
  const T* grad;
  double grad_factor;
};

/// The sums for dscale, count x group_channels of them in each block: item k * group_channels + j
/// belongs to bit-width k and channel group * group_channels + j.
template <typename C>
struct ScaleGradient {
  C* dscale;  // [scale_rows, channels]
  BlockSums sums;
  int32_t scale_rows;
  int group_channels;

  template <typename Problem>
  __device__ __forceinline__ void finish(const Problem& of, unsigned group, int item,
                                         double sum) const {
    const Scales<C>& scales = of.problem.scales;
    const auto& width = of.widths[item / group_channels];
    const int64_t channel = int64_t(group) * group_channels + item % group_channels;
    if (channel >= scales.channels) return;
    const int64_t at = width.scale_row * scales.channels + channel;
    const bool is_free = scale_is_free(scales.scale[at], scales.scale_min, scales.scale_max);
    dscale[at] = is_free ? static_cast<C>(sum * width.grad_factor) : C(0);
  }

  /// Takes the sum of one item over this block.
  template <typename Problem>
  __device__ __forceinline__ void deliver(const Problem& of, unsigned group, unsigned part,
                                          int item, double sum) const {
    sums.deliver(group, part, int64_t(of.problem.count) * group_channels, item, sum,
                 [&](int item, double sum) { finish(of, group, item, sum); });
  }

  /// Rows that no bit-width of this call uses.
  template <typename Problem>
  __device__ __forceinline__ void clear_unused_rows(const Problem& of, unsigned group) const {
    const int64_t channels = of.problem.scales.channels;
    for (int64_t row = 0; row < scale_rows; ++row) {
      bool used = false;
      for (int k = 0; k < of.problem.count; ++k) used |= of.widths[k].scale_row == row;
      if (used) continue;
      for (int j = threadIdx.x; j < group_channels; j += blockDim.x) {
        const int64_t channel = int64_t(group) * group_channels + j;
        if (channel < channels) dscale[row * channels + channel] = C(0);
      }
    }
  }

  /// After the block has delivered all of its items.
  template <typename Problem>
  __device__ __forceinline__ void complete(const Problem& of, unsigned group, unsigned part) const {
    const bool all = sums.complete(group, part, of.problem.count * group_channels,
                                   [&](int item, double sum) { finish(of, group, item, sum); });
    if (all) clear_unused_rows(of, group);
  }
};

/// Threads of a block. Columns take fewer: each of them keeps a sum per bit-width and channel.
constexpr int backward_rows_block = 256;
constexpr int backward_columns_block = 128;

/// Blocks that a multiprocessor's registers are to hold: as many as need no spills on any
/// architecture. Kernels that search their table need more registers.
template <typename T, bool single, typename Capacity>
constexpr int backward_rows_residents = !std::is_same_v<Capacity, One> ? (sizeof(T) == 4 ? 3 : 2)
                                        : single                       ? (sizeof(T) == 4 ? 4 : 3)
                                                                       : (sizeof(T) == 8 ? 2 : 3);
template <typename Capacity>
constexpr int backward_columns_residents = std::is_same_v<Capacity, One> ? 4 : 3;

template <typename T>
struct BackwardRows {
  Scales<ComputeType<T>> scales;
  Relu<ComputeType<T>> relu;
  ScaleGradient<ComputeType<T>> scale_gradient;
  const T* x;
  T* dx;
  int64_t outer;
  int64_t inner;
  int64_t piece_packs;
  int64_t chunk_rows;
  unsigned pieces;
  unsigned groups;
  int team;
  int count;
  int candidates;
  const int64_t* selected;
  int first_width;
  bool aligned;
};

/// Adds what one pack contributes through one bit-width: to dx, and to the result for the scale.
template <typename C, int V>
__device__ __forceinline__ C backward_pack(const C (&grad)[V], const C (&quotient)[V],
                                           Range<C> range, bool first, C (&dx)[V]) {
  C sum = C(0);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const Gradients<C> terms = fake_quantize_quotient_backward(grad[j], quotient[j], range);
    dx[j] = first ? terms.dx : dx[j] + terms.dx;  // no 0 + -0.0, which would lose the sign
    sum += terms.dscale;
  }
  return sum;
}

/// Bytes per element: sizeof(T) * (2 + count), where count is the gradients that are not null.
/// `single`: count is 1, and the scale and the sum stay in registers.
///
/// Each team of threads takes one channel, and of it either one piece of one row or several rows.
template <typename T, bool single, typename Capacity>
__global__ void __launch_bounds__(backward_rows_block, backward_rows_residents<T, single, Capacity>)
    backward_rows(
        const __grid_constant__ Table<BackwardRows<T>, BackwardWidth<T>, Capacity> table) {
  const auto picked = table.template pick<std::is_same_v<Capacity, Selected>>(blockIdx.x);
  const auto [p, widths, block] = picked;
  using C = ComputeType<T>;
  constexpr int V = vector_size<T>;
  constexpr int threads = backward_rows_block;
  const int team = threadIdx.x / p.team;
  const int lane = threadIdx.x % p.team;
  const unsigned piece = block % p.pieces;
  const unsigned group = block / p.pieces % p.groups;
  const unsigned chunk = block / p.pieces / p.groups;
  const int teams = threads / p.team;
  const int64_t channels = p.scales.channels;
  const int64_t channel = int64_t(group) * teams + team;
  const int count = single ? 1 : p.count;

  C* const sums = reinterpret_cast<C*>(shared_memory());  // [count, threads]
  Divisor<C>* const divisors =
      reinterpret_cast<Divisor<C>*>(sums + count * threads);  // [count, teams]
  Divisor<C> only_divisor(C(1));
  C only_sum = C(0);
  if (channel < channels) {
    if (single) {
      only_divisor = widths[0].divisor(p.scales, channel);
    } else {
      for (int k = lane; k < count; k += p.team) {
        divisors[k * teams + team] = widths[k].divisor(p.scales, channel);
      }
    }
  }
  if (!single) {
    for (int k = 0; k < count; ++k) sums[k * threads + threadIdx.x] = C(0);
    __syncthreads();
  }

  const int64_t last_row = min(p.outer, (chunk + int64_t(1)) * p.chunk_rows);
  for (int64_t o = chunk * p.chunk_rows; o < last_row && channel < channels; ++o) {
    const Row<T> row(p.x, (o * channels + channel) * p.inner, p.inner, p.aligned);
    const int64_t end = min(row.packs(), (piece + int64_t(1)) * p.piece_packs);
    for (int64_t i = piece * p.piece_packs + lane; i < end; i += p.team) {
      const Span<T> span = row.span(i);
      C x[V];
      C dx[V] = {};
      C grad[V];
      C quotient[V];
      if constexpr (single) {
        const Pack<T> grad_pack = span.load(widths[0].grad);
        widen<T>(span.load(p.x), x);
        widen<T>(grad_pack, grad);
        if (p.relu.present()) apply_relu(x, p.relu);
        divide(x, only_divisor, all_tame<T>(x), quotient);
        only_sum += backward_pack(grad, quotient, widths[0].range(), true, dx);
      } else {
        widen<T>(span.load(p.x), x);
        apply_relu(x, p.relu);  // without a branch, which would cost registers that there are not
        const bool tame = all_tame<T>(x);
        Pack<T> next{};
        if (count > 0) next = span.load(widths[0].grad);
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
          widen<T>(next, grad);
          if (k + 1 < count) next = span.load(widths[k + 1].grad);  // under way while k is computed
          divide(x, divisors[k * teams + team], tame, quotient);
          sums[k * threads + threadIdx.x] +=
              backward_pack(grad, quotient, widths[k].range(), k == 0, dx);
        }
      }
      if (p.relu.present()) stop_gradient(x, p.relu, dx);
      span.store(p.dx, narrow<T>(dx));
    }
  }

  if (single) sums[threadIdx.x] = only_sum;
  __syncthreads();

  const auto& scale_gradient = picked.problem.scale_gradient;
  const unsigned part = chunk * p.pieces + piece;
  add_teams<threads>(sums, count, p.team, [&](int item, double sum) {
    scale_gradient.deliver(picked, group, part, item, sum);
  });
  scale_gradient.complete(picked, group, part);
}

template <typename T>
struct BackwardColumns {
  Scales<ComputeType<T>> scales;
  Relu<ComputeType<T>> relu;
  ScaleGradient<ComputeType<T>> scale_gradient;
  const T* x;
  T* dx;
  int64_t rows;
  int64_t chunk_rows;
  unsigned groups;
  int width;
  int count;
  int candidates;
  const int64_t* selected;
  int first_width;
};

/// Bytes per element: sizeof(T) * (2 + count), and the scales, which stay in the cache.
///
/// Each thread owns V neighbouring channels and walks down their rows, `column_rows` at a time, so
/// that the scales are fetched and inverted once for them. V > 1 asks for channels % V == 0 and for
/// pointers, scale too, divisible by 16.
template <typename T, int V, typename Capacity>
__global__ void __launch_bounds__(backward_columns_block, backward_columns_residents<Capacity>)
    backward_columns(
        const __grid_constant__ Table<BackwardColumns<T>, BackwardWidth<T>, Capacity> table) {
  const auto picked = table.template pick<std::is_same_v<Capacity, One>>(blockIdx.x);
  const auto [p, widths, block] = picked;
  using C = ComputeType<T>;
  constexpr int rows_at_a_time = column_rows<T>;
  const int threads = blockDim.x;
  const int height = threads / p.width;
  const int down = threadIdx.x / p.width;
  const unsigned group = block % p.groups;
  const unsigned chunk = block / p.groups;
  const int64_t channels = p.scales.channels;
  const int64_t channel = (int64_t(group) * p.width + threadIdx.x % p.width) * V;
  const int count = p.count;

  C* const sums = reinterpret_cast<C*>(shared_memory());  // [count, V, threads]
  for (int i = 0; i < count * V; ++i) sums[i * threads + threadIdx.x] = C(0);

  if (channel < channels && down < height) {
    const int64_t end = min(p.rows, (chunk + int64_t(1)) * p.chunk_rows);
    for (int64_t first = chunk * p.chunk_rows + down; first < end;
         first += rows_at_a_time * height) {
      Pack<T, V> x[rows_at_a_time];
      C dx[rows_at_a_time][V] = {};
#pragma unroll
      for (int u = 0; u < rows_at_a_time; ++u) {
        const int64_t row = first + u * height;
        if (row < end) x[u] = load_pack<V>(p.x + row * channels + channel);
      }
      if (p.relu.present()) {
#pragma unroll
        for (int u = 0; u < rows_at_a_time; ++u) apply_relu(x[u], p.relu);
      }
#pragma unroll 1
      for (int k = 0; k < count; ++k) {
        Pack<T, V> grads[rows_at_a_time];
#pragma unroll
        for (int u = 0; u < rows_at_a_time; ++u) {
          const int64_t row = first + u * height;
          if (row < end) grads[u] = load_pack<V>(widths[k].grad + row * channels + channel);
        }
        Divisor<C> divisors[V];
        widths[k].divisors(p.scales, channel, divisors);
        const Range<C> range = widths[k].range();
        C sum[V] = {};
#pragma unroll
        for (int u = 0; u < rows_at_a_time; ++u) {
          if (first + u * height >= end) break;
          C values[V];
          C quotient[V];
          C grad[V];
          widen<T>(x[u], values);
          widen<T>(grads[u], grad);
          divide(values, divisors, all_tame<T>(values), quotient);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const Gradients<C> terms = fake_quantize_quotient_backward(grad[j], quotient[j], range);
            dx[u][j] = k == 0 ? terms.dx : dx[u][j] + terms.dx;
            sum[j] += terms.dscale;
          }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) sums[(k * V + j) * threads + threadIdx.x] += sum[j];
      }
#pragma unroll
      for (int u = 0; u < rows_at_a_time; ++u) {
        const int64_t row = first + u * height;
        if (p.relu.present()) {
          C values[V];
          widen<T>(x[u], values);
          stop_gradient(values, p.relu, dx[u]);
        }
        if (row < end) store_pack(p.dx + row * channels + channel, narrow<T>(dx[u]));
      }
    }
  }
  __syncthreads();

  const auto& scale_gradient = picked.problem.scale_gradient;
  add_columns<V>(sums, count, p.width, [&](int item, double sum) {
    scale_gradient.deliver(picked, group, chunk, item, sum);
  });
  scale_gradient.complete(picked, group, chunk);
}

/// How a backward problem is cut: which kernel, and what it asks of its caller.
struct BackwardLayout : SumsLayout {
  BackwardProblem problem;  // collapsed, bit-widths without a gradient left out

  static BackwardLayout of(const BackwardProblem& problem) {
    const BackwardProblem used = with_gradients(problem);
    return BackwardLayout(
        problem, aligned_alike(used.x, used.grad, used.count) && aligned_alike(used.x, &used.dx, 1),
        aligned_to_16(used.x) && aligned_to_16(used.scale));
  }

  /// What the caller has to provide, whatever its pointers will be.
  static int64_t workspace_bytes(const BackwardProblem& problem) {
    return most(problem, [](const SumsLayout& layout) { return layout.workspace_bytes(); });
  }
  static int64_t counter_bytes(const BackwardProblem& problem) {
    return most(problem, [](const SumsLayout& layout) { return layout.counter_bytes(); });
  }

  /// Problems of one kind run in one launch.
  auto kind() const { return std::tuple(problem.dtype, columns, pack); }

  BackwardLayout(const BackwardProblem& original, bool alike, bool at_16)
      : BackwardLayout(Used{with_gradients(collapse(original))}, alike, at_16) {}

 private:
  struct Used {
    BackwardProblem problem;
  };
  BackwardLayout(const Used& used, bool alike, bool at_16)
      : SumsLayout(used.problem, used.problem.count, backward_rows_block, backward_columns_block,
                   alike, at_16),
        problem(used.problem) {}

  template <typename Bytes>
  static int64_t most(const BackwardProblem& problem, Bytes&& bytes_of) {
    return most_bytes([&](bool alike, bool at_16) { return BackwardLayout(problem, alike, at_16); },
                      bytes_of);
  }

  static BackwardProblem with_gradients(BackwardProblem problem) {
    if (problem.numel() == 0) {
      problem.count = problem.candidates = 0;
      problem.selected = nullptr;
    }
    if (problem.selected != nullptr) return problem;
    const int count = problem.count;
    problem.count = 0;
    for (int k = 0; k < count; ++k) {
      if (problem.grad[k] == nullptr) continue;
      const int to = problem.count++;
      problem.grad[to] = problem.grad[k];
      problem.scale_row[to] = problem.scale_row[k];
      problem.quant_min[to] = problem.quant_min[k];
      problem.quant_max[to] = problem.quant_max[k];
      problem.grad_factor[to] = problem.grad_factor[k];
    }
    problem.candidates = problem.count;
    return problem;
  }
};

template <typename T>
void describe_backward_width(const BackwardLayout& layout, int k, BackwardWidth<T>& width) {
  static_cast<Quantizer<ComputeType<T>>&>(width) = Quantizer<ComputeType<T>>(layout.problem, k);
  width.grad = static_cast<const T*>(layout.problem.grad[k]);
  width.grad_factor = layout.problem.grad_factor[k];
}

/// What the entries for rows and for columns have in common.
template <typename T, typename Entry>
Work describe_backward(const BackwardLayout& layout, Entry& entry) {
  using C = ComputeType<T>;
  static_assert(sizeof(Divisor<C>) == 8, "BackwardLayout reserves 8 bytes");
  const BackwardProblem& problem = layout.problem;
  entry.scales = Scales<C>(problem);
  entry.relu = problem.template relu<C>();
  entry.x = static_cast<const T*>(problem.x);
  entry.dx = static_cast<T*>(problem.dx);
  ScaleGradient<C>& scale_gradient = entry.scale_gradient;
  scale_gradient.dscale = static_cast<C*>(problem.dscale);
  scale_gradient.scale_rows = checked_unsigned(problem.scale_rows, "scale rows");
  scale_gradient.group_channels = layout.group_channels;
  scale_gradient.sums = layout.block_sums(problem.workspace);
  return {layout.blocks, layout.shared_bytes};
}

template <typename T, bool single, typename Capacity, typename Launch>
void launch_backward_rows(const std::vector<const BackwardLayout*>& layouts, Launch&& launch) {
  const auto describe = [](const BackwardLayout& layout, BackwardRows<T>& entry) {
    entry.outer = layout.problem.outer;
    entry.inner = layout.problem.inner;
    entry.piece_packs = layout.rows.piece_packs;
    entry.chunk_rows = layout.rows.chunk_rows;
    entry.pieces = layout.rows.pieces;
    entry.groups = layout.rows.groups;
    entry.team = layout.rows.team;
    entry.aligned = layout.aligned;
    return describe_backward<T>(layout, entry);
  };
  launch_tables(backward_rows<T, single, Capacity>, backward_rows_block, layouts, describe,
                describe_backward_width<T>, launch);
}

template <typename T, int V, typename Capacity, typename Launch>
void launch_backward_columns(const std::vector<const BackwardLayout*>& layouts, Launch&& launch) {
  const auto describe = [](const BackwardLayout& layout, BackwardColumns<T>& entry) {
    entry.rows = layout.problem.outer;
    entry.chunk_rows = layout.column.chunk_rows;
    entry.groups = layout.column.groups;
    entry.width = layout.column.width;
    return describe_backward<T>(layout, entry);
  };
  launch_tables(backward_columns<T, V, Capacity>, backward_columns_block, layouts, describe,
                describe_backward_width<T>, launch);
}

/// Chooses the kernel for problems of one kind. The kernels for one bit-width and for several give
/// the same bits, those for different vector widths do not.
template <typename T, typename Launch>
void backward(const std::vector<const BackwardLayout*>& layouts, Launch&& launch) {
  constexpr int V = vector_size<T>;
  const bool one = layouts.size() == 1;
  const bool single = layouts[0]->problem.count == 1;
  if (layouts[0]->columns) {
    if (layouts[0]->pack == 1) {
      if (one) return launch_backward_columns<T, 1, One>(layouts, launch);
      return launch_backward_columns<T, 1, Many>(layouts, launch);
    }
    if (one) return launch_backward_columns<T, V, One>(layouts, launch);
    return launch_backward_columns<T, V, Many>(layouts, launch);
  }
  if (selected(layouts)) return launch_backward_rows<T, true, Selected>(layouts, launch);
  if (one && single) return launch_backward_rows<T, true, One>(layouts, launch);
  if (one) return launch_backward_rows<T, false, One>(layouts, launch);
  return launch_backward_rows<T, false, Many>(layouts, launch);
}

/// As few launches as possible: `launch(kernel, blocks, threads, bytes of shared memory, table)`.
/// Problems of a launch run at the same time, so each has counters of its own.
template <typename Launch>
void dispatch_backward(const BackwardProblem* problems, int64_t count, void* counters,
                       Launch&& launch) {
  auto next_counter = static_cast<unsigned*>(counters);
  std::vector<BackwardLayout> layouts;
  layouts.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (problems[i].scale_rows * problems[i].channels == 0) continue;  // x has no element either
    BackwardLayout layout = BackwardLayout::of(problems[i]);
    layout.counters = next_counter;
    if (layout.items > 0) next_counter += layout.tree.counters(layout.groups);
    layouts.push_back(layout);
  }
  for_each_kind(layouts, [&](auto zero, const std::vector<const BackwardLayout*>& alike) {
    backward<decltype(zero)>(alike, launch);
  });
}

}  // namespace limpq::cuda
