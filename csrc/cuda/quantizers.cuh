// The bit-widths of a call, as its kernels see them.
#pragma once

#include "access.cuh"
#include "layout.h"

namespace limpq::cuda {

/// In the kernel's parameters, hence in constant memory, where an index known only at run time
/// costs nothing.
template <typename C>
struct Quantizers {
  const C* scale;  // [scale_rows, channels]
  int64_t channels;
  C scale_min;
  C scale_max;
  int count;
  C quant_min[max_bit_widths];
  C quant_max[max_bit_widths];
  int64_t scale_row[max_bit_widths];

  Quantizers() = default;
  explicit Quantizers(const Problem& problem)
      : scale(static_cast<const C*>(problem.scale)),
        channels(problem.channels),
        scale_min(static_cast<C>(problem.scale_min)),
        scale_max(static_cast<C>(problem.scale_max)),
        count(0) {
    for (int k = 0; k < problem.count; ++k) add(problem, k);
  }

  void add(const Problem& problem, int k) {
    quant_min[count] = static_cast<C>(problem.quant_min[k]);
    quant_max[count] = static_cast<C>(problem.quant_max[k]);
    scale_row[count] = problem.scale_row[k];
    ++count;
  }

  __device__ __forceinline__ Range<C> range(int k) const { return {quant_min[k], quant_max[k]}; }

  __device__ __forceinline__ Divisor<C> divisor(int k, int64_t channel) const {
    return Divisor<C>(guard_scale(scale[scale_row[k] * channels + channel], scale_min, scale_max));
  }

  /// The scales of `size` neighbouring channels.
  template <int size>
  __device__ __forceinline__ void divisors(int k, int64_t channel, Divisor<C> (&all)[size]) const {
    constexpr int step = size < vector_size<C> ? 1 : vector_size<C>;
    const C* from = scale + scale_row[k] * channels + channel;
#pragma unroll
    for (int j = 0; j < size; j += step) {
      const Pack<C, step> scales = load_pack<step>(from + j);
#pragma unroll
      for (int i = 0; i < step; ++i) {
        all[j + i] = Divisor<C>(guard_scale(scales.element[i], scale_min, scale_max));
      }
    }
  }
};

}  // namespace limpq::cuda
