#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "loss_batch.h"

namespace {

using namespace als;

// exp, log
// -----------------------------------------------------------------------------------------

double relative(double got, double want) { return std::abs(got - want) / std::abs(want); }

TEST(Elementary, ExpIsAccurateForNonpositiveNumbers) {
  double worst = 0;
  for (int i = 0; i <= 870000; ++i) {
    const float x = -static_cast<float>(i) * 1e-4f;
    worst = std::max(worst, relative(exp_of_nonpositive(x), std::exp(static_cast<double>(x))));
  }
  EXPECT_LT(worst, 2e-7);
  EXPECT_EQ(exp_of_nonpositive(0.0f), 1.0f);
  EXPECT_EQ(exp_of_nonpositive(-88.0f), 0.0f);
  EXPECT_EQ(exp_of_nonpositive(-INFINITY), 0.0f);
  EXPECT_TRUE(std::isnan(exp_of_nonpositive(NAN)));
}

TEST(Elementary, Expm1KeepsSmallDifferences) {
  double worst = 0;
  for (float x = -80.0f; x < -1e-30f; x *= 0.999f) {
    worst = std::max(worst, relative(expm1_of_nonpositive(x), std::expm1(static_cast<double>(x))));
  }
  EXPECT_LT(worst, 4e-7);
  EXPECT_EQ(expm1_of_nonpositive(0.0f), 0.0f);
  EXPECT_EQ(expm1_of_nonpositive(-INFINITY), -1.0f);
  EXPECT_TRUE(std::isnan(expm1_of_nonpositive(NAN)));
}

TEST(Elementary, LogIsAccurateAndKnowsItsLimits) {
  double worst = 0;
  for (float x = 1.2e-38f; x < 1e38f; x *= 1.0007f) {
    const double want = std::log(static_cast<double>(x));
    worst =
        std::max(worst, std::abs(log_of_nonnegative(x) - want) / std::max(1e-30, std::abs(want)));
  }
  EXPECT_LT(worst, 3e-7);
  for (float x = 1.0f; x > 1e-38f; x *= 0.999f) {
    worst = std::max(worst, relative(log1p_of_fraction(x), std::log1p(static_cast<double>(x))));
  }
  EXPECT_LT(worst, 4e-7);
  EXPECT_EQ(log_of_nonnegative(1.0f), 0.0f);
  EXPECT_EQ(log_of_nonnegative(0.0f), -INFINITY);
  EXPECT_EQ(log_of_nonnegative(INFINITY), INFINITY);
  EXPECT_TRUE(std::isnan(log_of_nonnegative(NAN)));
  EXPECT_EQ(log1p_of_fraction(0.0f), 0.0f);
}

TEST(Elementary, PowOfFraction) {
  EXPECT_NEAR(pow_of_fraction(0.3f, 2.0f), 0.09f, 1e-8);
  EXPECT_EQ(pow_of_fraction(0.0f, 0.0f), 1.0f);
  EXPECT_EQ(pow_of_fraction(0.0f, 0.5f), 0.0f);
  EXPECT_EQ(pow_of_fraction(1.0f, 3.0f), 1.0f);
  EXPECT_TRUE(std::isnan(pow_of_fraction(static_cast<float>(NAN), 0.0f)));
}

// Rows
// ---------------------------------------------------------------------------------------------

TEST(LossRows, DerivativeIsThatOfTheValue) {
  for (const Case& c : kCases) {
    Batch<double> batch(5, 7);
    const auto job = job_of(batch, c);
    loss_rows(job, 0, batch.rows, CpuLevel::kBaseline);
    const auto grad = batch.grad;
    for (int64_t i = 0; i < batch.rows * batch.classes; ++i) {
      constexpr double kStep = 1e-6;
      const int64_t r = i / batch.classes;
      const double z = batch.logits[i];
      double value[2];
      for (int side = 0; side < 2; ++side) {
        batch.logits[i] = z + (side ? kStep : -kStep);
        loss_rows(job, r, r + 1, CpuLevel::kBaseline);
        value[side] = batch.losses[r];
      }
      batch.logits[i] = z;
      const double slope = batch.scale[r] * (value[1] - value[0]) / (2 * kStep);
      EXPECT_NEAR(grad[i], slope, 2e-8) << c.name << " element " << i;
    }
  }
}

TEST(LossRows, EveryInstructionSetAgrees) {
  for (const Case& c : kCases) {
    for (const int64_t classes : {1, 10, 15, 16, 17, 63, 64, 65, 1000}) {
      Batch<float> want(33, classes);
      loss_rows(job_of(want, c), 0, want.rows, CpuLevel::kBaseline);
      for (CpuLevel level : {CpuLevel::kAvx2, CpuLevel::kAvx512}) {
        if (level > cpu_level()) continue;
        Batch<float> got(33, classes);
        loss_rows(job_of(got, c), 0, got.rows, level);
        for (int64_t r = 0; r < got.rows; ++r) {
          EXPECT_NEAR(got.losses[r], want.losses[r], 2e-6f * (1 + std::abs(want.losses[r])));
        }
        for (size_t i = 0; i < got.grad.size(); ++i) {
          EXPECT_NEAR(got.grad[i], want.grad[i], 1e-6f * (1 + std::abs(want.grad[i]))) << c.name;
        }
      }
    }
  }
}

// Rows are written as whole vectors whose surplus falls on the next row: never on one of another
// thread.
TEST(LossRows, ARangeOfRowsWritesNothingElse) {
  for (const Case& c : kCases) {
    for (const int64_t classes : {1, 3, 15, 16, 17, 31, 33, 100}) {
      for (CpuLevel level : {CpuLevel::kBaseline, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
        if (level > cpu_level()) continue;
        Batch<float> all(140, classes), part(140, classes);
        loss_rows(job_of(all, c), 0, 140, level);
        std::fill(part.grad.begin(), part.grad.end(), -7.0f);
        std::fill(part.losses.begin(), part.losses.end(), -7.0f);
        loss_rows(job_of(part, c), 5, 137, level);
        for (int64_t r = 0; r < 140; ++r) {
          const bool inside = r >= 5 && r < 137;
          EXPECT_EQ(part.losses[r], inside ? all.losses[r] : -7.0f) << c.name;
          for (int64_t i = r * classes; i < (r + 1) * classes; ++i) {
            EXPECT_EQ(part.grad[i], inside ? all.grad[i] : -7.0f) << c.name << " row " << r;
          }
        }
      }
    }
  }
}

TEST(LossRows, BFloat16IsRoundedOnceOnEveryInstructionSet) {
  for (const Case& c : kCases) {
    Batch<BFloat16> half(9, 70);
    Batch<float> full(9, 70);
    for (size_t i = 0; i < full.logits.size(); ++i) full.logits[i] = half.logits[i];
    for (CpuLevel level : {CpuLevel::kBaseline, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
      if (level > cpu_level()) continue;
      loss_rows(job_of(half, c), 0, half.rows, level);
      loss_rows(job_of(full, c), 0, full.rows, level);
      EXPECT_EQ(half.losses, full.losses) << c.name;
      for (size_t i = 0; i < full.grad.size(); ++i) {
        const float got = half.grad[i], want = full.grad[i];
        EXPECT_LE(std::abs(got - want), std::ldexp(std::abs(want), -8)) << c.name;
      }
    }
  }
}

TEST(LossRows, BackwardFromTheStateGivesTheSameBits) {
  for (const Case& c : kCases) {
    Batch<float> once(20, 45), twice(20, 45);
    loss_rows(job_of(once, c), 0, once.rows, cpu_level());
    auto forward = job_of(twice, c);
    forward.grad = nullptr;
    loss_rows(forward, 0, twice.rows, cpu_level());
    auto backward = job_of(twice, c);
    backward.losses = backward.state_out = nullptr;
    backward.state_in = twice.state.data();
    loss_rows(backward, 0, twice.rows, cpu_level());
    EXPECT_EQ(once.grad, twice.grad) << c.name;
  }
}

TEST(Fate, AClassOutOfRangeIsNeverUsed) {
  EXPECT_EQ(fate_of(0, 5, -100), RowFate::kLoss);
  EXPECT_EQ(fate_of(4, 5, -100), RowFate::kLoss);
  EXPECT_EQ(fate_of(5, 5, -100), RowFate::kInvalid);
  EXPECT_EQ(fate_of(-1, 5, -100), RowFate::kInvalid);
  EXPECT_EQ(fate_of(int64_t{1} << 40, 5, -100), RowFate::kInvalid);
  EXPECT_EQ(fate_of(-100, 5, -100), RowFate::kIgnored);
  EXPECT_EQ(fate_of(3, 5, 3), RowFate::kIgnored);

  Batch<float> batch(3, 5);
  batch.index = {int64_t{1} << 40, -100, 2};
  loss_rows(job_of(batch, kCases[0]), 0, 3, cpu_level());
  EXPECT_TRUE(std::isnan(batch.losses[0]));
  EXPECT_TRUE(std::isnan(batch.grad[0]));
  EXPECT_EQ(batch.losses[1], 0.0f);
  EXPECT_EQ(batch.grad[5], 0.0f);
  EXPECT_TRUE(std::isfinite(batch.losses[2]));
}

// Online sums
// --------------------------------------------------------------------------------------

OnlineSums<double> sums_of(const std::vector<double>& z, const std::vector<double>& q, size_t y,
                           size_t begin, size_t end) {
  OnlineSums<double> sums;
  for (size_t c = begin; c < end; ++c) sums.add(z[c], c == y, q[c]);
  return sums;
}

TEST(OnlineSums, AnySplitOfARowGivesItsSums) {
  std::vector<double> z = {1, -INFINITY, 5, 2, 9, -3, 9, 0}, q = {.1, 0, .2, 0, .3, .1, 0, .3};
  const size_t n = z.size(), y = 3;
  double rest = 0, moment = 0, side = 0;
  for (size_t c = 0; c < n; ++c) {
    const double d = z[c] - 9;
    if (c != y) rest += std::exp(d);
    if (z[c] > -INFINITY) moment += std::exp(d) * d;
    if (q[c] > 0) side += q[c] * d;
  }
  for (size_t i = 0; i <= n; ++i) {
    for (size_t j = i; j <= n; ++j) {
      auto sums = sums_of(z, q, y, j, n);
      sums.merge(sums_of(z, q, y, 0, i));
      sums.merge(sums_of(z, q, y, i, j));
      EXPECT_EQ(sums.max, 9);
      EXPECT_NEAR(sums.rest, rest, 1e-12);
      EXPECT_NEAR(sums.hit, std::exp(-7.0), 1e-15);
      EXPECT_NEAR(sums.log_sum, moment, 1e-12);
      EXPECT_NEAR(sums.mass, 1.0, 1e-12);
      EXPECT_NEAR(sums.side, side, 1e-12);
    }
  }
}

TEST(OnlineSums, NanAndInfinityAreKept) {
  for (const double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    for (size_t at = 0; at < 3; ++at) {
      std::vector<double> z = {1, 4, 2}, q = {0, 0, 0};
      z[at] = bad;
      auto sums = sums_of(z, q, 3, 0, 1);
      sums.merge(sums_of(z, q, 3, 1, 3));
      EXPECT_TRUE(std::isnan(sums.rest)) << bad << " at " << at;
    }
  }
  OnlineSums<double> nothing = sums_of({-INFINITY, -INFINITY}, {0, 0}, 0, 0, 2);
  nothing.merge(OnlineSums<double>{});
  EXPECT_EQ(nothing.max, -INFINITY);  // the caller makes NaN of it
  EXPECT_EQ(nothing.rest + nothing.hit, 0.0);
}

}  // namespace
