// Device code of weighted_loss beside that of sample_loss. Torch-free.
#pragma once

#include <cstdint>

#include "sample_loss/loss_row.cuh"
#include "sample_loss/loss_total.cuh"

namespace als {

constexpr int kTotalThreads = 512;
constexpr int kScaleThreads = 256;
constexpr int64_t kScaleBlocks = 1024;  // then threads take more

// What: total[i] = sum over its rows of weight * loss, where the kernel of the rows has not done
// it. Grid: one block a total (grid-stride). Shared memory: 4 KiB, the lanes' sums. Determinism:
// float64 in one order, whatever the grid.
template <typename T>
__global__ void __launch_bounds__(kTotalThreads) weighted_total(const T* weight,  // [totals * rows]
                                                                const T* loss,    // [totals * rows]
                                                                T* total,         // [totals]
                                                                int64_t totals, int64_t rows) {
  __shared__ double lanes[kTotalLanes];
  for (int64_t i = blockIdx.x; i < totals; i += gridDim.x) {
    const double sum = weighted_sum(weight + i * rows, loss + i * rows, rows, lanes);
    if (threadIdx.x == 0) total[i] = static_cast<T>(sum);
    __syncthreads();
  }
}

// What: the kept gradient times the incoming one of total; nothing is touched where that is 1.
// Grid: 16 bytes a thread (grid-stride); the factor is on the device.
// Shared memory: none.  Determinism: no reduction.
template <typename scalar_t>
__global__ void __launch_bounds__(kScaleThreads)
    scale_gradient(scalar_t* grad,                        // [count]
                   const accumulate_t<scalar_t>* factor,  // []
                   int64_t count) {
  using T = accumulate_t<scalar_t>;
  const T f = *factor;
  if (f == 1) return;
  constexpr int kPack = 16 / sizeof(scalar_t);
  const int64_t head = min(static_cast<int64_t>(elements_to_pack(grad)), count);
  const int64_t packs = (count - head) / kPack;
  const int64_t thread = int64_t{blockIdx.x} * kScaleThreads + threadIdx.x;
  for (int64_t p = thread; p < packs; p += int64_t{gridDim.x} * kScaleThreads) {
    scalar_t* at = grad + head + p * kPack;
    T x[kPack];
    load_numbers<kPack>(at, x);
    ALS_UNROLL
    for (int j = 0; j < kPack; ++j) x[j] *= f;
    store_numbers<kPack>(at, x);
  }
  if (thread < count - packs * kPack) {
    scalar_t* at = grad + (thread < head ? thread : packs * kPack + thread);
    store(at, to_real(*at) * f);
  }
}

}  // namespace als
