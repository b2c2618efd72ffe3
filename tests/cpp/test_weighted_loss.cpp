#include <gtest/gtest.h>

#include <vector>

#include "weighted_loss/weighted_loss_math.h"
// clang-format off: the emulation comes before the kernels
#include "emulate_cuda.h"
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

}  // namespace
