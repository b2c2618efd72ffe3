// Scores of rows as they lie, in float32, and how wrong they can be: neither centred nor packed.
// Torch-free; one copy for CPU and CUDA.
//
// From the sums a = sum_j (x_j - y_j)^2 (l2) or a = sum_j x_j y_j, and b = sum_j y_j^2:
//   l2      s = -a              d = -s
//   ip      s = a               d = -s
//   cosine  s = a / (|x| |y|)   d = 1 - s
// A difference x_j - y_j is rounded once, so a sum of their squares is off by a share of itself,
// whatever the size of x and y. The other two are off by a share of |x||y|.
#pragma once

#include "knn/knn_math.h"

namespace als {

// Relative error of a sum of squares, and of a sum of products relative to |x||y|, in u = 2^-24: 3
// for a difference and its square, 4 to add lanes, and the longest chain of additions, which is one
// addition for every eight features and nine more at most.
ALS_HOST_DEVICE double quick_share(int64_t dim) {
  return 1.02 * (static_cast<double>(dim / 8) + 16.0) * kFloatUnit;
}
// What underflow takes from a sum: each flush of a subnormal up to 2^-126, twice a feature.
ALS_HOST_DEVICE double quick_flush(int64_t dim) { return static_cast<double>(dim) * 3e-38; }

// One query's scores: |computed - s| <= radius |y| + constant + share |computed|. The same holds
// for a score that was made from a row's float32 distance.
struct KnnQuick {
  KnnRelation relation;
  double radius, constant, share;
  float inverse_norm;  // 1/|x| for cosine; NaN: no score can be trusted

  // `square`: |x|^2, not used for l2.
  static ALS_HOST_DEVICE KnnQuick of(KnnMetric metric, int64_t dim, double square) {
    const double share = quick_share(dim);
    const bool cosine = metric == KnnMetric::kCosine;
    KnnQuick q{{cosine ? 1.0 : 0.0, 1.0, 0.0}, 0.0, quick_flush(dim), 0.0, 1.0f};
    if (metric == KnnMetric::kL2) {
      q.share = 1.1 * share;  // computed <= (1 + share) d + flush, and the other way round
    } else if (metric == KnnMetric::kIp) {
      q.radius = 1.01 * share * sqrt(square);
      q.share = 4.0 * kFloatUnit;  // a float32 distance
    } else {
      q.constant = 2.0 * share;  // a: share, b: half of it, root, quotient and 1/|x|: 6 u
      // In between nothing that is flushed matters, and nothing overflows
      q.inverse_norm = square >= 1e-20 && square <= 1e36 ? static_cast<float>(1.0 / sqrt(square))
                                                         : static_cast<float>(NAN);
    }
    if (!(share < 0.05)) q.constant = INFINITY;
    return q;
  }

  // NaN where float32 says nothing, and for all rows that are not finite.
  ALS_HOST_DEVICE float score(KnnMetric metric, float a, float b) const {
    if (!(fabsf(a) < 3e38f)) return NAN;
    if (metric == KnnMetric::kL2) return -a;
    if (metric == KnnMetric::kIp) return b < 3e38f ? a : static_cast<float>(NAN);
    return b >= 1e-20f && b <= 1e36f ? a * inverse_norm / sqrtf(b) : static_cast<float>(NAN);
  }
};

}  // namespace als
