// x / scale, correctly rounded, for less than a division.
//
// A float division takes some ten instructions on a GPU, and with many bit-widths in one pass they,
// not memory, set the time. The scale is shared by many elements, so its reciprocal is computed
// once and each quotient is a multiplication and one corrected step (Markstein 1990; Brisebarre,
// Muller and Raina 2004, "Accelerating correctly rounded floating-point division when the divisor
// is known in advance"). tests/cpp/division_test.cpp compares it with the true division for every
// float x.
#pragma once

#include <cstdint>
#include <cstring>

#include "../lsq.h"

namespace limpq::cuda {

LIMPQ_INLINE float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

/// Whether corrected_quotient is right for this x: zero, or large enough for the remainder to be
/// exact (2^-100). Infinities and NaN are fine.
LIMPQ_INLINE bool is_tame(float x) {
  uint32_t bits;
#if defined(__CUDA_ARCH__)
  bits = __float_as_uint(x);
#else
  memcpy(&bits, &x, sizeof(bits));
#endif
  constexpr uint32_t smallest = (127u - 100u) << 23;
  return 2 * bits - 1 >= 2 * smallest - 1;  // unsigned: the sign drops out, and zero wraps around
}

/// x / scale rounded to nearest wherever it lies within 2^20, and something beyond every quant_max
/// with the right sign, or NaN, elsewhere. For tame x and 2^-24 <= scale <= 2^24.
LIMPQ_INLINE float corrected_quotient(float x, float scale, float reciprocal) {
  const float approximate = x * reciprocal;
  // The signs as they stand keep an exact quotient -0.0: approximate * scale - x is then +0.0, and
  // that times -reciprocal is -0.0. It is the reciprocal that is negated, since GCC 12 turns the
  // negative of a fused multiply-add into one with the other sign of zero.
  const float excess = fused_multiply_add(approximate, scale, -x);
  const float corrected = fused_multiply_add(excess, -reciprocal, approximate);
  // Far outside the correction may overflow to a NaN, and is not needed.
  return __builtin_fabsf(approximate) < 1048576.0f ? corrected : approximate;
}

/// One guarded scale, ready to divide by. Plain division; float below has the faster one too.
template <typename C>
struct Divisor {
  C scale;

  Divisor() = default;
  LIMPQ_INLINE explicit Divisor(C guarded) : scale(guarded) {}

  /// Whether the fast quotient is right, for tame x.
  LIMPQ_INLINE bool has_fast_quotient() const { return false; }
  LIMPQ_INLINE C fast_quotient(C x) const { return x / scale; }
};

template <>
struct Divisor<float> {
  float scale;
  float reciprocal;  // 0 where only the true division is right

  Divisor() = default;
  LIMPQ_INLINE explicit Divisor(float guarded)
      : scale(guarded),
        reciprocal(guarded >= 0x1p-24f && guarded <= 0x1p24f ? 1.0f / guarded : 0.0f) {}

  LIMPQ_INLINE bool has_fast_quotient() const { return reciprocal != 0.0f; }
  LIMPQ_INLINE float fast_quotient(float x) const {
    return corrected_quotient(x, scale, reciprocal);
  }
};

/// quotient[j] = x[j] / divisor. `tame`: is_tame of every x.
template <typename C, int size>
LIMPQ_INLINE void divide(const C (&x)[size], const Divisor<C>& divisor, bool tame,
                         C (&quotient)[size]) {
  if (tame && divisor.has_fast_quotient()) {
#pragma unroll
    for (int j = 0; j < size; ++j) quotient[j] = divisor.fast_quotient(x[j]);
  } else {
#pragma unroll
    for (int j = 0; j < size; ++j) quotient[j] = x[j] / divisor.scale;
  }
}

/// quotient[j] = x[j] / divisors[j].
template <typename C, int size>
LIMPQ_INLINE void divide(const C (&x)[size], const Divisor<C> (&divisors)[size], bool tame,
                         C (&quotient)[size]) {
  bool fast = tame;
#pragma unroll
  for (int j = 0; j < size; ++j) fast &= divisors[j].has_fast_quotient();
  if (fast) {
#pragma unroll
    for (int j = 0; j < size; ++j) quotient[j] = divisors[j].fast_quotient(x[j]);
  } else {
#pragma unroll
    for (int j = 0; j < size; ++j) quotient[j] = x[j] / divisors[j].scale;
  }
}

}  // namespace limpq::cuda
