// The mean and the size of the database, in float64: what scores are centred and scaled by.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/parallel.h"
#include "knn/knn_buffers.h"
#include "knn/knn_math.h"
#include "knn/knn_measure.h"

namespace als {

struct KnnCentring {
  std::vector<double> origin;  // zeros: for rows that are not centred
  std::vector<double> mean;
  KnnFrame frame;
};

// Parts of the database that are looked at side by side; their number does not depend on threads.
inline int64_t knn_parts(int64_t rows) { return std::min<int64_t>(64, ceil_div(rows, 256)); }

// Any centre is right; the mean of some thousand rows is a good one. A row that is not finite
// counts nowhere: no score can choose it.
template <typename T>
std::vector<double> knn_mean(const KnnMeasure<T>& measure, const std::vector<double>& origin) {
  const KnnInput<T>& in = measure.in;
  const int64_t samples = std::min<int64_t>(in.rows, 4096);
  const int64_t parts = knn_parts(in.rows);
  std::vector<double> total(parts * in.dim, 0.0);
  std::vector<int64_t> finite(parts, 0);
  const auto scratch = [&] { return measure.scratch(); };
  parallel_tasks(parts, scratch, [&](int64_t p, auto& w) {
    bool zero = false;
    for (int64_t s = p * samples / parts; s < (p + 1) * samples / parts; ++s) {
      const int64_t row = s * in.rows / samples;
      if (!is_finite(measure.centred(in.database, row, origin, w, &zero))) continue;
      finite[p] += 1;
      for (int64_t j = 0; j < in.dim; ++j) total[p * in.dim + j] += w.query[j];
    }
  });
  const auto rows = static_cast<double>(
      std::max<int64_t>(1, std::accumulate(finite.begin(), finite.end(), int64_t{0})));
  std::vector<double> mean(in.dim, 0.0);
  for (int64_t p = 0; p < parts; ++p) {
    for (int64_t j = 0; j < in.dim; ++j) mean[j] += total[p * in.dim + j] / rows;
  }
  return mean;
}

template <typename T>
KnnFrame knn_frame(const KnnMeasure<T>& measure, const std::vector<double>& mean) {
  const KnnInput<T>& in = measure.in;
  const int64_t parts = knn_parts(in.rows);
  std::vector<double> norm(parts, 0.0);
  std::atomic<bool> zeros{false};
  const auto scratch = [&] { return measure.scratch(); };
  parallel_tasks(parts, scratch, [&](int64_t p, auto& w) {
    bool zero = false;
    for (int64_t row = p * in.rows / parts; row < (p + 1) * in.rows / parts; ++row) {
      const double square = measure.centred(in.database, row, mean, w, &zero);
      if (!is_finite(square)) continue;
      if (zero) zeros = true;
      norm[p] = std::max(norm[p], square);
    }
  });
  const double largest = sqrt(*std::max_element(norm.begin(), norm.end()));
  double square = 0.0;
  for (double m : mean) square += m * m;
  // An element is no larger than its row, a row no longer than its distance from the mean and
  // the mean; 1e-6 for the arithmetic.
  return KnnFrame::of(largest, largest, (1.0 + 1e-6) * (largest + sqrt(square)), zeros);
}

template <typename T>
KnnCentring knn_centring(const KnnMeasure<T>& measure) {
  KnnCentring c{std::vector<double>(measure.in.dim, 0.0), {}, {}};
  c.mean = knn_mean(measure, c.origin);
  c.frame = knn_frame(measure, c.mean);
  return c;
}

}  // namespace als
