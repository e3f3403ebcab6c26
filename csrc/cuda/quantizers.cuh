// The scales and bit-widths of a problem, as its kernel sees them.
#pragma once

#include "access.cuh"
#include "layout.h"

namespace limpq::cuda {

/// What the bit-widths of a problem share.
template <typename C>
struct Scales {
  const C* scale;  // [scale_rows, channels]
  int64_t channels;
  C scale_min;
  C scale_max;

  Scales() = default;
  explicit Scales(const Problem& problem)
      : scale(static_cast<const C*>(problem.scale)),
        channels(problem.channels),
        scale_min(static_cast<C>(problem.scale_min)),
        scale_max(static_cast<C>(problem.scale_max)) {}
};

/// One bit-width.
template <typename C>
struct Quantizer {
  C quant_min;
  C quant_max;
  int32_t scale_row;

  Quantizer() = default;
  Quantizer(const Problem& problem, int k)
      : quant_min(static_cast<C>(problem.quant_min[k])),
        quant_max(static_cast<C>(problem.quant_max[k])),
        scale_row(static_cast<int32_t>(checked_unsigned(problem.scale_row[k], "scale rows"))) {}

  __device__ __forceinline__ Range<C> range() const { return {quant_min, quant_max}; }

  __device__ __forceinline__ Divisor<C> divisor(const Scales<C>& all, int64_t channel) const {
    const C scale = all.scale[scale_row * all.channels + channel];
    return Divisor<C>(guard_scale(scale, all.scale_min, all.scale_max));
  }

  /// The scales of `size` neighbouring channels.
  template <int size>
  __device__ __forceinline__ void divisors(const Scales<C>& all, int64_t channel,
                                           Divisor<C> (&divisors)[size]) const {
    constexpr int step = size < vector_size<C> ? 1 : vector_size<C>;
    const C* from = all.scale + scale_row * all.channels + channel;
#pragma unroll
    for (int j = 0; j < size; j += step) {
      const Pack<C, step> scales = load_pack<step>(from + j);
#pragma unroll
      for (int i = 0; i < step; ++i) {
        divisors[j + i] = Divisor<C>(guard_scale(scales.element[i], all.scale_min, all.scale_max));
      }
    }
  }
};

/// What is quantized of x.
template <typename C, int size>
__device__ __forceinline__ void apply_relu(C (&x)[size], Relu<C> relu) {
#pragma unroll
  for (int j = 0; j < size; ++j) x[j] = relu.value(x[j]);
}

/// The same for a pack. A ceiling is a value of T, so nothing is rounded.
template <typename T, int size>
__device__ __forceinline__ void apply_relu(Pack<T, size>& x, Relu<ComputeType<T>> relu) {
  ComputeType<T> values[size];
  widen<T>(x, values);
  apply_relu(values, relu);
  x = narrow<T>(values);
}

/// `x` may be what apply_relu() gave.
template <typename C, int size>
__device__ __forceinline__ void stop_gradient(const C (&x)[size], Relu<C> relu, C (&dx)[size]) {
#pragma unroll
  for (int j = 0; j < size; ++j) dx[j] = relu.passes(x[j]) ? dx[j] : C(0);
}

}  // namespace limpq::cuda
