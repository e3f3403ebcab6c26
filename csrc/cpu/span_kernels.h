// Kernels over contiguous spans, one table of them per instruction set and data type.
//
// Memory traffic per element: forward reads x once and writes each of the K outputs once; backward
// reads x and the K gradients once and writes dx once; error_sums reads x and one gradient once. No
// torch headers here.
#pragma once

#include <cstdint>

#include "../lsq.h"

namespace limpq::cpu {

/// Storage of the half types, so that no torch or CUDA header is needed.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

/// One bit-width over a span that shares its scale; `scale` is guarded.
template <typename C>
struct Step {
  C scale;
  Range<C> range;
};

/// What guard_scale keeps a scale within.
template <typename C>
struct Guard {
  C scale_min;
  C scale_max;
};

/// Sums are taken over lane_count interleaved lanes in the compute type, at most block_size
/// elements at a time, and continued in double. Both numbers are part of the result's bits: they
/// make it the same for every instruction set and any number of threads.
constexpr int64_t block_size = 512;
constexpr int64_t lane_count = 16;

template <typename T>
struct SpanKernels {
  using C = typename ComputeType<T>::type;

  /// y[k][i] = fake_quantize(relu(x[i]), steps[k]) for i < n, k < count.
  void (*forward)(const T* x, T* const* y, int64_t n, Relu<C> relu, const Step<C>* steps,
                  int count);

  /// dx[i] = sum over k of the gradients, dscale[k] += the sum over i. A null grad[k] is skipped.
  void (*backward)(const T* x, const T* const* grad, T* dx, int64_t n, Relu<C> relu,
                   const Step<C>* steps, int count, double* dscale);

  /// The same where every element has a scale of its own, not yet guarded: scale[k][i],
  /// dscale[k][i].
  void (*forward_elementwise)(const T* x, T* const* y, int64_t n, Relu<C> relu,
                              const C* const* scale, Guard<C> guard, const Range<C>* ranges,
                              int count);
  void (*backward_elementwise)(const T* x, const T* const* grad, T* dx, int64_t n, Relu<C> relu,
                               const C* const* scale, Guard<C> guard, const Range<C>* ranges,
                               int count, double* const* dscale);

  /// sum[k] += the sum over i of t = grad[i] * (fake_quantize(x', steps[k]) - x'), x' = relu(x[i]),
  /// and square[k] += that of t * t.
  void (*error_sums)(const T* x, const T* grad, int64_t n, Relu<C> relu, const Step<C>* steps,
                     int count, double* sum, double* square);

  /// The same where every element has a scale of its own: scale[k][i], sum[k][i], square[k][i].
  void (*error_sums_elementwise)(const T* x, const T* grad, int64_t n, Relu<C> relu,
                                 const C* const* scale, Guard<C> guard, const Range<C>* ranges,
                                 int count, double* const* sum, double* const* square);
};

// Each namespace is the same source, span_kernels.inl, compiled for another instruction set.
namespace baseline {
template <typename T>
const SpanKernels<T>& span_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <typename T>
const SpanKernels<T>& span_kernels();
}
namespace avx512 {
template <typename T>
const SpanKernels<T>& span_kernels();
}
#endif

}  // namespace limpq::cpu
