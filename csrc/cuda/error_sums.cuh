// Error sums: x and the gradient are read once, and only the sums are written.
//
// The idea, without vectors and threads:
//
//   for each element i of x, in its channel c:
//     value = relu.value(x[i])
//     for k in 0 .. count:
//       t = grad[i] * (fake_quantize(value, guarded scale[scale_row[k], c], range[k]) - value)
//       sums[0, k, c] += t
//       sums[1, k, c] += t * t
//
// How the sums go is said in sums.cuh.
#pragma once

#include <tuple>
#include <vector>

#include "sums.cuh"
#include "table.cuh"

namespace limpq::cuda {

/// 2 x count x group_channels sums in each block: item (i * count + k) * group_channels + j belongs
/// to the terms (i = 0) or their squares (1) of bit-width k and channel group * group_channels + j.
struct ErrorSumsOutput {
  double* to;  // [2, count, channels]
  BlockSums sums;
  int group_channels;

  template <typename Problem>
  __device__ __forceinline__ auto finish(const Problem& of, unsigned group) const {
    return [this, channels = of.problem.scales.channels, group](int item, double sum) {
      const int64_t channel = int64_t(group) * group_channels + item % group_channels;
      if (channel < channels) to[item / group_channels * channels + channel] = sum;
    };
  }

  /// Takes the sum of one item over this block.
  template <typename Problem>
  __device__ __forceinline__ void deliver(const Problem& of, unsigned group, unsigned part,
                                          int item, double sum) const {
    sums.deliver(group, part, items(of), item, sum, finish(of, group));
  }

  /// After the block has delivered all of its items.
  template <typename Problem>
  __device__ __forceinline__ void complete(const Problem& of, unsigned group, unsigned part) const {
    sums.complete(group, part, items(of), finish(of, group));
  }

 private:
  template <typename Problem>
  __device__ __forceinline__ int items(const Problem& of) const {
    return 2 * of.problem.count * group_channels;
  }
};

/// Threads of a block. Each has two sums for a bit-width (and channel, in columns).
constexpr int error_sums_block = 128;

/// Adds what one element contributes through one bit-width.
template <typename C>
__device__ __forceinline__ void add_error(C grad, C value, C quotient, C scale, Range<C> range,
                                          C& sum, C& square) {
  const C term = grad * (fake_quantize_quotient(quotient, scale, range) - value);
  sum += term;
  square += term * term;
}

template <typename T>
struct ErrorSumsRows {
  Scales<ComputeType<T>> scales;
  Relu<ComputeType<T>> relu;
  ErrorSumsOutput output;
  const T* x;
  const T* grad;
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

/// Bytes per element: 2 * sizeof(T).
///
/// Each team of threads takes one channel, and of it either one piece of one row or several rows.
template <typename T>
__global__ void __launch_bounds__(error_sums_block, 6) error_sums_rows(
    const __grid_constant__ Table<ErrorSumsRows<T>, Quantizer<ComputeType<T>>, One> table) {
  const auto picked = table.template pick<false>(blockIdx.x);
  const auto [p, widths, block] = picked;
  using C = ComputeType<T>;
  constexpr int V = vector_size<T>;
  constexpr int threads = error_sums_block;
  const int team = threadIdx.x / p.team;
  const int lane = threadIdx.x % p.team;
  const unsigned piece = block % p.pieces;
  const unsigned group = block / p.pieces % p.groups;
  const unsigned chunk = block / p.pieces / p.groups;
  const int teams = threads / p.team;
  const int64_t channels = p.scales.channels;
  const int64_t channel = int64_t(group) * teams + team;
  const int count = p.count;

  C* const sums = reinterpret_cast<C*>(shared_memory());  // [2, count, threads]
  Divisor<C>* const divisors =
      reinterpret_cast<Divisor<C>*>(sums + 2 * count * threads);  // [count, teams]
  if (channel < channels) {
    for (int k = lane; k < count; k += p.team) {
      divisors[k * teams + team] = widths[k].divisor(p.scales, channel);
    }
  }
  for (int i = 0; i < 2 * count; ++i) sums[i * threads + threadIdx.x] = C(0);
  __syncthreads();

  const int64_t last_row = min(p.outer, (chunk + int64_t(1)) * p.chunk_rows);
  for (int64_t o = chunk * p.chunk_rows; o < last_row && channel < channels; ++o) {
    const Row<T> row(p.x, (o * channels + channel) * p.inner, p.inner, p.aligned);
    const int64_t end = min(row.packs(), (piece + int64_t(1)) * p.piece_packs);
    for (int64_t i = piece * p.piece_packs + lane; i < end; i += p.team) {
      const Span<T> span = row.span(i);
      C x[V];
      C grad[V];
      const Pack<T> grad_pack = span.load(p.grad);
      widen<T>(span.load(p.x), x);
      widen<T>(grad_pack, grad);
      apply_relu(x, p.relu);
      const bool tame = all_tame<T>(x);
#pragma unroll 1
      for (int k = 0; k < count; ++k) {
        const Divisor<C> divisor = divisors[k * teams + team];
        const Range<C> range = widths[k].range();
        C quotient[V];
        divide(x, divisor, tame, quotient);
        C sum = C(0);
        C square = C(0);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          add_error(grad[j], x[j], quotient[j], divisor.scale, range, sum, square);
        }
        sums[k * threads + threadIdx.x] += sum;
        sums[(count + k) * threads + threadIdx.x] += square;
      }
    }
  }
  __syncthreads();

  const auto& output = picked.problem.output;
  const unsigned part = chunk * p.pieces + piece;
  add_teams<threads>(sums, 2 * count, p.team,
                     [&](int item, double sum) { output.deliver(picked, group, part, item, sum); });
  output.complete(picked, group, part);
}

template <typename T>
struct ErrorSumsColumns {
  Scales<ComputeType<T>> scales;
  Relu<ComputeType<T>> relu;
  ErrorSumsOutput output;
  const T* x;
  const T* grad;
  int64_t rows;
  int64_t chunk_rows;
  unsigned groups;
  int width;
  int count;
  int candidates;
  const int64_t* selected;
  int first_width;
};

/// Bytes per element: 2 * sizeof(T), and the scales, which stay in the cache.
///
/// Each thread owns V neighbouring channels and walks down their rows, `column_rows` at a time. V >
/// 1 asks for channels % V == 0 and for pointers, scale too, divisible by 16.
template <typename T, int V>
__global__ void __launch_bounds__(error_sums_block, 4) error_sums_columns(
    const __grid_constant__ Table<ErrorSumsColumns<T>, Quantizer<ComputeType<T>>, One> table) {
  const auto picked = table.template pick<false>(blockIdx.x);
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

  C* const sums = reinterpret_cast<C*>(shared_memory());  // [2, count, V, threads]
  for (int i = 0; i < 2 * count * V; ++i) sums[i * threads + threadIdx.x] = C(0);

  if (channel < channels && down < height) {
    const int64_t end = min(p.rows, (chunk + int64_t(1)) * p.chunk_rows);
    for (int64_t first = chunk * p.chunk_rows + down; first < end;
         first += rows_at_a_time * height) {
      Pack<T, V> x[rows_at_a_time];
      Pack<T, V> grads[rows_at_a_time];
#pragma unroll
      for (int u = 0; u < rows_at_a_time; ++u) {
        const int64_t row = first + u * height;
        if (row < end) {
          x[u] = load_pack<V>(p.x + row * channels + channel);
          grads[u] = load_pack<V>(p.grad + row * channels + channel);
        }
      }
      if (p.relu.present()) {
#pragma unroll
        for (int u = 0; u < rows_at_a_time; ++u) apply_relu(x[u], p.relu);
      }
#pragma unroll 1
      for (int k = 0; k < count; ++k) {
        Divisor<C> divisors[V];
        widths[k].divisors(p.scales, channel, divisors);
        const Range<C> range = widths[k].range();
        C sum[V] = {};
        C square[V] = {};
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
            add_error(grad[j], values[j], quotient[j], divisors[j].scale, range, sum[j], square[j]);
          }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sums[(k * V + j) * threads + threadIdx.x] += sum[j];
          sums[((count + k) * V + j) * threads + threadIdx.x] += square[j];
        }
      }
    }
  }
  __syncthreads();

  const auto& output = picked.problem.output;
  add_columns<V>(sums, 2 * count, p.width,
                 [&](int item, double sum) { output.deliver(picked, group, chunk, item, sum); });
  output.complete(picked, group, chunk);
}

/// How a problem is cut: which kernel, and what it asks of its caller.
struct ErrorSumsLayout : SumsLayout {
  ErrorSumsProblem problem;  // collapsed

  static ErrorSumsLayout of(const ErrorSumsProblem& problem) {
    return ErrorSumsLayout(problem, aligned_alike(problem.x, &problem.grad, 1),
                           aligned_to_16(problem.x) && aligned_to_16(problem.scale));
  }

  /// What the caller has to provide, whatever its pointers will be.
  static int64_t workspace_bytes(const ErrorSumsProblem& problem) {
    return most(problem, [](const SumsLayout& layout) { return layout.workspace_bytes(); });
  }
  static int64_t counter_bytes(const ErrorSumsProblem& problem) {
    return most(problem, [](const SumsLayout& layout) { return layout.counter_bytes(); });
  }

  ErrorSumsLayout(const ErrorSumsProblem& original, bool alike, bool at_16)
      : SumsLayout(collapse(original), 2 * original.count, error_sums_block, error_sums_block,
                   alike, at_16),
        problem(collapse(original)) {}

 private:
  template <typename Bytes>
  static int64_t most(const ErrorSumsProblem& problem, Bytes&& bytes_of) {
    return most_bytes(
        [&](bool alike, bool at_16) { return ErrorSumsLayout(problem, alike, at_16); }, bytes_of);
  }
};

/// What the entries for rows and for columns have in common.
template <typename T, typename Entry>
Work describe_error_sums(const ErrorSumsLayout& layout, Entry& entry) {
  using C = ComputeType<T>;
  const ErrorSumsProblem& problem = layout.problem;
  entry.scales = Scales<C>(problem);
  entry.relu = problem.template relu<C>();
  entry.x = static_cast<const T*>(problem.x);
  entry.grad = static_cast<const T*>(problem.grad);
  entry.output = {problem.sums, layout.block_sums(problem.workspace), layout.group_channels};
  return {layout.blocks, layout.shared_bytes};
}

template <typename T>
void describe_error_sums_width(const ErrorSumsLayout& layout, int k,
                               Quantizer<ComputeType<T>>& width) {
  width = Quantizer<ComputeType<T>>(layout.problem, k);
}

template <typename T, typename Launch>
void launch_error_sums_rows(const ErrorSumsLayout& layout, Launch&& launch) {
  const auto describe = [](const ErrorSumsLayout& layout, ErrorSumsRows<T>& entry) {
    entry.outer = layout.problem.outer;
    entry.inner = layout.problem.inner;
    entry.piece_packs = layout.rows.piece_packs;
    entry.chunk_rows = layout.rows.chunk_rows;
    entry.pieces = layout.rows.pieces;
    entry.groups = layout.rows.groups;
    entry.team = layout.rows.team;
    entry.aligned = layout.aligned;
    return describe_error_sums<T>(layout, entry);
  };
  const std::vector<const ErrorSumsLayout*> one{&layout};
  launch_tables(error_sums_rows<T>, error_sums_block, one, describe, describe_error_sums_width<T>,
                launch);
}

template <typename T, int V, typename Launch>
void launch_error_sums_columns(const ErrorSumsLayout& layout, Launch&& launch) {
  const auto describe = [](const ErrorSumsLayout& layout, ErrorSumsColumns<T>& entry) {
    entry.rows = layout.problem.outer;
    entry.chunk_rows = layout.column.chunk_rows;
    entry.groups = layout.column.groups;
    entry.width = layout.column.width;
    return describe_error_sums<T>(layout, entry);
  };
  const std::vector<const ErrorSumsLayout*> one{&layout};
  launch_tables(error_sums_columns<T, V>, error_sums_block, one, describe,
                describe_error_sums_width<T>, launch);
}

/// One launch: `launch(kernel, blocks, threads, bytes of shared memory, table)`. The problem is not
/// empty.
template <typename Launch>
void dispatch_error_sums(const ErrorSumsProblem& problem, void* counters, Launch&& launch) {
  ErrorSumsLayout layout = ErrorSumsLayout::of(problem);
  layout.counters = static_cast<unsigned*>(counters);
  with_type(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!layout.columns) return launch_error_sums_rows<T>(layout, launch);
    if (layout.pack == 1) return launch_error_sums_columns<T, 1>(layout, launch);
    launch_error_sums_columns<T, vector_size<T>>(layout, launch);
  });
}

}  // namespace limpq::cuda
