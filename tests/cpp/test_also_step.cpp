#include <gtest/gtest.h>

#include <limits>

#include "also_step/also_step_math.h"

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

}  // namespace
