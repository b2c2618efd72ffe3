#include <gtest/gtest.h>

#include <random>

// clang-format off: the emulation stands before device code
#include "emulate_cuda.h"
#include "pi_step/pi_step_lazy_kernels.cuh"
// clang-format on
#include "pi_step/pi_step_lazy_rows.h"

namespace {

using als::PiFrame;
using als::PiRule;

constexpr PiRule kRule{0.98, 0.5, 0.7};

template <typename T>
std::vector<T> normal(int64_t n, unsigned seed, double scale = 1.0) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> distribution(0.0, scale);
  std::vector<T> values(n);
  for (T& v : values) v = static_cast<T>(distribution(engine));
  return values;
}

const std::vector<const als::PiLazyRows*> all_rows() {
  std::vector<const als::PiLazyRows*> found;
  for (auto level : {als::CpuLevel::kBaseline, als::CpuLevel::kAvx2, als::CpuLevel::kAvx512}) {
    if (level <= als::best_cpu_level()) found.push_back(&als::lazy_rows(level));
  }
  return found;
}

// The logarithm of mean_i exp(x_i + scale u_i).
double log_mean(const std::vector<double>& u, const std::vector<float>& prior, double scale) {
  als::LogSum sum;
  for (size_t i = 0; i < u.size(); ++i) {
    const double x = prior.empty() ? 0.0 : kRule.prior * prior[i];
    sum.add(als::kLog2E * (x + scale * u[i]), 1.0);
  }
  return sum.log_mean(static_cast<int64_t>(u.size()));
}

// The sums of all entries, as a pass makes them.
std::vector<double> sums_of(const std::vector<double>& u, const std::vector<float>& prior,
                            double scale) {
  std::vector<double> sums(als::kPiSumsSize), moments(als::kPiMoments, 0.0);
  const auto [low, high] = std::minmax_element(u.begin(), u.end());
  als::start_sums(sums.data(), *low, *high, scale, log_mean(u, prior, scale));
  const auto n = static_cast<int64_t>(u.size());
  als::lazy_rows(als::CpuLevel::kBaseline)
      .add_moments(u.data(), prior.empty() ? nullptr : prior.data(), n, PiFrame::of(sums.data()),
                   kRule.prior, moments.data());
  for (int j = 0; j < als::kPiMoments; ++j) {
    als::add_moment(sums.data(), j, moments[j] / static_cast<double>(n));
  }
  als::end_sums(sums.data(), n);
  return sums;
}

// ---- formulas --------------------------------------------------------------------------------

TEST(ExpOf, IsExactToSomeUnitsInTheLastPlace) {
  std::mt19937 engine(1);
  std::uniform_real_distribution<double> wide(-707.0, 708.0), near(-1.0, 1.0);
  for (int k = 0; k < 100'000; ++k) {
    const double x = k % 2 ? wide(engine) : near(engine);
    EXPECT_NEAR(als::exp_of(x) / std::exp(x), 1.0, 4e-16) << x;
  }
  EXPECT_EQ(als::exp_of(0.0), 1.0);
  EXPECT_EQ(als::exp_of(-1e300), 0.0);
  EXPECT_EQ(als::exp_of(-INFINITY), 0.0);
  EXPECT_EQ(als::exp_of(INFINITY), INFINITY);
  EXPECT_TRUE(std::isnan(als::exp_of(NAN)));
}

TEST(AddMoment, KeepsWhatOneDoubleWouldLose) {
  std::vector<double> sums(als::kPiSumsSize, 0.0);
  als::add_moment(sums.data(), 3, 1e16);
  for (int k = 0; k < 1000; ++k) als::add_moment(sums.data(), 3, 0.25);
  als::add_moment(sums.data(), 3, -1e16);
  EXPECT_EQ(sums[als::kPiHigh + 3] + sums[als::kPiLow + 3], 250.0);
}

TEST(Series, IsWithinItsToleranceOrSaysThatItIsNot) {
  const std::vector<float> prior = normal<float>(500, 4);
  for (const bool with_prior : {false, true}) {
    for (const double spread : {0.0, 0.1, 1.0, 2.0, 5.0, 20.0, 300.0}) {
      const std::vector<double> u = normal<double>(500, 3, spread);
      const std::vector<float> p = with_prior ? prior : std::vector<float>();
      const std::vector<double> sums = sums_of(u, p, 1.0);
      EXPECT_EQ(sums[als::kPiTilt] == 0.0, spread <= 1.0 || als::kPiPlainReach > 3.0 * spread);
      int good = 0;
      for (double scale = 1.0; scale > 0.01; scale *= 0.97) {
        const als::PiSeries series = als::series_at(sums.data(), scale, 0.0, 0.0);
        if (!series.good) continue;
        ++good;
        EXPECT_NEAR(series.log_mean, log_mean(u, p, scale), als::kPiTolerance)
            << spread << ' ' << scale;
      }
      EXPECT_GE(good, spread <= 1.0 ? 150 : 1) << spread;
      EXPECT_FALSE(spread > 10.0 && als::series_at(sums.data(), 0.01, 0.0, 0.0).good);
    }
  }
}

TEST(Series, RefusesWhatIsNotFinite) {
  std::vector<double> sums = sums_of(normal<double>(100, 5), {}, 1.0);
  EXPECT_TRUE(als::series_at(sums.data(), 1.0, 0.0, 0.0).good);
  EXPECT_FALSE(als::series_at(sums.data(), 1.0, NAN, 0.0).good);
  EXPECT_FALSE(als::series_at(sums.data(), 1.0, INFINITY, 0.0).good);
  EXPECT_FALSE(als::series_at(sums.data(), 1.0, -2.0, 0.0).good);
  sums[als::kPiReach] = NAN;
  EXPECT_FALSE(als::series_at(sums.data(), 1.0, 0.0, 0.0).good);
}

TEST(Widen, ChangesNoValue) {
  std::vector<double> sums = sums_of(normal<double>(100, 6), {}, 1.0);
  const double scale = 1e-4;
  const als::PiSeries before = als::series_at(sums.data(), scale, 0.0, 0.0);
  const double width = sums[als::kPiInverseWidth];
  als::widen(sums.data(), scale);
  EXPECT_EQ(sums[als::kPiInverseWidth], width / als::kPiWidthStep);
  EXPECT_EQ(als::series_at(sums.data(), scale, 0.0, 0.0).log_mean, before.log_mean);
  als::widen(sums.data(), 1.0);
  EXPECT_EQ(sums[als::kPiInverseWidth], width / als::kPiWidthStep);
}

// ---- the CPU's loops -------------------------------------------------------------------------

TEST(LazyRows, AgreeAtEveryWidthAndLength) {
  for (const int64_t n : {1, 7, 8, 31, 32, 33, 500}) {
    std::vector<double> u = normal<double>(n, 7, 2.0);
    if (n > 20) u[17] = -INFINITY;  // lifted
    const std::vector<float> prior = normal<float>(n, 8);
    for (const bool with_prior : {false, true}) {
      const float* p = with_prior ? prior.data() : nullptr;
      const PiFrame frame{0.3, 0.2, 0.1, 0.5};
      als::PiNormalisers want;
      std::vector<long double> moments(als::kPiMoments, 0.0L), size(als::kPiMoments, 0.0L);
      for (int64_t i = 0; i < n; ++i) {
        const double x = p ? 0.7 * prior[i] : 0.0;
        want.add_entry(u[i], x, 0.0, 0.8, 0.5);
        if (u[i] == -INFINITY) continue;
        long double e = std::exp(static_cast<long double>(x + 0.3 * u[i] - 0.2));
        for (int j = 0; j < als::kPiMoments; ++j, e *= (u[i] - 0.1) * 0.5) {
          moments[j] += e;
          size[j] += std::fabs(e);
        }
      }
      for (const als::PiLazyRows* rows : all_rows()) {
        const als::PiNormalisers got = rows->normalise(u.data(), p, n, 0.8, 0.4, 0.7);
        EXPECT_NEAR(got.total.log_mean(n), want.total.log_mean(n), 1e-13);
        EXPECT_NEAR(got.half.log_mean(n), want.half.log_mean(n), 1e-13);
        EXPECT_EQ(got.low, want.low);
        EXPECT_EQ(got.high, want.high);
        std::vector<double> sums(als::kPiMoments, 1.0);  // adds to what is there
        rows->add_moments(u.data(), p, n, frame, 0.7, sums.data());
        for (int j = 0; j < als::kPiMoments; ++j) {
          EXPECT_NEAR(sums[j] - 1.0, static_cast<double>(moments[j]),
                      1e-13 * (1.0 + static_cast<double>(size[j])))
              << j;
        }
      }
    }
  }
}

TEST(LazyRows, ChangeIsTheDifferenceOfTheMoments) {
  const int64_t n = 3 * als::kPiBatchRows;
  std::vector<double> before = normal<double>(n, 9), after = normal<double>(n, 10);
  const std::vector<double> x = normal<double>(n, 11), gain = normal<double>(n, 12);
  before[n - 1] = after[n - 1] = -INFINITY;  // padding
  const PiFrame frame{0.3, 0.2, 0.1, 0.5};
  for (const als::PiLazyRows* rows : all_rows()) {
    std::vector<double> got(als::kPiMoments), want(als::kPiMoments, 0.0);
    const als::PiChange change = rows->change(
        {before.data(), after.data(), x.data(), gain.data(), n}, frame, 0.8, 0.5, 0.6, got.data());
    double mass = 0.0, reach = 0.0, half = 0.0;
    for (int64_t i = 0; i + 1 < n; ++i) {
      const als::PiTerm a = frame.term(before[i], x[i]), b = frame.term(after[i], x[i]);
      for (int j = 0; j < als::kPiMoments; ++j) {
        want[j] += b.e * std::pow(b.v, j) - a.e * std::pow(a.v, j);
      }
      mass += a.e + b.e;
      reach = std::max({reach, std::fabs(a.v), std::fabs(b.v)});
      half += std::exp(x[i] + 0.5 * (0.8 * after[i] + gain[i]) - 0.6) -
              std::exp(x[i] + 0.5 * 0.8 * after[i] - 0.6);
    }
    for (int j = 0; j < als::kPiMoments; ++j) EXPECT_NEAR(got[j], want[j], 1e-12 * (1 + mass));
    EXPECT_NEAR(change.mass, mass, 1e-12 * mass);
    EXPECT_DOUBLE_EQ(change.reach, reach);
    EXPECT_NEAR(change.half, half, 1e-12 * mass);
  }
}

// ---- the device code, emulated ---------------------------------------------------------------

struct Device {
  std::vector<double> u, scalars{1.0, 0.0, 0.0, 0.0}, sums, loss, pending_grad, lifted, moments;
  std::vector<float> prior;
  std::vector<int64_t> index, order, pending_index;
  std::vector<als::PiNormalisers> partial;
  std::vector<double> orders = std::vector<double>(als::kPiOrders, -1.0);
  int64_t skipped = 0;
  float found_inf = 0.0f;

  Device(int64_t n, bool with_prior, double spread, int64_t capacity)
      : u(normal<double>(n, 21, spread)),
        sums(als::kPiSumsSize, 0.0),
        pending_grad(capacity, 0.0),
        lifted(capacity),
        prior(with_prior ? normal<float>(n, 22) : std::vector<float>()),
        pending_index(capacity, INT64_MAX) {
    run(false);
  }

  void batch(std::vector<int64_t> sorted, unsigned seed) {
    index = std::move(sorted);
    order.clear();
    loss = normal<double>(static_cast<int64_t>(index.size()), seed);
    for (size_t p = 0; p < index.size(); ++p) {
      order.push_back(static_cast<int64_t>(index.size() - 1 - p));
    }
  }

  void run(bool advance) {
    als::PiLazyParams p{};
    p.u = u.data();
    p.log_prior = prior.empty() ? nullptr : prior.data();
    p.scalars = scalars.data();
    p.sums = sums.data();
    p.skipped = &skipped;
    p.batch_index = pending_index.data();
    p.batch_grad = pending_grad.data();
    p.found_inf = &found_inf;
    p.index = index.data();
    p.order = order.data();
    p.loss = {nullptr, loss.data()};
    p.orders = advance ? orders.data() : nullptr;
    p.lifted = lifted.data();
    p.n = static_cast<int64_t>(u.size());
    p.capacity = static_cast<int64_t>(pending_index.size());
    p.batch = static_cast<int64_t>(index.size());
    p.blocks = p.n > 1000 ? 2 : 1;
    partial.resize(p.blocks);
    moments.resize(p.blocks * als::kPiMoments);
    p.partial = partial.data();
    p.moments = moments.data();
    p.rule = kRule;
    if (advance) emulated::launch(1, als::kPiThreads, [&] { als::pi_lazy_step_kernel(p); });
    emulated::launch(1, als::kPiThreads, [&] { als::pi_lazy_lift_kernel(p); });
    emulated::launch(p.blocks, als::kPiThreads, [&] { als::pi_lazy_pass_kernel(p); });
    emulated::launch(1, als::kPiThreads, [&] { als::pi_lazy_combine_kernel(p); });
    emulated::launch(p.blocks, als::kPiThreads, [&] { als::pi_lazy_moments_kernel(p); });
    emulated::launch(1, 64, [&] { als::pi_lazy_sums_kernel(p); });
  }

  // The normalisers against float64, the half step's with the pending batch.
  void expect_normalised() const {
    std::vector<double> half(u.size());
    for (size_t i = 0; i < u.size(); ++i) half[i] = kRule.rho * scalars[als::kPiScale] * u[i];
    for (size_t p = 0; p < pending_index.size(); ++p) {
      if (pending_index[p] < 0 || pending_index[p] >= static_cast<int64_t>(u.size())) continue;
      half[pending_index[p]] += kRule.rho * als::ascent(pending_grad[p], kRule.step);
    }
    EXPECT_NEAR(scalars[als::kPiLogMean], log_mean(u, prior, scalars[als::kPiScale]), 2e-8);
    EXPECT_NEAR(scalars[als::kPiLogMeanHalf], log_mean(half, prior, 1.0), 2e-8);
  }
};

class LazyDevice : public testing::TestWithParam<std::tuple<int64_t, bool, double>> {};

TEST_P(LazyDevice, FollowsFloat64) {
  const auto [n, with_prior, spread] = GetParam();
  Device device(n, with_prior, spread, 9);
  device.expect_normalised();
  int served = 0;
  for (unsigned step = 0; step < 3; ++step) {
    device.batch({-7, 0, 0, n / 2, n / 2, n - 1, n, n + 5}, 30 + step);
    std::vector<double> grad(n, 0.0), r(n);
    for (size_t p = 0; p < device.index.size(); ++p) {
      const int64_t i = device.index[p];
      if (i >= 0 && i < n) grad[i] += device.loss[device.order[p]];
    }
    for (int64_t i = 0; i < n; ++i) {
      r[i] = kRule.rho * (device.scalars[als::kPiScale] * device.u[i] + kRule.step * grad[i]);
    }
    device.run(true);
    EXPECT_EQ(device.scalars[als::kPiHasPending], 1.0);
    EXPECT_EQ(device.pending_index.back(), INT64_MAX);
    for (int64_t i = 0; i < n; ++i) {
      EXPECT_NEAR(device.scalars[als::kPiScale] * device.u[i], r[i], 1e-11 * (1 + std::fabs(r[i])));
    }
    device.expect_normalised();
    served += device.orders[als::kPiDemand] == 0.0;
  }
  EXPECT_EQ(device.skipped, 0);
  if (spread <= 1.0) {
    EXPECT_EQ(served, 3);  // no pass was needed
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, LazyDevice,
                         testing::Combine(testing::Values<int64_t>(2, 3001), testing::Bool(),
                                          testing::Values(0.0, 1.0, 400.0)));

TEST(LazyDeviceStep, RewritesEntriesThatHaveDriftedAway) {
  Device device(50, true, 1.0, 4);
  for (double& u : device.u) u += 3e4;
  device.run(false);
  device.batch({3, 3, 20}, 40);
  device.run(true);
  EXPECT_EQ(device.orders[als::kPiRewrite], 1.0);
  EXPECT_EQ(device.scalars[als::kPiScale], 1.0);
  EXPECT_LT(std::fabs(device.scalars[als::kPiLogMean]), 10.0);
  device.expect_normalised();
  device.run(true);
  EXPECT_EQ(device.orders[als::kPiDemand], 0.0);
}

TEST(LazyDeviceStep, FoundInfChangesNothingAndLossesThatAreNotFiniteAreCounted) {
  Device device(10, true, 1.0, 3);
  device.batch({1, 1, 4}, 50);
  device.loss = {NAN, 2.0, -INFINITY};
  const auto [u, scalars, sums] = std::tuple(device.u, device.scalars, device.sums);
  device.found_inf = 1.0f;
  device.run(true);
  EXPECT_EQ(device.u, u);
  EXPECT_EQ(device.scalars, scalars);
  EXPECT_EQ(device.sums, sums);
  EXPECT_EQ(device.skipped, 0);
  device.found_inf = 0.0f;
  device.run(true);
  EXPECT_EQ(device.skipped, 2);
  EXPECT_EQ(device.pending_grad, (std::vector<double>{2.0, 0.0, 0.0}));
  device.expect_normalised();
}

}  // namespace
