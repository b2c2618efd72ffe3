// The kernel of long rows, emulated with its plans, against the CPU's rows in float64.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "loss_batch.h"
// clang-format off: the emulation comes before the kernels
#include "emulate_cuda.h"
#include "emulate_cluster.h"
#include "emulate_mma.h"
#include "sample_loss/sample_loss_kernels.cuh"
// clang-format on

namespace {

using namespace als;

constexpr int64_t kHopper = 227 << 10, kAmpere = 163 << 10;  // shared memory of a block

// ---- plans -----------------------------------------------------------------------------------

TEST(LossPlan, SharesAreFewAndSmall) {
  const auto plan = [](int64_t classes, int64_t element, int64_t shared, int most) {
    return plan_loss(classes, element, shared, most);
  };
  EXPECT_EQ(plan(32000, 2, kHopper, 8).blocks, 1);
  EXPECT_EQ(plan(50257, 2, kHopper, 8).blocks, 2);
  EXPECT_EQ(plan(128256, 2, kHopper, 8).blocks, 4);
  EXPECT_EQ(plan(128256, 4, kHopper, 8).blocks, 8);
  EXPECT_EQ(plan(400'000, 4, kHopper, 8).chunk, 50'000);  // all of it in shared memory
  EXPECT_EQ(plan(500'000, 4, kHopper, 8).chunk, 8192);    // no more
  EXPECT_EQ(plan(80'000, 2, kAmpere, 1).chunk, 80'000);
  EXPECT_EQ(plan(128256, 2, kAmpere, 1).chunk, 16384);
}

TEST(LossPlan, CoversEveryRowAndFitsIntoSharedMemory) {
  for (const int64_t element : {2, 4, 8}) {
    for (const int64_t shared : {int64_t{40} << 10, kAmpere, kHopper}) {
      for (int most = 1; most <= kMostLossBlocks; most *= 2) {
        for (int64_t classes = 1; classes < 3'000'000; classes += classes / 3 + 1) {
          const LossPlan p = plan_loss(classes, element, shared, most);
          EXPECT_LE(p.blocks, most);
          EXPECT_GE(p.blocks * p.share, classes);
          EXPECT_LE(p.chunk, p.share);
          EXPECT_LE(p.bytes(element), shared);
          EXPECT_EQ(p.chunk % (16 / element), 0) << "chunks stand alike to 16 bytes";
          EXPECT_EQ(p.share % (16 / element), 0);
        }
      }
    }
  }
}

// ---- the kernel ------------------------------------------------------------------------------

void round_to(float& to, double x) { to = static_cast<float>(x); }
void round_to(double& to, double x) { to = x; }
void round_to(__nv_bfloat16& to, double x) { to = __float2bfloat16_rn(static_cast<float>(x)); }
void round_to(__half& to, double x) { to = __float2half_rn(static_cast<float>(x)); }

struct Layout {
  int64_t offset = 0;   // of the first logit from 16 aligned bytes, in elements
  int64_t padding = 0;  // between rows
  unsigned clusters = 2;
};

// A float64 batch as the kernel has it; its logits are rounded to scalar_t.
template <typename scalar_t, typename grad_t = scalar_t>
struct Device {
  using T = accumulate_t<scalar_t>;
  const Case& c;
  Layout layout;
  int64_t rows, classes;
  std::vector<scalar_t> memory;
  std::vector<int64_t> index;
  std::vector<T> dense, class_weight, scale, losses, state;
  std::vector<grad_t> grad;

  Device(const Case& c, Batch<double>& batch, Layout layout = {})
      : c(c),
        layout(layout),
        rows(batch.rows),
        classes(batch.classes),
        memory(layout.offset + rows * (classes + layout.padding) - layout.padding),
        index(batch.index),
        dense(batch.dense.begin(), batch.dense.end()),
        class_weight(batch.class_weight.begin(), batch.class_weight.end()),
        scale(batch.scale.begin(), batch.scale.end()),
        losses(rows),
        state(3 * rows),
        grad(rows * classes) {
    for (int64_t i = 0; i < rows * classes; ++i) {
      scalar_t& z = memory[layout.offset + i + i / classes * layout.padding];
      round_to(z, batch.logits[i]);
      batch.logits[i] = to_real(z);
    }
    for (size_t i = 0; i < dense.size(); ++i) batch.dense[i] = dense[i];
    for (size_t i = 0; i < class_weight.size(); ++i) batch.class_weight[i] = class_weight[i];
    for (size_t i = 0; i < scale.size(); ++i) batch.scale[i] = scale[i];
  }

  LossJob<scalar_t, grad_t> job() {
    LossJob<scalar_t, grad_t> j{};
    j.logits = memory.data() + layout.offset;
    j.rows = rows;
    j.classes = classes;
    j.row_stride = classes + layout.padding;
    if (c.probabilities) {
      j.dense = dense.data();
    } else {
      j.index = index.data();
    }
    j.class_weight = class_weight.data();
    j.scale = scale.data();
    j.spec = {c.kind, {}, static_cast<T>(c.smoothing), c.probabilities};
    for (int i = 0; i < 3; ++i) j.spec.parameters[i] = static_cast<T>(c.parameters[i]);
    j.ignore_index = -100;
    j.losses = losses.data();
    j.state_out = state.data();
    j.grad = grad.data();
    return j;
  }

  void run(const LossJob<scalar_t, grad_t>& job, const LossPlan& plan) const {
    emulated::launch(
        layout.clusters * plan.blocks, kBlockThreads,
        [&] {
          if (std::is_same_v<T, double> || is_general(job)) {
            loss_rows_by_block<true>(job, plan);
          } else {
            loss_rows_by_block<false>(job, plan);
          }
        },
        sizeof(BlockShared<T>) + plan.bytes(sizeof(scalar_t)), plan.blocks);
  }
};

template <typename scalar_t>
LossPlan hopper(int64_t classes) {
  return plan_loss(classes, sizeof(scalar_t), kHopper - 2048, kMostLossBlocks);
}

// Relative rounding of a gradient; the sums of float32 numbers make up the rest.
template <typename grad_t>
double rounding() {
  return std::is_same_v<grad_t, __nv_bfloat16> ? 0x1p-8
         : std::is_same_v<grad_t, __half>      ? 0x1p-11
                                               : 0.0;
}

template <typename scalar_t, typename grad_t>
void expect_float64(Device<scalar_t, grad_t>& got, Batch<double>& want, const LossPlan& plan) {
  using T = accumulate_t<scalar_t>;
  const double unit = std::is_same_v<T, double> ? 1e-13 : 4e-6;
  loss_rows(job_of(want, got.c), 0, want.rows, CpuLevel::kBaseline);
  got.run(got.job(), plan);
  for (int64_t r = 0; r < want.rows; ++r) {
    const double loss = want.losses[r];
    if (std::isnan(loss)) {
      EXPECT_TRUE(std::isnan(got.losses[r])) << got.c.name << " row " << r;
    } else {
      EXPECT_NEAR(got.losses[r], loss, unit * (1 + std::abs(loss))) << got.c.name << " row " << r;
    }
    const double* slopes = want.grad.data() + r * want.classes;
    double mean = 0;
    for (int64_t i = 0; i < want.classes; ++i) {
      mean += std::abs(slopes[i]) / static_cast<double>(want.classes);
    }
    int wrong = 0;
    for (int64_t i = 0; i < want.classes && wrong < 3; ++i) {
      const double slope = to_real(got.grad[r * want.classes + i]);
      const double allowed = (unit + rounding<grad_t>()) * std::abs(slopes[i]) + unit * mean +
                             (std::is_same_v<grad_t, __half> ? 0x1p-25 : 0.0);
      const bool same =
          std::isnan(slopes[i]) ? std::isnan(slope) : std::abs(slope - slopes[i]) <= allowed;
      if (same) continue;
      ++wrong;
      ADD_FAILURE() << got.c.name << " row " << r << " class " << i << ": " << slope << ", not "
                    << slopes[i];
    }
  }
}

template <typename scalar_t, typename grad_t = scalar_t>
void expect_float64(const Case& c, int64_t rows, int64_t classes, Layout layout = {}) {
  SCOPED_TRACE(testing::Message() << c.name << ' ' << rows << " x " << classes);
  Batch<double> want(rows, classes, static_cast<unsigned>(classes));
  Device<scalar_t, grad_t> got(c, want, layout);
  expect_float64(got, want, hopper<scalar_t>(classes));
}

TEST(LossBlock, EveryLossOnRaggedRows) {
  for (const Case& c : kCases) expect_float64<float>(c, 2, 20'001);
  for (const Case& c : kCases) expect_float64<__nv_bfloat16>(c, 2, 50'257, {1, 0, 1});
}

TEST(LossBlock, EveryNumberOfClasses) {
  for (const int64_t classes : {1025, 16'385, 20'000, 32'000, 50'257, 128'256}) {
    expect_float64<float>(kCases[0], 2, classes);
    expect_float64<__nv_bfloat16>(kCases[0], 2, classes);
    expect_float64<__half>(kCases[3], 2, classes, {3, 5, 1});
    expect_float64<__half, float>(kCases[1], 1, classes, {5, 0, 1});
    expect_float64<double>(kCases[8], 1, classes);
  }
}

TEST(LossBlock, RowsBeyondSharedMemoryAreReadTwice) {
  for (const int i : {0, 2, 7, 8}) {
    for (const int blocks : {1, 2}) {
      Batch<double> want(3, 5003);
      Device<float> got(kCases[i], want, {1, 2, 1});
      const int64_t share = blocks == 1 ? 5004 : 2504;
      const LossPlan plan{blocks, share, 1000, blocks == 2};
      expect_float64(got, want, plan);
      const std::vector<float> once = got.grad;
      auto job = got.job();
      job.losses = job.state_out = nullptr;
      job.state_in = got.state.data();
      got.run(job, plan);
      EXPECT_EQ(got.grad, once);
    }
  }
}

// The same bits wherever a row begins, whatever stands beside it, and from the state.
TEST(LossBlock, TheBitsOfARowAreItsOwn) {
  for (const Case& c : kCases) {
    std::vector<float> losses, state;
    std::vector<uint16_t> grad;
    for (const Layout layout :
         {Layout{0, 0, 3}, Layout{1, 0, 1}, Layout{2, 3, 2}, Layout{7, 1, 4}}) {
      Batch<double> batch(4, 9001);
      Device<__nv_bfloat16> got(c, batch, layout);
      const LossPlan plan{2, 4504, 4504, layout.offset == 1};
      got.run(got.job(), plan);
      const auto bits = [&] {
        std::vector<uint16_t> all;
        for (const auto g : got.grad) all.push_back(g.bits);
        return all;
      };
      if (losses.empty()) {
        losses = got.losses;
        state = got.state;
        grad = bits();
      }
      EXPECT_EQ(got.losses, losses) << c.name;
      EXPECT_EQ(got.state, state) << c.name;
      EXPECT_EQ(bits(), grad) << c.name;

      auto forward = got.job();  // what sample_loss does: no gradient, then one from the state
      forward.grad = nullptr;
      forward.scale = nullptr;
      std::fill(got.losses.begin(), got.losses.end(), -1.0f);
      got.run(forward, plan);
      EXPECT_EQ(got.losses, losses) << c.name;
      auto backward = got.job();
      backward.losses = backward.state_out = nullptr;
      backward.state_in = got.state.data();
      std::fill(got.grad.begin(), got.grad.end(), __nv_bfloat16{1});
      got.run(backward, plan);
      EXPECT_EQ(bits(), grad) << c.name;
    }
  }
}

// The arg max of the hard bootstrap is the first of many, of whatever block.
TEST(LossBlock, EqualLogits) {
  Batch<double> want(2, 40'001);
  std::fill(want.logits.begin(), want.logits.end(), 1.0);
  std::fill_n(want.logits.begin() + want.classes, 30'000, 0.5);  // the second block's first
  Device<__nv_bfloat16> got(kCases[7], want);
  const LossPlan plan = hopper<__nv_bfloat16>(want.classes);
  ASSERT_EQ(plan.blocks, 2);
  expect_float64(got, want, plan);
}

TEST(LossBlock, OneRowRepeated) {
  Batch<double> want(1, 18'433);
  Device<float> got(kCases[4], want);
  const auto plan = hopper<float>(want.classes);
  ASSERT_EQ(plan.blocks, 2);
  const int64_t rows = 3;
  got.losses.resize(rows);
  got.state.resize(3 * rows);
  got.grad.resize(rows * want.classes);
  got.index.assign(rows, got.index[0]);
  got.scale.assign(rows, got.scale[0]);
  auto job = got.job();
  job.rows = rows;
  job.row_stride = 0;
  got.run(job, plan);
  loss_rows(job_of(want, got.c), 0, 1, CpuLevel::kBaseline);
  for (int64_t r = 0; r < rows; ++r) {
    EXPECT_NEAR(got.losses[r], want.losses[0], 4e-6 * (1 + want.losses[0]));
    EXPECT_EQ(std::memcmp(&got.grad[r * want.classes], got.grad.data(), want.classes * 4), 0);
  }
}

TEST(LossBlock, RowsWithoutALossAndOfMinusInfinity) {
  for (const Case& c : kCases) {
    if (c.probabilities) continue;
    Batch<double> want(6, 40'001);
    want.index[0] = -100;
    want.index[2] = int64_t{1} << 40;
    want.index[3] = want.classes - 1;  // the last block's
    std::fill_n(want.logits.begin() + 4 * want.classes, want.classes, -INFINITY);
    std::fill_n(want.logits.begin() + 5 * want.classes, want.classes - 1, -INFINITY);
    want.index[5] = want.classes - 1;  // certain, and all other blocks have -inf alone
    Device<__nv_bfloat16> got(c, want);
    if (c.kind == LossKind::kCrossEntropy && c.smoothing > 0) {
      std::fill(got.class_weight.begin(), got.class_weight.end(), 0.0f);  // else the loss is inf
      std::fill(want.class_weight.begin(), want.class_weight.end(), 0.0);
    }
    expect_float64(got, want, hopper<__nv_bfloat16>(want.classes));
  }
}

// A stage that is read before its copies have landed.
TEST(LossBlock, WaitsForItsCopies) {
  emulated::copies_are_late = true;
  expect_float64<__nv_bfloat16>(kCases[0], 3, 40'003, {1, 0, 1});
  emulated::copies_are_late = false;
}

// A short row is copied before its target is known; the next row's copies go to the same places.
TEST(LossBlock, IgnoredRowsLeaveNoCopiesUnderWay) {
  emulated::copies_are_late = true;
  Batch<double> want(4, 1500);
  want.index[0] = want.index[2] = -100;
  Device<__nv_bfloat16> got(kCases[0], want, {1, 0, 1});
  const LossPlan plan = hopper<__nv_bfloat16>(want.classes);
  ASSERT_TRUE(plan.early);
  expect_float64(got, want, plan);
  emulated::copies_are_late = false;
}

}  // namespace
