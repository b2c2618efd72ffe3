#include "knn/knn_scan.h"

#include <cstring>

namespace als {
namespace {

#define ALS_INLINE inline __attribute__((always_inline))

typedef float Vec4f __attribute__((vector_size(16)));
typedef float Vec8f __attribute__((vector_size(32)));
typedef float Vec16f __attribute__((vector_size(64)));

template <typename V>
ALS_INLINE void load(const float* p, V& v) {
  memcpy(&v, p, sizeof v);
}

// Lanes added pairwise until four are left.
ALS_INLINE void fold(const Vec8f& v, Vec4f& sum) {
  Vec4f half[2];
  memcpy(half, &v, sizeof v);
  sum = half[0] + half[1];
}
ALS_INLINE void fold(const Vec16f& v, Vec4f& sum) {
  Vec8f half[2];
  memcpy(half, &v, sizeof v);
  fold(half[0] + half[1], sum);
}

typedef int32_t Four __attribute__((vector_size(16)));

// The sums of four vectors of four lanes.
ALS_INLINE Vec4f sums_of(const Vec4f (&v)[4]) {
  const Four low{0, 4, 1, 5}, high{2, 6, 3, 7}, first{0, 1, 4, 5}, second{2, 3, 6, 7};
  const Vec4f a = __builtin_shuffle(v[0], v[1], low) + __builtin_shuffle(v[0], v[1], high);
  const Vec4f b = __builtin_shuffle(v[2], v[3], low) + __builtin_shuffle(v[2], v[3], high);
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
}

template <typename V, int kRows>
ALS_INLINE void scan_rows(const float* query, const float* rows, int64_t dim, float* out) {
  constexpr int64_t kWidth = sizeof(V) / sizeof(float);
  V acc[kRows][kKnnScanQueries];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kKnnScanQueries; ++i) acc[r][i] = V{};
  }
  int64_t j = 0;
  for (; j + kWidth <= dim; j += kWidth) {
    V q[kKnnScanQueries], c;
#pragma GCC unroll 4
    for (int i = 0; i < kKnnScanQueries; ++i) load(query + i * dim + j, q[i]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      load(rows + r * dim + j, c);
#pragma GCC unroll 4
      for (int i = 0; i < kKnnScanQueries; ++i) {
        const V t = q[i] - c;
        acc[r][i] += t * t;
      }
    }
  }
  if (j < dim) {  // the rest, filled up with zeros
    const size_t bytes = (dim - j) * sizeof(float);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      float c[kWidth] = {};
      memcpy(c, rows + r * dim + j, bytes);
#pragma GCC unroll 4
      for (int i = 0; i < kKnnScanQueries; ++i) {
        float q[kWidth] = {};
        memcpy(q, query + i * dim + j, bytes);
        V a, b;
        load(q, a);
        load(c, b);
        a -= b;
        acc[r][i] += a * a;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    Vec4f folded[4];
#pragma GCC unroll 4
    for (int i = 0; i < kKnnScanQueries; ++i) fold(acc[r][i], folded[i]);
    const Vec4f sum = sums_of(folded);
    memcpy(out + r * kKnnScanQueries, &sum, sizeof sum);
  }
}

template <typename V, int kRows>
ALS_INLINE void scan(const float* query, const float* rows, int64_t n, int64_t dim, float* out) {
  int64_t r = 0;
  for (; r + kRows <= n; r += kRows) {
    scan_rows<V, kRows>(query, rows + r * dim, dim, out + r * kKnnScanQueries);
  }
  for (; r < n; ++r) scan_rows<V, 1>(query, rows + r * dim, dim, out + r * kKnnScanQueries);
}

void scan_baseline(const float* query, const float* rows, int64_t n, int64_t dim, float* out) {
  scan<Vec8f, 1>(query, rows, n, dim, out);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void scan_avx2(const float* query, const float* rows, int64_t n,
                                                   int64_t dim, float* out) {
  scan<Vec8f, 2>(query, rows, n, dim, out);
}
__attribute__((target("avx512f,avx512vl,fma"))) void scan_avx512(const float* query,
                                                                 const float* rows, int64_t n,
                                                                 int64_t dim, float* out) {
  if (dim == 8) {
    scan<Vec8f, 4>(query, rows, n, dim, out);
  } else {
    scan<Vec16f, 4>(query, rows, n, dim, out);
  }
}
#endif

}  // namespace

KnnScan knn_scan(CpuLevel level) {
#if defined(__x86_64__)
  if (level >= CpuLevel::kAvx512) return scan_avx512;
  if (level >= CpuLevel::kAvx2) return scan_avx2;
#endif
  return scan_baseline;
}

}  // namespace als
