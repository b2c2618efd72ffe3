// Device code of knn: the k-th largest of numbers in shared memory, and their order. By all threads
// of a block. Torch-free.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "knn/knn_math.h"

namespace als {

struct KnnRadix {  // in shared memory
  unsigned histogram[256];
  uint32_t prefix;
  unsigned rank;
};

// The k-th largest of n numbers, exactly, by four rounds over 8 bits of their keys. All threads get
// it.
template <int kThreads>
__device__ float kth_largest(const float* value, int n, int k, KnnRadix& radix) {
  if (threadIdx.x == 0) {
    radix.prefix = 0;
    radix.rank = static_cast<unsigned>(k);
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) radix.histogram[i] = 0;
    __syncthreads();
    const uint32_t prefix = radix.prefix;
    const uint32_t known = shift == 24 ? 0u : 0xFFFFFFFFu << (shift + 8);
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t key = distance_key(value[i]);
      if ((key & known) == prefix) atomicAdd(&radix.histogram[key >> shift & 255u], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane l has the digits 8 l to 8 l + 7
      const unsigned rank = radix.rank;
      unsigned mine = 0;
      for (int d = 0; d < 8; ++d) mine += radix.histogram[8 * threadIdx.x + d];
      unsigned from_here = mine;  // keys of these digits and of larger ones
      for (unsigned step = 1; step < 32; step *= 2) {
        const unsigned behind = __shfl_down_sync(0xFFFFFFFFu, from_here, step);
        if (threadIdx.x + step < 32) from_here += behind;
      }
      unsigned left = rank - (from_here - mine);
      if (from_here >= rank && from_here - mine < rank) {  // one lane
        unsigned digit = 8 * threadIdx.x + 7;
        for (; radix.histogram[digit] < left; --digit) left -= radix.histogram[digit];
        radix.prefix = prefix | digit << shift;
        radix.rank = left;
      }
    }
    __syncthreads();
  }
  return key_distance(radix.prefix);
}

// Ascending bitonic sort of the first n (a power of two) entries. Ends with a barrier.
template <int kThreads>
__device__ void sort_entries(uint32_t* keys, int64_t* rows, int n) {
  for (int size = 2; size <= n; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < n / 2; i += kThreads) {
        const int low = 2 * step * (i / step) + i % step;
        const int high = low + step;
        const bool ascending = (low & size) == 0;
        const Neighbour x{keys[low], rows[low]}, y{keys[high], rows[high]};
        if ((y < x) == ascending) {
          keys[low] = y.key, rows[low] = y.index;
          keys[high] = x.key, rows[high] = x.index;
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace als
