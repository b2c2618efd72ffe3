// Device code of weighted_loss beside that of sample_loss. Torch-free.
#pragma once

#include <cstdint>

namespace als {

constexpr int kTotalThreads = 512;

// What: total[i] = sum over its rows of weight * loss.
// Grid: one block a total (grid-stride); a thread adds every kTotalThreads-th row.
// Shared memory: 4 KiB, the threads' sums.
// Determinism: float64 in one order, whatever the grid.
template <typename T>
__global__ void __launch_bounds__(kTotalThreads) weighted_total(const T* weight,  // [totals * rows]
                                                                const T* loss,    // [totals * rows]
                                                                T* total,         // [totals]
                                                                int64_t totals, int64_t rows) {
  __shared__ double sums[kTotalThreads];
  for (int64_t i = blockIdx.x; i < totals; i += gridDim.x) {
    double sum = 0;
    for (int64_t r = threadIdx.x; r < rows; r += kTotalThreads) {
      sum += static_cast<double>(weight[i * rows + r]) * static_cast<double>(loss[i * rows + r]);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned step = kTotalThreads / 2; step > 0; step /= 2) {
      if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
      __syncthreads();
    }
    if (threadIdx.x == 0) total[i] = static_cast<T>(sums[0]);
    __syncthreads();
  }
}

}  // namespace als
