// The scoring kernel for AVX-512 with bf16 dot products: 12 x 32 scores, two features a step.
#include "knn/knn_tile.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bf16,fma")

namespace als {
namespace {

constexpr int kLanes = 16;
constexpr int kRows = 12;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

typedef __mmask16 Mask;

inline __attribute__((always_inline)) Mask mask_greater(__m512 a, __m512 b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}
inline __attribute__((always_inline)) bool any(Mask a, Mask b) { return !_mm512_kortestz(a, b); }
inline __attribute__((always_inline)) uint32_t bits(Mask m) { return m; }

// A float here is the bits of two bf16 numbers; nothing computes with it.
inline __attribute__((always_inline)) void multiply_add(float query, Vec panel, Vec& sum) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_ps(query), (__m512bh)panel);
}

#include "knn/knn_tile_kernel.h"

}  // namespace

const KnnTileKernel knn_tile_bf16{kRows, kColumns, 2, run, products, reach};

}  // namespace als
#endif
