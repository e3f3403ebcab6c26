// A list of problems as few launches: each launch carries a table of them in its parameters.
//
// Parameters and not device memory: nothing is uploaded or kept alive, a captured graph has its own
// copy, and the kernels find them in constant memory, where an index known only at run time costs
// nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "access.cuh"
#include "layout.h"

namespace limpq::cuda {

/// What CUDA 12.1 and later take as the parameters of a kernel.
constexpr int most_parameter_bytes = 32764;

/// A table of the largest size has room for this many bit-widths of each of its problems.
constexpr int usual_bit_widths = 5;

/// The tests set it low, so that short lists take several launches.
#if !defined(LIMPQ_LONGEST_TABLE)
#define LIMPQ_LONGEST_TABLE 1000
#endif

// How much a table holds. CUDA copies all of it at each launch, however much is filled, so there
// is a small one for the plain and the multi-bit operators, whose kernels then need no search
// either, and a large one for a bank.
struct One {
  template <typename Entry, typename Width>
  static constexpr int entries = 1;
  template <typename Entry, typename Width>
  static constexpr int widths = max_bit_widths;
};
struct Selected : One {};  // for the kernel for rows where a tensor selects the bit-width
struct Many {
  template <typename Entry, typename Width>
  static constexpr int entries =
      std::min<int>((most_parameter_bytes - sizeof(int64_t)) /
                        (sizeof(unsigned) + sizeof(Entry) + usual_bit_widths * sizeof(Width)),
                    LIMPQ_LONGEST_TABLE);
  template <typename Entry, typename Width>
  static constexpr int widths = usual_bit_widths * entries<Entry, Width>;
};

/// A problem of a table, as one of its blocks sees it.
template <typename Entry, typename Width>
struct Pick {
  const Entry& problem;
  const Width* widths;
  unsigned block;  // counted from the first one of the problem
};

/// The parameters of a kernel: its problems, and their bit-widths in one pool. An Entry has members
/// `count`, `candidates`, `selected` and `first_width`.
template <typename EntryType, typename WidthType, typename Capacity>
struct Table {
  using Entry = EntryType;
  using Width = WidthType;
  static constexpr int most_entries = Capacity::template entries<Entry, Width>;
  static constexpr int most_widths = Capacity::template widths<Entry, Width>;
  static_assert(most_widths >= max_bit_widths, "a problem may have all bit-widths");

  int size;
  unsigned first_block[most_entries];
  Entry entries[most_entries];
  Width widths[most_widths];

  /// The problem that this block of the launch works on. `selects`: a tensor may say which of its
  /// candidates is the one bit-width that the kernel sees. (Not in the plain kernel for rows, where
  /// it would cost registers that there are not.)
  template <bool selects>
  __device__ __forceinline__ Pick<Entry, Width> pick(unsigned block) const {
    int at = 0;
    if constexpr (most_entries > 1) {
      for (int past = size; past - at > 1;) {
        const int middle = (at + past) / 2;
        if (first_block[middle] <= block) {
          at = middle;
        } else {
          past = middle;
        }
      }
      block -= first_block[at];
    }
    const Entry& entry = entries[at];
    const Width* own = most_entries > 1 ? widths + entry.first_width : widths;
    if constexpr (selects) {
      if (entry.selected != nullptr) {
        own += min(max(*entry.selected, int64_t(0)), int64_t(entry.candidates - 1));
      }
    }
    return {entry, own, block};
  }
};

/// What one problem asks of its launch.
struct Work {
  int64_t blocks;
  int shared_bytes;
};

/// Launches `kernel` for all of `layouts`, as few times as its table allows. `describe(layout,
/// entry)` fills an entry, all but its bit-widths, and returns its Work; `describe_width(layout, k,
/// width)` fills one of its bit-widths.
template <typename Table, typename Layout, typename Describe, typename DescribeWidth,
          typename Launch>
void launch_tables(void (*kernel)(Table), int threads, const std::vector<const Layout*>& layouts,
                   Describe&& describe, DescribeWidth&& describe_width, Launch&& launch) {
  static_assert(sizeof(Table) <= most_parameter_bytes, "more than the parameters of a kernel");
  Table table;
  int widths = 0;
  int64_t blocks = 0;
  int shared_bytes = 0;
  table.size = 0;
  const auto start = [&] {
    if (table.size > 0) launch(kernel, blocks, threads, shared_bytes, table);
    table.size = widths = shared_bytes = 0;
    blocks = 0;
  };
  for (const Layout* layout : layouts) {
    const int count = layout->problem.candidates;
    typename Table::Entry entry;
    const Work work = describe(*layout, entry);
    if (table.size == Table::most_entries || widths + count > Table::most_widths ||
        blocks + work.blocks > std::numeric_limits<int32_t>::max()) {
      start();
    }
    entry.count = layout->problem.count;
    entry.candidates = count;
    entry.selected = layout->problem.selected;
    entry.first_width = widths;
    table.first_block[table.size] = static_cast<unsigned>(blocks);
    table.entries[table.size++] = entry;
    for (int k = 0; k < count; ++k) describe_width(*layout, k, table.widths[widths++]);
    blocks += work.blocks;
    shared_bytes = std::max(shared_bytes, work.shared_bytes);
  }
  start();
}

/// Calls run(T(), layouts) for the layouts of each kind(), in the order of the list and by rising
/// kind; T stores one element.
template <typename Layout, typename Run>
void for_each_kind(const std::vector<Layout>& list, Run&& run) {
  std::vector<const Layout*> ordered;
  for (const Layout& layout : list) ordered.push_back(&layout);
  const auto before = [](const Layout* a, const Layout* b) { return a->kind() < b->kind(); };
  if (!std::is_sorted(ordered.begin(), ordered.end(), before)) {
    std::stable_sort(ordered.begin(), ordered.end(), before);
  }
  for (auto first = ordered.begin(); first != ordered.end();) {
    const auto last = std::upper_bound(first, ordered.end(), *first, before);
    const std::vector<const Layout*> alike(first, last);
    with_type(alike[0]->problem.dtype, [&](auto zero) { run(zero, alike); });
    first = last;
  }
}

/// Whether a tensor selects the bit-width; such a problem stands alone.
template <typename Layout>
bool selected(const std::vector<const Layout*>& layouts) {
  return layouts[0]->problem.selected != nullptr;
}

}  // namespace limpq::cuda
