// The loops of the lazy pi step on the CPU, for AVX-512, AVX2 and the baseline. Torch-free.
// Plain branch-free loops over kPiSumsLanes entries, which compilers vectorise at any width; the
// order of additions depends on nothing but the data.
#pragma once

#include "common/cpu_level.h"
#include "pi_step/pi_step_lazy_math.h"

namespace als {

constexpr int kPiBatchRows = 2 * kPiSumsLanes;

// The batch's entries before and after a step, ready to be added up; padded with -inf.
struct PiBatchRows {
  const double* old_u;
  const double* new_u;
  const double* x;     // c log_prior
  const double* gain;  // of the half step
  int64_t count;       // a multiple of kPiBatchRows
};

struct PiLazyRows {
  // What the batch's entries change, times n: the moments[kPiMoments] and the rest. The half step
  // goes from r = scale * new_u; half_level: its level.
  PiChange (*change)(const PiBatchRows& rows, const PiFrame& frame, double scale, double rho,
                     double half_level, double* moments);
  PiNormalisers (*normalise)(const double* u, const float* log_prior, int64_t count, double scale,
                             double half_scale, double prior);
  // moments[j] += sum of e v^j.
  void (*add_moments)(const double* u, const float* log_prior, int64_t count, const PiFrame& frame,
                      double prior, double* moments);
};

namespace lazy_detail {

#define ALS_INLINE inline __attribute__((always_inline))

constexpr int kLanes = kPiSumsLanes;
constexpr int kGroup = 4 * kLanes;  // entries in flight: powers are long chains of products
constexpr double kInfinity = INFINITY;

ALS_INLINE double larger(double a, double b) { return select(a > b, a, b); }
ALS_INLINE double smaller(double a, double b) { return select(a < b, a, b); }

ALS_INLINE double sum_of_lanes(const double* lane) {
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// sum[l] += the kGroup values of lane l.
ALS_INLINE void add_group(double* sum, const double* value) {
  for (int l = 0; l < kLanes; ++l) {
    sum[l] += (value[l] + value[l + kLanes]) + (value[l + 2 * kLanes] + value[l + 3 * kLanes]);
  }
}

ALS_INLINE PiChange change(const PiBatchRows& rows, const PiFrame& frame, double scale, double rho,
                           double half_level, double* moments) {
  constexpr int kHalf = kPiBatchRows;
  double sum[kPiMoments][kLanes] = {}, mass[kLanes] = {}, half_mass[kLanes] = {};
  double half[kHalf] = {}, reach[kHalf] = {};
  for (int64_t i = 0; i < rows.count; i += kHalf) {
    double e[kGroup], v[kGroup];  // before, then after
    for (int l = 0; l < kHalf; ++l) {
      const PiTerm before = frame.term(rows.old_u[i + l], rows.x[i + l]);
      const PiTerm after = frame.term(rows.new_u[i + l], rows.x[i + l]);
      e[l] = before.e;
      v[l] = before.v;
      e[kHalf + l] = after.e;
      v[kHalf + l] = after.v;
      reach[l] = larger_or_nan(fabs(after.v), larger_or_nan(fabs(before.v), reach[l]));
    }
    add_group(mass, e);
    double parts[kGroup];
    for (int l = 0; l < kHalf; ++l) {
      const double r = scale * rows.new_u[i + l];
      const double without = exp_of(rows.x[i + l] + rho * r - half_level);
      const double with = exp_of(rows.x[i + l] + rho * (r + rows.gain[i + l]) - half_level);
      half[l] += with - without;
      parts[l] = without;
      parts[kHalf + l] = with;
    }
    add_group(half_mass, parts);
    for (int l = 0; l < kHalf; ++l) e[l] = -e[l];
    for (int j = 0; j < kPiMoments; ++j) {
      add_group(sum[j], e);
      for (int l = 0; l < kGroup; ++l) e[l] *= v[l];
    }
  }
  for (int j = 0; j < kPiMoments; ++j) moments[j] = sum_of_lanes(sum[j]);
  PiChange total{sum_of_lanes(mass), 0.0, 0.0, sum_of_lanes(half_mass)};
  for (int l = 0; l < kHalf; ++l) {
    total.reach = larger_or_nan(reach[l], total.reach);
    total.half += half[l];
  }
  return total;
}

// u and c log_prior of the entries of a chunk, kGroup at a time; the ragged end is padded with what
// adds nothing.
template <typename Body>
ALS_INLINE void for_groups(const double* u, const float* log_prior, int64_t count, double prior,
                           const Body& body) {
  double x[kGroup] = {}, rest[kGroup];
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    if (log_prior != nullptr) {
      for (int l = 0; l < kGroup; ++l) x[l] = prior * log_prior[i + l];
    }
    body(u + i, x);
  }
  if (i == count) return;
  for (int l = 0; l < kGroup; ++l) {
    const bool inside = i + l < count;
    rest[l] = inside ? u[i + l] : -kInfinity;
    x[l] = inside && log_prior != nullptr ? prior * log_prior[i + l] : 0.0;
  }
  body(rest, x);
}

ALS_INLINE PiNormalisers normalise(const double* u, const float* log_prior, int64_t count,
                                   double scale, double half_scale, double prior) {
  double max[kGroup], max_half[kGroup], low[kGroup], high[kGroup];
  for (int l = 0; l < kGroup; ++l) {
    max[l] = max_half[l] = high[l] = -kInfinity;
    low[l] = kInfinity;
  }
  for_groups(u, log_prior, count, prior,
             [&](const double* at, const double* x) __attribute__((always_inline)) {
               for (int l = 0; l < kGroup; ++l) {
                 max[l] = larger(max[l], x[l] + scale * at[l]);
                 max_half[l] = larger(max_half[l], x[l] + half_scale * at[l]);
                 high[l] = larger(high[l], at[l]);
                 low[l] = smaller(low[l], select(at[l] > -kInfinity, at[l], kInfinity));
               }
             });
  PiNormalisers out;
  double top = -kInfinity, top_half = -kInfinity;
  for (int l = 0; l < kGroup; ++l) {
    top = larger(top, max[l]);
    top_half = larger(top_half, max_half[l]);
    out.high = larger(out.high, high[l]);
    out.low = smaller(out.low, low[l]);
  }
  if (top == -kInfinity) return out;
  double sum[kLanes] = {}, sum_half[kLanes] = {};
  for_groups(u, log_prior, count, prior,
             [&](const double* at, const double* x) __attribute__((always_inline)) {
               double e[kGroup], half[kGroup];
               for (int l = 0; l < kGroup; ++l) {
                 e[l] = exp_of(x[l] + scale * at[l] - top);
                 half[l] = exp_of(x[l] + half_scale * at[l] - top_half);
               }
               add_group(sum, e);
               add_group(sum_half, half);
             });
  out.total.add(kLog2E * top, sum_of_lanes(sum));
  out.half.add(kLog2E * top_half, sum_of_lanes(sum_half));
  return out;
}

ALS_INLINE void add_moments(const double* u, const float* log_prior, int64_t count,
                            const PiFrame& frame, double prior, double* moments) {
  double sum[kPiMoments][kLanes] = {};
  for_groups(u, log_prior, count, prior,
             [&](const double* at, const double* x) __attribute__((always_inline)) {
               double e[kGroup], v[kGroup];
               for (int l = 0; l < kGroup; ++l) {
                 const PiTerm term = frame.term(at[l], x[l]);
                 e[l] = term.e;
                 v[l] = term.v;
               }
               for (int j = 0; j < kPiMoments; ++j) {
                 add_group(sum[j], e);
                 for (int l = 0; l < kGroup; ++l) e[l] *= v[l];
               }
             });
  for (int j = 0; j < kPiMoments; ++j) moments[j] += sum_of_lanes(sum[j]);
}

#define ALS_LAZY_ROWS(LEVEL, ATTRIBUTE)                                                            \
  ATTRIBUTE inline PiChange change_##LEVEL(const PiBatchRows& rows, const PiFrame& frame,          \
                                           double scale, double rho, double half_level,            \
                                           double* sums) {                                         \
    return change(rows, frame, scale, rho, half_level, sums);                                      \
  }                                                                                                \
  ATTRIBUTE inline PiNormalisers normalise_##LEVEL(const double* u, const float* log_prior,        \
                                                   int64_t count, double scale, double half_scale, \
                                                   double prior) {                                 \
    return normalise(u, log_prior, count, scale, half_scale, prior);                               \
  }                                                                                                \
  ATTRIBUTE inline void add_moments_##LEVEL(const double* u, const float* log_prior,               \
                                            int64_t count, const PiFrame& frame, double prior,     \
                                            double* sums) {                                        \
    add_moments(u, log_prior, count, frame, prior, sums);                                          \
  }                                                                                                \
  inline constexpr PiLazyRows rows_##LEVEL{change_##LEVEL, normalise_##LEVEL, add_moments_##LEVEL};

ALS_LAZY_ROWS(baseline, )
#if defined(__x86_64__)
ALS_LAZY_ROWS(avx2, __attribute__((target("avx2,fma"))))
ALS_LAZY_ROWS(avx512, __attribute__((target("avx512f,avx512dq,fma,prefer-vector-width=512"))))
#endif

#undef ALS_LAZY_ROWS
#undef ALS_INLINE

}  // namespace lazy_detail

inline const PiLazyRows& lazy_rows(CpuLevel level) {
#if defined(__x86_64__)
  if (level >= CpuLevel::kAvx512) return lazy_detail::rows_avx512;
  if (level == CpuLevel::kAvx2) return lazy_detail::rows_avx2;
#endif
  return lazy_detail::rows_baseline;
}

}  // namespace als
