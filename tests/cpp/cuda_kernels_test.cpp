// The CUDA kernels, run on the CPU, against lsq.h applied element by element.
//
// Built twice: as the kernels are, and with LIMPQ_ENOUGH_BLOCKS small, which gives each thread more
// steps to take.
#include "cuda_on_host.h"
// clang-format off: the stand-in comes first
#include "../../csrc/cuda/backward.cuh"
#include "../../csrc/cuda/forward.cuh"
// clang-format on

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>

namespace limpq::cuda {
namespace {

using cuda_on_host::BlockOrder;

template <typename T>
DataType data_type();
template <>
DataType data_type<float>() {
  return DataType::float32;
}
template <>
DataType data_type<double>() {
  return DataType::float64;
}
template <>
DataType data_type<__half>() {
  return DataType::float16;
}
template <>
DataType data_type<__nv_bfloat16>() {
  return DataType::bfloat16;
}

template <typename T>
T from_double(double value) {
  T result;
  narrow(static_cast<ComputeType<T>>(value), result);
  return result;
}

/// `size` elements that begin `offset` elements after a 16-byte boundary, at the end of their
/// memory block: the sanitizer sees a step beyond, and before() what was written in front.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size, int offset = 0)
      : offset_(offset), size_(size), memory_(new (std::align_val_t(16)) unsigned char[bytes()]) {
    std::memset(memory_.get(), 0x5a, bytes());
  }
  T* data() { return reinterpret_cast<T*>(memory_.get()) + offset_; }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return size_; }
  bool front_is_untouched() const {
    for (size_t i = 0; i < offset_ * sizeof(T); ++i) {
      if (memory_[i] != 0x5a) return false;
    }
    return true;
  }
  bool same_bits(Buffer& other) {
    return size_ == other.size_ && std::memcmp(data(), other.data(), size_ * sizeof(T)) == 0;
  }

 private:
  struct Free {
    void operator()(unsigned char* memory) const {
      ::operator delete[](memory, std::align_val_t(16));
    }
  };
  size_t bytes() const { return (offset_ + size_) * sizeof(T); }

  int offset_;
  int64_t size_;
  std::unique_ptr<unsigned char[], Free> memory_;
};

template <typename T>
::testing::AssertionResult same(T actual, T expected) {
  const auto a = widen(actual);
  const auto e = widen(expected);
  if ((std::isnan(a) && std::isnan(e)) || std::memcmp(&actual, &expected, sizeof(T)) == 0) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << a << " instead of " << e;
}

enum class Values { ordinary, special, special_with_nan };

struct Case {
  int64_t outer = 1;
  int64_t channels = 1;
  int64_t inner = 1;
  int count = 1;
  int x_offset = 0;
  int y_offset = 0;     // of y[0] and of dx; further outputs and gradients keep x_offset
  unsigned absent = 0;  // bit k: gradient k is null
  Values values = Values::ordinary;
  bool odd_scales = false;  // at the guard's edges, huge, tiny, NaN

  std::string text() const {
    return "[" + std::to_string(outer) + ", " + std::to_string(channels) + ", " +
           std::to_string(inner) + "] count " + std::to_string(count) + " offsets " +
           std::to_string(x_offset) + ", " + std::to_string(y_offset) + " absent " +
           std::to_string(absent) + " values " + std::to_string(int(values)) +
           (odd_scales ? " odd scales" : "");
  }
};

/// A problem with its memory, and what lsq.h says about it.
template <typename T>
class Trial {
  using C = ComputeType<T>;

 public:
  explicit Trial(const Case& c)
      : case_(c),
        size_(c.outer * c.channels * c.inner),
        scale_rows_(c.count + 2),
        random_(size_ + 17 * c.count),
        x_(size_, c.x_offset),
        scale_(scale_rows_ * c.channels) {
    SCOPED_TRACE(c.text());
    fill_in(problem_);
    fill_scales();
    fill_x();
  }

  void check_forward() {
    SCOPED_TRACE(case_.text());
    std::vector<Buffer<T>> y;
    ForwardProblem problem{};
    static_cast<Problem&>(problem) = problem_;
    for (int k = 0; k < case_.count; ++k) {
      y.emplace_back(size_, k == 0 ? case_.y_offset : case_.x_offset);
      problem.y[k] = y[k].data();
    }
    dispatch_forward(problem, cuda_on_host::launcher());
    for (int k = 0; k < case_.count; ++k) {
      EXPECT_TRUE(y[k].front_is_untouched());
      for (int64_t i = 0; i < size_; ++i) {
        T expected;
        narrow(fake_quantize(widen(x_[i]), guarded(k, i), range(k)), expected);
        ASSERT_TRUE(same(y[k][i], expected)) << "element " << i << ", bit-width " << k << ", x "
                                             << widen(x_[i]) << ", scale " << guarded(k, i);
      }
    }
  }

  void check_backward() {
    SCOPED_TRACE(case_.text());
    BackwardProblem problem{};
    static_cast<Problem&>(problem) = problem_;
    std::vector<Buffer<T>> grad;
    std::normal_distribution<double> normal;
    for (int k = 0; k < case_.count; ++k) {
      grad.emplace_back(size_, case_.x_offset);
      for (int64_t i = 0; i < size_; ++i) grad[k][i] = from_double<T>(normal(random_));
      if (size_ > 1) grad[k][size_ - 1] = from_double<T>(-0.0);
      problem.grad[k] = case_.absent >> k & 1 ? nullptr : grad[k].data();
      problem.grad_factor[k] = 0.5 + k;
    }
    Buffer<double> workspace(BackwardLayout::workspace_bytes(problem) / 8);
    Buffer<unsigned> counters(BackwardLayout::counter_bytes(problem) / 4);
    for (int64_t i = 0; i < counters.size(); ++i) counters[i] = 0;
    problem.workspace = workspace.data();
    problem.counters = counters.data();

    Buffer<T> dx(size_, case_.y_offset);
    Buffer<C> dscale(scale_.size());
    problem.dx = dx.data();
    problem.dscale = dscale.data();
    dispatch_backward(problem, cuda_on_host::launcher(BlockOrder::ascending));
    EXPECT_TRUE(dx.front_is_untouched());
    for (int64_t i = 0; i < counters.size(); ++i) ASSERT_EQ(counters[i], 0u);
    compare_backward(problem, grad, dx, dscale);

    // Once more with the blocks in another order, and the counters and the workspace as they are.
    Buffer<T> dx_again(size_, case_.y_offset);
    Buffer<C> dscale_again(scale_.size());
    problem.dx = dx_again.data();
    problem.dscale = dscale_again.data();
    dispatch_backward(problem, cuda_on_host::launcher(BlockOrder::descending));
    EXPECT_TRUE(dx.same_bits(dx_again));
    EXPECT_TRUE(dscale.same_bits(dscale_again));
  }

 private:
  void fill_in(Problem& problem) {
    problem = Problem{};
    problem.dtype = data_type<T>();
    problem.outer = case_.outer;
    problem.channels = case_.channels;
    problem.inner = case_.inner;
    problem.count = case_.count;
    problem.x = x_.data();
    problem.scale = scale_.data();
    problem.scale_rows = scale_rows_;
    problem.scale_min = 1e-5;
    problem.scale_max = std::numeric_limits<double>::infinity();
    for (int k = 0; k < case_.count; ++k) {
      const int bits = case_.count == 15 ? k + 2 : 2 + k % 7;
      const bool is_signed = k % 3 != 1;
      problem.scale_row[k] = scale_rows_ - 1 - k;  // rows 0 and 1 stay unused
      problem.quant_min[k] = is_signed ? -std::ldexp(1.0, bits - 1) : 0;
      problem.quant_max[k] = std::ldexp(1.0, is_signed ? bits - 1 : bits) - 1;
    }
    if (case_.odd_scales) problem.scale_max = 1e30;
  }

  void fill_scales() {
    std::uniform_real_distribution<double> uniform(0.05, 0.3);
    for (int64_t i = 0; i < scale_.size(); ++i) scale_[i] = static_cast<C>(uniform(random_));
    if (!case_.odd_scales) return;
    const double odd[] = {0.0,   -1.0,    1e-5,    2e-5,
                          1e-30, 3.5e7,   1e29,    std::numeric_limits<double>::infinity(),
                          0.125, 0.09375, 1.75e-5, std::numeric_limits<double>::quiet_NaN()};
    for (int64_t i = 0; i < scale_.size(); ++i) scale_[i] = static_cast<C>(odd[i % 12]);
  }

  void fill_x() {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < size_; ++i) x_[i] = from_double<T>(normal(random_));
    if (case_.values == Values::ordinary) return;
    using Limits = std::numeric_limits<C>;
    const double tiny = Limits::denorm_min();
    const double special[] = {0.0,
                              -0.0,
                              tiny,
                              -tiny,
                              3 * tiny,
                              double(Limits::min()),
                              -double(Limits::min()) / 2,
                              1e-31,
                              -1e-30,
                              -1e-32,
                              double(Limits::infinity()),
                              -double(Limits::infinity()),
                              double(Limits::max()),
                              -double(Limits::max()),
                              6e-8,
                              65504.0};
    for (int64_t i = 0; i < size_; ++i) {
      if (i % 3 == 0) {
        x_[i] = from_double<T>(special[i / 3 % 16]);
      } else if (i % 3 == 1) {  // ties and bounds: multiples of half a step, and their neighbours
        const C step = guarded(int(i % case_.count), i);
        const C at = step * C(0.5) * C(i % 41 - 20);
        x_[i] = from_double<T>(i % 2 ? at : std::nextafter(at, C(i % 5 - 2)));
      }
    }
    if (case_.values == Values::special_with_nan) {
      for (int64_t i = size_ / 2; i < size_; i += 97) {
        x_[i] = from_double<T>(std::numeric_limits<double>::quiet_NaN());
      }
    }
  }

  int64_t channel(int64_t i) const { return i / case_.inner % case_.channels; }
  C scale(int k, int64_t channel) {
    return scale_[problem_.scale_row[k] * case_.channels + channel];
  }
  C guarded(int k, int64_t i) {
    return guard_scale(scale(k, channel(i)), C(problem_.scale_min), C(problem_.scale_max));
  }
  Range<C> range(int k) const { return {C(problem_.quant_min[k]), C(problem_.quant_max[k])}; }

  void compare_backward(const BackwardProblem& problem, std::vector<Buffer<T>>& grad, Buffer<T>& dx,
                        Buffer<C>& dscale) {
    std::vector<double> sums(scale_.size());
    std::vector<double> sizes(scale_.size());
    for (int64_t i = 0; i < size_; ++i) {
      C total = 0;
      bool first = true;
      for (int k = 0; k < case_.count; ++k) {
        if (problem.grad[k] == nullptr) continue;
        const Gradients<C> terms =
            fake_quantize_backward(widen(grad[k][i]), widen(x_[i]), guarded(k, i), range(k));
        total = first ? terms.dx : total + terms.dx;
        first = false;
        const int64_t at = problem_.scale_row[k] * case_.channels + channel(i);
        sums[at] += terms.dscale;
        sizes[at] += std::abs(double(terms.dscale));
      }
      T expected;
      narrow(total, expected);
      ASSERT_TRUE(same(dx[i], expected)) << "element " << i << ", x " << widen(x_[i]);
    }

    for (int64_t row = 0; row < scale_rows_; ++row) {
      int user = -1;
      for (int k = 0; k < case_.count; ++k) {
        if (problem_.scale_row[k] == row && problem.grad[k] != nullptr) user = k;
      }
      for (int64_t c = 0; c < case_.channels; ++c) {
        const int64_t at = row * case_.channels + c;
        const C actual = dscale[at];
        if (user < 0 || !scale_is_free(scale_[at], C(problem_.scale_min), C(problem_.scale_max))) {
          ASSERT_EQ(actual, C(0)) << "scale row " << row << ", channel " << c;
          continue;
        }
        const double expected = sums[at] * problem.grad_factor[user];
        if (std::isnan(expected)) {
          ASSERT_TRUE(std::isnan(actual)) << "scale row " << row << ", channel " << c;
        } else {
          const double tolerance = 1e-5 * sizes[at] * problem.grad_factor[user] + 1e-40;
          ASSERT_NEAR(double(actual), expected, tolerance)
              << "scale row " << row << ", channel " << c;
        }
      }
    }
  }

  Case case_;
  int64_t size_;
  int64_t scale_rows_;
  std::mt19937 random_;
  Buffer<T> x_;
  Buffer<C> scale_;
  Problem problem_;
};

template <typename T>
class Kernels : public ::testing::Test {
 protected:
  static void check(const Case& c) {
    Trial<T> trial(c);
    trial.check_forward();
    trial.check_backward();
  }
};

using DataTypes = ::testing::Types<float, double, __half, __nv_bfloat16>;

struct DataTypeNames {
  template <typename T>
  static std::string GetName(int) {
    const char* const names[] = {"float32", "float64", "float16", "bfloat16"};
    return names[static_cast<int>(data_type<T>())];
  }
};
TYPED_TEST_SUITE(Kernels, DataTypes, DataTypeNames);

TYPED_TEST(Kernels, OneScale) {
  for (const int64_t size : {0, 1, 3, 31, 255, 1023, 4099}) {
    this->check({.outer = size});
    this->check({.inner = size, .count = 5, .absent = 0b01010});
  }
}

TYPED_TEST(Kernels, OneScaleWithSumsOverManyBlocks) {
  this->check({.inner = 70 * backward_rows_block * vector_size<TypeParam>});
}

TYPED_TEST(Kernels, PointersThatAreMisalignedAlike) {
  for (int offset = 1; offset < vector_size<TypeParam>; offset += 2) {
    this->check({.inner = 1023, .count = 2, .x_offset = offset, .y_offset = offset});
    this->check({.inner = 3, .x_offset = offset, .y_offset = offset});
  }
}

TYPED_TEST(Kernels, PointersThatAreMisalignedDifferently) {
  this->check({.inner = 4099, .x_offset = 1});
  this->check({.inner = 4099, .count = 2, .y_offset = 1});
}

TYPED_TEST(Kernels, LongRows) {
  this->check({.outer = 2, .channels = 3, .inner = 4099});
  this->check({.channels = 5, .inner = 1023, .count = 5, .absent = 0b00001});
  this->check({.outer = 3, .channels = 2, .inner = 2048, .count = 2, .x_offset = 1, .y_offset = 1});
}

TYPED_TEST(Kernels, ShortRows) {
  this->check({.outer = 5, .channels = 17, .inner = 49});
  this->check({.outer = 3, .channels = 8, .inner = 9, .count = 5, .absent = 0b10000});
  this->check({.outer = 12, .channels = 2, .inner = 31, .count = 2});
  this->check({.channels = 31, .inner = 3, .x_offset = 1, .y_offset = 1});
}

TYPED_TEST(Kernels, Columns) {
  this->check({.outer = 1, .channels = 3});
  this->check({.outer = 255, .channels = 16, .count = 5, .absent = 0b00110});
  this->check({.outer = 31, .channels = 64});
  this->check({.outer = 1023, .channels = 3, .count = 2});
  this->check({.outer = 5, .channels = 1040});
  this->check({.outer = 31, .channels = 24, .count = 2, .y_offset = 1});
  this->check({.outer = 31, .channels = 32, .x_offset = 1, .y_offset = 1});
}

TYPED_TEST(Kernels, ColumnsWithSumsOverManyBlocks) {
  const int64_t channels = 64 * vector_size<TypeParam>;
  this->check({.outer = 70 * 2 * column_rows<TypeParam>, .channels = channels});
}

TYPED_TEST(Kernels, AllBitWidths) {
  this->check({.inner = 1023, .count = 15});
  this->check({.outer = 31, .channels = 32, .count = 15});
  this->check({.outer = 2, .channels = 9, .inner = 31, .count = 15, .absent = 0x7ffe});
}

TYPED_TEST(Kernels, NoGradientAtAll) {
  this->check({.outer = 3, .channels = 5, .inner = 31, .count = 2, .absent = 0b11});
  this->check({.outer = 31, .channels = 32, .absent = 1});
  this->check({.inner = 1023, .absent = 1});
}

TYPED_TEST(Kernels, EmptyTensors) {
  this->check({.outer = 0, .channels = 5, .inner = 3, .count = 2});
  this->check({.outer = 0, .channels = 64});
  this->check({.outer = 3, .channels = 0, .inner = 3});
  this->check({.outer = 3, .channels = 2, .inner = 0, .count = 3});
}

TYPED_TEST(Kernels, SpecialValues) {
  for (const Values values : {Values::special, Values::special_with_nan}) {
    this->check({.inner = 1023, .values = values});
    this->check({.inner = 1023, .count = 5, .values = values});
    this->check({.outer = 3, .channels = 11, .inner = 31, .count = 2, .values = values});
    this->check({.outer = 31, .channels = 32, .count = 5, .values = values});
  }
}

TYPED_TEST(Kernels, ScalesAtAndBeyondTheGuard) {
  for (const Values values : {Values::ordinary, Values::special}) {
    this->check({.outer = 3, .channels = 24, .inner = 31, .values = values, .odd_scales = true});
    this->check({.outer = 31, .channels = 24, .count = 2, .values = values, .odd_scales = true});
  }
  // One scale each, and with 12 bit-widths all values of the list.
  this->check({.inner = 255, .values = Values::special, .odd_scales = true});
  this->check({.inner = 255, .count = 12, .values = Values::special, .odd_scales = true});
}

/// Every element belongs to one thread and step, whatever the shape: counted without running.
TEST(Layout, RowsCoverTheTensorInBoundedWork) {
  const int64_t shapes[][3] = {
      {1, 1, 1},        {1, 1, int64_t(5) << 32}, {64, 256, 49},      {4096, 2048, 1},
      {1, 4096, 11008}, {int64_t(1) << 32, 2, 7}, {256, 64, 56 * 56}, {1, 1, 8193}};
  for (const auto& shape : shapes) {
    Problem problem{};
    problem.outer = shape[0];
    problem.channels = shape[1];
    problem.inner = shape[2];
    for (const int pack : {2, 4, 8}) {
      const RowsLayout rows(problem, pack, 256, 1, longest_float_sum);
      EXPECT_GE(rows.piece_packs * rows.pieces * pack, problem.inner);
      EXPECT_GE(rows.chunk_rows * rows.chunks, problem.outer);
      EXPECT_GE(int64_t(rows.groups) * (256 / rows.team), problem.channels);
      EXPECT_LE(ceil_div(rows.piece_packs, rows.team) * rows.chunk_rows, longest_float_sum);
      EXPECT_LT((rows.pieces - 1) * rows.piece_packs, ceil_div(problem.inner, pack) + 1);
      const SumTree tree(rows.chunks * rows.pieces);
      EXPECT_GE(int64_t(tree.fan_in) * tree.branches, tree.parts);
      EXPECT_LT(int64_t(tree.fan_in) * (tree.branches - 1), tree.parts);
    }
  }
}

TEST(Layout, ATensorThatNeedsTooManyBlocksIsRefused) {
  Problem problem{};
  problem.outer = 1;
  problem.channels = 1;
  problem.inner = std::numeric_limits<int64_t>::max() / 4;
  EXPECT_THROW(RowsLayout(problem, 4, 256, 4, 4), std::runtime_error);
}

}  // namespace
}  // namespace limpq::cuda
