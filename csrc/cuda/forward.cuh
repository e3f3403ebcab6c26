// Forward: every element of x is read once and gives one output per bit-width.
//
// The idea, without the vectors (the reader of the kernels below adds only where elements are):
//
//   for each element i of x, in its channel c:
//     for k in 0 .. count:
//       y[k][i] = fake_quantize(relu.value(x[i]), guarded scale[scale_row[k], c], range[k])
//
// One kernel for tensors whose channels are rows of neighbouring elements (a tensor with one scale
// is one long row), one for those whose channels are columns.
#pragma once

#include <tuple>
#include <type_traits>

#include "quantizers.cuh"
#include "table.cuh"

namespace limpq::cuda {

/// Threads of a block.
constexpr int forward_rows_block = 256;
constexpr int forward_columns_block = 128;

/// Packs of a thread: that many loads are in flight before the first result is needed. Fewer where
/// they would not fit the registers that leave room for 640 threads or more on a multiprocessor.
template <typename T, bool lean>
constexpr int forward_packs = sizeof(T) == 4 || lean ? 4 : 2;

/// Blocks of forward_rows that a multiprocessor's registers are to hold.
template <typename T, bool single, typename Capacity>
constexpr int forward_rows_residents =
    single && (std::is_same_v<Capacity, One> || sizeof(T) == 4) ? 4 : 3;

template <typename T>
struct ForwardWidth : Quantizer<ComputeType<T>> {
  T* y;
};

template <typename T>
struct ForwardRows {
  Scales<ComputeType<T>> scales;
  Relu<ComputeType<T>> relu;
  const T* x;
  int64_t rows;
  int64_t inner;
  int64_t piece_packs;
  unsigned pieces;
  int team;
  int count;
  int candidates;
  const int64_t* selected;
  int first_width;
  bool aligned;
};

/// Bytes per element: sizeof(T) * (1 + count). `single`: count is 1, and there is no loop over k.
///
/// Each team of threads takes one piece of one row, and each thread of it `forward_packs` packs.
template <typename T, bool single, typename Capacity>
__global__ void __launch_bounds__(forward_rows_block, forward_rows_residents<T, single, Capacity>)
    forward_rows(const __grid_constant__ Table<ForwardRows<T>, ForwardWidth<T>, Capacity> table) {
  const auto [p, widths, block] =
      table.template pick<std::is_same_v<Capacity, Selected>>(blockIdx.x);
  using C = ComputeType<T>;
  constexpr int V = vector_size<T>;
  constexpr int packs_per_thread = forward_packs<T, single>;
  const int teams = blockDim.x / p.team;
  const unsigned piece = block % p.pieces;
  const int64_t index = int64_t(block / p.pieces) * teams + threadIdx.x / p.team;
  if (index >= p.rows) return;
  const int64_t channels = p.scales.channels;
  const int64_t channel = channels == 1 ? 0 : index % channels;
  const Row<T> row(p.x, index * p.inner, p.inner, p.aligned);

  const int64_t first = piece * p.piece_packs + threadIdx.x % p.team;
  const int64_t packs = row.packs();
  Pack<T> x[packs_per_thread];
#pragma unroll
  for (int u = 0; u < packs_per_thread; ++u) {
    if (first + u * p.team < packs) x[u] = row.span(first + u * p.team).load(p.x);
  }
  if (p.relu.present()) {
#pragma unroll
    for (int u = 0; u < packs_per_thread; ++u) apply_relu(x[u], p.relu);
  }

  const int count = single ? 1 : p.count;
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    const Divisor<C> divisor = widths[k].divisor(p.scales, channel);
    const Range<C> range = widths[k].range();
    T* const y = widths[k].y;
#pragma unroll
    for (int u = 0; u < packs_per_thread; ++u) {
      if (first + u * p.team >= packs) break;
      C values[V];
      C quotients[V];
      widen<T>(x[u], values);
      divide(values, divisor, all_tame<T>(values), quotients);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        values[j] = fake_quantize_quotient(quotients[j], divisor.scale, range);
      }
      row.span(first + u * p.team).store(y, narrow<T>(values));
    }
  }
}

template <typename T>
struct ForwardColumns {
  Scales<ComputeType<T>> scales;
  Relu<ComputeType<T>> relu;
  const T* x;
  int64_t rows;
  int64_t chunk_rows;
  unsigned groups;
  int width;
  int count;
  int candidates;
  const int64_t* selected;
  int first_width;
};

/// Bytes per element: sizeof(T) * (1 + count), and the scales, which stay in the cache.
///
/// Each thread owns V neighbouring channels, with their scales in registers, and `forward_packs`
/// rows. V > 1 asks for channels % V == 0 and for pointers, scale too, divisible by 16.
template <typename T, int V, bool single, typename Capacity>
__global__ void __launch_bounds__(forward_columns_block, single ? 8 : 5) forward_columns(
    const __grid_constant__ Table<ForwardColumns<T>, ForwardWidth<T>, Capacity> table) {
  const auto [p, widths, block] = table.template pick<std::is_same_v<Capacity, One>>(blockIdx.x);
  using C = ComputeType<T>;
  constexpr int packs_per_thread = forward_packs<T, false>;
  const int64_t channels = p.scales.channels;
  const int height = blockDim.x / p.width;
  const int64_t channel = (int64_t(block % p.groups) * p.width + threadIdx.x % p.width) * V;
  const int down = threadIdx.x / p.width;
  if (channel >= channels || down >= height) return;
  const int64_t first = (block / p.groups) * p.chunk_rows + down;

  Pack<T, V> x[packs_per_thread];
#pragma unroll
  for (int u = 0; u < packs_per_thread; ++u) {
    const int64_t row = first + u * height;
    if (row < p.rows) x[u] = load_pack<V>(p.x + row * channels + channel);
  }
  if (p.relu.present()) {
#pragma unroll
    for (int u = 0; u < packs_per_thread; ++u) apply_relu(x[u], p.relu);
  }

  const int count = single ? 1 : p.count;
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    Divisor<C> divisors[V];
    widths[k].divisors(p.scales, channel, divisors);
    const Range<C> range = widths[k].range();
    T* const y = widths[k].y;
#pragma unroll
    for (int u = 0; u < packs_per_thread; ++u) {
      const int64_t row = first + u * height;
      if (row >= p.rows) break;
      C values[V];
      C quotients[V];
      widen<T>(x[u], values);
      divide(values, divisors, all_tame<T>(values), quotients);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        values[j] = fake_quantize_quotient(quotients[j], divisors[j].scale, range);
      }
      store_pack(y + row * channels + channel, narrow<T>(values));
    }
  }
}

/// Which kernel a problem needs.
struct ForwardLayout {
  ForwardProblem problem;  // collapsed
  bool columns;
  bool aligned;
  int pack;  // elements of an access

  explicit ForwardLayout(const ForwardProblem& original)
      : problem(collapse(original)),
        columns(by_columns(problem)),
        aligned(aligned_alike(problem.x, problem.y, problem.candidates)),
        pack(16 / element_bytes(problem.dtype)) {
    const bool vectors = aligned && aligned_to_16(problem.x) && aligned_to_16(problem.scale) &&
                         problem.channels % pack == 0;
    if (columns && !vectors) pack = 1;
  }

  auto kind() const { return std::tuple(problem.dtype, columns, pack); }
};

template <typename T>
void describe_forward_width(const ForwardLayout& layout, int k, ForwardWidth<T>& width) {
  static_cast<Quantizer<ComputeType<T>>&>(width) = Quantizer<ComputeType<T>>(layout.problem, k);
  width.y = static_cast<T*>(layout.problem.y[k]);
}

template <typename T, bool single, typename Capacity, typename Launch>
void launch_forward_rows(const std::vector<const ForwardLayout*>& layouts, Launch&& launch) {
  constexpr int V = vector_size<T>;
  constexpr int packs = forward_packs<T, single>;
  const auto describe = [](const ForwardLayout& layout, ForwardRows<T>& entry) {
    const ForwardProblem& problem = layout.problem;
    const RowsLayout cut(problem, V, forward_rows_block, packs, packs);
    entry.scales = Scales<ComputeType<T>>(problem);
    entry.relu = problem.template relu<ComputeType<T>>();
    entry.x = static_cast<const T*>(problem.x);
    entry.rows = problem.outer * problem.channels;
    entry.inner = problem.inner;
    entry.piece_packs = cut.piece_packs;
    entry.pieces = cut.pieces;
    entry.team = cut.team;
    entry.aligned = layout.aligned;
    const int64_t row_groups = ceil_div(entry.rows, forward_rows_block / cut.team);
    return Work{checked_unsigned(row_groups * cut.pieces, "blocks"), 0};
  };
  launch_tables(forward_rows<T, single, Capacity>, forward_rows_block, layouts, describe,
                describe_forward_width<T>, launch);
}

template <typename T, int V, bool single, typename Capacity, typename Launch>
void launch_forward_columns(const std::vector<const ForwardLayout*>& layouts, Launch&& launch) {
  const auto describe = [](const ForwardLayout& layout, ForwardColumns<T>& entry) {
    const ForwardProblem& problem = layout.problem;
    const ColumnsLayout cut(problem, V, forward_columns_block, forward_packs<T, false>, 1, 1);
    entry.scales = Scales<ComputeType<T>>(problem);
    entry.relu = problem.template relu<ComputeType<T>>();
    entry.x = static_cast<const T*>(problem.x);
    entry.rows = problem.outer;
    entry.chunk_rows = cut.chunk_rows;
    entry.groups = cut.groups;
    entry.width = cut.width;
    return Work{cut.blocks(), 0};
  };
  launch_tables(forward_columns<T, V, single, Capacity>, forward_columns_block, layouts, describe,
                describe_forward_width<T>, launch);
}

/// Chooses the kernel for problems of one kind. Bits do not depend on the kernel, so not every
/// variant has all capacities.
template <typename T, typename Launch>
void forward(const std::vector<const ForwardLayout*>& layouts, Launch&& launch) {
  constexpr int V = vector_size<T>;
  const bool single = layouts[0]->problem.count == 1;
  const bool one = layouts.size() == 1;
  if (layouts[0]->columns) {
    if (layouts[0]->pack == 1) {
      if (one) return launch_forward_columns<T, 1, false, One>(layouts, launch);
      return launch_forward_columns<T, 1, false, Many>(layouts, launch);
    }
    if (!one) return launch_forward_columns<T, V, false, Many>(layouts, launch);
    if (single) return launch_forward_columns<T, V, true, One>(layouts, launch);
    return launch_forward_columns<T, V, false, One>(layouts, launch);
  }
  if (selected(layouts)) return launch_forward_rows<T, true, Selected>(layouts, launch);
  if (one && single) return launch_forward_rows<T, true, One>(layouts, launch);
  if (one) return launch_forward_rows<T, false, One>(layouts, launch);
  return launch_forward_rows<T, false, Many>(layouts, launch);
}

/// As few launches as possible: `launch(kernel, blocks, threads, bytes of shared memory, table)`.
template <typename Launch>
void dispatch_forward(const ForwardProblem* problems, int64_t count, Launch&& launch) {
  std::vector<ForwardLayout> layouts;
  layouts.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (problems[i].numel() > 0) layouts.emplace_back(problems[i]);
  }
  for_each_kind(layouts, [&](auto zero, const std::vector<const ForwardLayout*>& alike) {
    forward<decltype(zero)>(alike, launch);
  });
}

}  // namespace limpq::cuda
