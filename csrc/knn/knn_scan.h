// Float32 squared distances in difference form, for a few queries against rows as they lie in
// memory. Torch-free.
//
// Unlike the scores of knn_tile.h they need no centring and no packing (knn_quick_math.h).
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "knn/knn_quick_math.h"

namespace als {

constexpr int kKnnScanQueries = 4;  // at a time

// out[r][i] = squared distance of row r and query i; query [kKnnScanQueries][dim], rows [n][dim].
using KnnScan = void (*)(const float* query, const float* rows, int64_t n, int64_t dim, float* out);

KnnScan knn_scan(CpuLevel level);

// A row whose float32 distance is <= `kth` has an `out` of at most this, or NaN.
inline float knn_scan_limit(float kth, int64_t dim) {
  const double share = quick_share(dim);
  const double reach = kth * (1.0 + 4.0 * kFloatUnit) + 1.2e-38;
  const double limit = reach * (1.0 + 2.0 * share) + quick_flush(dim);
  // `out` may overflow where the distance just does not
  return share < 0.05 && limit < 3e38 ? static_cast<float>(limit * (1.0 + 1e-6)) : INFINITY;
}

}  // namespace als
