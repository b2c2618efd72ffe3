// Runs torch-free device code (*_kernels.cuh) on the CPU: a fiber a CUDA thread, one block (or
// cluster, emulate_cluster.h) after the other, barriers for __syncthreads and warp shuffles.
// Include before the kernels. For small grids. Shared memory is a function's static storage, so
// kernels must write it before they read it; dynamic shared memory is as large as the launch says,
// so that AddressSanitizer sees its end, and starts as NaNs. Blocks of a cluster run at a time:
// they have dynamic shared memory alone, each its own.
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
#define ALS_DYNAMIC_SHARED(name) unsigned char* const name = emulated::block->shared.get()

namespace emulated {

struct Dim {
  unsigned x = 0, y = 0;
};

struct Warp {
  Barrier barrier{32};
  unsigned char slots[2][32][32];
  unsigned turn[32] = {};  // of each lane: the set of slots that it uses next
};

struct Block {
  Dim index;
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  size_t bytes;
  std::unique_ptr<unsigned char, void (*)(void*)> shared;  // dynamic
  unsigned returned = 0;                                   // threads

  Block(Dim index, unsigned threads, size_t bytes)
      : index(index), barrier(threads), bytes(bytes), shared(nullptr, std::free) {
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
    void* memory = nullptr;  // the size may be no multiple of the alignment
    if (posix_memalign(&memory, 1024, bytes) != 0) std::abort();
    shared.reset(static_cast<unsigned char*>(std::memset(memory, 0xFF, bytes)));
  }
};

// The blocks that run at a time, and their barrier.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned arrived = 0, generation = 0;  // threads at the barrier; how often all have been there
  std::vector<unsigned> arrivals;        // of each thread, and how often it has waited
  std::vector<unsigned> waits;
};

inline Cluster cluster;
inline Block* block = nullptr;                    // of the running thread
inline unsigned thread_number = 0;                // of the running thread, in its cluster
inline unsigned long launch_number = 0;           // counts the clusters that were run
inline std::vector<void (*)()> at_end_of_launch;  // what else has to hold there

}  // namespace emulated

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
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

inline __half __float2half_rn(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  const float size = std::fabs(x);
  if (std::isnan(x)) return {0x7FFF};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};  // rounds to infinity
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  // nearbyint rounds ties to even; a fraction of 2048 carries into the exponent by itself
  const auto fraction = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  const int bits = size < 0x1p-14f ? fraction : (exponent + 14) * 1024 + fraction;
  return {static_cast<uint16_t>(sign | bits)};
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7FFF};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float __expf(float x) { return std::exp(x); }

inline emulated::Dim threadIdx, blockIdx;
inline emulated::Dim gridDim, blockDim;

using std::max;
using std::min;

inline void __syncthreads() { emulated::block->barrier.wait(); }

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
  Warp& warp = *block->warps[threadIdx.x / 32];
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

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned step) {
  const unsigned lane = threadIdx.x % 32;
  return emulated::exchange(value)[lane + step < 32 ? lane + step : lane];
}

inline void __syncwarp() { emulated::exchange(0); }

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

// a b + c towards +infinity. The product of two float32 numbers is exact in float64, and what its
// sum with c loses is known exactly too (Knuth's two-sum).
inline float __fmaf_ru(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c;
  const double other = sum - product;
  const double lost = (product - (sum - other)) + (c - other);
  const auto nearest = static_cast<float>(sum);
  return nearest < sum || (nearest == sum && lost > 0.0) ? std::nextafter(nearest, INFINITY)
                                                         : nearest;
}

inline float __fadd_ru(float a, float b) { return __fmaf_ru(1.0f, a, b); }
inline float __fadd_rd(float a, float b) { return -__fadd_ru(-a, -b); }
inline float __fsqrt_ru(float x) {
  const float nearest = std::sqrt(x);
  return static_cast<double>(nearest) * nearest < x ? std::nextafter(nearest, INFINITY) : nearest;
}

namespace emulated {

// kernel<<<blocks, threads, bytes>>>(...) as launch(blocks, threads, [&] { kernel(...); }, bytes),
// in clusters of `size` blocks along x.
template <typename Kernel>
void launch(Dim blocks, unsigned threads, const Kernel& kernel, size_t bytes = 1 << 16,
            unsigned size = 1) {
  if (blocks.x % size != 0) std::abort();
  gridDim = blocks;
  blockDim = {threads, 1};
  const auto thread = [&] {
    kernel();
    ++block->returned;
  };
  for (unsigned y = 0; y < std::max(blocks.y, 1u); ++y) {
    for (unsigned x = 0; x < blocks.x; x += size) {
      cluster = {};
      for (unsigned b = 0; b < size; ++b) {
        cluster.blocks.push_back(std::make_unique<Block>(Dim{x + b, y}, threads, bytes));
      }
      cluster.arrivals.resize(size * threads);
      cluster.waits.resize(size * threads);
      ++launch_number;
      run_fibers(size * threads, thread, [&](unsigned t) {
        thread_number = t;
        block = cluster.blocks[t / threads].get();
        blockIdx = block->index;
        threadIdx = {t % threads, 0};
      });
      for (const auto check : at_end_of_launch) check();
    }
  }
}

template <typename Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel, size_t bytes = 1 << 16,
            unsigned size = 1) {
  launch(Dim{blocks, 1}, threads, kernel, bytes, size);
}

}  // namespace emulated
