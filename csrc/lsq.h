// The numerics of LSQ fake quantization: one element, forward and backward.
//
// Every kernel, on the CPU and on CUDA, and every test applies these functions; nothing else
// rounds or clamps. C is the compute type: float for float16, bfloat16 and float32 tensors,
// double for float64 tensors. Build with contraction off (-ffp-contract=off, -fmad=false) and
// never with fast-math: both change the bits of the result.
//
// Source: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153, equations 1 to 3.
#pragma once

#if defined(__CUDACC__)
#define LIMPQ_INLINE __host__ __device__ __forceinline__
#else
// always_inline, so that a caller compiled for AVX2 or AVX-512 gets these in its own instructions.
#define LIMPQ_INLINE inline __attribute__((always_inline))
#endif

namespace limpq {

/// The thresholds of one bit-width: quant_min <= 0 < quant_max, whole numbers.
template <typename C>
struct Range {
  C quant_min;
  C quant_max;
};

/// The ReLU that a quantizer may have in front: x' = min(max(x, 0), ceiling) is quantized instead
/// of x. An infinite ceiling is ReLU, 6 is ReLU6. Only with quant_min 0.
template <typename C>
struct Relu {
  C floor;    // 0, or -infinity where there is no ReLU: then value(x) is x
  C ceiling;  // a value of the tensor's data type; infinite without a ReLU

  LIMPQ_INLINE bool present() const { return floor == C(0); }

  /// x'; a NaN stays a NaN, and -0.0 stays -0.0, as in PyTorch's CPU kernels. What is below 0
  /// becomes 0 here and not in clamp_to_range: a negative x / scale may underflow to -0.0, or be
  /// -inf / inf, a NaN.
  LIMPQ_INLINE C value(C x) const {
    const C raised = x < floor ? floor : x;
    return raised > ceiling ? ceiling : raised;
  }

  /// Whether the gradient of x' reaches x, for x or x' itself: as in PyTorch not at the bounds.
  LIMPQ_INLINE bool passes(C x) const { return (x > C(0)) & (x < ceiling); }
};

/// max(min(scale, scale_max), scale_min), so that a step is never zero or negative. NaN stays NaN.
template <typename C>
LIMPQ_INLINE C guard_scale(C scale, C scale_min, C scale_max) {
  C guarded = scale > scale_max ? scale_max : scale;
  return guarded < scale_min ? scale_min : guarded;
}

/// Whether a gradient reaches the scale: not where the guard replaced it.
template <typename C>
LIMPQ_INLINE bool scale_is_free(C scale, C scale_min, C scale_max) {
  return !(scale < scale_min || scale > scale_max);
}

/// torch.clamp's values: a NaN stays a NaN. On the host -0.0 with quant_min 0 stays -0.0, as in
/// PyTorch's CPU kernels; PyTorch's CUDA kernels give +0.0 there (PTX max orders the zeros).
template <typename C>
LIMPQ_INLINE C clamp_to_range(C v, Range<C> range) {
#if defined(__CUDA_ARCH__)
  if (v != v) return v;
  return fmin(fmax(v, range.quant_min), range.quant_max);
#else
  C raised = v < range.quant_min ? range.quant_min : v;
  return raised > range.quant_max ? range.quant_max : raised;
#endif
}

/// Round to nearest, ties to even, for |c| <= 2^22 (float) or 2^51 (double), which clamping
/// ensures.
#if defined(__CUDA_ARCH__)
LIMPQ_INLINE float round_ties_even(float c) {
  return rintf(c);
}
LIMPQ_INLINE double round_ties_even(double c) {
  return rint(c);
}
#else
// Adding 1.5 * 2^23 leaves no bits for a fraction, so the addition itself rounds. Unlike rint() it
// vectorises on every x86-64; copysign keeps -0.0, which round() gives for -0.5 <= c < 0.
LIMPQ_INLINE float round_ties_even(float c) {
  constexpr float magic = 12582912.0f;
  return __builtin_copysignf((c + magic) - magic, c);
}
LIMPQ_INLINE double round_ties_even(double c) {
  constexpr double magic = 6755399441055744.0;
  return __builtin_copysign((c + magic) - magic, c);
}
#endif

/// y = round(clamp(v)) * scale, for v = x / scale.
template <typename C>
LIMPQ_INLINE C fake_quantize_quotient(C v, C scale, Range<C> range) {
  return round_ties_even(clamp_to_range(v, range)) * scale;
}

/// y = round(clamp(x / scale)) * scale. The division is a true one: multiplying by 1 / scale moves
/// ties and changes about one value in 10^6. `scale` is the guarded scale.
template <typename C>
LIMPQ_INLINE C fake_quantize(C x, C scale, Range<C> range) {
  return fake_quantize_quotient(x / scale, scale, range);
}

/// What one element contributes to the gradients; `dscale` is summed over the elements that share
/// the scale and multiplied by the gradient factor once.
template <typename C>
struct Gradients {
  C dx;
  C dscale;
};

/// The straight-through gradients of fake_quantize, for v = x / scale. The bounds count as inside,
/// as in torch.clamp.
template <typename C>
LIMPQ_INLINE Gradients<C> fake_quantize_quotient_backward(C grad, C v, Range<C> range) {
  const C q = round_ties_even(clamp_to_range(v, range));
  const bool inside = (v >= range.quant_min) & (v <= range.quant_max);
  // q - 0 is q: subtracting a selected value, not selecting a difference, lets compilers vectorise.
  return {inside ? grad : C(0), grad * (q - (inside ? v : C(0)))};
}

template <typename C>
LIMPQ_INLINE Gradients<C> fake_quantize_backward(C grad, C x, C scale, Range<C> range) {
  return fake_quantize_quotient_backward(grad, x / scale, range);
}

}  // namespace limpq
