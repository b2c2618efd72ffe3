// The loops of the lazy pi step on the CPU, for AVX-512, AVX2 and the baseline. Torch-free.
// Plain branch-free loops over kPiSumsLanes entries, which compilers vectorise at any width; the
// order of additions depends on nothing but the data.
#pragma once

#include <algorithm>

#include "common/cpu_level.h"
#include "pi_step/pi_step_lazy_math.h"

namespace als {

// The batch's entries before and after a step, ready to be added up; padded with -inf.
struct PiBatchRows {
  const double* old_u;
  const double* new_u;
  const double* x;  // c log_prior
  int64_t count;    // a multiple of kPiSumsLanes
};

// What a chunk of entries adds to the normalisers at two scales.
struct PiNormalisers {
  LogSum total, half;
  double low = INFINITY, high = -INFINITY;  // of the entries that are there
};

struct PiLazyRows {
  // Adds the change of n T_j to moments[kPiMoments]; change: its mass (times n) and reach.
  void (*change)(const PiBatchRows& rows, const PiFrame& frame, double* moments, PiChange& change);
  PiNormalisers (*normalise)(const double* u, const float* log_prior, int64_t count, double scale,
                             double half_scale, double prior);
  // moments[j] += sum of e v^j.
  void (*add_moments)(const double* u, const float* log_prior, int64_t count, const PiFrame& frame,
                      double prior, double* moments);
};

namespace lazy_detail {

#define ALS_INLINE inline __attribute__((always_inline))

constexpr int kLanes = kPiSumsLanes;
constexpr double kInfinity = INFINITY;

ALS_INLINE double sum_of_lanes(const double* lane) {
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

ALS_INLINE void change(const PiBatchRows& rows, const PiFrame& frame, double* moments,
                       PiChange& change) {
  double sum[kPiMoments][kLanes] = {}, mass[kLanes] = {}, reach[kLanes] = {};
  for (int64_t i = 0; i < rows.count; i += kLanes) {
    double e_old[kLanes], v_old[kLanes], e_new[kLanes], v_new[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const PiTerm before = frame.term(rows.old_u[i + l], rows.x[i + l]);
      const PiTerm after = frame.term(rows.new_u[i + l], rows.x[i + l]);
      e_old[l] = before.e;
      v_old[l] = before.v;
      e_new[l] = after.e;
      v_new[l] = after.v;
      mass[l] += before.e + after.e;
      reach[l] = larger_or_nan(fabs(after.v), larger_or_nan(fabs(before.v), reach[l]));
    }
    for (int j = 0; j < kPiMoments; ++j) {
      for (int l = 0; l < kLanes; ++l) {
        sum[j][l] += e_new[l] - e_old[l];
        e_new[l] *= v_new[l];
        e_old[l] *= v_old[l];
      }
    }
  }
  for (int j = 0; j < kPiMoments; ++j) moments[j] = sum_of_lanes(sum[j]);
  change.mass = sum_of_lanes(mass);
  change.reach = 0.0;
  for (int l = 0; l < kLanes; ++l) change.reach = larger_or_nan(reach[l], change.reach);
}

// Entries of a chunk, kLanes at a time; the ragged end is padded with what adds nothing.
template <typename Body>
ALS_INLINE void for_lanes(const double* u, const float* log_prior, int64_t count, double prior,
                          const Body& body) {
  double at[kLanes], x[kLanes];
  for (int64_t i = 0; i < count; i += kLanes) {
    if (i + kLanes <= count) {
      for (int l = 0; l < kLanes; ++l) at[l] = u[i + l];
    } else {
      for (int l = 0; l < kLanes; ++l) at[l] = i + l < count ? u[i + l] : -INFINITY;
    }
    if (log_prior == nullptr) {
      for (int l = 0; l < kLanes; ++l) x[l] = 0.0;
    } else if (i + kLanes <= count) {
      for (int l = 0; l < kLanes; ++l) x[l] = prior * log_prior[i + l];
    } else {
      for (int l = 0; l < kLanes; ++l) x[l] = i + l < count ? prior * log_prior[i + l] : 0.0;
    }
    body(at, x);
  }
}

ALS_INLINE PiNormalisers normalise(const double* u, const float* log_prior, int64_t count,
                                   double scale, double half_scale, double prior) {
  double max[kLanes], max_half[kLanes], low[kLanes], high[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    max[l] = max_half[l] = high[l] = -INFINITY;
    low[l] = INFINITY;
  }
  for_lanes(u, log_prior, count, prior,
            [&](const double* at, const double* x) __attribute__((always_inline)) {
              for (int l = 0; l < kLanes; ++l) {
                max[l] = std::max(max[l], x[l] + scale * at[l]);
                max_half[l] = std::max(max_half[l], x[l] + half_scale * at[l]);
                high[l] = std::max(high[l], at[l]);
                low[l] = std::min(low[l], select(at[l] > -kInfinity, at[l], kInfinity));
              }
            });
  PiNormalisers out;
  double top = -INFINITY, top_half = -INFINITY;
  for (int l = 0; l < kLanes; ++l) {
    top = std::max(top, max[l]);
    top_half = std::max(top_half, max_half[l]);
    out.high = std::max(out.high, high[l]);
    out.low = std::min(out.low, low[l]);
  }
  if (top == -INFINITY) return out;
  double sum[kLanes] = {}, sum_half[kLanes] = {};
  for_lanes(u, log_prior, count, prior,
            [&](const double* at, const double* x) __attribute__((always_inline)) {
              for (int l = 0; l < kLanes; ++l) {
                sum[l] += exp_of(x[l] + scale * at[l] - top);
                sum_half[l] += exp_of(x[l] + half_scale * at[l] - top_half);
              }
            });
  out.total.add(kLog2E * top, sum_of_lanes(sum));
  out.half.add(kLog2E * top_half, sum_of_lanes(sum_half));
  return out;
}

ALS_INLINE void add_moments(const double* u, const float* log_prior, int64_t count,
                            const PiFrame& frame, double prior, double* moments) {
  double sum[kPiMoments][kLanes] = {};
  for_lanes(u, log_prior, count, prior,
            [&](const double* at, const double* x) __attribute__((always_inline)) {
              double e[kLanes], v[kLanes];
              for (int l = 0; l < kLanes; ++l) {
                const PiTerm term = frame.term(at[l], x[l]);
                e[l] = term.e;
                v[l] = term.v;
              }
              for (int j = 0; j < kPiMoments; ++j) {
                for (int l = 0; l < kLanes; ++l) {
                  sum[j][l] += e[l];
                  e[l] *= v[l];
                }
              }
            });
  for (int j = 0; j < kPiMoments; ++j) moments[j] += sum_of_lanes(sum[j]);
}

#define ALS_LAZY_ROWS(LEVEL, ATTRIBUTE)                                                            \
  ATTRIBUTE inline void change_##LEVEL(const PiBatchRows& rows, const PiFrame& frame,              \
                                       double* sums, PiChange& result) {                           \
    change(rows, frame, sums, result);                                                             \
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
