// Device code of knn: how far rows are from a query. In float32 with a bound on the error, from
// 16-byte loads of the rows as they lie, and in float64, which is what counts. Torch-free.
#pragma once

#include "knn/knn_quick_math.h"
#include "knn/knn_rows.cuh"

namespace als {

// ---- what a score is worth ----

// |score - true score| <= error(score, norm, residual), where `norm` bounds the length of the row
// or of the rows of a group, and `residual` that of what was rounded away from them.
//
// A proof in float32: every coefficient is rounded up from float64, and every step rounds towards
// the side on which the statement stays true, so error() is at least the bound that the float64
// formula gives for these norms. highest() and lowest() are then bounds of the true score. They are
// NaN for a score of -infinity, which stands for no row that could be chosen.
struct KnnBound {
  float radius, spread, square, constant, share;

  __device__ float error(float score, float norm, float residual) const {
    float e = __fmaf_ru(spread, residual, constant);
    e = __fmaf_ru(__fmaf_ru(square, norm, radius), norm, e);
    return __fmaf_ru(share, fabsf(score), e);
  }
  __device__ float highest(float score, float e) const { return __fadd_ru(score, e); }
  __device__ float lowest(float score, float e) const { return __fadd_rd(score, -e); }

  // Scores of packed rows: radius |c| + spread |c - c~| + square_error (|c|^2 / 2 + offset).
  static __device__ KnnBound of_packed(double radius, double spread, double square_error,
                                       double offset) {
    return {__double2float_ru(radius), __double2float_ru(spread),
            __double2float_ru(0.5 * square_error), __double2float_ru(square_error * offset), 0.0f};
  }
  static __device__ KnnBound of_quick(const KnnQuick& q) {
    // finite: times a norm of 0 it has to stay 0 (float64 rows, whose bound is `share` alone)
    return {fminf(__double2float_ru(q.radius), 3e38f), 0.0f, 0.0f, __double2float_ru(q.constant),
            __double2float_ru(q.share)};
  }
};

// At least |y|, from the float32 sum b of its squares: 1.1 quick_share < 0.06 (beyond, no score is
// trusted), and 2e-31 for what was flushed.
__device__ inline float quick_norm(float b) { return __fsqrt_ru(__fmaf_ru(b, 1.06f, 2e-31f)); }

// ---- float32 ----

__device__ __forceinline__ float narrow(float x) { return x; }
__device__ __forceinline__ float narrow(double x) { return static_cast<float>(x); }
__device__ __forceinline__ float narrow(__half x) { return __half2float(x); }
__device__ __forceinline__ float narrow(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
struct alignas(16) KnnVector {  // one load
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

// Whether all rows of both begin at a multiple of 16 bytes.
template <typename T>
__device__ bool rows_are_aligned(const KnnRows<T>& x, const KnnRows<T>& y) {
  return (reinterpret_cast<uintptr_t>(x.data) | reinterpret_cast<uintptr_t>(y.data) |
          static_cast<uintptr_t>(x.dim) * sizeof(T)) %
             16 ==
         0;
}

// The sums of knn_quick_math.h for some queries and rows, shared among the lanes of eight threads.
template <int kQueries, int kRows, bool kProduct>
struct KnnQuickSums {
  float a[kQueries * kRows];  // of query i and row r at i * kRows + r
  float b[kRows];             // kProduct only

  __device__ void add(const float (&x)[kQueries], const float (&y)[kRows]) {
    ALS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      ALS_UNROLL
      for (int i = 0; i < kQueries; ++i) {
        float& sum = a[i * kRows + r];
        if constexpr (kProduct) {
          sum = fmaf(x[i], y[r], sum);
        } else {
          const float t = x[i] - y[r];
          sum = fmaf(t, t, sum);
        }
      }
      if constexpr (kProduct) b[r] = fmaf(y[r], y[r], b[r]);
    }
  }

  // This thread's part. The rows lie a multiple of 16 bytes from one another; with kAligned the
  // queries too, and all begin at such a multiple.
  template <bool kAligned, typename T>
  __device__ void add_part(const T* const (&query)[kQueries], const T* const (&row)[kRows],
                           int64_t dim, int lane) {
    using Vector = KnnVector<T>;
    constexpr int kSize = Vector::kSize;
    float x[kQueries], y[kRows];
    int64_t head = 0, vectors = dim / kSize;
    if constexpr (!kAligned) {  // the elements in front of the first such multiple, and behind the
                                // last one
      head = -(reinterpret_cast<uintptr_t>(row[0]) / sizeof(T)) % kSize;
      head = head < dim ? head : dim;
      vectors = (dim - head) / kSize;
      const int64_t body = vectors * kSize;
      ALS_UNROLL_BY(1)
      for (int64_t e = lane; e < dim - body; e += kKnnLanes) {
        const int64_t j = e < head ? e : e + body;
        ALS_UNROLL
        for (int i = 0; i < kQueries; ++i) x[i] = narrow(query[i][j]);
        ALS_UNROLL
        for (int r = 0; r < kRows; ++r) y[r] = narrow(row[r][j]);
        add(x, y);
      }
    }
    ALS_UNROLL_BY((kRows * kSize > 16 ? 1 : 2))  // loads in flight
    for (int64_t v = lane; v < vectors; v += kKnnLanes) {
      const int64_t j = head + v * kSize;
      Vector rows[kRows], queries[kQueries];
      ALS_UNROLL
      for (int r = 0; r < kRows; ++r) rows[r] = *reinterpret_cast<const Vector*>(row[r] + j);
      ALS_UNROLL
      for (int i = 0; i < kQueries; ++i) {
        if constexpr (kAligned) {
          queries[i] = *reinterpret_cast<const Vector*>(query[i] + j);
        } else {
          ALS_UNROLL
          for (int e = 0; e < kSize; ++e) queries[i].element[e] = query[i][j + e];
        }
      }
      ALS_UNROLL
      for (int e = 0; e < kSize; ++e) {
        ALS_UNROLL
        for (int i = 0; i < kQueries; ++i) x[i] = narrow(queries[i].element[e]);
        ALS_UNROLL
        for (int r = 0; r < kRows; ++r) y[r] = narrow(rows[r].element[e]);
        add(x, y);
      }
    }
  }
};

// Adds v[n] over the eight lanes and shares it out: lane l gets the sums l n / 8, ... in front, at
// least one (n < 8: every 8 / n lanes the same).
template <int kCount>
__device__ void add_and_scatter(float (&v)[kCount], int lane) {
  int n = kCount;
  ALS_UNROLL
  for (int step = kKnnLanes / 2; step > 0; step /= 2) {
    if (n > 1) {
      n /= 2;
      const bool upper = lane & step;
      ALS_UNROLL
      for (int i = 0; i < kCount / 2; ++i) {
        if (i >= n) break;
        const float given = upper ? v[i] : v[i + n];
        v[i] = (upper ? v[i + n] : v[i]) + __shfl_xor_sync(0xFFFFFFFFu, given, step);
      }
    } else {
      v[0] += __shfl_xor_sync(0xFFFFFFFFu, v[0], step);
    }
  }
}

// ---- float64 ----

// The distance of query q and row `row`, rounded to float32; all eight lanes get it. `factor` is
// the row_factor of the query.
template <typename T>
__device__ float exact_distance(const KnnRows<T>& x, int64_t q, double factor, const KnnRows<T>& y,
                                int64_t row, int lane) {
  using Rows = KnnRows<T>;
  const T *const left = x.data + q * x.dim, *const right = y.data + row * y.dim;
  double sum = 0.0;
  if (y.metric == KnnMetric::kIp) {
    ALS_UNROLL_BY(4)
    for (int64_t j = lane; j < y.dim; j += kKnnLanes) {
      sum = unfused_add(sum, unfused_mul(Rows::widen(left[j]), Rows::widen(right[j])));
    }
    return finish_distance(KnnMetric::kIp, add_lanes(sum));
  }
  const bool cosine = y.metric == KnnMetric::kCosine;
  const double scale = cosine ? inverse_norm(sum_of_squares(y, row, lane)) : 1.0;
  ALS_UNROLL_BY(4)
  for (int64_t j = lane; j < y.dim; j += kKnnLanes) {
    const double v = Rows::widen(left[j]);
    sum = unfused_add(
        sum, squared_difference(cosine ? unfused_mul(v, factor) : v, Rows::widen(right[j]), scale));
  }
  const float d = finish_distance(y.metric, add_lanes(sum));
  const bool finite = factor == factor && scale == scale;
  return cosine && finite && (factor == 0.0 || scale == 0.0) ? 1.0f : d;
}

}  // namespace als
