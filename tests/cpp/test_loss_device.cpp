// Device code of sample_loss and weighted_loss, emulated.
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

template <int kVec, int kElements>
void run_in_registers(const LossJob<float>& job) {
  int lanes = 1;
  while (lanes * kElements < job.classes) lanes *= 2;
  emulated::launch(1, kRegisterThreads, [&] {
    if (is_general(job)) {
      loss_rows_in_registers<kVec, kElements, true>(job, lanes, nullptr);
    } else {
      loss_rows_in_registers<kVec, kElements, false>(job, lanes, nullptr);
    }
  });
}

// Two clusters of kBlocks blocks, with chunks of `chunk` classes.
template <int kBlocks>
void run_by_block(const LossJob<float>& job, int64_t chunk) {
  const int64_t share = (job.classes + 4 * kBlocks - 1) / (4 * kBlocks) * 4;
  const LossPlan plan{kBlocks, share, std::min(chunk, share), kBlocks > 1};
  emulated::launch(
      2 * kBlocks, kBlockThreads,
      [&] {
        if (is_general(job)) {
          loss_rows_by_block<true>(job, plan);
        } else {
          loss_rows_by_block<false>(job, plan);
        }
      },
      sizeof(BlockShared<float>) + plan.bytes(sizeof(float)), kBlocks);
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
    expect_same_as_cpu(c, 5, 1025, [](const auto& job) { run_by_block<1>(job, 2000); });
    expect_same_as_cpu(c, 5, 501, [](const auto& job) { run_by_block<4>(job, 2000); });
  }
  expect_same_as_cpu(kCases[0], 1, 1, [](const auto& job) { run_by_block<2>(job, 9); });
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
  for (const Case& c : kCases) {
    expect_special_rows(c, 12, 12, [](const auto& job) { run_by_block<1>(job, 12); });
    expect_special_rows(c, 12, 12, [](const auto& job) { run_by_block<2>(job, 12); });
    expect_special_rows(c, 12, 12, [](const auto& job) { run_by_block<2>(job, 4); });
  }
  expect_special_rows(kCases[0], 12, 0, [](const auto& job) { run_by_block<2>(job, 12); });
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

}  // namespace
