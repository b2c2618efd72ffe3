#include <gtest/gtest.h>

#include <vector>

#include "loss_batch.h"
#include "weighted_loss/weighted_loss_math.h"
// clang-format off: the emulation comes before the kernels
#include "emulate_cuda.h"
#include "emulate_cluster.h"
#include "emulate_mma.h"
#include "sample_loss/sample_loss_kernels.cuh"
#include "weighted_loss/weighted_loss_kernels.cuh"
// clang-format on

namespace {

using als::WeightedTotal;

TEST(WeightedTotal, SumsInFloat64) {
  std::vector<float> weight(1003, 1.0f), loss(1003, 1.0f);
  loss[0] = 16777216.0f;  // 2^24: float32 addition would lose every 1
  WeightedTotal total;
  total.add_all(weight.data(), loss.data(), 1003);
  EXPECT_EQ(total.sum(), 16777216.0 + 1002);
}

TEST(WeightedTotal, OfNothingIsZero) {
  WeightedTotal total;
  total.add_all<float>(nullptr, nullptr, 0);
  EXPECT_EQ(total.sum(), 0.0);
}

TEST(WeightedTotal, EveryLengthCountsEveryRow) {
  for (int n = 1; n < 40; ++n) {
    std::vector<double> weight(n), loss(n);
    double want = 0;
    for (int i = 0; i < n; ++i) want += (weight[i] = i + 1) * (loss[i] = 3 * i - 7);
    WeightedTotal total;
    total.add_all(weight.data(), loss.data(), n);
    EXPECT_EQ(total.sum(), want);
  }
}

TEST(EmulatedDevice, ATotalForEveryGroupOfRows) {
  constexpr int kTotals = 3, kRows = 1111;
  std::vector<float> weight(kTotals * kRows), loss(kTotals * kRows), total(kTotals);
  double want[kTotals] = {};
  for (int i = 0; i < kTotals * kRows; ++i) {
    weight[i] = static_cast<float>(i % 7);
    loss[i] = 0.25f * static_cast<float>(i);
    want[i / kRows] += weight[i] * loss[i];
  }
  emulated::launch(2, als::kTotalThreads, [&] {
    als::weighted_total(weight.data(), loss.data(), total.data(), int64_t{kTotals}, int64_t{kRows});
  });
  for (int i = 0; i < kTotals; ++i) EXPECT_EQ(total[i], static_cast<float>(want[i]));
}

// A batch of one cluster: the kernel of the rows adds up the total, with the bits of the other one.
TEST(EmulatedDevice, ATotalFromTheKernelOfTheRows) {
  for (const int64_t rows : {1, 33, 300, 1500}) {
    for (const unsigned blocks : {1u, 2u, 8u}) {
      als::Batch<float> batch(rows, 10);
      auto job = als::job_of(batch, als::kCases[0]);
      float total = NAN, want = NAN;
      emulated::launch(
          blocks, als::kTotalRowThreads,
          [&] { als::loss_rows_in_registers<1, als::kFewElements, false>(job, 2, &total); },
          als::kTotalLanes * sizeof(double), blocks);
      emulated::launch(1, als::kTotalThreads, [&] {
        als::weighted_total(job.scale, static_cast<const float*>(job.losses), &want, int64_t{1},
                            rows);
      });
      EXPECT_EQ(total, want) << rows << " rows, " << blocks << " blocks";
      double exact = 0;
      als::loss_rows(job, 0, rows, als::CpuLevel::kBaseline);
      for (int64_t r = 0; r < rows; ++r) exact += double{batch.scale[r]} * batch.losses[r];
      EXPECT_NEAR(total, exact, 1e-5 * (1 + std::abs(exact)));
    }
  }
}

template <typename scalar_t>
void expect_scaled(float factor) {
  for (const int64_t count : {1, 7, 8, 100, 5000}) {
    for (const int64_t offset : {0, 1, 5}) {
      std::vector<scalar_t> memory(offset + count + 1), before;
      for (size_t i = 0; i < memory.size(); ++i) {
        als::store(&memory[i], 0.5f * static_cast<float>(i % 40) - 7.0f);
      }
      before = memory;
      emulated::launch(2, als::kScaleThreads,
                       [&] { als::scale_gradient(memory.data() + offset, &factor, count); });
      for (int64_t i = 0; i < offset + count + 1; ++i) {
        const bool inside = i >= offset && i < offset + count;
        scalar_t want;
        als::store(&want, als::to_real(before[i]) * (inside ? factor : 1.0f));
        ASSERT_EQ(als::to_real(memory[i]), als::to_real(want)) << i << " of " << count;
      }
    }
  }
}

TEST(EmulatedDevice, TheKeptGradientIsScaledInPlace) {
  for (const float factor : {1.0f, -3.0f, 0.0f}) {
    expect_scaled<float>(factor);
    expect_scaled<__nv_bfloat16>(factor);
  }
}

// A factor of 1 touches nothing: neither reads nor writes.
TEST(EmulatedDevice, AFactorOfOneCostsNoPass) {
  const float one = 1.0f;
  emulated::launch(1, als::kScaleThreads,
                   [&] { als::scale_gradient<float>(nullptr, &one, int64_t{1} << 40); });
}

}  // namespace
