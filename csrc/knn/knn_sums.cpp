#include "knn/knn_sums.h"

#include <cstring>

#include "knn/knn_math.h"

namespace als {
namespace {

typedef double Vec4d __attribute__((vector_size(32)));
typedef float Vec4f __attribute__((vector_size(16)));
typedef double Vec8d __attribute__((vector_size(64)));
typedef float Vec8f __attribute__((vector_size(32)));

#define ALS_INLINE inline __attribute__((always_inline))

ALS_INLINE void load(const double* p, Vec4d& v) { memcpy(&v, p, sizeof v); }
ALS_INLINE void load(const double* p, Vec8d& v) { memcpy(&v, p, sizeof v); }
ALS_INLINE void load(const float* p, Vec4d& v) {
  Vec4f f;
  memcpy(&f, p, sizeof f);
  v = __builtin_convertvector(f, Vec4d);
}
ALS_INLINE void load(const float* p, Vec8d& v) {
  Vec8f f;
  memcpy(&f, p, sizeof f);
  v = __builtin_convertvector(f, Vec8d);
}

// A product that no compiler may fuse with the sum it goes into: AVX-512 brings FMA with it, and so
// does a build for one processor (-march). Else the other levels are compiled without FMA.
ALS_INLINE void unfused(Vec4d& product) {
#if defined(__x86_64__) && defined(__FMA__)
  asm("" : "+x"(product));
#else
  (void)product;
#endif
}
ALS_INLINE void unfused(Vec8d& product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));
#else
  (void)product;
#endif
}

// The summands. vector(r, j) and scalar(r, j): those of row r from feature j on.
template <typename T>
struct Difference {
  const double* q;
  const T* const* rows;
  template <typename V>
  ALS_INLINE void vector(int r, int64_t j, V& t) const {
    V c;
    load(q + j, t);
    load(rows[r] + j, c);
    t -= c;
    t = t * t;
    unfused(t);
  }
  ALS_INLINE double scalar(int r, int64_t j) const {
    return squared_difference(q[j], static_cast<double>(rows[r][j]), 1.0);
  }
};

template <typename T>
struct ScaledDifference {
  const double* q;
  const T* const* rows;
  const double* scales;
  template <typename V>
  ALS_INLINE void vector(int r, int64_t j, V& t) const {
    V c;
    load(q + j, t);
    load(rows[r] + j, c);
    c = c * scales[r];
    unfused(c);
    t -= c;
    t = t * t;
    unfused(t);
  }
  ALS_INLINE double scalar(int r, int64_t j) const {
    return squared_difference(q[j], static_cast<double>(rows[r][j]), scales[r]);
  }
};

template <typename T>
struct Product {
  const double* q;
  const T* const* rows;
  template <typename V>
  ALS_INLINE void vector(int r, int64_t j, V& t) const {
    V c;
    load(q + j, t);
    load(rows[r] + j, c);
    t = t * c;
    unfused(t);
  }
  ALS_INLINE double scalar(int r, int64_t j) const {
    return unfused_mul(q[j], static_cast<double>(rows[r][j]));
  }
};

template <typename T>
struct Square {
  const T* const* rows;
  template <typename V>
  ALS_INLINE void vector(int r, int64_t j, V& t) const {
    load(rows[r] + j, t);
    t = t * t;
    unfused(t);
  }
  ALS_INLINE double scalar(int r, int64_t j) const {
    const auto c = static_cast<double>(rows[r][j]);
    return unfused_mul(c, c);
  }
};

// The eight lanes of knn_math.h in one or two vectors, kRows rows at a time.
template <typename V, int kRows, typename Terms>
ALS_INLINE void sum_rows(const Terms& terms, int first, int64_t dim, double* sums) {
  constexpr int kWidth = sizeof(V) / sizeof(double);
  constexpr int kParts = kKnnLanes / kWidth;
  V acc[kRows][kParts];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) acc[r][p] = V{};
  }
  int64_t j = 0;
  for (; j + kKnnLanes <= dim; j += kKnnLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        V t;
        terms.vector(first + r, j + p * kWidth, t);
        acc[r][p] += t;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    double lane[kKnnLanes];
    memcpy(lane, acc[r], sizeof lane);
    for (int64_t l = 0; j + l < dim; ++l) {
      lane[l] = unfused_add(lane[l], terms.scalar(first + r, j + l));
    }
    sums[first + r] = combine_lanes(lane);
  }
}

template <typename V, typename Terms>
ALS_INLINE void sum_all(const Terms& terms, int64_t n, int64_t dim, double* sums) {
  int first = 0;
  for (; first + 4 <= n; first += 4) sum_rows<V, 4>(terms, first, dim, sums);
  for (; first < n; ++first) sum_rows<V, 1>(terms, first, dim, sums);
}

#define ALS_SUMS(SUFFIX, V, ATTRIBUTE)                                                           \
  template <typename T>                                                                          \
  ATTRIBUTE void difference_##SUFFIX(const double* q, const T* const* rows, int64_t n,           \
                                     int64_t dim, double* sums) {                                \
    sum_all<V>(Difference<T>{q, rows}, n, dim, sums);                                            \
  }                                                                                              \
  template <typename T>                                                                          \
  ATTRIBUTE void scaled_difference_##SUFFIX(const double* q, const T* const* rows,               \
                                            const double* scales, int64_t n, int64_t dim,        \
                                            double* sums) {                                      \
    sum_all<V>(ScaledDifference<T>{q, rows, scales}, n, dim, sums);                              \
  }                                                                                              \
  template <typename T>                                                                          \
  ATTRIBUTE void product_##SUFFIX(const double* q, const T* const* rows, int64_t n, int64_t dim, \
                                  double* sums) {                                                \
    sum_all<V>(Product<T>{q, rows}, n, dim, sums);                                               \
  }                                                                                              \
  template <typename T>                                                                          \
  ATTRIBUTE void square_##SUFFIX(const T* const* rows, int64_t n, int64_t dim, double* sums) {   \
    sum_all<V>(Square<T>{rows}, n, dim, sums);                                                   \
  }                                                                                              \
  template <typename T>                                                                          \
  KnnSums<T> sums_##SUFFIX() {                                                                   \
    return {difference_##SUFFIX<T>, scaled_difference_##SUFFIX<T>, product_##SUFFIX<T>,          \
            square_##SUFFIX<T>};                                                                 \
  }

ALS_SUMS(baseline, Vec4d, )
#if defined(__x86_64__)
ALS_SUMS(avx2, Vec4d, __attribute__((target("avx2"))))
ALS_SUMS(avx512, Vec8d, __attribute__((target("avx512f"))))
#endif

}  // namespace

template <typename T>
KnnSums<T> knn_sums(CpuLevel level) {
#if defined(__x86_64__)
  if (level >= CpuLevel::kAvx512) return sums_avx512<T>();
  if (level >= CpuLevel::kAvx2) return sums_avx2<T>();
#endif
  return sums_baseline<T>();
}

template KnnSums<float> knn_sums(CpuLevel);
template KnnSums<double> knn_sums(CpuLevel);

}  // namespace als
