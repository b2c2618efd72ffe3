// The scoring kernel for AVX-512: 12 x 32 scores in 24 of 32 registers.
#include "knn/knn_tile.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,fma")

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

inline __attribute__((always_inline)) void multiply_add(float query, Vec panel, Vec& sum) {
  sum += query * panel;
}

#include "knn/knn_tile_kernel.h"

}  // namespace

const KnnTileKernel knn_tile_avx512{kRows, kColumns, 1, run, products, reach};

}  // namespace als
#endif
