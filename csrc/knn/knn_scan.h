// Float32 squared distances in difference form, for a few queries against rows as they lie in
// memory. Torch-free.
//
// Unlike the scores of knn_tile.h they need no centring and no packing: q - c is rounded once, so a
// sum is off by a share of itself, whatever the size of q and c.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "knn/knn_math.h"

namespace als {

constexpr int kKnnScanQueries = 4;  // at a time

// out[r][i] = squared distance of row r and query i; query [kKnnScanQueries][dim], rows [n][dim].
using KnnScan = void (*)(const float* query, const float* rows, int64_t n, int64_t dim, float* out);

KnnScan knn_scan(CpuLevel level);

// |out - d| <= share d + dim 2^-125, in u = 2^-24: a difference and its square (3), a chain of one
// addition for every vector of at least 8 lanes, and 4 to add the lanes; each flush of a subnormal
// costs up to 2^-126.
inline double knn_scan_share(int64_t dim) {
  return 1.02 * (static_cast<double>(dim / 8 + 1) + 7.0) * kFloatUnit;
}

// A row whose float32 distance is <= `kth` has an `out` of at most this, or NaN.
inline float knn_scan_limit(float kth, int64_t dim) {
  const double share = knn_scan_share(dim);
  const double reach = kth * (1.0 + 4.0 * kFloatUnit) + 1.2e-38;
  const double limit = reach * (1.0 + 2.0 * share) + static_cast<double>(dim) * 3e-38;
  // `out` may overflow where the distance just does not
  return share < 0.05 && limit < 3e38 ? static_cast<float>(limit * (1.0 + 1e-6)) : INFINITY;
}

}  // namespace als
