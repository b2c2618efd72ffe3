#include "knn/knn_list.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace als {
namespace {

#define ALS_INLINE inline __attribute__((always_inline))

// float32 <-> integers of the same order; its own inverse on the bits.
ALS_INLINE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

// Bisection: a pass over the list is a handful of vector compares, where a selection that moves
// elements mispredicts every second branch.
ALS_INLINE float kth(const float* score, const float* error, int64_t n, int64_t k,
                     int32_t* scratch) {
  int32_t lowest = INT32_MAX, highest = INT32_MIN;
  for (int64_t e = 0; e < n; ++e) {
    const float bound = score[e] - error[e];
    const float below = bound - fabsf(bound) * 2.4e-7f;  // the two subtractions round
    int32_t bits;
    memcpy(&bits, &below, sizeof bits);
    scratch[e] = ordered(bits);
    lowest = std::min(lowest, scratch[e]);
    highest = std::max(highest, scratch[e]);
  }
  int64_t low = lowest, high = int64_t{highest} + 1;  // k of them are >= low, fewer are >= high
  while (high - low > 1) {
    const auto middle = static_cast<int32_t>(low + (high - low) / 2);
    int32_t count = 0;
    for (int64_t e = 0; e < n; ++e) count += scratch[e] >= middle;
    (count >= k ? low : high) = middle;
    if (count == k) break;
  }
  const int32_t bits = ordered(static_cast<int32_t>(low));
  float bound;
  memcpy(&bound, &bits, sizeof bound);
  return bound;
}

ALS_INLINE int64_t keep(float* score, float* error, int64_t* index, int64_t n, float limit) {
  int64_t kept = 0;
  for (int64_t e = 0; e < n; ++e) {  // no branch: every second one would be mispredicted
    const float s = score[e], r = error[e];
    score[kept] = s;
    error[kept] = r;
    index[kept] = index[e];
    kept += s + r >= limit;
  }
  return kept;
}

float kth_baseline(const float* score, const float* error, int64_t n, int64_t k, int32_t* scratch) {
  return kth(score, error, n, k, scratch);
}
int64_t keep_baseline(float* score, float* error, int64_t* index, int64_t n, float limit) {
  return keep(score, error, index, n, limit);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) float kth_avx2(const float* score, const float* error, int64_t n,
                                               int64_t k, int32_t* scratch) {
  return kth(score, error, n, k, scratch);
}
__attribute__((target("avx512f"))) float kth_avx512(const float* score, const float* error,
                                                    int64_t n, int64_t k, int32_t* scratch) {
  return kth(score, error, n, k, scratch);
}

__attribute__((target("avx512f,popcnt"))) int64_t keep_avx512(float* score, float* error,
                                                              int64_t* index, int64_t n,
                                                              float limit) {
  int64_t kept = 0;
  const __m512 least = _mm512_set1_ps(limit);
  for (int64_t e = 0; e < n; e += 16) {
    const int64_t left = n - e;
    const auto valid = static_cast<__mmask16>(left < 16 ? (1u << left) - 1 : 0xFFFFu);
    const __m512 s = _mm512_maskz_loadu_ps(valid, score + e);
    const __m512 r = _mm512_maskz_loadu_ps(valid, error + e);
    const __mmask16 chosen = _mm512_mask_cmp_ps_mask(valid, _mm512_add_ps(s, r), least, _CMP_GE_OQ);
    const auto low = static_cast<__mmask8>(chosen), high = static_cast<__mmask8>(chosen >> 8);
    const __m512i a = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(valid), index + e);
    const __m512i b = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(valid >> 8), index + e + 8);
    const int first = __builtin_popcount(low), all = __builtin_popcount(chosen);
    const auto store = static_cast<__mmask16>((1u << all) - 1);
    _mm512_mask_storeu_ps(score + kept, store, _mm512_maskz_compress_ps(chosen, s));
    _mm512_mask_storeu_ps(error + kept, store, _mm512_maskz_compress_ps(chosen, r));
    _mm512_mask_storeu_epi64(index + kept, static_cast<__mmask8>((1u << first) - 1),
                             _mm512_maskz_compress_epi64(low, a));
    _mm512_mask_storeu_epi64(index + kept + first, static_cast<__mmask8>((1u << (all - first)) - 1),
                             _mm512_maskz_compress_epi64(high, b));
    kept += all;
  }
  return kept;
}
#endif

}  // namespace

KnnListOps knn_list_ops(CpuLevel level) {
#if defined(__x86_64__)
  if (level >= CpuLevel::kAvx512) return {kth_avx512, keep_avx512};
  if (level >= CpuLevel::kAvx2) return {kth_avx2, keep_baseline};
#endif
  return {kth_baseline, keep_baseline};
}

// By digits of the key, which has no branch to mispredict; rows of one key then by index.
void sort_neighbours(std::vector<Neighbour>& list, std::vector<Neighbour>& scratch) {
  const size_t n = list.size();
  if (n < 64) {
    std::sort(list.begin(), list.end());
    return;
  }
  scratch.resize(n);
  uint32_t start[4][256] = {};
  for (const Neighbour& x : list) {
    for (int digit = 0; digit < 4; ++digit) ++start[digit][x.key >> (8 * digit) & 255];
  }
  for (int digit = 0; digit < 4; ++digit) {
    uint32_t* at = start[digit];
    if (at[list[0].key >> (8 * digit) & 255] == n) continue;  // all the same
    uint32_t sum = 0;
    for (int value = 0; value < 256; ++value) {
      const uint32_t count = at[value];
      at[value] = sum;
      sum += count;
    }
    for (const Neighbour& x : list) scratch[at[x.key >> (8 * digit) & 255]++] = x;
    list.swap(scratch);
  }
  for (size_t begin = 0; begin < n;) {
    size_t end = begin + 1;
    while (end < n && list[end].key == list[begin].key) ++end;
    if (end - begin > 1) std::sort(list.begin() + begin, list.begin() + end);
    begin = end;
  }
}

}  // namespace als
