// The CUDA kernels, run on the CPU, against lsq.h applied element by element.
//
// Built twice: as the kernels are but for the longest table, and with LIMPQ_ENOUGH_BLOCKS small,
// which gives each thread more steps to take.
#include "cuda_on_host.h"
// clang-format off: the stand-in comes first
#include "../../csrc/cuda/backward.cuh"
#include "../../csrc/cuda/error_sums.cuh"
#include "../../csrc/cuda/forward.cuh"
// clang-format on

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

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
  std::optional<double> relu_max = {};

  std::string text() const {
    return "[" + std::to_string(outer) + ", " + std::to_string(channels) + ", " +
           std::to_string(inner) + "] count " + std::to_string(count) + " offsets " +
           std::to_string(x_offset) + ", " + std::to_string(y_offset) + " absent " +
           std::to_string(absent) + " values " + std::to_string(int(values)) +
           (odd_scales ? " odd scales" : "") +
           (relu_max ? " relu_max " + std::to_string(*relu_max) : "");
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
    fill_in(problem_);
    fill_scales();
    fill_x();
    fill_gradients();
  }

  /// What one call writes.
  struct Forward {
    ForwardProblem problem{};
    std::vector<Buffer<T>> y;
  };
  struct Backward {
    BackwardProblem problem{};
    Buffer<T> dx;
    Buffer<C> dscale;
    Buffer<double> workspace;
  };

  Forward forward() {
    Forward call;
    static_cast<Problem&>(call.problem) = problem_;
    for (int k = 0; k < case_.count; ++k) {
      call.y.emplace_back(size_, k == 0 ? case_.y_offset : case_.x_offset);
      call.problem.y[k] = call.y[k].data();
    }
    return call;
  }

  Backward backward() {
    BackwardProblem problem{};
    static_cast<Problem&>(problem) = problem_;
    for (int k = 0; k < case_.count; ++k) {
      problem.grad[k] = case_.absent >> k & 1 ? nullptr : grad_[k].data();
      problem.grad_factor[k] = grad_factor(k);
    }
    Backward call{problem, Buffer<T>(size_, case_.y_offset), Buffer<C>(scale_.size()),
                  Buffer<double>(BackwardLayout::workspace_bytes(problem) / 8)};
    call.problem.dx = call.dx.data();
    call.problem.dscale = call.dscale.data();
    call.problem.workspace = call.workspace.data();
    return call;
  }

  struct Sums {
    ErrorSumsProblem problem{};
    Buffer<double> sums;
    Buffer<double> workspace;
    Buffer<unsigned> counters;

    void run(BlockOrder order) {
      dispatch_error_sums(problem, counters.data(), cuda_on_host::launcher(order));
      for (int64_t i = 0; i < counters.size(); ++i) EXPECT_EQ(counters[i], 0u);
    }
  };

  /// With the gradient of bit-width 0.
  Sums error_sums() {
    ErrorSumsProblem problem{};
    static_cast<Problem&>(problem) = problem_;
    problem.grad = grad_[0].data();
    Sums call{problem, Buffer<double>(2 * case_.count * case_.channels),
              Buffer<double>(ErrorSumsLayout::workspace_bytes(problem) / 8),
              Buffer<unsigned>(ErrorSumsLayout::counter_bytes(problem) / 4)};
    for (int64_t i = 0; i < call.counters.size(); ++i) call.counters[i] = 0;
    call.problem.sums = call.sums.data();
    call.problem.workspace = call.workspace.data();
    return call;
  }

  void compare(Sums& call) {
    SCOPED_TRACE(case_.text());
    const int64_t each = case_.count * case_.channels;
    std::vector<double> sums(2 * each), sizes(2 * each);
    for (int k = 0; k < case_.count; ++k) {
      for (int64_t i = 0; i < size_; ++i) {
        const int64_t at = k * case_.channels + channel(i);
        const C error = fake_quantize(quantized(i), guarded(k, i), range(k)) - quantized(i);
        const C term = widen(grad_[0][i]) * error;
        sums[at] += term;
        sizes[at] += std::abs(double(term));
        sums[each + at] += term * term;
        sizes[each + at] += term * term;
      }
    }
    for (int64_t at = 0; at < 2 * each; ++at) {
      SCOPED_TRACE("sum " + std::to_string(at));
      if (!std::isfinite(sizes[at])) {
        ASSERT_FALSE(std::isfinite(call.sums[at]));
      } else {
        ASSERT_NEAR(call.sums[at], sums[at], 1e-5 * sizes[at] + 1e-40);
      }
    }
  }

  void compare(Forward& call) {
    SCOPED_TRACE(case_.text());
    for (int k = 0; k < case_.count; ++k) {
      EXPECT_TRUE(call.y[k].front_is_untouched());
      for (int64_t i = 0; i < size_; ++i) {
        T expected;
        narrow(fake_quantize(quantized(i), guarded(k, i), range(k)), expected);
        ASSERT_TRUE(same(call.y[k][i], expected))
            << "element " << i << ", bit-width " << k << ", x " << widen(x_[i]) << ", scale "
            << guarded(k, i);
      }
    }
  }

  void compare(Backward& call) {
    SCOPED_TRACE(case_.text());
    EXPECT_TRUE(call.dx.front_is_untouched());
    compare_dx(call.dx);
    compare_dscale(call.dscale);
  }

 private:
  void fill_in(Problem& problem) {
    problem = Problem{};
    problem.dtype = data_type<T>();
    problem.outer = case_.outer;
    problem.channels = case_.channels;
    problem.inner = case_.inner;
    problem.count = problem.candidates = case_.count;
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
      if (case_.relu_max) problem.quant_min[k] = 0;
    }
    problem.relu_max = case_.relu_max;
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
    if (case_.relu_max) {  // at the ceiling, and the nearest values of every type around it
      const double near[] = {1,           1 - 0x1p-8,  1 + 0x1p-7,  1 - 0x1p-11, 1 + 0x1p-10,
                             1 - 0x1p-24, 1 + 0x1p-23, 1 - 0x1p-53, 1 + 0x1p-52};
      for (int64_t i = 0; i < size_; i += 7) x_[i] = from_double<T>(*case_.relu_max * near[i % 9]);
    }
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

  void fill_gradients() {
    std::normal_distribution<double> normal;
    for (int k = 0; k < case_.count; ++k) {
      grad_.emplace_back(size_, case_.x_offset);
      for (int64_t i = 0; i < size_; ++i) grad_[k][i] = from_double<T>(normal(random_));
      if (size_ > 1) grad_[k][size_ - 1] = from_double<T>(-0.0);
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

  double grad_factor(int k) const { return 0.5 + k; }
  bool absent(int k) const { return case_.absent >> k & 1; }

  /// The value behind the ReLU, if there is one.
  C quantized(int64_t i) {
    const C x = widen(x_[i]);
    if (!case_.relu_max || std::isnan(x)) return x;
    return x < 0 ? C(0) : std::min(x, C(*case_.relu_max));
  }

  Gradients<C> terms(int k, int64_t i) {
    const C x = widen(x_[i]);
    Gradients<C> terms =
        fake_quantize_backward(widen(grad_[k][i]), quantized(i), guarded(k, i), range(k));
    if (case_.relu_max && !(0 < x && x < C(*case_.relu_max))) terms.dx = 0;
    return terms;
  }

  void compare_dx(Buffer<T>& dx) {
    for (int64_t i = 0; i < size_; ++i) {
      C total = 0;
      bool first = true;
      for (int k = 0; k < case_.count; ++k) {
        if (absent(k)) continue;
        total = first ? terms(k, i).dx : total + terms(k, i).dx;
        first = false;
      }
      T expected;
      narrow(total, expected);
      ASSERT_TRUE(same(dx[i], expected)) << "element " << i << ", x " << widen(x_[i]);
    }
  }

  void compare_dscale(Buffer<C>& dscale) {
    std::vector<double> sums(scale_.size());
    std::vector<double> sizes(scale_.size());
    std::vector<int> user(scale_rows_, -1);
    for (int k = 0; k < case_.count; ++k) {
      if (absent(k)) continue;
      user[problem_.scale_row[k]] = k;
      for (int64_t i = 0; i < size_; ++i) {
        const int64_t at = problem_.scale_row[k] * case_.channels + channel(i);
        sums[at] += terms(k, i).dscale;
        sizes[at] += std::abs(double(terms(k, i).dscale));
      }
    }
    for (int64_t at = 0; at < dscale.size(); ++at) {
      const int k = user[at / case_.channels];
      SCOPED_TRACE("scale " + std::to_string(at));
      if (k < 0 || !scale_is_free(scale_[at], C(problem_.scale_min), C(problem_.scale_max))) {
        ASSERT_EQ(dscale[at], C(0));
        continue;
      }
      const double expected = sums[at] * grad_factor(k);
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(dscale[at]));
      } else {
        ASSERT_NEAR(double(dscale[at]), expected, 1e-5 * sizes[at] * grad_factor(k) + 1e-40);
      }
    }
  }

  Case case_;
  int64_t size_;
  int64_t scale_rows_;
  std::mt19937 random_;
  Buffer<T> x_;
  Buffer<C> scale_;
  std::vector<Buffer<T>> grad_;
  Problem problem_;
};

/// Counts launches and runs the blocks in one order or the other.
struct CountingLauncher {
  BlockOrder order = BlockOrder::ascending;
  int launches = 0;

  template <typename Kernel, typename Parameters>
  void operator()(Kernel kernel, int64_t blocks, int threads, int shared_bytes,
                  const Parameters& parameters) {
    ++launches;
    cuda_on_host::launcher(order)(kernel, blocks, threads, shared_bytes, parameters);
  }
};

int run(const std::vector<ForwardProblem>& problems, BlockOrder order = BlockOrder::ascending) {
  CountingLauncher launcher{order};
  dispatch_forward(problems.data(), problems.size(), launcher);
  return launcher.launches;
}

/// Counters for backward calls, zero and zero again after each.
class Counters {
 public:
  explicit Counters(const std::vector<BackwardProblem>& problems) : counters_(size(problems)) {
    for (int64_t i = 0; i < counters_.size(); ++i) counters_[i] = 0;
  }
  int run(const std::vector<BackwardProblem>& problems, BlockOrder order = BlockOrder::ascending) {
    CountingLauncher launcher{order};
    dispatch_backward(problems.data(), problems.size(), counters_.data(), launcher);
    for (int64_t i = 0; i < counters_.size(); ++i) EXPECT_EQ(counters_[i], 0u);
    return launcher.launches;
  }

 private:
  static int64_t size(const std::vector<BackwardProblem>& problems) {
    int64_t bytes = 0;
    for (const BackwardProblem& problem : problems) bytes += BackwardLayout::counter_bytes(problem);
    return bytes / 4;
  }
  Buffer<unsigned> counters_;
};

template <typename Calls>
auto problems_of(Calls& calls) {
  std::vector<decltype(calls[0].problem)> problems;
  for (auto& call : calls) problems.push_back(call.problem);
  return problems;
}

template <typename T>
class Kernels : public ::testing::Test {
 protected:
  static void check(const Case& c) {
    Trial<T> trial(c);
    auto forward = trial.forward();
    run({forward.problem});
    trial.compare(forward);

    auto backward = trial.backward();
    Counters counters({backward.problem});
    counters.run({backward.problem});
    trial.compare(backward);
    // Once more with the blocks in another order, and the counters as they are.
    auto again = trial.backward();
    counters.run({again.problem}, BlockOrder::descending);
    EXPECT_TRUE(backward.dx.same_bits(again.dx));
    EXPECT_TRUE(backward.dscale.same_bits(again.dscale));
  }

  /// The error sums alone.
  static void check_error_sums(const Case& c) {
    Trial<T> trial(c);
    auto once = trial.error_sums();
    once.run(BlockOrder::ascending);
    trial.compare(once);
    auto again = trial.error_sums();
    again.run(BlockOrder::descending);
    EXPECT_TRUE(once.sums.same_bits(again.sums));
  }

  /// A tensor selects each bit-width in turn: the results are those of that bit-width alone.
  static void check_selected(Case c) {
    for (int64_t place = 0; place < c.count; ++place) {
      c.absent = ((1u << c.count) - 1) & ~(1u << place);
      Trial<T> trial(c);
      auto plain = trial.forward();
      run({plain.problem});
      auto chosen = trial.forward();
      select(chosen.problem, place, chosen.problem.y);
      run({chosen.problem});
      EXPECT_TRUE(chosen.y[place].same_bits(plain.y[place]));

      auto backward = trial.backward();
      select(backward.problem, place, backward.problem.grad);
      Counters counters({backward.problem});
      counters.run({backward.problem});
      trial.compare(backward);
    }
  }

  template <typename P, typename Pointer>
  static void select(P& problem, const int64_t& place, Pointer* pointers) {
    for (int k = 0; k < problem.candidates; ++k) pointers[k] = pointers[place];
    problem.selected = &place;
    problem.count = 1;
  }

  struct Launches {
    int forward = 1;
    int backward = 1;
  };

  /// A list as one call: against lsq.h, against calls with one problem each, and again with the
  /// blocks in another order.
  static void check_list(const std::vector<Case>& cases, Launches expected = {}) {
    std::vector<Trial<T>> trials(cases.begin(), cases.end());
    std::vector<typename Trial<T>::Forward> y;
    std::vector<typename Trial<T>::Backward> once, again, alone;
    for (Trial<T>& trial : trials) {
      y.push_back(trial.forward());
      once.push_back(trial.backward());
      again.push_back(trial.backward());
      alone.push_back(trial.backward());
    }
    EXPECT_EQ(run(problems_of(y)), expected.forward);
    Counters counters(problems_of(once));
    EXPECT_EQ(counters.run(problems_of(once)), expected.backward);
    counters.run(problems_of(again), BlockOrder::descending);
    for (size_t i = 0; i < trials.size(); ++i) {
      SCOPED_TRACE("problem " + std::to_string(i) + ": " + cases[i].text());
      counters.run({alone[i].problem});
      trials[i].compare(y[i]);
      trials[i].compare(once[i]);
      EXPECT_TRUE(once[i].dx.same_bits(alone[i].dx));
      EXPECT_TRUE(once[i].dscale.same_bits(alone[i].dscale));
      EXPECT_TRUE(once[i].dx.same_bits(again[i].dx));
      EXPECT_TRUE(once[i].dscale.same_bits(again[i].dscale));
    }
  }

  /// Slices of one tensor: each begins where the one before it ends.
  static std::vector<Case> slices(int number, Case slice) {
    std::vector<Case> cases(number, slice);
    const int64_t size = slice.outer * slice.channels * slice.inner;
    for (int i = 0; i < number; ++i) {
      cases[i].x_offset = cases[i].y_offset = int(i * size % vector_size<T>);
    }
    return cases;
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

TYPED_TEST(Kernels, OneBitWidthThatATensorSelects) {
  const int64_t vectors = 4 * vector_size<TypeParam>;
  for (const Case& c :
       {Case{.inner = 1023, .count = 5},
        Case{.inner = 70 * backward_rows_block * vector_size<TypeParam>, .count = 2},
        Case{.outer = 3, .channels = 8, .inner = 31, .count = 3},
        Case{.outer = 31, .channels = vectors, .count = 3},
        Case{.outer = 31, .channels = vectors + 1, .count = 3}, Case{.inner = 0, .count = 3}}) {
    this->check_selected(c);
  }
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

TYPED_TEST(Kernels, AReluInFrontOfTheQuantizer) {
  const int64_t vectors = 4 * vector_size<TypeParam>;
  for (const double ceiling : {1.5, std::numeric_limits<double>::infinity()}) {
    for (Case c :
         {Case{.inner = 1023, .values = Values::special_with_nan},
          Case{.inner = 255, .count = 5, .absent = 0b01010, .values = Values::special},
          Case{.inner = 255, .count = 5, .values = Values::special, .odd_scales = true},
          Case{.outer = 3, .channels = 11, .inner = 31, .count = 2, .x_offset = 1},
          Case{.outer = 31, .channels = vectors, .values = Values::special},
          Case{.outer = 31, .channels = vectors, .count = 5, .values = Values::special_with_nan},
          Case{.outer = 31, .channels = vectors + 1, .count = 2}}) {
      c.relu_max = ceiling;
      this->check(c);
    }
    this->check_selected({.inner = 255, .count = 2, .relu_max = ceiling});
  }
}

TYPED_TEST(Kernels, AReluInSomeProblemsOfAList) {
  const int64_t vectors = 2 * vector_size<TypeParam>;
  this->check_list(this->slices(3, {.inner = 1023, .relu_max = 6.0}));
  this->check_list({{.inner = 1023, .count = 5, .relu_max = 1.5},
                    {.channels = 9, .inner = 31, .count = 5},
                    {.inner = 255, .relu_max = std::numeric_limits<double>::infinity()}});
  this->check_list({{.outer = 31, .channels = vectors, .count = 2, .relu_max = 1.5},
                    {.outer = 5, .channels = 3 * vectors}});
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

TYPED_TEST(Kernels, BanksOfOneBitWidth) {
  for (const int64_t size : {0, 1, 3, 31, 255, 1023, 4099}) {
    const int launches = size == 0 ? 0 : 1;
    this->check_list(this->slices(3, {.inner = size}), {.forward = launches});
  }
  this->check_list(this->slices(3, {.outer = 2, .channels = 3, .inner = 31}));
  this->check_list(this->slices(3, {.outer = 31, .channels = 24}));
  this->check_list(this->slices(3, {.outer = 31, .channels = 8 * vector_size<TypeParam>}));
}

TYPED_TEST(Kernels, Banks) {
  // Per tensor and per channel, several bit-widths and one, absent gradients.
  this->check_list({{.inner = 1023, .count = 5, .absent = 0b01010},
                    {.channels = 9, .inner = 31, .count = 5},
                    {.channels = 3, .inner = 255, .count = 2, .absent = 0b01},
                    {.inner = 4099, .x_offset = 1}});
  // With an empty problem, one without any gradient and one with special values.
  this->check_list({{.inner = 255, .count = 2},
                    {.channels = 3, .inner = 0, .count = 2},
                    {.channels = 5, .inner = 31, .count = 2, .absent = 0b11},
                    {.inner = 255, .count = 5, .values = Values::special, .odd_scales = true}});
}

TYPED_TEST(Kernels, BanksOfColumns) {
  const int64_t vectors = 2 * vector_size<TypeParam>;
  this->check_list({{.outer = 31, .channels = vectors, .count = 2},
                    {.outer = 5, .channels = 3 * vectors},
                    {.outer = 3, .channels = vectors, .count = 5, .absent = 0b00110}});
  this->check_list({{.outer = 31, .channels = vectors + 1, .count = 2},
                    {.outer = 5, .channels = 3, .count = 5, .absent = 0b10001}});
}

TYPED_TEST(Kernels, ListsOfSeveralKinds) {
  const int64_t vectors = 2 * vector_size<TypeParam>;
  this->check_list({{.inner = 255, .count = 2},
                    {.outer = 31, .channels = vectors},
                    {.inner = 31, .count = 5},
                    {.outer = 31, .channels = vectors + 1},
                    {.inner = 1023},
                    {.outer = 3, .channels = vectors, .count = 2}},
                   {3, 3});
}

TYPED_TEST(Kernels, ListsLongerThanATable) {
  std::vector<Case> cases;
  for (int i = 0; i < LIMPQ_LONGEST_TABLE + 2; ++i)
    cases.push_back({.inner = 3 + i % 7, .count = 2});
  this->check_list(cases, {2, 2});
  // Here the bit-widths are too many, not the problems.
  const int full = usual_bit_widths * LIMPQ_LONGEST_TABLE / max_bit_widths;
  this->check_list(std::vector<Case>(full + 1, {.inner = 31, .count = 15}), {2, 2});
}

TYPED_TEST(Kernels, AnEmptyList) {
  this->check_list({}, {0, 0});
}

TYPED_TEST(Kernels, ErrorSums) {
  constexpr int V = vector_size<TypeParam>;
  for (const int64_t size : {1, 3, 31, 1023, 4099}) this->check_error_sums({.inner = size});
  this->check_error_sums({.inner = 1023, .count = 15});
  this->check_error_sums({.inner = 4099, .count = 5, .x_offset = 1});
  this->check_error_sums({.channels = 32, .inner = 147, .count = 5});
  this->check_error_sums({.outer = 3, .channels = 9, .inner = 31, .count = 2, .x_offset = 1});
  this->check_error_sums({.outer = 2, .channels = 3, .inner = 4099, .count = 2});
  this->check_error_sums({.outer = 31, .channels = 4 * V, .count = 5});
  this->check_error_sums({.outer = 31, .channels = 4 * V + 1, .count = 5});
  this->check_error_sums({.outer = 31, .channels = 2 * V, .count = 15});
  this->check_error_sums({.outer = 255, .channels = 3, .count = 2, .x_offset = 1});
}

TYPED_TEST(Kernels, ErrorSumsOverManyBlocks) {
  constexpr int V = vector_size<TypeParam>;
  this->check_error_sums({.inner = 70 * error_sums_block * V});
  this->check_error_sums({.outer = 70 * 2 * column_rows<TypeParam>, .channels = 64 * V});
}

TYPED_TEST(Kernels, ErrorSumsOfSpecialValues) {
  constexpr int V = vector_size<TypeParam>;
  const std::optional<double> ceilings[] = {{}, 1.5, std::numeric_limits<double>::infinity()};
  for (const auto ceiling : ceilings) {
    for (Case c : {Case{.inner = 255, .count = 2}, Case{.channels = 11, .inner = 31, .count = 2},
                   Case{.outer = 31, .channels = 4 * V, .count = 2}}) {
      c.relu_max = ceiling;
      this->check_error_sums(c);
      c.values = Values::special_with_nan;
      this->check_error_sums(c);
      c.odd_scales = true;
      this->check_error_sums(c);
    }
  }
}

TEST(Lists, ProblemsOfSeveralDataTypesAreALaunchForEach) {
  Trial<float> first({.inner = 255, .count = 2}), last({.inner = 31});
  Trial<__half> half({.inner = 1023}), other_half({.inner = 31});
  Trial<double> wide({.channels = 3, .inner = 31});
  auto y = std::tuple(first.forward(), half.forward(), wide.forward(), other_half.forward(),
                      last.forward());
  auto dx = std::tuple(first.backward(), half.backward(), wide.backward(), other_half.backward(),
                       last.backward());
  const auto in_one_list = [](auto&... calls) { return std::vector{calls.problem...}; };
  EXPECT_EQ(run(std::apply(in_one_list, y)), 3);
  const std::vector<BackwardProblem> problems = std::apply(in_one_list, dx);
  EXPECT_EQ(Counters(problems).run(problems), 3);
  const auto compare = [&](auto& calls) {
    first.compare(std::get<0>(calls));
    half.compare(std::get<1>(calls));
    wide.compare(std::get<2>(calls));
    other_half.compare(std::get<3>(calls));
    last.compare(std::get<4>(calls));
  };
  compare(y);
  compare(dx);
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
