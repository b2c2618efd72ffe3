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

#define __global__ [[maybe_unused]] static
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
  unsigned x = 0, y = 0;
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

struct alignas(16) float4 {
  float x, y, z, w;
};

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

inline void atomicMin(unsigned long long* address, unsigned long long value) {
  unsigned long long old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  emulated::Warp& warp = *emulated::warps[threadIdx.x / 32];
  warp.slots[threadIdx.x % 32] = predicate;
  warp.barrier.wait();
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) ballot |= unsigned{warp.slots[lane] != 0} << lane;
  warp.barrier.wait();
  return ballot;
}

inline int atomicCAS(int* address, int expected, int desired) {
  __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_RELAXED,
                              __ATOMIC_RELAXED);
  return expected;  // what stood there, also after a success
}

template <typename T, typename V>
T atomicAdd(T* address, V value) {
  return __atomic_fetch_add(address, static_cast<T>(value), __ATOMIC_RELAXED);
}

inline void atomicMax(unsigned long long* address, unsigned long long value) {
  unsigned long long seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(address, &seen, value, false,
                                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float __double2float_rd(double x) {
  const auto nearest = static_cast<float>(x);
  return nearest > x ? std::nextafter(nearest, -INFINITY) : nearest;
}

inline float __double2float_ru(double x) { return -__double2float_rd(-x); }

namespace emulated {

// kernel<<<blocks, threads>>>(...) as launch(blocks, threads, [&] { kernel(...); });
template <typename Kernel>
void launch(Dim blocks, unsigned threads, const Kernel& kernel) {
  gridDim = blocks;
  for (unsigned y = 0; y < std::max(blocks.y, 1u); ++y) {
    for (unsigned x = 0; x < blocks.x; ++x) {
      Barrier barrier(threads);
      block = &barrier;
      warps.clear();
      for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
      std::vector<std::thread> pool;
      for (unsigned t = 0; t < threads; ++t) {
        pool.emplace_back([&kernel, x, y, t] {
          blockIdx = {x, y};
          threadIdx = {t, 0};
          kernel();
        });
      }
      for (std::thread& thread : pool) thread.join();
    }
  }
}

template <typename Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
  launch(Dim{blocks, 1}, threads, kernel);
}

}  // namespace emulated
