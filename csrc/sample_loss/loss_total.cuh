// The weighted sum of the losses of a batch. Torch-free.
#pragma once

#include <cstdint>

namespace als {

constexpr int kTotalLanes = 512;

// sum of weight * loss in thread 0 of a block: lane l adds up rows l, l + kTotalLanes, ..., then
// lanes in a tree, in float64. One order, whatever the number of threads, which share the lanes.
template <typename T>
__device__ double weighted_sum(const T* weight, const T* loss,  // [rows]
                               int64_t rows,
                               double* lanes) {  // [kTotalLanes] in shared memory
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  for (int lane = thread; lane < kTotalLanes; lane += threads) {
    double sum = 0;
    for (int64_t r = lane; r < rows; r += kTotalLanes) {
      sum += static_cast<double>(weight[r]) * static_cast<double>(loss[r]);
    }
    lanes[lane] = sum;
  }
  __syncthreads();
  for (int step = kTotalLanes / 2; step > 0; step /= 2) {
    for (int lane = thread; lane < step; lane += threads) lanes[lane] += lanes[lane + step];
    __syncthreads();
  }
  return lanes[0];
}

}  // namespace als
