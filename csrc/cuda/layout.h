// How a tensor [outer, channels, inner] is cut into blocks and threads. Host code, no CUDA.
//
// The cut depends on the problem alone, never on the device or on what runs beside it: it fixes the
// order of every sum, and so the bits of the result.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "../fake_quantize.h"

namespace limpq::cuda {

constexpr int warp_size = 32;

/// Where there is enough to do, this many blocks: several times what any GPU holds at once. The
/// tests set it low, so that small tensors give their threads long work.
#if !defined(LIMPQ_ENOUGH_BLOCKS)
#define LIMPQ_ENOUGH_BLOCKS 2048
#endif
constexpr int64_t enough_blocks = LIMPQ_ENOUGH_BLOCKS;

/// No thread adds more than this many packs in float before its sum goes on in double: with the
/// additions inside a pack, 40 roundings of 2^-24, well below the 1e-5 that the contract allows.
constexpr int64_t longest_float_sum = 32;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline unsigned checked_unsigned(int64_t value, const char* what) {
  if (value > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error(std::string("fake quantization: the tensor needs too many ") + what +
                             ": " + std::to_string(value));
  }
  return static_cast<unsigned>(value);
}

inline int element_bytes(DataType dtype) {
  switch (dtype) {
    case DataType::float32:
      return 4;
    case DataType::float64:
      return 8;
    case DataType::float16:
    case DataType::bfloat16:
      return 2;
  }
  return 0;
}

/// Contiguous memory with one scale is one row.
template <typename AnyProblem>
AnyProblem collapse(AnyProblem problem) {
  if (problem.channels == 1) {
    problem.inner *= problem.outer;
    problem.outer = 1;
  }
  return problem;
}

/// Whether the scale varies from element to element, so that threads own columns of
/// [outer, channels]; otherwise teams of threads walk along rows of `inner` elements.
inline bool by_columns(const Problem& collapsed) {
  return collapsed.inner == 1 && collapsed.channels > 1;
}

/// Rows: a team of threads, a whole block or one warp, works on a row or on a piece of it.
struct RowsLayout {
  int team;             // threads
  unsigned groups;      // of block / team neighbouring channels, which one block works on
  int64_t piece_packs;  // packs of a piece of a row
  unsigned pieces;      // in each row
  int64_t chunk_rows;   // rows of one channel that a team works through
  unsigned chunks;      // of the rows of a channel

  int64_t blocks() const { return int64_t(groups) * pieces * chunks; }

  RowsLayout() = default;

  /// `packs_per_thread`: how many packs a thread takes, at least and at most.
  RowsLayout(const Problem& problem, int pack, int block, int64_t fewest, int64_t most) {
    const int64_t row_packs = ceil_div(problem.inner, pack) + 1;  // one more where it is misaligned
    team = row_packs <= 4 * warp_size ? warp_size : block;
    groups = checked_unsigned(ceil_div(problem.channels, block / team), "channels");
    const int64_t packs = problem.outer * problem.channels * row_packs;
    const int64_t share = std::clamp(ceil_div(packs, block * enough_blocks), fewest, most);
    const int64_t row_steps = std::max<int64_t>(ceil_div(row_packs, team), 1);
    piece_packs = team * std::min(share, row_steps);
    pieces = checked_unsigned(ceil_div(row_packs, piece_packs), "pieces of a row");
    chunk_rows = pieces > 1 ? 1 : std::max<int64_t>(share / row_steps, 1);
    chunks = checked_unsigned(std::max<int64_t>(ceil_div(problem.outer, chunk_rows), 1), "rows");
    checked_unsigned(blocks(), "blocks");
  }
};

/// Columns: the threads of a block form a rectangle, `width` threads across the channels with
/// `pack` neighbouring channels each, and block / width threads down the rows.
struct ColumnsLayout {
  int width;           // threads
  unsigned groups;     // of width * pack channels
  int64_t chunk_rows;  // rows that one block works through
  unsigned chunks;

  int64_t blocks() const { return int64_t(groups) * chunks; }

  ColumnsLayout() = default;

  /// A thread takes from `fewest` to `most` steps of `step_rows` rows each.
  ColumnsLayout(const Problem& problem, int pack, int block, int step_rows, int64_t fewest,
                int64_t most) {
    const int64_t row_packs = std::max<int64_t>(ceil_div(problem.channels, pack), 1);
    width = static_cast<int>(std::min<int64_t>(row_packs, block));
    groups = checked_unsigned(ceil_div(row_packs, width), "channels");
    const int64_t block_rows = int64_t(block / width) * step_rows;
    const int64_t steps = ceil_div(problem.outer, block_rows) * groups;
    chunk_rows = block_rows * std::clamp(ceil_div(steps, enough_blocks), fewest, most);
    chunks = checked_unsigned(std::max<int64_t>(ceil_div(problem.outer, chunk_rows), 1), "rows");
    checked_unsigned(blocks(), "blocks");
  }
};

/// The second stage of a sum over blocks: `parts` blocks share a group of channels. Some `fan_in`
/// neighbours among them form a branch; the last block of a branch adds its parts, the last branch
/// adds the branches. Two levels keep the tail of the launch short: 2 * sqrt(parts) additions.
struct SumTree {
  unsigned parts;
  unsigned fan_in;
  unsigned branches;

  explicit SumTree(unsigned parts = 1) : parts(parts) {
    fan_in = parts <= 64 ? parts : static_cast<unsigned>(std::ceil(std::sqrt(double(parts))));
    branches = static_cast<unsigned>(ceil_div(parts, fan_in));
  }

  /// Doubles of workspace for `items` sums in each of `groups` groups.
  int64_t workspace(int64_t groups, int64_t items) const {
    return parts > 1 ? groups * items * (int64_t(parts) + branches) : 0;
  }
  /// Counters: one for each branch and one above them.
  int64_t counters(int64_t groups) const {
    return parts > 1 ? groups * (1 + int64_t(branches)) : 0;
  }
};

/// Whether all of the pointers have the same offset from a 16-byte boundary.
inline bool aligned_alike(const void* first, const void* const* others, int count) {
  for (int k = 0; k < count; ++k) {
    if ((reinterpret_cast<uintptr_t>(first) ^ reinterpret_cast<uintptr_t>(others[k])) % 16 != 0) {
      return false;
    }
  }
  return true;
}

inline bool aligned_to_16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace limpq::cuda
