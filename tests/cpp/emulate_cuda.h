// Runs torch-free device code (*_kernels.cuh) on the CPU: a thread a CUDA thread, one block after
// the other, barriers for __syncthreads and warp shuffles. Include before the kernels. Slow; for
// small grids. Shared memory is a function's static storage, so kernels must write it before they
// read it.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
// What a kernel launched with dynamic shared memory gets: 64 KiB.
#define ALS_DYNAMIC_SHARED(name) alignas(16) static unsigned char name[1 << 16]

namespace emulated {

struct Dim {
  unsigned x = 0;
};

class Barrier {
 public:
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier_, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{32};
  double slots[32];
};

inline Barrier* block = nullptr;
inline std::vector<std::unique_ptr<Warp>> warps;

}  // namespace emulated

inline thread_local emulated::Dim threadIdx, blockIdx;
inline emulated::Dim gridDim;

using std::max;
using std::min;

inline void __syncthreads() { emulated::block->wait(); }

namespace emulated {
template <typename T>
T shuffle(T value, unsigned from) {
  Warp& warp = *warps[threadIdx.x / 32];
  std::memcpy(&warp.slots[threadIdx.x % 32], &value, sizeof value);
  warp.barrier.wait();
  T other;
  std::memcpy(&other, &warp.slots[from], sizeof other);
  warp.barrier.wait();
  return other;
}
}  // namespace emulated

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::shuffle(value, threadIdx.x % 32 ^ mask);
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulated::shuffle(value, lane);
}

inline void atomicAdd(unsigned long long* address, unsigned long long value) {
  __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline void atomicMin(unsigned long long* address, unsigned long long value) {
  unsigned long long old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
}

namespace emulated {

// kernel<<<blocks, threads>>>(...) as launch(blocks, threads, [&] { kernel(...); });
template <typename Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
  gridDim.x = blocks;
  for (unsigned b = 0; b < blocks; ++b) {
    Barrier barrier(threads);
    block = &barrier;
    warps.clear();
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
    std::vector<std::thread> pool;
    for (unsigned t = 0; t < threads; ++t) {
      pool.emplace_back([&kernel, b, t] {
        blockIdx.x = b;
        threadIdx.x = t;
        kernel();
      });
    }
    for (std::thread& thread : pool) thread.join();
  }
}

}  // namespace emulated
