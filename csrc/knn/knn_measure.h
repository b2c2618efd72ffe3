// The rows of a search on the CPU and what float64 says of them: distances, the centred row.
// Torch-free.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/cpu_level.h"
#include "knn/knn_math.h"
#include "knn/knn_rows.h"
#include "knn/knn_smallest.h"
#include "knn/knn_sums.h"

namespace als {

template <typename T>
struct KnnInput {
  const T* query;     // [Q, D]
  const T* database;  // [M, D]
  int64_t queries, rows, dim, k;
  KnnMetric metric;
  bool exclude_self;
  bool exact;  // false: float32 scores are taken for exact

  // The row that is no neighbour of query q; -1: none.
  int64_t self_of(int64_t q) const { return exclude_self ? q : -1; }
};

inline void write_neighbours(const std::vector<Neighbour>& sorted, int64_t k, float* distance,
                             int64_t* index) {
  for (int64_t j = 0; j < k; ++j) {
    distance[j] = key_distance(sorted[j].key);
    index[j] = sorted[j].index;
  }
}

template <typename T>
class KnnMeasure {
  static constexpr int64_t kAtOnce = 4;  // rows measured at a time

 public:
  // Elements are widened to Value row by row: 16-bit rows to float32.
  using Value = std::conditional_t<std::is_same_v<T, double>, double, float>;

  // Of one thread.
  struct Scratch {
    std::vector<Value> row;     // kAtOnce widened rows
    std::vector<double> query;  // one query row as distance() wants it, or a centred row
  };

  explicit KnnMeasure(const KnnInput<T>& input)
      : in(input), row_ops(knn_rows<Value>(cpu_level())), sums_(knn_sums<Value>(cpu_level())) {}

  const KnnInput<T> in;
  const KnnRowOps<Value> row_ops;

  Scratch scratch() const {
    return {std::vector<Value>(kAtOnce * in.dim), std::vector<double>(in.dim)};
  }

  // The query to w.query, normalised for cosine. False: all zero under cosine.
  bool load_query(int64_t q, Scratch& w) const {
    const Value* x = widened(in.query, q, w.row.data());
    const double scale = scale_of(x);
    for (int64_t j = 0; j < in.dim; ++j) w.query[j] = static_cast<double>(x[j]) * scale;
    return scale != 0.0;
  }

  // The distances of n rows to the loaded query; `nonzero` is what load_query said.
  void measure_rows(const int64_t* rows, int64_t n, bool nonzero, Scratch& w,
                    Neighbour* out) const {
    const Value* at[kAtOnce];
    double sum[kAtOnce], scale[kAtOnce];
    for (int64_t begin = 0; begin < n; begin += kAtOnce) {
      const int64_t count = std::min(kAtOnce, n - begin);
      for (int64_t r = 0; r < count; ++r) {
        if (begin + kAtOnce + r < n) prefetch(rows[begin + kAtOnce + r]);
        at[r] = widened(in.database, rows[begin + r], w.row.data() + r * in.dim);
      }
      add_up(w.query.data(), at, count, sum, scale);
      for (int64_t r = 0; r < count; ++r) {
        float d = finish_distance(in.metric, sum[r]);
        if (in.metric == KnnMetric::kCosine && (!nonzero || scale[r] == 0.0) &&
            !std::isnan(scale[r])) {
          d = 1.0f;
        }
        out[begin + r] = {distance_key(d), rows[begin + r]};
      }
    }
  }

  // Offers rows [begin, end) as neighbours of query q.
  void scan(int64_t q, int64_t begin, int64_t end, Scratch& w, KnnSmallest& best) const {
    const bool nonzero = load_query(q, w);
    const int64_t self = in.self_of(q);
    int64_t rows[kAtOnce];
    Neighbour near[kAtOnce];
    for (int64_t first = begin; first < end; first += kAtOnce) {
      const int64_t count = std::min(kAtOnce, end - first);
      for (int64_t r = 0; r < count; ++r) rows[r] = first + r;
      measure_rows(rows, count, nonzero, w, near);
      for (int64_t r = 0; r < count; ++r) {
        if (rows[r] != self) best.offer(near[r]);
      }
    }
  }

  // Normalised (cosine) row minus `mean`, unscaled, to w.query; returns the sum of squares, not
  // finite where the row is not.
  double centred(const T* base, int64_t row, const std::vector<double>& mean, Scratch& w,
                 bool* zero) const {
    const Value* x = widened(base, row, w.row.data());
    const double scale = scale_of(x);
    *zero = scale == 0.0;
    return row_ops.centre(x, scale, mean.data(), in.dim, w.query.data());
  }

 private:
  const Value* widened(const T* base, int64_t row, Value* scratch) const {
    const T* p = base + row * in.dim;
    if constexpr (std::is_same_v<T, Value>) {
      return p;
    } else {
      for (int64_t j = 0; j < in.dim; ++j) scratch[j] = static_cast<float>(p[j]);
      return scratch;
    }
  }

  // 1 / |x| for cosine, else 1.
  double scale_of(const Value* x) const {
    if (in.metric != KnnMetric::kCosine) return 1.0;
    double square;
    sums_.square(&x, 1, in.dim, &square);
    return inverse_norm(square);
  }

  // Candidates lie all over the database; a row of a few cache lines arrives in time.
  void prefetch(int64_t row) const {
    const char* p = reinterpret_cast<const char*>(in.database + row * in.dim);
    const int64_t bytes = std::min<int64_t>(in.dim * sizeof(T), 1024);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at);
  }

  // The metric's sums of up to kAtOnce rows, and under cosine their scales.
  void add_up(const double* q, const Value* const* at, int64_t count, double* sum,
              double* scale) const {
    if (in.metric == KnnMetric::kIp) {
      sums_.product(q, at, count, in.dim, sum);
    } else if (in.metric == KnnMetric::kL2) {
      sums_.difference(q, at, count, in.dim, sum);
    } else {
      sums_.square(at, count, in.dim, sum);
      for (int64_t r = 0; r < count; ++r) scale[r] = inverse_norm(sum[r]);
      sums_.scaled_difference(q, at, scale, count, in.dim, sum);
    }
  }

  const KnnSums<Value> sums_;
};

}  // namespace als
