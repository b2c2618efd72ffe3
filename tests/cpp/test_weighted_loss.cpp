#include <gtest/gtest.h>

#include <vector>

#include "weighted_loss/weighted_loss_math.h"

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

}  // namespace
