// The span kernels, compiled once per instruction set by span_baseline.cpp, span_avx2.cpp and
// span_avx512.cpp, which define LIMPQ_ISA (the namespace) and set the compiler's target first.
//
// Plain loops that the compiler vectorises: scales and thresholds are copied into locals (a
// captured reference might alias the output, and the loop would stay scalar), and float sums run
// over explicit lanes, since without fast-math the compiler may not reorder them.
// Nothing here may call an inline function of a system header: the linker could keep the copy that
// was compiled for AVX-512 and run it on a machine without.

namespace limpq::cpu::LIMPQ_ISA {
namespace {

// --- half precision ---------------------------------------------------------------------------

inline float widen(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline BFloat16 narrow_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(value != value ? 0x7fc0u : rounded)};
}

#if !defined(LIMPQ_F16C)
// Without F16C. Subnormal results and inputs are scaled by a power of two in float, which is exact.
inline float widen(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t exponent_and_mantissa = magnitude << 13;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | exponent_and_mantissa;
  } else if (magnitude >= 0x0400u) {
    bits = exponent_and_mantissa + (112u << 23);
  } else {
    const float subnormal = float(magnitude) * 0x1p-24f;
    __builtin_memcpy(&bits, &subnormal, sizeof bits);
  }
  bits |= sign;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline Float16 narrow_float16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: round the lower 13 bits to even
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 aligns the last bit to 2^-24, and the addition rounds
    float absolute;
    __builtin_memcpy(&absolute, &magnitude, sizeof absolute);
    const float aligned = absolute + 0.5f;
    uint32_t aligned_bits;
    __builtin_memcpy(&aligned_bits, &aligned, sizeof aligned_bits);
    half = aligned_bits - 0x3f000000u;
  }
  return {uint16_t(sign | half)};
}
#endif

inline void load(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
inline void load(const BFloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}
inline void store(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow_bfloat16(from[i]);
}
#if defined(LIMPQ_F16C)
inline void load(const Float16* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i].bits);
}
inline void store(const float* from, Float16* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  for (; i < n; ++i) to[i].bits = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}
#else
inline void load(const Float16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}
inline void store(const float* from, Float16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow_float16(from[i]);
}
#endif

/// A block of a span in the compute type: the span itself where the types agree, else a copy.
template <typename T, typename C>
struct Reader {
  C buffer[block_size];
  const C* read(const T* from, int64_t n) {
    load(from, buffer, n);
    return buffer;
  }
};
template <typename C>
struct Reader<C, C> {
  const C* read(const C* from, int64_t) { return from; }
};

template <typename T, typename C>
struct Writer {
  C buffer[block_size];
  C* open(T*) { return buffer; }
  void close(T* to, int64_t n) { store(buffer, to, n); }
};
template <typename C>
struct Writer<C, C> {
  C* open(C* to) { return to; }
  void close(C*, int64_t) {}
};

/// In the place of a Relu where there is none, so that nothing is computed for it.
template <typename C>
struct NoRelu {
  C value(C x) const { return x; }
  bool passes(C) const { return true; }
};

/// In the place of a Relu without a ceiling. An infinite x does not pass, as above quant_max.
template <typename C>
struct PlainRelu {
  C value(C x) const { return x < C(0) ? C(0) : x; }
  bool passes(C x) const { return x > C(0); }
};

// --- blocks in the compute type ---------------------------------------------------------------

template <typename C, typename MaybeRelu>
inline void forward_block(const C* __restrict x, C* __restrict y, int64_t n, MaybeRelu relu,
                          Step<C> step) {
  for (int64_t i = 0; i < n; ++i) y[i] = fake_quantize(relu.value(x[i]), step.scale, step.range);
}

template <typename C, typename MaybeRelu>
inline void forward_block(const C* __restrict x, C* __restrict y, int64_t n, MaybeRelu relu,
                          const C* __restrict scale, Guard<C> guard, Range<C> range) {
  for (int64_t i = 0; i < n; ++i) {
    const C guarded = guard_scale(scale[i], guard.scale_min, guard.scale_max);
    y[i] = fake_quantize(relu.value(x[i]), guarded, range);
  }
}

/// fake_quantize_backward through the ReLU. What is below 0 contributes 0 to dscale either way.
template <typename C, typename MaybeRelu>
LIMPQ_INLINE Gradients<C> backward_element(C grad, C x, MaybeRelu relu, C scale, Range<C> range) {
  const Gradients<C> out = fake_quantize_backward(grad, relu.value(x), scale, range);
  return {relu.passes(x) ? out.dx : C(0), out.dscale};
}

template <bool accumulate, typename C, typename MaybeRelu>
inline double backward_block(const C* __restrict x, const C* __restrict grad, C* __restrict dx,
                             int64_t n, MaybeRelu relu, Step<C> step) {
  C lanes[lane_count] = {};
  int64_t i = 0;
  for (; i + lane_count <= n; i += lane_count) {
    for (int64_t lane = 0; lane < lane_count; ++lane) {
      const Gradients<C> out =
          backward_element(grad[i + lane], x[i + lane], relu, step.scale, step.range);
      dx[i + lane] = accumulate ? dx[i + lane] + out.dx : out.dx;
      lanes[lane] += out.dscale;
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) {
    const Gradients<C> out = backward_element(grad[i], x[i], relu, step.scale, step.range);
    dx[i] = accumulate ? dx[i] + out.dx : out.dx;
    lanes[lane] += out.dscale;
  }
  double sum = 0;
  for (int64_t lane = 0; lane < lane_count; ++lane) sum += double(lanes[lane]);
  return sum;
}

template <bool accumulate, typename C, typename MaybeRelu>
inline void backward_block(const C* __restrict x, const C* __restrict grad, C* __restrict dx,
                           int64_t n, MaybeRelu relu, const C* __restrict scale, Guard<C> guard,
                           Range<C> range, double* __restrict dscale) {
  for (int64_t i = 0; i < n; ++i) {
    const C guarded = guard_scale(scale[i], guard.scale_min, guard.scale_max);
    const Gradients<C> out = backward_element(grad[i], x[i], relu, guarded, range);
    dx[i] = accumulate ? dx[i] + out.dx : out.dx;
    dscale[i] += double(out.dscale);
  }
}

/// What the error of one element adds to the loss, to first order.
template <typename C, typename MaybeRelu>
LIMPQ_INLINE C error_term(C grad, C x, MaybeRelu relu, C scale, Range<C> range) {
  const C value = relu.value(x);
  return grad * (fake_quantize(value, scale, range) - value);
}

template <typename C, typename MaybeRelu>
inline void error_sums_block(const C* __restrict x, const C* __restrict grad, int64_t n,
                             MaybeRelu relu, Step<C> step, double& sum, double& square) {
  C sums[lane_count] = {};
  C squares[lane_count] = {};
  int64_t i = 0;
  for (; i + lane_count <= n; i += lane_count) {
    for (int64_t lane = 0; lane < lane_count; ++lane) {
      const C term = error_term(grad[i + lane], x[i + lane], relu, step.scale, step.range);
      sums[lane] += term;
      squares[lane] += term * term;
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) {
    const C term = error_term(grad[i], x[i], relu, step.scale, step.range);
    sums[lane] += term;
    squares[lane] += term * term;
  }
  double block_sum = 0;
  double block_square = 0;
  for (int64_t lane = 0; lane < lane_count; ++lane) {
    block_sum += double(sums[lane]);
    block_square += double(squares[lane]);
  }
  sum += block_sum;
  square += block_square;
}

template <typename C, typename MaybeRelu>
inline void error_sums_block(const C* __restrict x, const C* __restrict grad, int64_t n,
                             MaybeRelu relu, const C* __restrict scale, Guard<C> guard,
                             Range<C> range, double* __restrict sum, double* __restrict square) {
  for (int64_t i = 0; i < n; ++i) {
    const C guarded = guard_scale(scale[i], guard.scale_min, guard.scale_max);
    const C term = error_term(grad[i], x[i], relu, guarded, range);
    sum[i] += double(term);
    square[i] += double(term * term);
  }
}

// --- spans --------------------------------------------------------------------------------------

/// Calls body(offset, length) for the blocks of a span.
template <typename Body>
inline void for_each_block(int64_t n, Body body) {
  for (int64_t i = 0; i < n; i += block_size) body(i, n - i < block_size ? n - i : block_size);
}

/// Forward over a span; quantize(k, offset, x, y, length) does one block of one bit-width.
template <typename T, typename Quantize>
inline void forward_span(const T* x, T* const* y, int64_t n, int count, Quantize quantize) {
  using C = typename ComputeType<T>::type;
  Reader<T, C> x_reader;
  Writer<T, C> y_writer;
  for_each_block(n, [&](int64_t offset, int64_t length) {
    const C* x_block = x_reader.read(x + offset, length);
    for (int k = 0; k < count; ++k) {
      quantize(k, offset, x_block, y_writer.open(y[k] + offset), length);
      y_writer.close(y[k] + offset, length);
    }
  });
}

/// Backward over a span; differentiate(accumulate, k, offset, x, grad, dx, length) does one block.
template <typename T, typename Differentiate>
inline void backward_span(const T* x, const T* const* grad, T* dx, int64_t n, int count,
                          Differentiate differentiate) {
  using C = typename ComputeType<T>::type;
  Reader<T, C> x_reader;
  Reader<T, C> grad_reader;
  Writer<T, C> dx_writer;
  for_each_block(n, [&](int64_t offset, int64_t length) {
    const C* x_block = x_reader.read(x + offset, length);
    C* dx_block = dx_writer.open(dx + offset);
    bool accumulate = false;
    for (int k = 0; k < count; ++k) {
      if (grad[k] == nullptr) continue;
      const C* grad_block = grad_reader.read(grad[k] + offset, length);
      differentiate(accumulate, k, offset, x_block, grad_block, dx_block, length);
      accumulate = true;
    }
    if (!accumulate) {
      for (int64_t i = 0; i < length; ++i) dx_block[i] = C(0);
    }
    dx_writer.close(dx + offset, length);
  });
}

/// Error sums over a span; add(k, offset, x, grad, length) does one block of one bit-width.
template <typename T, typename Add>
inline void error_sums_span(const T* x, const T* grad, int64_t n, int count, Add add) {
  using C = typename ComputeType<T>::type;
  Reader<T, C> x_reader;
  Reader<T, C> grad_reader;
  for_each_block(n, [&](int64_t offset, int64_t length) {
    const C* x_block = x_reader.read(x + offset, length);
    const C* grad_block = grad_reader.read(grad + offset, length);
    for (int k = 0; k < count; ++k) add(k, offset, x_block, grad_block, length);
  });
}

/// Calls run(relu) with the ReLU, or with what stands for none or one without a ceiling.
template <typename C, typename Run>
inline void with_relu(Relu<C> relu, Run run) {
  if (!relu.present()) {
    run(NoRelu<C>());
  } else if (relu.ceiling == C(__builtin_inff())) {
    run(PlainRelu<C>());
  } else {
    run(relu);
  }
}

template <typename T, typename C>
void forward(const T* x, T* const* y, int64_t n, Relu<C> given, const Step<C>* steps, int count) {
  with_relu(given, [=](auto relu) {
    forward_span(x, y, n, count, [=](int k, int64_t, const C* x_block, C* y_block, int64_t length) {
      forward_block(x_block, y_block, length, relu, steps[k]);
    });
  });
}

template <typename T, typename C>
void backward(const T* x, const T* const* grad, T* dx, int64_t n, Relu<C> given,
              const Step<C>* steps, int count, double* dscale) {
  with_relu(given, [=](auto relu) {
    backward_span(x, grad, dx, n, count,
                  [=](bool accumulate, int k, int64_t, const C* x_block, const C* grad_block,
                      C* dx_block, int64_t length) {
                    dscale[k] += accumulate ? backward_block<true>(x_block, grad_block, dx_block,
                                                                   length, relu, steps[k])
                                            : backward_block<false>(x_block, grad_block, dx_block,
                                                                    length, relu, steps[k]);
                  });
  });
}

template <typename T, typename C>
void forward_elementwise(const T* x, T* const* y, int64_t n, Relu<C> given, const C* const* scale,
                         Guard<C> guard, const Range<C>* ranges, int count) {
  with_relu(given, [=](auto relu) {
    forward_span(
        x, y, n, count, [=](int k, int64_t offset, const C* x_block, C* y_block, int64_t length) {
          forward_block(x_block, y_block, length, relu, scale[k] + offset, guard, ranges[k]);
        });
  });
}

template <typename T, typename C>
void backward_elementwise(const T* x, const T* const* grad, T* dx, int64_t n, Relu<C> given,
                          const C* const* scale, Guard<C> guard, const Range<C>* ranges, int count,
                          double* const* dscale) {
  with_relu(given, [=](auto relu) {
    backward_span(x, grad, dx, n, count,
                  [=](bool accumulate, int k, int64_t offset, const C* x_block, const C* grad_block,
                      C* dx_block, int64_t length) {
                    const C* s = scale[k] + offset;
                    double* ds = dscale[k] + offset;
                    if (accumulate) {
                      backward_block<true>(x_block, grad_block, dx_block, length, relu, s, guard,
                                           ranges[k], ds);
                    } else {
                      backward_block<false>(x_block, grad_block, dx_block, length, relu, s, guard,
                                            ranges[k], ds);
                    }
                  });
  });
}

template <typename T, typename C>
void error_sums(const T* x, const T* grad, int64_t n, Relu<C> given, const Step<C>* steps,
                int count, double* sum, double* square) {
  with_relu(given, [=](auto relu) {
    error_sums_span(x, grad, n, count,
                    [=](int k, int64_t, const C* x_block, const C* grad_block, int64_t length) {
                      error_sums_block(x_block, grad_block, length, relu, steps[k], sum[k],
                                       square[k]);
                    });
  });
}

template <typename T, typename C>
void error_sums_elementwise(const T* x, const T* grad, int64_t n, Relu<C> given,
                            const C* const* scale, Guard<C> guard, const Range<C>* ranges,
                            int count, double* const* sum, double* const* square) {
  with_relu(given, [=](auto relu) {
    error_sums_span(
        x, grad, n, count,
        [=](int k, int64_t offset, const C* x_block, const C* grad_block, int64_t length) {
          error_sums_block(x_block, grad_block, length, relu, scale[k] + offset, guard, ranges[k],
                           sum[k] + offset, square[k] + offset);
        });
  });
}

}  // namespace

template <typename T>
const SpanKernels<T>& span_kernels() {
  using C = typename ComputeType<T>::type;
  static constexpr SpanKernels<T> kernels = {forward<T, C>,
                                             backward<T, C>,
                                             forward_elementwise<T, C>,
                                             backward_elementwise<T, C>,
                                             error_sums<T, C>,
                                             error_sums_elementwise<T, C>};
  return kernels;
}

template const SpanKernels<float>& span_kernels<float>();
template const SpanKernels<double>& span_kernels<double>();
template const SpanKernels<Float16>& span_kernels<Float16>();
template const SpanKernels<BFloat16>& span_kernels<BFloat16>();

}  // namespace limpq::cpu::LIMPQ_ISA
