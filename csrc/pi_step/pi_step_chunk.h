// The pass over the entries on the CPU, one chunk at a time, for AVX-512, AVX2 and the baseline.
// Torch-free. Plain branch-free loops over blocks of kLanes entries, which compilers vectorise at
// any width. Chunks, and the order of additions in them, do not depend on the threads.
#pragma once

#include <cstring>

#include "common/cpu_level.h"
#include "pi_step/pi_step_math.h"

namespace als {

constexpr int64_t kPiChunk = 8192;  // 32 KiB of u: the second sweep reads it from the cache

struct ChunkSums {
  float max = -INFINITY, max_half = -INFINITY;  // in base 2
  double sum = 0.0, sum_half = 0.0;             // of 2^(x - max)
};

using ChunkFunction = ChunkSums (*)(const float* u, const float* log_prior, int64_t count,
                                    const PiExponent& exponent);

namespace chunk_detail {

#define ALS_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 128;
constexpr int kTotals = kLanes / 4;  // float64 totals; two levels of a tree are added as floats

ALS_INLINE float larger(float a, float b) { return a > b ? a : b; }

// 2^x for x <= 0 within 2 ulp: 2^round(x) times a polynomial of degree 6 (relative error 2e-9 on
// [-1/2, 1/2]). Below 2^-125 (and for NaN, which -inf entries give) it is 2^-125, which no sum with
// a term of 1 can notice.
ALS_INLINE float exp2_negative(float x) {
  x = larger(x, -125.0f);
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: x + kMagic has round(x) in its low bits
  const float shifted = x + kMagic;
  const float f = x - (shifted - kMagic);
  float p = 0.00015353361959569156f * f + 0.0013398875016719103f;
  p = p * f + 0.00961843691766262f;
  p = p * f + 0.055503323674201965f;
  p = p * f + 0.24022647738456726f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
  uint32_t bits, exponent;
  std::memcpy(&bits, &p, 4);
  std::memcpy(&exponent, &shifted, 4);
  bits += exponent << 23;
  std::memcpy(&p, &bits, 4);
  return p;
}

// 2^(x - max) for x = c prior + (high + low) u: the large terms cancel in the first multiply-add.
template <bool kPrior>
ALS_INLINE float term(float u, float prior, float high, float low, float c, float max) {
  float x = high * u - max;
  x = low * u + x;
  if (kPrior) x = c * prior + x;
  return exp2_negative(x);
}

ALS_INLINE void add_tree(float* w, double* totals) {
  for (int l = 0; l < kLanes / 2; ++l) w[l] += w[l + kLanes / 2];
  for (int l = 0; l < kLanes / 4; ++l) w[l] += w[l + kLanes / 4];
  for (int l = 0; l < kTotals; ++l) totals[l] += w[l];
}

template <bool kPrior>
ALS_INLINE ChunkSums sum_blocks(const float* u, const float* log_prior, int64_t count,
                                const PiExponent& e) {
  const int64_t whole = count / kLanes * kLanes;
  float tail_u[kLanes], tail_prior[kLanes];  // the ragged end, padded with what adds nothing
  for (int l = 0; l < kLanes; ++l) {
    const bool inside = whole + l < count;
    tail_u[l] = inside ? u[whole + l] : -INFINITY;
    tail_prior[l] = kPrior && inside ? log_prior[whole + l] : 0.0f;
  }
  const bool tail = whole < count;

  float max[kLanes], max_half[kLanes];
  for (int l = 0; l < kLanes; ++l) max[l] = max_half[l] = -INFINITY;
  for (int64_t i = 0; i < whole + tail; i += kLanes) {
    const float* pu = i < whole ? u + i : tail_u;
    if (kPrior) {
      const float* pp = i < whole ? log_prior + i : tail_prior;
      for (int l = 0; l < kLanes; ++l) {
        max[l] = larger(e.high * pu[l] + e.prior * pp[l], max[l]);
        max_half[l] = larger(e.half_high * pu[l] + e.prior * pp[l], max_half[l]);
      }
    } else {
      for (int l = 0; l < kLanes; ++l) max[l] = larger(pu[l], max[l]);
    }
  }
  ChunkSums out;
  for (int l = 0; l < kLanes; ++l) {
    out.max = larger(max[l], out.max);
    out.max_half = larger(max_half[l], out.max_half);
  }
  if (out.max == -INFINITY) return out;
  if (!kPrior) {  // both exponents grow with u
    out.max_half = e.half_high * out.max;
    out.max = e.high * out.max;
  }

  double sum[kTotals] = {}, sum_half[kTotals] = {};
  for (int64_t i = 0; i < whole + tail; i += kLanes) {
    const float* pu = i < whole ? u + i : tail_u;
    const float* pp = !kPrior ? nullptr : i < whole ? log_prior + i : tail_prior;
    for (int l = 0; l < kLanes; l += 16) {  // the next chunk, a cache line at a time
      __builtin_prefetch(pu + kPiChunk + l);
      if (kPrior) __builtin_prefetch(pp + kPiChunk + l);
    }
    float w[kLanes], h[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const float prior = kPrior ? pp[l] : 0.0f;
      w[l] = term<kPrior>(pu[l], prior, e.high, e.low, e.prior, out.max);
      h[l] = term<kPrior>(pu[l], prior, e.half_high, e.half_low, e.prior, out.max_half);
    }
    add_tree(w, sum);
    add_tree(h, sum_half);
  }
  for (int l = 0; l < kTotals; ++l) {
    out.sum += sum[l];
    out.sum_half += sum_half[l];
  }
  return out;
}

ALS_INLINE ChunkSums sum_chunk(const float* u, const float* log_prior, int64_t count,
                               const PiExponent& e) {
  return log_prior ? sum_blocks<true>(u, log_prior, count, e)
                   : sum_blocks<false>(u, nullptr, count, e);
}

inline ChunkSums sum_chunk_baseline(const float* u, const float* log_prior, int64_t count,
                                    const PiExponent& e) {
  return sum_chunk(u, log_prior, count, e);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) inline ChunkSums sum_chunk_avx2(const float* u,
                                                                    const float* log_prior,
                                                                    int64_t count,
                                                                    const PiExponent& e) {
  return sum_chunk(u, log_prior, count, e);
}
__attribute__((target("avx512f,avx512dq,fma"))) inline ChunkSums sum_chunk_avx512(
    const float* u, const float* log_prior, int64_t count, const PiExponent& e) {
  return sum_chunk(u, log_prior, count, e);
}
#endif

#undef ALS_INLINE
}  // namespace chunk_detail

inline ChunkFunction chunk_function(CpuLevel level) {
#if defined(__x86_64__)
  if (level == CpuLevel::kAvx512) return chunk_detail::sum_chunk_avx512;
  if (level == CpuLevel::kAvx2) return chunk_detail::sum_chunk_avx2;
#endif
  return chunk_detail::sum_chunk_baseline;
}

}  // namespace als
