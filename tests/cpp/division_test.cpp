// The kernels' quotient is the true one, for every float x.
//
// Compared is what the rest of the numerics sees: within 2^17, which is beyond every quant_max, the
// same bits, and outside only the same side (or NaN). Then y, dx and dscale are the same too.
//
// Division_Every* takes all 2^32 values of x for each scale (minutes); Division_Strided* takes
// every 61st, and all x of one binade for more scales (seconds).
#include "../../csrc/cuda/division.cuh"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

// Where the processor may lack a fused multiply-add; elsewhere it is part of the architecture.
#if defined(__x86_64__)
#define LIMPQ_WITH_FMA __attribute__((target("avx2,fma")))
#define LIMPQ_HAS_FMA (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#else
#define LIMPQ_WITH_FMA
#define LIMPQ_HAS_FMA true
#endif

namespace limpq::cuda {
namespace {

LIMPQ_INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

LIMPQ_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

/// 1 where the quotients differ in a way that anybody can see.
LIMPQ_INLINE uint32_t differs(float x, float scale, float reciprocal) {
  const float expected = x / scale;
  const float fast = corrected_quotient(x, scale, reciprocal);
  const float actual = is_tame(x) ? fast : expected;
  const bool same_bits = as_bits(actual) == as_bits(expected);
  const bool both_above = (actual > 131072.0f) & (expected > 131072.0f);
  const bool both_below = (actual < -131072.0f) & (expected < -131072.0f);
  const bool both_nan = (actual != actual) & (expected != expected);
  return !(same_bits | both_above | both_below | both_nan);
}

/// How many of the x with bits first, first + stride, ... differ.
LIMPQ_WITH_FMA uint32_t count_differences(float scale, uint32_t first, uint32_t stride,
                                          uint32_t count) {
  const float reciprocal = Divisor<float>(scale).reciprocal;
  uint32_t differences = 0;
  for (uint32_t i = 0; i < count; ++i) {
    differences += differs(as_float(first + i * stride), scale, reciprocal);
  }
  return differences;
}

class Division : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!LIMPQ_HAS_FMA) {
      GTEST_SKIP() << "this CPU has no fused multiply-add: the sweep would take hours";
    }
  }

  /// Powers of two and their neighbours, the guard's limit, both ends of what the fast quotient
  /// takes, usual steps.
  static std::vector<float> scales() {
    return {1e-5f,         0x1p-24f,    0x1p24f,       0x1.fffffep23f, 0x1.000002p-24f,
            1.0f,          0x1.8p0f,    0x1.fffffep0f, 0x1.fffffcp1f,  0x1.000002p0f,
            0.1f,          1.0f / 3,    0.0123456f,    0x1.555556p0f,  0x1.aaaaaap-3f,
            0.75f,         3.14159265f, 255.0f,        1e-3f,          7e4f,
            0x1.6a09e6p0f, 0x1.0p-10f};
  }

  /// `size` significands, half of them near the ends of the binade, where reciprocals are hardest.
  static std::vector<float> significands(int size) {
    std::mt19937 random(11);
    std::vector<float> result;
    for (int i = 0; i < size; ++i) {
      const uint32_t fraction = i % 4 == 0   ? 0x7fffffu - i / 4
                                : i % 4 == 1 ? i / 4
                                             : random() & 0x7fffffu;
      result.push_back(as_float(0x3f800000u | fraction));
    }
    return result;
  }
};

TEST_F(Division, StridedOverAllFloats) {
  for (const float scale : scales()) {
    ASSERT_TRUE(Divisor<float>(scale).has_fast_quotient()) << scale;
    EXPECT_EQ(count_differences(scale, 3, 61, UINT32_MAX / 61), 0u) << scale;
  }
}

TEST_F(Division, ZerosInfinitiesAndTheLimitsOfAllRanges) {
  const uint32_t edges[] = {0x00000000u, 0x00800000u, 0x7f800000u, 0x7fc00000u,
                            0x0d800000u, 0x3f800000u, 0x7f7fffffu, 0x7fffffffu};
  for (const float scale : scales()) {
    for (const uint32_t edge : edges) {
      for (const uint32_t sign : {0u, 0x80000000u}) {
        EXPECT_EQ(count_differences(scale, (sign | edge) - 100, 1, 201), 0u)
            << "scale " << scale << ", x near " << as_float(sign | edge);
      }
    }
  }
}

TEST_F(Division, StridedSignificandsOfTheScale) {
  for (const float scale : significands(150)) {
    EXPECT_EQ(count_differences(scale, 0x3f800000u, 1, 1u << 23), 0u) << scale;
  }
}

/// Where the corrected quotient could go wrong, for every significand of the scale at once.
///
/// Before its last rounding the corrected quotient is off by at most 1.5 * 2^-23 units in the last
/// place: the approximate one is off by 1.5 units, and its correction by two relative errors of
/// 2^-24. So only quotients this close to the middle between two floats can round wrongly. With
/// significands x and s as integers in [2^23, 2^24) and m the middle's, that is
///   0 < |x * 2^shift - m * s| <= 6    where shift is 24 for x >= s and 25 for x < s,
/// and the few x for each s follow from the inverse of 2^shift modulo s. Quotients of floats are
/// never exactly in the middle, and nothing over- or underflows, so exponents change nothing.
TEST_F(Division, HardestQuotientsOfEveryScale) {
  constexpr int64_t low = 1 << 23;
  constexpr int64_t high = 1 << 24;
  constexpr int64_t margin = 8;
  int64_t checked = 0;
  int64_t wrong = 0;
  for (int64_t s = low; s < high; ++s) {
    const int twos = __builtin_ctzll(s);
    const int64_t odd = s >> twos;
    if ((int64_t(1) << twos) > margin) continue;  // no such distance is divisible by 2^twos
    const float scale = static_cast<float>(s);
    const float reciprocal = 1.0f / scale;
    for (const int shift : {24, 25}) {
      int64_t inverse = 1;
      for (int i = 0; i < shift - twos; ++i) {  // halve modulo odd
        inverse = inverse % 2 == 0 ? inverse / 2 : (inverse + odd) / 2;
      }
      const int64_t first = shift == 24 ? s : low;
      const int64_t end = shift == 24 ? high : s;
      for (int64_t distance = -margin; distance <= margin; ++distance) {
        if (distance == 0 || distance % (int64_t(1) << twos) != 0) continue;
        const int64_t x0 = (((distance >> twos) * inverse - first) % odd + odd) % odd;
        for (int64_t x = first + x0; x < end; x += odd) {
          ++checked;
          wrong += differs(static_cast<float>(x), scale, reciprocal);
        }
      }
    }
  }
  EXPECT_GT(checked, 50'000'000);
  EXPECT_EQ(wrong, 0);
}

TEST_F(Division, EveryFloat) {
  for (const float scale : scales()) {
    EXPECT_EQ(count_differences(scale, 0, 1, UINT32_MAX), 0u) << scale;
    EXPECT_EQ(count_differences(scale, UINT32_MAX, 1, 1), 0u) << scale;
  }
}

TEST_F(Division, EverySignificandOfXForManyScales) {
  for (const float scale : significands(4000)) {
    EXPECT_EQ(count_differences(scale, 0x3f800000u, 1, 1u << 23), 0u) << scale;
  }
}

TEST_F(Division, ScalesThatTheFastQuotientDoesNotTake) {
  for (const float scale : {0x1.fffffep-25f, 0x1.000002p24f, 0.0f, -1.0f, __builtin_inff(),
                            __builtin_nanf(""), 1e-40f}) {
    EXPECT_FALSE(Divisor<float>(scale).has_fast_quotient()) << scale;
  }
}

TEST_F(Division, TinyValuesAreNotTame) {
  EXPECT_TRUE(is_tame(0.0f));
  EXPECT_TRUE(is_tame(-0.0f));
  EXPECT_TRUE(is_tame(0x1p-100f));
  EXPECT_FALSE(is_tame(-0x1.fffffep-101f));
  EXPECT_FALSE(is_tame(0x1p-149f));
  EXPECT_TRUE(is_tame(__builtin_inff()));
  EXPECT_TRUE(is_tame(__builtin_nanf("")));
}

}  // namespace
}  // namespace limpq::cuda
