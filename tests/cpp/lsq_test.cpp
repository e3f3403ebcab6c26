// lsq.h against the plain formulas: std::nearbyint, comparisons written out, and long double sums.
#include "../../csrc/lsq.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace limpq {
namespace {

template <typename C>
class Lsq : public ::testing::Test {
 protected:
  static constexpr C infinity = std::numeric_limits<C>::infinity();
  static constexpr C nan = std::numeric_limits<C>::quiet_NaN();

  static std::vector<Range<C>> ranges() {
    return {{-2, 1}, {0, 3}, {-1, 1}, {-128, 127}, {0, 255}, {-32768, 32767}, {0, 65535}};
  }

  static std::vector<C> inputs(C scale, Range<C> range) {
    std::vector<C> x = {C(0),     -C(0),
                        infinity, -infinity,
                        nan,      std::numeric_limits<C>::denorm_min(),
                        1e30f,    -std::numeric_limits<C>::denorm_min()};
    for (int i = -600; i <= 600; ++i) {  // ties, whole steps and their neighbours
      const C at = C(i) / 2 * scale;
      x.insert(x.end(), {at, std::nextafter(at, infinity), std::nextafter(at, -infinity)});
    }
    for (const C bound : {range.quant_min, range.quant_max}) {
      const C at = bound * scale;
      x.insert(x.end(), {at, std::nextafter(at, infinity), std::nextafter(at, -infinity)});
    }
    std::mt19937 random(7);
    std::normal_distribution<C> normal(0, 3 * scale * range.quant_max);
    for (int i = 0; i < 2000; ++i) x.push_back(normal(random));
    return x;
  }

  static ::testing::AssertionResult same(C actual, C expected) {
    if ((std::isnan(actual) && std::isnan(expected)) ||
        std::memcmp(&actual, &expected, sizeof(C)) == 0) {
      return ::testing::AssertionSuccess();
    }
    return ::testing::AssertionFailure() << actual << " instead of " << expected;
  }
};

using ComputeTypes = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Lsq, ComputeTypes);

TYPED_TEST(Lsq, RoundsAsNearbyint) {
  using C = TypeParam;
  std::mt19937 random(3);
  std::uniform_real_distribution<C> uniform(-70000, 70000);
  for (int i = -70000; i <= 70000; ++i) {
    for (const C c : {C(i), C(i) + C(0.5), uniform(random)}) {
      ASSERT_TRUE(this->same(round_ties_even(c), std::nearbyint(c))) << c;
    }
  }
  for (const C c : {C(-0.0), C(0.0), C(-0.25), C(-0.5), C(0.5), std::nextafter(C(0.5), C(0)),
                    std::nextafter(C(-0.5), C(-1)), C(4194304), C(-4194304)}) {
    ASSERT_TRUE(this->same(round_ties_even(c), std::nearbyint(c))) << c;
  }
  EXPECT_TRUE(std::isnan(round_ties_even(this->nan)));
}

TYPED_TEST(Lsq, ForwardIsThePlainFormula) {
  using C = TypeParam;
  for (const Range<C> range : this->ranges()) {
    for (const C scale : {C(0.1), C(1e-5), C(1.0 / 3), C(2), C(1e-30), C(5e8)}) {
      for (const C x : this->inputs(scale, range)) {
        const C v = x / scale;
        const C c = std::isnan(v)         ? v
                    : v < range.quant_min ? range.quant_min
                    : v > range.quant_max ? range.quant_max
                                          : v;
        const C expected = std::nearbyint(c) * scale;
        ASSERT_TRUE(this->same(fake_quantize(x, scale, range), expected))
            << "x " << x << ", scale " << scale << ", quant_max " << range.quant_max;
      }
    }
  }
}

TYPED_TEST(Lsq, BackwardIsThePlainFormula) {
  using C = TypeParam;
  for (const Range<C> range : this->ranges()) {
    for (const C scale : {C(0.1), C(1e-5), C(1.0 / 3), C(2)}) {
      for (const C x : this->inputs(scale, range)) {
        const C grad = C(0.75);
        const C v = x / scale;
        const Gradients<C> actual = fake_quantize_backward(grad, x, scale, range);
        C dx = 0;
        C dscale = 0;
        if (std::isnan(v)) {
          dscale = v;
        } else if (v < range.quant_min) {
          dscale = grad * range.quant_min;
        } else if (v > range.quant_max) {
          dscale = grad * range.quant_max;
        } else {
          dx = grad;
          dscale = grad * (std::nearbyint(v) - v);
        }
        ASSERT_TRUE(this->same(actual.dx, dx)) << "x " << x << ", scale " << scale;
        ASSERT_EQ(std::isnan(actual.dscale), std::isnan(dscale));
        if (!std::isnan(dscale)) {
          ASSERT_EQ(actual.dscale, dscale) << "x " << x << ", scale " << scale;
        }
      }
    }
  }
}

TYPED_TEST(Lsq, TheBoundsLetTheGradientThrough) {
  using C = TypeParam;
  const Range<C> range{-2, 1};
  const C scale = C(0.5);
  EXPECT_EQ(fake_quantize_backward(C(3), C(-1.0), scale, range).dx, C(3));
  EXPECT_EQ(fake_quantize_backward(C(3), C(0.5), scale, range).dx, C(3));
  EXPECT_EQ(fake_quantize_backward(C(3), std::nextafter(C(0.5), C(1)), scale, range).dx, C(0));
}

TYPED_TEST(Lsq, ReluIsThePlainFormula) {
  using C = TypeParam;
  for (const C ceiling : {C(6), C(0.1), this->infinity}) {
    const Relu<C> relu{0, ceiling};
    for (const C scale : {C(0.1), C(1.0 / 3), ceiling / 3, C(7)}) {
      const Range<C> range{0, 3};
      std::vector<C> values = this->inputs(C(0.1), range);
      values.insert(values.end(), {ceiling, std::nextafter(ceiling, C(0)),
                                   std::nextafter(ceiling, this->infinity)});
      for (const C x : values) {
        // -0.0 stays what it is, as in PyTorch's relu6.
        const C clamped = x < 0 ? C(0) : x > ceiling ? ceiling : x;
        ASSERT_TRUE(this->same(fake_quantize(relu.value(x), scale, range),
                               fake_quantize(clamped, scale, range)))
            << "x " << x << ", scale " << scale << ", ceiling " << ceiling;
        EXPECT_EQ(relu.passes(x), 0 < x && x < ceiling) << x;
        EXPECT_EQ(relu.passes(relu.value(x)), relu.passes(x)) << x;
      }
    }
  }
}

TYPED_TEST(Lsq, NoReluChangesNothing) {
  using C = TypeParam;
  const Relu<C> none{-this->infinity, this->infinity};
  for (const C x : this->inputs(C(0.1), {-8, 7})) ASSERT_TRUE(this->same(none.value(x), x));
}

TYPED_TEST(Lsq, TheGuardKeepsScalesInItsLimits) {
  using C = TypeParam;
  const C low = C(1e-5);
  const C high = C(4);
  for (const C scale : {-this->infinity, C(-1), C(0), std::nextafter(low, C(0))}) {
    EXPECT_EQ(guard_scale(scale, low, high), low);
    EXPECT_FALSE(scale_is_free(scale, low, high));
  }
  for (const C scale : {low, C(1), high}) {
    EXPECT_EQ(guard_scale(scale, low, high), scale);
    EXPECT_TRUE(scale_is_free(scale, low, high));
  }
  EXPECT_EQ(guard_scale(this->infinity, low, high), high);
  EXPECT_FALSE(scale_is_free(this->infinity, low, high));
  EXPECT_TRUE(std::isnan(guard_scale(this->nan, low, high)));
  EXPECT_TRUE(scale_is_free(this->nan, low, high));
}

}  // namespace
}  // namespace limpq
