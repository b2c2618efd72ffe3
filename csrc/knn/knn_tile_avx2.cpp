// The scoring kernel for AVX2 with FMA: 6 x 16 scores in 12 of 16 registers.
#include "knn/knn_tile.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma")

namespace als {
namespace {

constexpr int kLanes = 8;
constexpr int kRows = 6;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

typedef uint32_t Mask;

inline __attribute__((always_inline)) Mask mask_greater(__m256 a, __m256 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
inline __attribute__((always_inline)) bool any(Mask a, Mask b) { return (a | b) != 0; }
inline __attribute__((always_inline)) uint32_t bits(Mask m) { return m; }

inline __attribute__((always_inline)) void multiply_add(float query, Vec panel, Vec& sum) {
  sum += query * panel;
}

#include "knn/knn_tile_kernel.h"

}  // namespace

const KnnTileKernel knn_tile_avx2{kRows, kColumns, 1, run, products, reach};

}  // namespace als
#endif
