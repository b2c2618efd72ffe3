// Vote weights in fixed point. Torch-free; one copy for CPU and CUDA.
//
// A weight lies in [0, 1] and is rounded to a multiple of 2^-40. Sums of such integers do not
// depend on the order of addition, so threads may add in any order and the result is the same to
// the bit, on every device.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace als {

enum class VoteWeighting : int64_t { kUniform = 0, kDistance = 1, kSoftmax = 2 };

constexpr double kVoteScale = 1099511627776.0;  // 2^40; 2^22 neighbours fit into an int64

// uniform: 1.  distance: d_min / d (exact hits share all of it).  softmax: exp(-(d - d_min) /
// temperature). d_min is the smallest distance among the row's voters. A NaN distance has no vote.
ALS_HOST_DEVICE int64_t vote_weight(float distance, float d_min, VoteWeighting weighting,
                                    float inverse_temperature) {
  if (!(distance == distance)) return 0;
  double weight = 1.0;
  if (weighting == VoteWeighting::kDistance) {
    const double d = distance > 0.0f ? distance : 0.0f;
    const double lowest = d_min > 0.0f ? d_min : 0.0f;
    weight = d <= lowest ? 1.0 : lowest / d;
  } else if (weighting == VoteWeighting::kSoftmax) {
    weight = distance <= d_min
                 ? 1.0
                 : exp(-(static_cast<double>(distance) - d_min) * inverse_temperature);
  }
  return static_cast<int64_t>(weight * kVoteScale + 0.5);
}

// Best and second-best class of a row. `offer` takes classes in any order; ties go to the smaller
// class.
struct VoteResult {
  int64_t winner = -1;
  int64_t best = 0;
  int64_t second = 0;
  int64_t total = 0;

  ALS_HOST_DEVICE void offer(int64_t cls, int64_t votes) {
    if (votes > best || (votes == best && votes > 0 && cls < winner)) {
      second = best;
      best = votes;
      winner = cls;
    } else if (votes > second) {
      second = votes;
    }
  }
  ALS_HOST_DEVICE float share() const {
    return total > 0 ? static_cast<float>(static_cast<double>(best) / total) : 0.0f;
  }
  ALS_HOST_DEVICE float margin() const {
    return total > 0 ? static_cast<float>(static_cast<double>(best - second) / total) : 0.0f;
  }
};

}  // namespace als
