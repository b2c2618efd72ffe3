#include "knn/knn_sums.h"

#include <cstring>

#include "knn/knn_math.h"

namespace als {
namespace {

typedef double Vec4d __attribute__((vector_size(32)));
typedef float Vec4f __attribute__((vector_size(16)));

#define ALS_INLINE inline __attribute__((always_inline))

ALS_INLINE void load(const double* p, Vec4d& v) { memcpy(&v, p, sizeof v); }
ALS_INLINE void load(const float* p, Vec4d& v) {
  Vec4f f;
  memcpy(&f, p, sizeof f);
  v = __builtin_convertvector(f, Vec4d);
}

// The eight lanes of knn_math.h in two vectors; term(lane half, j) and tail(j) give the summands.
template <typename Term, typename Tail>
ALS_INLINE double sum_lanes(int64_t dim, const Term& term, const Tail& tail) {
  Vec4d low{}, high{}, t;
  int64_t j = 0;
  for (; j + kKnnLanes <= dim; j += kKnnLanes) {
    term(j, t);
    low += t;
    term(j + 4, t);
    high += t;
  }
  double lane[kKnnLanes];
  memcpy(lane, &low, sizeof low);
  memcpy(lane + 4, &high, sizeof high);
  for (int64_t l = 0; j < dim; ++j, ++l) lane[l] += tail(j);
  return combine_lanes(lane);
}

template <typename T>
ALS_INLINE double squared_difference_sum(const double* q, const T* c, int64_t dim, double scale) {
  const auto term = [&](int64_t j, Vec4d& t) __attribute__((always_inline)) {
    Vec4d a, b;
    load(q + j, a);
    load(c + j, b);
    a -= b * scale;
    t = a * a;
  };
  return sum_lanes(dim, term, [&](int64_t j) __attribute__((always_inline)) {
    return squared_difference(q[j], static_cast<double>(c[j]), scale);
  });
}

template <typename T, typename Q>
ALS_INLINE double product_sum(const Q* q, const T* c, int64_t dim) {
  const auto term = [&](int64_t j, Vec4d& t) __attribute__((always_inline)) {
    Vec4d a, b;
    load(q + j, a);
    load(c + j, b);
    t = a * b;
  };
  return sum_lanes(dim, term, [&](int64_t j) __attribute__((always_inline)) {
    return unfused_mul(static_cast<double>(q[j]), static_cast<double>(c[j]));
  });
}

// AVX2 without FMA serves AVX-512 as well: FMA in reach, the compiler would fuse.
#define ALS_SUMS(SUFFIX, ATTRIBUTE)                                                      \
  template <typename T>                                                                  \
  ATTRIBUTE double squared_difference_##SUFFIX(const double* q, const T* c, int64_t dim, \
                                               double scale) {                           \
    return squared_difference_sum(q, c, dim, scale);                                     \
  }                                                                                      \
  template <typename T>                                                                  \
  ATTRIBUTE double product_##SUFFIX(const double* q, const T* c, int64_t dim) {          \
    return product_sum(q, c, dim);                                                       \
  }                                                                                      \
  template <typename T>                                                                  \
  ATTRIBUTE double sum_of_squares_##SUFFIX(const T* c, int64_t dim) {                    \
    return product_sum(c, c, dim);                                                       \
  }

ALS_SUMS(baseline, )
#if defined(__x86_64__)
ALS_SUMS(avx2, __attribute__((target("avx2"))))
#endif

}  // namespace

template <typename T>
KnnSums<T> knn_sums(CpuLevel level) {
#if defined(__x86_64__)
  if (level >= CpuLevel::kAvx2) {
    return {squared_difference_avx2<T>, product_avx2<T>, sum_of_squares_avx2<T>};
  }
#endif
  return {squared_difference_baseline<T>, product_baseline<T>, sum_of_squares_baseline<T>};
}

template KnnSums<float> knn_sums(CpuLevel);
template KnnSums<double> knn_sums(CpuLevel);

}  // namespace als
