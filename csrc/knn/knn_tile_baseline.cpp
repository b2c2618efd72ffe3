// The scoring kernel for any processor: vectors of four floats.
#include "knn/knn_tile.h"

namespace als {
namespace {

constexpr int kLanes = 4;
constexpr int kRows = 6;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

typedef uint32_t Mask;

inline __attribute__((always_inline)) Mask mask_greater(Vec a, Vec b) {
  const auto greater = a > b;
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(greater[i] & 1) << i;
  return mask;
}
inline __attribute__((always_inline)) bool any(Mask a, Mask b) { return (a | b) != 0; }
inline __attribute__((always_inline)) uint32_t bits(Mask m) { return m; }

inline __attribute__((always_inline)) void multiply_add(float query, Vec panel, Vec& sum) {
  sum += query * panel;
}

#include "knn/knn_tile_kernel.h"

}  // namespace

extern const KnnTileKernel knn_tile_baseline;
const KnnTileKernel knn_tile_baseline{kRows, kColumns, 1, run, products, reach};

}  // namespace als
