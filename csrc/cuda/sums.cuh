// Sums over the blocks of a launch, finished in the same launch and always in the same order.
//
// The sum goes: a thread's elements in the compute type, at most `longest_float_sum` packs of them;
// a block's threads in double; and the blocks that share a channel in double as a tree (SumTree),
// each node of which is added by the block that arrives last at it. Who adds varies from run to
// run, the order of the additions does not.
#pragma once

#include "quantizers.cuh"

namespace limpq::cuda {

/// Scratch of a block: its threads' sums first, then those of combine().
__device__ __forceinline__ unsigned char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#else
  return cuda_on_host::shared_memory();
#endif
}

/// Rows: `sums` is [lists, threads]; hands the sum of each list over each team to take(item, sum),
/// item = list * teams + team. One warp for each item.
template <int threads, typename C, typename Take>
__device__ __forceinline__ void add_teams(const C* sums, int lists, int team, Take&& take) {
  const int teams = threads / team;
  const int warp_lane = threadIdx.x % warp_size;
  for (int item = threadIdx.x / warp_size; item < lists * teams; item += threads / warp_size) {
    const C* const team_sums = sums + item / teams * threads + item % teams * team;
    double sum = 0;
    for (int i = warp_lane; i < team; i += warp_size) sum += team_sums[i];
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (warp_lane == 0) take(item, sum);
  }
}

/// Columns: `sums` is [lists, V, threads]; hands the sum of each list over each channel to
/// take(item, sum), item = list * width * V + channel. One thread for each item: it adds the sums
/// of the threads above each other.
template <int V, typename C, typename Take>
__device__ __forceinline__ void add_columns(const C* sums, int lists, int width, Take&& take) {
  const int threads = blockDim.x;
  const int height = threads / width;
  const int group_channels = width * V;
  for (int item = threadIdx.x; item < lists * group_channels; item += threads) {
    const int list = item / group_channels;
    const int j = item % group_channels % V;
    const C* const column = sums + (list * V + j) * threads + item % group_channels / V;
    double sum = 0;
    for (int i = 0; i < height; ++i) sum += column[i * width];
    take(item, sum);
  }
}

/// Rows that a thread has in registers at a time.
template <typename T>
constexpr int column_rows = sizeof(T) == 2 ? 2 : 4;

/// The sums over blocks. A block works on `items` sums of its group of channels; the blocks of a
/// group are its parts. finish(item, sum) takes what is summed over all of them.
struct BlockSums {
  double* part_sums;    // [groups, parts, items]
  double* branch_sums;  // [groups, branches, items]
  unsigned* counters;   // [groups, 1 + branches]
  SumTree tree;

  /// Takes the sum of one item over this block.
  template <typename Finish>
  __device__ __forceinline__ void deliver(unsigned group, unsigned part, int64_t items, int item,
                                          double sum, Finish&& finish) const {
    if (tree.parts == 1) {
      finish(item, sum);
    } else {
      part_sums[(int64_t(group) * tree.parts + part) * items + item] = sum;
    }
  }

  /// After the block has delivered all of its items: true in the one block of the group after which
  /// all is finished.
  template <typename Finish>
  __device__ __forceinline__ bool complete(unsigned group, unsigned part, int items,
                                           Finish&& finish) const {
    if (tree.parts == 1 || items == 0) return part == 0;
    const unsigned branch = part / tree.fan_in;
    const unsigned first = branch * tree.fan_in;
    const unsigned parts = min(tree.fan_in, tree.parts - first);
    unsigned* const counter = counters + int64_t(group) * (1 + tree.branches);

    if (!last_to_arrive(counter + 1 + branch, parts)) return false;
    const double* const branch_parts = part_sums + (int64_t(group) * tree.parts + first) * items;
    if (tree.branches == 1) {
      combine(branch_parts, parts, items, finish);
      return true;
    }
    double* const group_branches = branch_sums + int64_t(group) * tree.branches * items;
    combine(branch_parts, parts, items,
            [&](int item, double sum) { group_branches[int64_t(branch) * items + item] = sum; });
    if (!last_to_arrive(counter, tree.branches)) return false;
    combine(group_branches, tree.branches, items, finish);
    return true;
  }

 private:
  /// Counts the blocks that came here; true in the last of `expected`, which sees all that the
  /// others wrote before. Leaves the counter at 0 for the next launch.
  __device__ __forceinline__ bool last_to_arrive(unsigned* counter, unsigned expected) const {
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicAdd(counter, 1u) == expected - 1;
      if (last) {
        *counter = 0;
        __threadfence();
      }
    }
    return __syncthreads_or(last);
  }

  /// For each item, the sum over `parts` in a fixed order, handed to `take(item, sum)`.
  template <typename Take>
  __device__ __forceinline__ void combine(const double* sums, unsigned parts, int items,
                                          Take&& take) const {
    double* const scratch = reinterpret_cast<double*>(shared_memory());
    const int threads = blockDim.x;
    // Few items: several threads add each, and one adds theirs.
    const int helpers = items >= threads ? 1 : min(warp_size, threads / items);
    for (int first = 0; first < items; first += threads) {
      const int item = helpers == 1 ? first + int(threadIdx.x) : threadIdx.x % items;
      const int helper = helpers == 1 ? 0 : threadIdx.x / items;
      const bool busy = item < items && helper < helpers;
      double sum = 0;
      if (busy) {
        // Past the L1 cache: it may hold what was here before the other blocks wrote.
#pragma unroll 4
        for (unsigned i = helper; i < parts; i += helpers) {
          sum += __ldcg(sums + int64_t(i) * items + item);
        }
      }
      if (helpers == 1) {
        if (busy) take(item, sum);
        continue;
      }
      if (busy) scratch[helper * items + item] = sum;
      __syncthreads();
      if (helper == 0) {
        sum = 0;
#pragma unroll 4
        for (int h = 0; h < helpers; ++h) sum += scratch[h * items + item];
        take(item, sum);
      }
      __syncthreads();
    }
  }
};

/// How a problem whose channels have sums is cut.
struct SumsLayout {
  static constexpr int shared_limit = 48 * 1024;  // what every GPU gives without asking

  unsigned* counters = nullptr;
  bool columns;
  int pack;  // elements of an access
  bool aligned;
  int64_t blocks = 0;
  int64_t groups = 0;
  int group_channels = 0;
  int64_t items = 0;  // sums of a block: `lists` of each of its channels
  int shared_bytes = 0;
  SumTree tree{1};
  // One of these is in use.
  RowsLayout rows;
  ColumnsLayout column;

  /// `collapsed` is a problem; a thread has `lists` sums of each channel. `alike`: whether all
  /// pointers have the same offset from a 16-byte boundary, `at_16`: whether it is 0.
  SumsLayout(const Problem& collapsed, int lists, int rows_block, int columns_block, bool alike,
             bool at_16)
      : columns(by_columns(collapsed)), pack(1), aligned(alike) {
    const int widest = 16 / element_bytes(collapsed.dtype);
    const int compute_bytes = collapsed.dtype == DataType::float64 ? 8 : 4;
    if (columns) {
      const int wide_bytes = lists * widest * columns_block * compute_bytes;
      if (alike && at_16 && collapsed.channels % widest == 0 && wide_bytes <= shared_limit) {
        pack = widest;
      }
      column = ColumnsLayout(collapsed, pack, columns_block, step_rows(collapsed.dtype), 1,
                             longest_float_sum);
      blocks = column.blocks();
      groups = column.groups;
      group_channels = column.width * pack;
      tree = SumTree(column.chunks);
      shared_bytes = lists * pack * columns_block * compute_bytes;
    } else {
      pack = widest;
      rows = RowsLayout(collapsed, pack, rows_block, 1, longest_float_sum);
      blocks = rows.blocks();
      groups = rows.groups;
      group_channels = rows_block / rows.team;
      tree = SumTree(checked_unsigned(int64_t(rows.chunks) * rows.pieces, "blocks"));
      const int divisor_bytes = 8;  // double, or float and its reciprocal
      shared_bytes =
          lists * rows_block * compute_bytes + collapsed.count * group_channels * divisor_bytes;
    }
    const int block = columns ? columns_block : rows_block;
    shared_bytes = std::max(shared_bytes, block * int(sizeof(double)));  // combine()
    items = int64_t(lists) * group_channels;
  }

  int64_t workspace_bytes() const {
    return items == 0 ? 0 : tree.workspace(groups, items) * int64_t(sizeof(double));
  }
  int64_t counter_bytes() const {
    return items == 0 ? 0 : tree.counters(groups) * int64_t(sizeof(unsigned));
  }

  BlockSums block_sums(void* workspace) const {
    double* const part_sums = static_cast<double*>(workspace);
    return {part_sums, part_sums + groups * tree.parts * items, counters, tree};
  }

 private:
  static int step_rows(DataType dtype) {
    return element_bytes(dtype) == 2 ? column_rows<__half> : column_rows<float>;
  }
};

/// The most of what make(alike, at_16) asks for, over all alignments of its pointers.
template <typename Make, typename Bytes>
int64_t most_bytes(Make&& make, Bytes&& bytes_of) {
  const auto scalars = make(false, false);
  if (!scalars.columns) return bytes_of(scalars);  // the cut of rows does not depend on it
  return std::max(bytes_of(scalars), bytes_of(make(true, true)));
}

}  // namespace limpq::cuda
