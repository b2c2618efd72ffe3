#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace als {
struct BFloat16 {  // what loss_rows_isa.h asks of its includer
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};
}  // namespace als

#include "sample_loss/loss_rows_isa.h"
// clang-format off: the emulation comes before the kernels
#include "emulate_cuda.h"
#include "sample_loss/sample_loss_kernels.cuh"
// clang-format on

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

template <typename scalar_t, typename T = accumulate_t<scalar_t>>
struct Batch {
  int64_t rows, classes;
  std::vector<scalar_t> logits;
  std::vector<int64_t> index;
  std::vector<T> dense, class_weight, scale, losses, state;
  std::vector<scalar_t> grad;

  Batch(int64_t b, int64_t c, unsigned seed = 0)
      : rows(b),
        classes(c),
        logits(b * c),
        index(b),
        dense(b * c),
        class_weight(c),
        scale(b),
        losses(b),
        state(3 * b),
        grad(b * c) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal(0, 3);
    std::uniform_real_distribution<float> uniform(0, 1);
    for (auto& z : logits) set(z, normal(engine));
    for (auto& y : index) y = static_cast<int64_t>(engine() % c);
    for (auto& t : dense) t = uniform(engine) / static_cast<T>(c);
    for (auto& w : class_weight) w = uniform(engine);
    for (auto& g : scale) g = normal(engine);
  }
  static void set(float& z, float value) { z = value; }
  static void set(double& z, float value) { z = value; }
  static void set(BFloat16& z, float value) { z.bits = detail::bits_of(value) >> 16; }

  LossJob<scalar_t> job(LossKind kind, std::array<T, 3> parameters, T smoothing,
                        bool probabilities) {
    LossJob<scalar_t> j{};
    j.logits = logits.data();
    j.rows = rows;
    j.classes = j.row_stride = classes;
    if (probabilities)
      j.dense = dense.data();
    else
      j.index = index.data();
    j.class_weight = class_weight.data();
    j.scale = scale.data();
    j.spec = {kind, {parameters[0], parameters[1], parameters[2]}, smoothing, probabilities};
    j.ignore_index = -100;
    j.losses = losses.data();
    j.state_out = state.data();
    j.grad = grad.data();
    return j;
  }
};

struct Case {
  const char* name;
  LossKind kind;
  std::array<double, 3> parameters;
  double smoothing;
  bool probabilities;
};
const Case kCases[] = {
    {"cross_entropy", LossKind::kCrossEntropy, {}, 0, false},
    {"smoothing", LossKind::kCrossEntropy, {}, 0.2, false},
    {"probabilities", LossKind::kCrossEntropy, {}, 0.1, true},
    {"gce", LossKind::kGce, {0.6}, 0, false},
    {"sce", LossKind::kSce, {0.5, 1.5, -4}, 0, false},
    {"mae", LossKind::kMae, {}, 0, false},
    {"focal", LossKind::kFocal, {1.5}, 0, false},
    {"bootstrap_hard", LossKind::kBootstrapHard, {0.7}, 0, false},
    {"bootstrap_soft", LossKind::kBootstrapSoft, {0.7}, 0, false},
};

template <typename scalar_t>
LossJob<scalar_t> job_of(Batch<scalar_t>& batch, const Case& c) {
  using T = accumulate_t<scalar_t>;
  return batch.job(c.kind,
                   {static_cast<T>(c.parameters[0]), static_cast<T>(c.parameters[1]),
                    static_cast<T>(c.parameters[2])},
                   static_cast<T>(c.smoothing), c.probabilities);
}

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

// Device code, emulated

// Losses and gradients of `run(job)` against those of the CPU rows; then the gradient once more
// from the state. Rows 1 to 3 are ignored, out of range and of -inf alone.
template <class Run>
void expect_same_as_cpu(const Case& c, int64_t rows, int64_t classes, const Run& run) {
  Batch<float> want(rows, classes);
  if (rows > 3) {
    want.index[1] = -100;
    want.index[2] = int64_t{1} << 40;
    std::fill_n(want.logits.begin() + 3 * classes, classes, -INFINITY);
  }
  Batch<float> got = want;
  loss_rows(job_of(want, c), 0, rows, CpuLevel::kBaseline);
  auto job = job_of(got, c);
  run(job);
  for (int64_t r = 0; r < rows; ++r) {
    EXPECT_EQ(std::isnan(got.losses[r]), std::isnan(want.losses[r])) << c.name << " row " << r;
    if (std::isnan(want.losses[r])) continue;
    EXPECT_NEAR(got.losses[r], want.losses[r], 3e-6f * (1 + std::abs(want.losses[r]))) << c.name;
    for (int64_t i = r * classes; i < (r + 1) * classes; ++i) {
      EXPECT_NEAR(got.grad[i], want.grad[i], 2e-6f * (1 + std::abs(want.grad[i])))
          << c.name << " row " << r << " class " << i % classes;
    }
  }
  const std::vector<float> once = got.grad;
  job.losses = job.state_out = nullptr;
  job.state_in = got.state.data();
  run(job);
  EXPECT_EQ(std::memcmp(once.data(), got.grad.data(), once.size() * sizeof(float)), 0) << c.name;
}

bool is_general(const LossJob<float>& job) {
  return job.spec.side() != SideTarget::kNone || job.spec.needs_entropy();
}

template <int kVec, int kElements>
void run_in_registers(const LossJob<float>& job) {
  int lanes = 1;
  while (lanes * kElements < job.classes) lanes *= 2;
  emulated::launch(1, kRegisterThreads, [&] {
    if (is_general(job)) {
      loss_rows_in_registers<kVec, kElements, true>(job, lanes);
    } else {
      loss_rows_in_registers<kVec, kElements, false>(job, lanes);
    }
  });
}

template <int kVec>
void run_by_block(const LossJob<float>& job, bool cached) {
  emulated::launch(1, kBlockThreads, [&] {
    if (is_general(job)) {
      loss_rows_by_block<kVec, true>(job, cached);
    } else {
      loss_rows_by_block<kVec, false>(job, cached);
    }
  });
}

TEST(EmulatedDevice, RowsInRegisters) {
  for (const Case& c : kCases) {
    expect_same_as_cpu(c, 70, 10, run_in_registers<1, 8>);  // 2 lanes a row, more than one pass
    expect_same_as_cpu(c, 5, 60, run_in_registers<4, 8>);
    expect_same_as_cpu(c, 5, 1000, run_in_registers<4, 32>);
  }
  expect_same_as_cpu(kCases[0], 1, 1, run_in_registers<1, 8>);
  expect_same_as_cpu(kCases[0], 5, 257, run_in_registers<1, 32>);
}

TEST(EmulatedDevice, RowsByBlock) {
  for (const Case& c : kCases) {
    if (c.kind == LossKind::kGce || c.kind == LossKind::kSce || c.kind == LossKind::kMae) continue;
    expect_same_as_cpu(c, 1, 2500, [](const auto& job) { run_by_block<4>(job, true); });
  }
  expect_same_as_cpu(kCases[0], 4, 1025, [](const auto& job) { run_by_block<1>(job, false); });
}

// Rows of special logits, without class weights, forward and backward as sample_loss asks for them.
// A stride of 0 repeats the first row.
template <class Run>
void expect_special_rows(const Case& c, int64_t classes, int64_t stride, const Run& run) {
  const float inf = INFINITY, nan = NAN;
  const std::vector<std::array<float, 2>> values = {
      // of the target, of another class
      {nan, 1}, {1, nan}, {inf, 1}, {1, inf}, {-inf, 1}, {1, -inf}, {inf, inf}, {-inf, nan}};
  Batch<float> want(static_cast<int64_t>(values.size()) + 1, classes);
  for (size_t r = 0; r < values.size(); ++r) {
    float* row = want.logits.data() + r * classes;
    row[(want.index[r] + 1) % classes] = values[r][1];
    row[want.index[r]] = values[r][0];
  }
  std::fill_n(want.logits.end() - classes, classes, -inf);
  want.logits.back() = 2;                      // certain of one class
  if (!c.probabilities) want.index[0] = -100;  // NaN, but ignored
  Batch<float> got = want;
  auto job = job_of(want, c);
  job.class_weight = nullptr;
  job.row_stride = stride;
  loss_rows(job, 0, want.rows, CpuLevel::kBaseline);
  auto forward = job_of(got, c);
  forward.class_weight = nullptr;
  forward.row_stride = stride;
  auto backward = forward;
  forward.grad = nullptr;
  forward.scale = nullptr;
  run(forward);
  backward.losses = backward.state_out = nullptr;
  backward.state_in = got.state.data();
  run(backward);
  const auto same = [](float a, float b) {
    return std::isnan(a) ? std::isnan(b) : a == b || std::abs(a - b) <= 3e-6f * (1 + std::abs(b));
  };
  for (int64_t i = 0; i < want.rows * classes; ++i) {
    const int64_t r = i / classes;
    EXPECT_PRED2(same, got.losses[r], want.losses[r]) << c.name << " row " << r;
    EXPECT_PRED2(same, got.grad[i], want.grad[i])
        << c.name << " row " << r << " class " << i % classes << " target " << want.index[r];
  }
}

TEST(EmulatedDevice, SpecialRows) {
  for (const Case& c : kCases) {
    expect_special_rows(c, 12, 12, run_in_registers<4, 8>);
    expect_special_rows(c, 1, 1, run_in_registers<1, 8>);
  }
  expect_special_rows(kCases[0], 12, 0, run_in_registers<4, 8>);
  for (const int i : {0, 2, 7, 8}) {
    expect_special_rows(kCases[i], 12, 12, [](const auto& job) { run_by_block<4>(job, false); });
  }
}

TEST(EmulatedDevice, SquaredError) {
  const Case squared{"squared_error", LossKind::kSquaredError, {}, 0, true};
  Batch<float> want(9, 50), got(9, 50);
  auto job = job_of(want, squared);
  loss_rows(job, 0, 9, CpuLevel::kBaseline);
  job = job_of(got, squared);
  emulated::launch(2, kRegisterThreads, [&] { squared_error_rows(job, 32); });
  for (int r = 0; r < 9; ++r) EXPECT_FLOAT_EQ(got.losses[r], want.losses[r]);
  for (size_t i = 0; i < got.grad.size(); ++i) EXPECT_FLOAT_EQ(got.grad[i], want.grad[i]);
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
