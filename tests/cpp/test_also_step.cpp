#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "also_step/also_step_math.h"
#include "emulate_cuda.h"
// After the emulation:
#include "also_step/also_step_kernels.cuh"

namespace {

using als::adam_correction;
using als::also_coefficients;
using als::also_element;
using als::AlsoOptions;

constexpr AlsoOptions kAdam{0.9, 0.999, 1e-8, 0.0, 1.0, false};

TEST(AdamCorrection, IsTheClosedFormAtEveryAge) {
  for (int64_t t : {1, 2, 10, 1000, 100000}) {
    const auto c = adam_correction<double>(0.1, std::log(0.9), std::log(0.999), t);
    EXPECT_NEAR(c.step_size, 0.1 / (1.0 - std::pow(0.9, t)), 1e-13);
    EXPECT_NEAR(c.inverse_root, 1.0 / std::sqrt(1.0 - std::pow(0.999, t)), 1e-11);
  }
  const auto old = adam_correction<double>(0.1, std::log(0.9), std::log(0.999), int64_t{1} << 62);
  EXPECT_EQ(old.step_size, 0.1);
  EXPECT_EQ(old.inverse_root, 1.0);
}

TEST(AdamCorrection, ZeroBetaNeedsNoCorrection) {
  const auto c = adam_correction<double>(0.1, std::log(0.0), std::log(0.0), 1);
  EXPECT_EQ(c.step_size, 0.1);
  EXPECT_EQ(c.inverse_root, 1.0);
}

TEST(AdamCorrection, BetaNextToOneDoesNotCancel) {
  const double gap = 1e-15;  // 1 - pow(1 - gap, 1) in float64 would be off by a tenth
  const auto c = adam_correction<double>(1.0, std::log1p(-gap), std::log1p(-gap), 1);
  EXPECT_NEAR(c.step_size * gap, 1.0, 1e-9);
}

TEST(AlsoElement, FirstStepIsLrInTheDirectionOfTheSign) {
  const auto c = also_coefficients<double>(kAdam, 0.5, 1.0, 0);
  for (double gradient : {3.0, -3.0, 1e-3}) {
    double theta = 1.0, base = 0.0, m = 0.0, v = 0.0, v_max = 0.0;
    also_element<false, false>(theta, gradient, base, m, v, v_max, c);
    EXPECT_NEAR(theta, gradient > 0 ? 0.5 : 1.5, 1e-5);
    EXPECT_EQ(base, 0.0);
  }
}

TEST(AlsoElement, HalfStepLeavesTheBaseBehind) {
  const auto c = also_coefficients<double>(kAdam, 0.5, 1.0, 0);
  double theta = 7.0, base = 1.0, m = 0.0, v = 0.0, v_max = 0.0;
  also_element<false, true>(theta, 2.0, base, m, v, v_max, c);
  EXPECT_NEAR(base, 0.5, 1e-8);   // from the base, not from the half point
  EXPECT_NEAR(theta, 0.0, 1e-8);  // one more step of the same size
}

TEST(AlsoElement, L2DecayIsTakenAtTheHalfPointAndIsNotScaled) {
  AlsoOptions options = kAdam;
  options.weight_decay = 0.5;
  const auto c = also_coefficients<double>(options, 0.0, 4.0, 0);
  double theta = 6.0, base = 100.0, m = 0.0, v = 0.0, v_max = 0.0;
  also_element<false, true>(theta, 8.0, base, m, v, v_max, c);
  const double g = 8.0 / 4.0 + 0.5 * 6.0;
  EXPECT_NEAR(m, 0.1 * g * 0.9 + 0.1 * g, 1e-12);  // both advances saw the same gradient
  EXPECT_EQ(base, 100.0);
}

TEST(AlsoElement, DecoupledDecayShrinksTheStartOfEachStep) {
  AlsoOptions options = kAdam;
  options.weight_decay = 0.5;
  options.decoupled = true;
  const auto c = also_coefficients<double>(options, 0.1, 1.0, 0);
  double theta = 5.0, base = 2.0, m = 0.0, v = 0.0, v_max = 0.0;
  also_element<false, true>(theta, 0.0, base, m, v, v_max, c);
  EXPECT_NEAR(base, 2.0 * 0.95, 1e-15);
  EXPECT_NEAR(theta, 2.0 * 0.95 * 0.95, 1e-15);
}

TEST(AlsoElement, AmsgradKeepsTheLargestSecondMoment) {
  const auto c = also_coefficients<float>(kAdam, 0.1, 1.0, 10);
  float theta = 1.0f, base = 0.0f, m = 0.0f, v = 1.0f, v_max = 5.0f;
  also_element<true, false>(theta, 0.0f, base, m, v, v_max, c);
  EXPECT_EQ(v_max, 5.0f);
  also_element<true, false>(theta, 1e4f, base, m, v, v_max, c);
  EXPECT_EQ(v_max, v);
  also_element<true, false>(theta, std::numeric_limits<float>::quiet_NaN(), base, m, v, v_max, c);
  EXPECT_TRUE(std::isnan(v_max));
}

// The device code on the CPU, against the same formula element by element.
template <typename T>
struct Parameter {
  std::vector<T> param, grad, m, v, v_max, base;
  int64_t step;
  int64_t size;
  int64_t first;        // of param and grad; 1: misaligned for vectors
  int64_t first_state;  // of the others

  Parameter(int64_t n, int64_t advances, std::mt19937& random)
      : step(advances), size(n), first(n % 2), first_state(n % 3 == 1) {
    std::normal_distribution<T> normal;
    for (auto* values : {&param, &grad, &m, &v, &v_max, &base}) {
      for (int64_t i = 0; i < n + 2; ++i) values->push_back(normal(random));
    }
    for (auto* values : {&v, &v_max}) {
      for (T& value : *values) value = std::abs(value);
    }
  }
};

template <typename T, bool kAmsgrad, bool kHalf>
void compare_kernel_with_formula(float found_inf) {
  std::mt19937 random(0);
  std::vector<Parameter<T>> got;
  int64_t advances = 0;
  for (int64_t size : {0, 1, 5, 4096, 7, 0, 4097, 8191}) {
    got.emplace_back(size, advances++, random);
  }
  auto want = got;
  const AlsoOptions options{0.9, 0.99, 1e-8, 0.1, 0.7, false};
  const double lr = 1e-2;
  const float scale = 4.0f;
  als::AlsoBatch<T, T> batch{};
  batch.options = options;
  batch.lr = -1.0;  // replaced by the tensor
  batch.lr_tensor = &lr;
  batch.grad_scale = &scale;
  batch.found_inf = &found_inf;
  int64_t chunks = 0;
  for (auto& t : got) {
    const auto state = [&t](std::vector<T>& values) { return values.data() + t.first_state; };
    batch.tensors[batch.count] = {t.param.data() + t.first,
                                  t.grad.data() + t.first,
                                  state(t.m),
                                  state(t.v),
                                  kAmsgrad ? state(t.v_max) : nullptr,
                                  kHalf ? state(t.base) : nullptr,
                                  &t.step,
                                  t.size};
    chunks += (t.size + als::kAlsoChunk - 1) / als::kAlsoChunk;
    batch.chunk_end[batch.count++] = chunks;
  }
  emulated::launch(static_cast<unsigned>(chunks), als::kAlsoThreads,
                   [&] { als::also_step_kernel<kAmsgrad, kHalf>(batch); });
  emulated::launch(1, als::kAlsoBatch,
                   [&] { als::also_advance_kernel(batch, int64_t{kHalf ? 2 : 1}); });
  for (size_t k = 0; k < want.size(); ++k) {
    auto& t = want[k];
    if (found_inf == 0.0f) {
      const auto c = also_coefficients<T>(options, lr, scale, t.step);
      for (int64_t i = 0; i < t.size; ++i) {
        const int64_t j = t.first_state + i;
        also_element<kAmsgrad, kHalf>(t.param[t.first + i], t.grad[t.first + i], t.base[j], t.m[j],
                                      t.v[j], t.v_max[j], c);
      }
      t.step += kHalf ? 2 : 1;
    }
    EXPECT_EQ(got[k].step, t.step);
    const std::vector<T>* pairs[][2] = {{&got[k].param, &t.param}, {&got[k].base, &t.base},
                                        {&got[k].m, &t.m},         {&got[k].v, &t.v},
                                        {&got[k].v_max, &t.v_max}, {&got[k].grad, &t.grad}};
    for (const auto& [a, b] : pairs) {  // the elements before and after the tensor as well
      for (size_t i = 0; i < a->size(); ++i) EXPECT_NEAR((*a)[i], (*b)[i], 1e-6) << k << " " << i;
    }
  }
}

TEST(AlsoStepKernel, AgreesWithTheFormulaOnEveryElement) {
  compare_kernel_with_formula<float, false, false>(0.0f);
  compare_kernel_with_formula<float, true, true>(0.0f);
  compare_kernel_with_formula<double, false, true>(0.0f);
  compare_kernel_with_formula<double, true, false>(0.0f);
}

TEST(AlsoStepKernel, FoundInfLeavesEverythingAsItIs) {
  compare_kernel_with_formula<float, true, true>(1.0f);
}

}  // namespace
