// The sum of weighted losses in an order that does not depend on threads. Torch-free.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace als {

// Sum of weight[i] loss[i], in float64, as kLanes interleaved sums that are added in order: the
// same bits whoever computes it.
struct WeightedTotal {
  static constexpr int kLanes = 8;
  double lane[kLanes] = {};

  template <typename T>
  ALS_HOST_DEVICE void add_all(const T* weight, const T* loss, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) {
        lane[k] += static_cast<double>(weight[i + k]) * static_cast<double>(loss[i + k]);
      }
    }
    for (int k = 0; i + k < n; ++k) {
      lane[k] += static_cast<double>(weight[i + k]) * static_cast<double>(loss[i + k]);
    }
  }
  ALS_HOST_DEVICE double sum() const {
    double total = 0;
    for (int k = 0; k < kLanes; ++k) total += lane[k];
    return total;
  }
};

}  // namespace als
