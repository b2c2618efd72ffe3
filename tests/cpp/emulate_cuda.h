// Runs torch-free device code (*_kernels.cuh) on the CPU: a fiber a CUDA thread, one block after
// the other, barriers for __syncthreads and warp shuffles. Include before the kernels. For small
// grids. Shared memory is a function's static storage, so kernels must write it before they
// read it; dynamic shared memory is as large as the launch says, so that AddressSanitizer sees its
// end, and starts as NaNs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "emulate_threads.h"

#define __global__ [[maybe_unused]] static
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define ALS_DYNAMIC_SHARED(name) unsigned char* const name = emulated::dynamic_shared

namespace emulated {

struct Dim {
  unsigned x = 0, y = 0;
};

struct Warp {
  Barrier barrier{32};
  unsigned char slots[2][32][32];
  unsigned turn[32] = {};  // of each lane: the set of slots that it uses next
};

inline Barrier* block = nullptr;
inline std::vector<std::unique_ptr<Warp>> warps;
inline unsigned char* dynamic_shared = nullptr;
inline size_t dynamic_shared_bytes = 0;
inline unsigned long block_number = 0;           // counts the blocks that were run
inline std::vector<void (*)()> at_end_of_block;  // what else has to hold there

}  // namespace emulated

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const float sign = x.bits & 0x8000u ? -1.0f : 1.0f;
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25)
                          : std::ldexp(static_cast<float>(fraction), -24));
}

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline emulated::Dim threadIdx, blockIdx;
inline emulated::Dim gridDim;

using std::max;
using std::min;

inline void __syncthreads() { emulated::block->wait(); }

namespace emulated {

template <typename T>
struct Lanes {
  const unsigned char (*slots)[32];
  T operator[](unsigned lane) const {
    T value;
    std::memcpy(&value, slots[lane], sizeof value);
    return value;
  }
};

// What the lanes of a warp bring to one collective instruction. Two sets of slots, in turn: whoever
// writes a set again has met all lanes at the barrier in between, and they had read it by then.
template <typename T>
Lanes<T> exchange(const T& mine) {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0][0]));
  Warp& warp = *warps[threadIdx.x / 32];
  unsigned& turn = warp.turn[threadIdx.x % 32];
  auto& slots = warp.slots[turn];
  turn ^= 1;
  std::memcpy(slots[threadIdx.x % 32], &mine, sizeof mine);
  warp.barrier.wait();
  return {slots};
}

}  // namespace emulated

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::exchange(value)[threadIdx.x % 32 ^ mask];
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulated::exchange(value)[lane];
}

inline void atomicMin(unsigned long long* address, unsigned long long value) {
  unsigned long long old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  const auto predicates = emulated::exchange(predicate);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) ballot |= unsigned{predicates[lane]} << lane;
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

// kernel<<<blocks, threads, bytes>>>(...) as launch(blocks, threads, [&] { kernel(...); }, bytes).
template <typename Kernel>
void launch(Dim blocks, unsigned threads, const Kernel& kernel, size_t bytes = 1 << 16) {
  gridDim = blocks;
  for (unsigned y = 0; y < std::max(blocks.y, 1u); ++y) {
    for (unsigned x = 0; x < blocks.x; ++x) {
      Barrier barrier(threads);
      block = &barrier;
      warps.clear();
      for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
      void* shared = nullptr;  // the size may be no multiple of the alignment
      if (posix_memalign(&shared, 1024, bytes) != 0) std::abort();
      const std::unique_ptr<void, void (*)(void*)> owner(shared, std::free);
      dynamic_shared = static_cast<unsigned char*>(std::memset(shared, 0xFF, bytes));
      dynamic_shared_bytes = bytes;
      ++block_number;
      blockIdx = {x, y};
      run_fibers(threads, kernel, [](unsigned t) { threadIdx = {t, 0}; });
      for (const auto check : at_end_of_block) check();
    }
  }
}

template <typename Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel, size_t bytes = 1 << 16) {
  launch(Dim{blocks, 1}, threads, kernel, bytes);
}

}  // namespace emulated
