#include "knn/knn_rows.h"

#include <cstring>

namespace als {
namespace {

constexpr int kLanes = 8;

typedef double Vec8d __attribute__((vector_size(64)));
typedef float Vec8f __attribute__((vector_size(32)));
typedef uint32_t Vec8u __attribute__((vector_size(32)));
typedef uint16_t Vec8h __attribute__((vector_size(16)));

#define ALS_INLINE inline __attribute__((always_inline))

ALS_INLINE void load(const double* p, Vec8d& v) { memcpy(&v, p, sizeof v); }
ALS_INLINE void load(const float* p, Vec8d& v) {
  Vec8f f;
  memcpy(&f, p, sizeof f);
  v = __builtin_convertvector(f, Vec8d);
}

ALS_INLINE double total(const Vec8d& v) {
  double sum = 0.0;
  for (int l = 0; l < kLanes; ++l) sum += v[l];
  return sum;
}

template <typename T>
ALS_INLINE double centre(const T* x, double scale, const double* mean, int64_t dim, double* out) {
  Vec8d squares{}, v, m;
  int64_t j = 0;
  for (; j + kLanes <= dim; j += kLanes) {
    load(x + j, v);
    load(mean + j, m);
    v = v * scale - m;
    memcpy(out + j, &v, sizeof v);
    squares += v * v;
  }
  double sum = total(squares);
  for (; j < dim; ++j) {
    out[j] = static_cast<double>(x[j]) * scale - mean[j];
    sum += out[j] * out[j];
  }
  return sum;
}

ALS_INLINE void pack_float(const double* row, double scale, int64_t dim, float* units) {
  for (int64_t j = 0; j < dim; ++j) units[j] = static_cast<float>(row[j] * scale);
}

// Eight values to the nearest bf16, ties to even. |v| is below 2^127, so nothing overflows.
ALS_INLINE void pack_eight(const Vec8d& v, uint16_t* out, Vec8d& packed, Vec8d& residual) {
  const Vec8f f = __builtin_convertvector(v, Vec8f);
  Vec8u bits;
  memcpy(&bits, &f, sizeof bits);
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  bits &= (Vec8u)((bits & 0x7F800000u) != 0);  // subnormal: 0
  const Vec8h half = __builtin_convertvector(bits >> 16, Vec8h);
  memcpy(out, &half, sizeof half);
  Vec8f rounded;
  memcpy(&rounded, &bits, sizeof rounded);
  const Vec8d r = __builtin_convertvector(rounded, Vec8d);
  packed += r * r;
  residual += (v - r) * (v - r);
}

ALS_INLINE KnnPackedSquares pack_bf16(const double* row, double scale, int64_t dim, float* units) {
  auto* out = reinterpret_cast<unsigned char*>(units);
  Vec8d packed{}, residual{}, v;
  uint16_t half[kLanes];
  int64_t j = 0;
  for (; j + kLanes <= dim; j += kLanes) {
    load(row + j, v);
    pack_eight(v * scale, half, packed, residual);
    memcpy(out + 2 * j, half, sizeof half);
  }
  if (j < dim) {
    v = Vec8d{};
    for (int64_t l = 0; j + l < dim; ++l) v[l] = row[j + l] * scale;
    pack_eight(v, half, packed, residual);
    memcpy(out + 2 * j, half, (dim - j + 1) / 2 * 4);
  }
  return {total(packed), total(residual)};
}

#define ALS_ROWS(SUFFIX, ATTRIBUTE)                                                              \
  template <typename T>                                                                          \
  ATTRIBUTE double centre_##SUFFIX(const T* x, double scale, const double* mean, int64_t dim,    \
                                   double* out) {                                                \
    return centre(x, scale, mean, dim, out);                                                     \
  }                                                                                              \
  ATTRIBUTE void pack_float_##SUFFIX(const double* row, double scale, int64_t dim, float* out) { \
    pack_float(row, scale, dim, out);                                                            \
  }                                                                                              \
  ATTRIBUTE KnnPackedSquares pack_bf16_##SUFFIX(const double* row, double scale, int64_t dim,    \
                                                float* out) {                                    \
    return pack_bf16(row, scale, dim, out);                                                      \
  }

ALS_ROWS(baseline, )
#if defined(__x86_64__)
ALS_ROWS(avx2, __attribute__((target("avx2,fma"))))
ALS_ROWS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))))
#endif

}  // namespace

template <typename T>
KnnRowOps<T> knn_rows(CpuLevel level) {
#if defined(__x86_64__)
  if (level >= CpuLevel::kAvx512) {
    return {centre_avx512<T>, pack_float_avx512, pack_bf16_avx512};
  }
  if (level >= CpuLevel::kAvx2) return {centre_avx2<T>, pack_float_avx2, pack_bf16_avx2};
#endif
  return {centre_baseline<T>, pack_float_baseline, pack_bf16_baseline};
}

template KnnRowOps<float> knn_rows(CpuLevel);
template KnnRowOps<double> knn_rows(CpuLevel);

}  // namespace als
