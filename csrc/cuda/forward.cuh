// Forward: every element of x is read once and gives one output per bit-width.
//
// The idea, without the vectors (the reader of the kernels below adds only where elements are):
//
//   for each element i of x, in its channel c:
//     for k in 0 .. count:
//       y[k][i] = fake_quantize(x[i], guarded scale[scale_row[k], c], range[k])
//
// One kernel for tensors whose channels are rows of neighbouring elements (a tensor with one scale
// is one long row), one for those whose channels are columns.
#pragma once

#include "quantizers.cuh"

namespace limpq::cuda {

/// Threads of a block.
constexpr int forward_rows_block = 256;
constexpr int forward_columns_block = 128;

/// Packs of a thread: that many loads are in flight before the first result is needed. Fewer where
/// they would not fit the registers that leave room for 640 threads or more on a multiprocessor.
template <typename T, bool lean>
constexpr int forward_packs = sizeof(T) == 4 || lean ? 4 : 2;

template <typename T>
struct ForwardRows {
  Quantizers<ComputeType<T>> quantizers;
  const T* x;
  T* y[max_bit_widths];
  int64_t rows;
  int64_t inner;
  int64_t piece_packs;
  unsigned pieces;
  int team;
  bool aligned;
};

/// Bytes per element: sizeof(T) * (1 + count). `single`: count is 1, and there is no loop over k.
///
/// Each team of threads takes one piece of one row, and each thread of it `forward_packs` packs.
template <typename T, bool single>
__global__ void __launch_bounds__(forward_rows_block, single ? 4 : 3)
    forward_rows(const __grid_constant__ ForwardRows<T> p) {
  using C = ComputeType<T>;
  constexpr int V = vector_size<T>;
  constexpr int packs_per_thread = forward_packs<T, single>;
  const int teams = blockDim.x / p.team;
  const unsigned piece = blockIdx.x % p.pieces;
  const int64_t index = int64_t(blockIdx.x / p.pieces) * teams + threadIdx.x / p.team;
  if (index >= p.rows) return;
  const int64_t channels = p.quantizers.channels;
  const int64_t channel = channels == 1 ? 0 : index % channels;
  const Row<T> row(p.x, index * p.inner, p.inner, p.aligned);

  const int64_t first = piece * p.piece_packs + threadIdx.x % p.team;
  const int64_t packs = row.packs();
  Pack<T> x[packs_per_thread];
#pragma unroll
  for (int u = 0; u < packs_per_thread; ++u) {
    if (first + u * p.team < packs) x[u] = row.span(first + u * p.team).load(p.x);
  }

  const int count = single ? 1 : p.quantizers.count;
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    const Divisor<C> divisor = p.quantizers.divisor(k, channel);
    const Range<C> range = p.quantizers.range(k);
    T* const y = p.y[k];
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
  Quantizers<ComputeType<T>> quantizers;
  const T* x;
  T* y[max_bit_widths];
  int64_t rows;
  int64_t chunk_rows;
  unsigned groups;
  int width;
};

/// Bytes per element: sizeof(T) * (1 + count), and the scales, which stay in the cache.
///
/// Each thread owns V neighbouring channels, with their scales in registers, and `forward_packs`
/// rows. V > 1 asks for channels % V == 0 and for pointers, scale too, divisible by 16.
template <typename T, int V, bool single>
__global__ void __launch_bounds__(forward_columns_block, single ? 8 : 5)
    forward_columns(const __grid_constant__ ForwardColumns<T> p) {
  using C = ComputeType<T>;
  constexpr int packs_per_thread = forward_packs<T, false>;
  const int64_t channels = p.quantizers.channels;
  const int height = blockDim.x / p.width;
  const int64_t channel = (int64_t(blockIdx.x % p.groups) * p.width + threadIdx.x % p.width) * V;
  const int down = threadIdx.x / p.width;
  if (channel >= channels || down >= height) return;
  const int64_t first = (blockIdx.x / p.groups) * p.chunk_rows + down;

  Pack<T, V> x[packs_per_thread];
#pragma unroll
  for (int u = 0; u < packs_per_thread; ++u) {
    const int64_t row = first + u * height;
    if (row < p.rows) x[u] = load_pack<V>(p.x + row * channels + channel);
  }

  const int count = single ? 1 : p.quantizers.count;
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    Divisor<C> divisors[V];
    p.quantizers.divisors(k, channel, divisors);
    const Range<C> range = p.quantizers.range(k);
    T* const y = p.y[k];
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

/// Chooses the kernel. `launch(kernel, blocks, threads, bytes of shared memory, parameters)`.
template <typename T, typename Launch>
void forward(const ForwardProblem& problem, Launch&& launch) {
  constexpr int V = vector_size<T>;
  const int count = problem.count;
  const Quantizers<ComputeType<T>> quantizers(problem);
  const bool aligned = aligned_alike(problem.x, problem.y, count);

  const auto copy_pointers = [&](auto& parameters) {
    parameters.quantizers = quantizers;
    parameters.x = static_cast<const T*>(problem.x);
    for (int k = 0; k < count; ++k) parameters.y[k] = static_cast<T*>(problem.y[k]);
  };

  if (by_columns(problem)) {
    const bool vectors = aligned && aligned_to_16(problem.x) && aligned_to_16(problem.scale) &&
                         problem.channels % V == 0;
    const ColumnsLayout layout(problem, vectors ? V : 1, forward_columns_block,
                               forward_packs<T, false>, 1, 1);
    ForwardColumns<T> parameters{};
    copy_pointers(parameters);
    parameters.rows = problem.outer;
    parameters.chunk_rows = layout.chunk_rows;
    parameters.groups = layout.groups;
    parameters.width = layout.width;
    const auto kernel = !vectors     ? forward_columns<T, 1, false>
                        : count == 1 ? forward_columns<T, V, true>
                                     : forward_columns<T, V, false>;
    launch(kernel, layout.blocks(), forward_columns_block, 0, parameters);
    return;
  }

  const int packs = count == 1 ? forward_packs<T, true> : forward_packs<T, false>;
  const RowsLayout layout(problem, V, forward_rows_block, packs, packs);
  ForwardRows<T> parameters{};
  copy_pointers(parameters);
  parameters.rows = problem.outer * problem.channels;
  parameters.inner = problem.inner;
  parameters.piece_packs = layout.piece_packs;
  parameters.pieces = layout.pieces;
  parameters.team = layout.team;
  parameters.aligned = aligned;
  const int64_t row_groups = ceil_div(parameters.rows, forward_rows_block / layout.team);
  const int64_t blocks = checked_unsigned(row_groups * layout.pieces, "blocks");
  launch(count == 1 ? forward_rows<T, true> : forward_rows<T, false>, blocks, forward_rows_block, 0,
         parameters);
}

template <typename Launch>
void dispatch_forward(const ForwardProblem& problem, Launch&& launch) {
  if (problem.numel() == 0) return;
  const ForwardProblem collapsed = collapse(problem);
  switch (problem.dtype) {
    case DataType::float32:
      return forward<float>(collapsed, launch);
    case DataType::float64:
      return forward<double>(collapsed, launch);
    case DataType::float16:
      return forward<__half>(collapsed, launch);
    case DataType::bfloat16:
      return forward<__nv_bfloat16>(collapsed, launch);
  }
}

}  // namespace limpq::cuda
