#include <gtest/gtest.h>

#include <random>

// clang-format off: the emulation stands before device code
#include "emulate_cuda.h"
#include "pi_step/pi_step_kernels.cuh"
// clang-format on
#include "pi_step/pi_step_chunk.h"

namespace {

using als::PiExponent;
using als::PiPlan;
using als::PiRule;

constexpr PiRule kRule{0.9, 0.5, 0.7};

std::vector<float> normal(int64_t n, unsigned seed, float scale = 1.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> distribution(0.0f, scale);
  std::vector<float> values(n);
  for (float& v : values) v = distribution(engine);
  return values;
}

// ---- formulas --------------------------------------------------------------------------------

TEST(PiPlan, AnUntouchedEntryOnlyShrinksThroughTheScale) {
  const double scalars[als::kPiScalars] = {0.5, 0.1, 0.1, 1.0};
  const PiPlan plan = als::plan_step(scalars, kRule);
  EXPECT_FALSE(plan.rewrite);
  EXPECT_DOUBLE_EQ(plan.new_scale, 0.45);
  // r = 0.5 * 4 = 2; (2 + 1) * 0.9 = 2.7 = 0.45 * 6
  EXPECT_FLOAT_EQ(als::advance_entry(4.0f, 1.0, plan), 6.0f);
}

TEST(PiPlan, RewritesWhenTheScaleIsSmallOrTheLevelIsFar) {
  const double small[als::kPiScalars] = {als::kPiScaleMin, 0.5, 0.0, 1.0};
  const double far[als::kPiScalars] = {0.5, -10.0, 0.0, 1.0};
  for (const double* scalars : {small, far}) {
    const PiPlan plan = als::plan_step(scalars, kRule);
    EXPECT_TRUE(plan.rewrite);
    EXPECT_EQ(plan.new_scale, 1.0);
    EXPECT_DOUBLE_EQ(plan.shift, 0.9 * scalars[als::kPiLogMean]);
    const float u = 3.0f;  // an entry of the batch without losses is as any other
    EXPECT_EQ(als::rewrite_entry(u, plan), als::advance_entry(u, 0.0, plan));
    EXPECT_EQ(als::rewrite_entry(-INFINITY, plan), -INFINITY);
  }
}

TEST(PiPlan, KeepsBitsWithoutAStep) {
  const double scalars[als::kPiScalars] = {0.3333, 7.0, 0.0, 1.0};
  for (float u : normal(1000, 1, 30.0f))
    EXPECT_EQ(als::advance_entry(u, 0.0, als::plan_same(scalars)), u);
}

TEST(PiAscent, IsBounded) {
  EXPECT_EQ(als::ascent(3.0, 0.5), 1.5);
  EXPECT_EQ(als::ascent(1e300, -1e300), -als::kPiLimit);
}

TEST(LogSum, AddsInAnyOrderAndIgnoresNothing) {
  als::LogSum up, down;
  for (double x : {-2000.0, 0.0, 1.0, 2000.0}) up.add(x, 1.0);
  for (double x : {2000.0, 1.0, 0.0, -2000.0}) down.add(x, 1.0);
  up.add(-INFINITY, 0.0);
  EXPECT_EQ(up.max, 2000.0);
  EXPECT_EQ(up.sum, 1.0);
  EXPECT_EQ(down.sum, 1.0);
  als::LogSum eight;
  for (int i = 0; i < 8; ++i) eight.add(3.0, 1.0);
  EXPECT_DOUBLE_EQ(eight.log_mean(2), 6 * als::kLn2 - als::kLn2);
}

TEST(UsableLoss, IsFiniteAsFloat) {
  EXPECT_TRUE(als::usable_loss(-3.4e38));
  for (double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY), -1e39, 1e300})
    EXPECT_FALSE(als::usable_loss(bad));
}

TEST(LowerBound, FindsTheFirstOfEqualKeys) {
  const int64_t keys[] = {-4, 2, 2, 2, 9, INT64_MAX};
  EXPECT_EQ(als::lower_bound(keys, 6, 2), 1);
  EXPECT_EQ(als::lower_bound(keys, 6, 3), 4);
  EXPECT_EQ(als::lower_bound(keys, 6, INT64_MAX), 5);
  EXPECT_EQ(als::lower_bound(keys, 0, 2), 0);
}

// ---- the CPU's pass --------------------------------------------------------------------------

std::vector<als::ChunkFunction> chunk_functions() {
  std::vector<als::ChunkFunction> found;
  for (auto level : {als::CpuLevel::kBaseline, als::CpuLevel::kAvx2, als::CpuLevel::kAvx512}) {
    if (level <= als::best_cpu_level()) found.push_back(als::chunk_function(level));
  }
  return found;
}

TEST(SumChunk, AgreesWithFloat64AtEveryWidthAndLength) {
  for (const float spread : {0.01f, 3.0f, 100.0f}) {
    for (const int64_t n : {1, 15, 16, 127, 128, 129, 1000, 8192}) {
      std::vector<float> u = normal(n, 2, spread);
      const std::vector<float> prior = normal(n, 3);
      if (n > 20) u[17] = -INFINITY;  // lifted
      for (const bool with_prior : {false, true}) {
        const PiExponent e = als::exponent_of(0.7, kRule);
        als::LogSum total, half;
        for (int64_t i = 0; i < n; ++i) {
          const double p = with_prior ? kRule.prior * prior[i] : 0.0;
          total.add(als::kLog2E * (p + 0.7 * u[i]), 1.0);
          half.add(als::kLog2E * (p + 0.7 * kRule.rho * u[i]), 1.0);
        }
        for (const als::ChunkFunction sum : chunk_functions()) {
          // The product with u, up to 400 at spread 100, is rounded where there is no fused
          // multiply-add.
          const double tolerance = spread < 100.0f ? 1e-6 : 5e-5;
          const als::ChunkSums got = sum(u.data(), with_prior ? prior.data() : nullptr, n, e);
          EXPECT_NEAR(got.max + std::log2(got.sum), total.max + std::log2(total.sum), tolerance);
          EXPECT_NEAR(got.max_half + std::log2(got.sum_half), half.max + std::log2(half.sum),
                      tolerance);
        }
      }
    }
  }
}

TEST(SumChunk, OfLiftedEntriesAloneIsNothing) {
  const std::vector<float> u(300, -INFINITY);
  for (const als::ChunkFunction sum : chunk_functions()) {
    const als::ChunkSums got = sum(u.data(), nullptr, 300, als::exponent_of(1.0, kRule));
    EXPECT_EQ(got.max, -INFINITY);
    EXPECT_EQ(got.sum, 0.0);
  }
}

// ---- the device code, emulated ---------------------------------------------------------------

// A distribution and one batch, with the step in float64 beside the emulated kernels.
struct Device {
  std::vector<float> u, prior, lifted;
  std::vector<double> scalars{1.0, 0.0, 0.0, 0.0}, loss;
  std::vector<int64_t> index, order, pending_index;
  std::vector<double> pending_grad;
  std::vector<als::PiSums> partial;
  int64_t skipped = 0;
  float found_inf = 0.0f;
  int64_t offset = 0;  // of the first entry from 16 aligned bytes

  Device(int64_t n, bool with_prior, std::vector<int64_t> sorted, int64_t capacity)
      : u(normal(n, 5)),
        prior(with_prior ? normal(n, 6) : std::vector<float>()),
        lifted(capacity),
        index(std::move(sorted)),
        pending_index(capacity, INT64_MAX),
        pending_grad(capacity) {
    for (size_t p = 0; p < index.size(); ++p) {
      order.push_back(static_cast<int64_t>(index.size() - 1 - p));
      loss.push_back(0.01 * static_cast<double>(p) - 0.3);
    }
  }

  void run(bool advance, int64_t max_blocks) {
    // Copies end where the entries do, so that AddressSanitizer sees what is read beyond.
    std::vector<float> moved_u(offset + u.size()), moved_prior(offset + prior.size());
    std::copy(u.begin(), u.end(), moved_u.begin() + offset);
    std::copy(prior.begin(), prior.end(), moved_prior.begin() + offset);
    als::PiStepParams p{};
    p.u = moved_u.data() + offset;
    p.log_prior = prior.empty() ? nullptr : moved_prior.data() + offset;
    p.scalars = scalars.data();
    p.skipped = &skipped;
    p.batch_index = pending_index.data();
    p.batch_grad = pending_grad.data();
    p.lifted = lifted.data();
    p.found_inf = &found_inf;
    p.index = index.data();
    p.order = order.data();
    p.loss = {nullptr, loss.data()};
    p.n = static_cast<int64_t>(u.size());
    p.capacity = static_cast<int64_t>(pending_index.size());
    p.batch = static_cast<int64_t>(index.size());
    p.rule = kRule;
    p.advance = advance;
    const int64_t tiles = (p.n + als::kPiTile - 1) / als::kPiTile;
    p.tiles = (tiles + max_blocks - 1) / max_blocks;
    p.blocks = (tiles + p.tiles - 1) / p.tiles;
    partial.resize(p.blocks);
    p.partial = partial.data();
    emulated::launch(2, als::kPiThreads, [&] { als::pi_lift_kernel(p); });
    emulated::launch(static_cast<unsigned>(p.blocks), als::kPiThreads, [&] {
      p.log_prior ? als::pi_pass_kernel<true>(p) : als::pi_pass_kernel<false>(p);
    });
    emulated::launch(1, als::kPiCombineThreads, [&] { als::pi_combine_kernel(p); });
    std::copy(moved_u.begin() + offset, moved_u.end(), u.begin());
  }

  // r of every entry after the step, and after the half step, without a common constant.
  void expect(const std::vector<double>& r, const std::vector<double>& grad) const {
    std::vector<double> x(r.size()), half(r.size());
    double z = 0.0, z_half = 0.0;
    for (size_t i = 0; i < r.size(); ++i) {
      const double c = prior.empty() ? 0.0 : kRule.prior * prior[i];
      x[i] = c + r[i];
      half[i] = c + kRule.rho * (r[i] + kRule.step * grad[i]);
      z += std::exp(x[i]) / static_cast<double>(r.size());
      z_half += std::exp(half[i]) / static_cast<double>(r.size());
    }
    const als::PiView view{u.data(),
                           nullptr,
                           prior.empty() ? nullptr : prior.data(),
                           scalars.data(),
                           pending_index.data(),
                           pending_grad.data(),
                           static_cast<int64_t>(u.size()),
                           static_cast<int64_t>(pending_index.size()),
                           kRule};
    for (size_t i = 0; i < r.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      ASSERT_NEAR(als::log_weight(view, at, false), x[i] - std::log(z), 2e-6) << i;
      ASSERT_NEAR(als::log_weight(view, at, true), half[i] - std::log(z_half), 2e-6) << i;
    }
  }
};

class DevicePass : public testing::TestWithParam<std::tuple<int64_t, bool, bool>> {};

TEST_P(DevicePass, FollowsFloat64) {
  const auto [n, with_prior, far] = GetParam();
  std::vector<int64_t> index{-7, 0, 0, n, n + 5};
  if (n > 1000) {
    index = {-7, 2, 2, 5, 999, n - 1, n};
    index.insert(index.begin() + 3, 70, 4);  // a run longer than two warps
  }
  Device device(n, with_prior, index, static_cast<int64_t>(index.size()) + 3);
  if (far) device.scalars[als::kPiLogMean] = 30.0;  // u is rewritten, centred by 27
  std::vector<double> r, grad(n, 0.0);
  for (const float u : device.u) r.push_back(u);
  for (size_t p = 0; p < index.size(); ++p)
    if (index[p] >= 0 && index[p] < n) grad[index[p]] += device.loss[device.order[p]];
  device.loss.back() = INFINITY;  // order is reversed: the loss of index[0], outside [0, n)
  for (int64_t i = 0; i < n; ++i) r[i] = kRule.rho * (r[i] + kRule.step * grad[i]);
  device.run(true, n > 1000 ? 2 : 4096);
  EXPECT_EQ(device.skipped, 0);
  EXPECT_EQ(device.scalars[als::kPiHasPending], 1.0);
  EXPECT_EQ(device.scalars[als::kPiScale], far ? 1.0 : kRule.rho);
  EXPECT_EQ(device.pending_index.back(), INT64_MAX);
  device.expect(r, grad);

  const auto [u, scalars] = std::pair(device.u, device.scalars);
  device.run(false, 4096);  // only the normalisers, in other blocks
  EXPECT_EQ(device.u, u);
  for (int k = 0; k < als::kPiScalars; ++k) EXPECT_NEAR(device.scalars[k], scalars[k], 1e-7);
}

INSTANTIATE_TEST_SUITE_P(Sizes, DevicePass,
                         testing::Combine(testing::Values<int64_t>(1, 5, 9001), testing::Bool(),
                                          testing::Bool()));

// Whole tiles are read 16 bytes at a time where u begins so, and entry by entry elsewhere.
TEST(DevicePassLayout, TheSameBitsWhereverTheStateBegins) {
  for (const bool with_prior : {false, true}) {
    for (const bool far : {false, true}) {
      std::vector<float> u;
      std::vector<double> scalars;
      for (const int64_t offset : {0, 1, 2, 3}) {
        Device device(2 * als::kPiTile + 9, with_prior, {1, 1, 4}, 3);
        device.offset = offset;
        if (far) device.scalars[als::kPiLogMean] = 30.0;
        device.run(true, 2);
        if (offset == 0) {
          u = device.u;
          scalars = device.scalars;
        }
        EXPECT_EQ(device.u, u);
        EXPECT_EQ(device.scalars, scalars);
      }
    }
  }
}

TEST(DeviceStep, CountsLossesThatAreNotFinite) {
  Device device(10, false, {1, 1, 4}, 3);
  device.loss = {NAN, 2.0, -INFINITY};
  device.run(true, 1);
  EXPECT_EQ(device.skipped, 2);
  EXPECT_EQ(device.pending_grad, (std::vector<double>{2.0, 0.0, 0.0}));
}

TEST(DeviceStep, FoundInfChangesNothing) {
  Device device(10, true, {1, 1, 4}, 3);
  const auto [u, scalars, pending] = std::tuple(device.u, device.scalars, device.pending_index);
  device.found_inf = 1.0f;
  device.loss[0] = NAN;
  device.run(true, 1);
  EXPECT_EQ(device.u, u);
  EXPECT_EQ(device.scalars, scalars);
  EXPECT_EQ(device.pending_index, pending);
  EXPECT_EQ(device.skipped, 0);
}

TEST(DeviceWeight, ReadsABatchAndNanOutside) {
  Device device(10, true, {1, 1, 4}, 3);
  device.run(true, 1);
  const als::PiView view{device.u.data(),
                         nullptr,
                         device.prior.data(),
                         device.scalars.data(),
                         device.pending_index.data(),
                         device.pending_grad.data(),
                         10,
                         3,
                         kRule};
  const std::vector<int64_t> index{4, -1, 10, 0};
  std::vector<float> got(4);
  emulated::launch(1, als::kPiThreads,
                   [&] { als::pi_weight_kernel(view, index.data(), got.data(), 4, true, false); });
  EXPECT_FLOAT_EQ(got[0], static_cast<float>(std::exp(als::log_weight(view, 4, true))));
  EXPECT_TRUE(std::isnan(got[1]) && std::isnan(got[2]));
  EXPECT_FLOAT_EQ(got[3], static_cast<float>(std::exp(als::log_weight(view, 0, true))));
}

}  // namespace
