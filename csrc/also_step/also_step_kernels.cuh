// Device code of also_step. Torch-free.
#pragma once

#ifdef __CUDACC__  // the tests run this file on the CPU, without 16-bit types
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>

#include "also_step/also_step_math.h"

namespace als {

constexpr int kAlsoThreads = 256;
constexpr int64_t kAlsoChunk = 4096;  // elements a block: four 16-byte vectors a thread
constexpr int kAlsoBatch = 48;        // tensors a launch: kernel arguments stay below 4 KiB

// The tensors of one launch, passed by value as the kernel's argument.
template <typename P, typename S>
struct AlsoBatch {
  AlsoPointers<P, S> tensors[kAlsoBatch];
  int64_t chunk_end[kAlsoBatch];  // running number of chunks, of which a block takes one
  int count;
  AlsoOptions options;
  double lr;
  const double* lr_tensor;  // [1], replaces lr; may be null
  const float* grad_scale;  // [1]; may be null
  const float* found_inf;   // [1]; may be null

  __device__ bool skipped() const { return found_inf != nullptr && *found_inf != 0.0f; }
};
static_assert(sizeof(AlsoBatch<float, float>) <= 4096, "kernel arguments of CUDA 11 and 12.0");

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) AlsoVector {
  T lane[kWidth];
};

// Explicit conversions: torch's build flags switch the implicit ones of the 16-bit types off.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
#ifdef __CUDACC__
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }
#endif

// Elements [begin, begin + kWidth) of one tensor. base and v_max are read only where they exist.
template <bool kAmsgrad, bool kHalf, int kWidth, typename P, typename S>
__device__ __forceinline__ void also_step_vector(const AlsoPointers<P, S>& t, int64_t begin,
                                                 const AlsoCoefficients<S>& c) {
  using ParamVector = AlsoVector<P, kWidth>;
  using StateVector = AlsoVector<S, kWidth>;
  const auto param = reinterpret_cast<ParamVector*>(t.param + begin);
  const auto exp_avg = reinterpret_cast<StateVector*>(t.exp_avg + begin);
  const auto exp_avg_sq = reinterpret_cast<StateVector*>(t.exp_avg_sq + begin);
  const auto max_exp_avg_sq = reinterpret_cast<StateVector*>(t.max_exp_avg_sq + begin);
  const auto base_pointer = reinterpret_cast<StateVector*>(t.base + begin);
  ParamVector theta = *param;
  const ParamVector grad = *reinterpret_cast<const ParamVector*>(t.grad + begin);
  StateVector m = *exp_avg;
  StateVector v = *exp_avg_sq;
  StateVector v_max{}, base{};
  if constexpr (kAmsgrad) v_max = *max_exp_avg_sq;
  if constexpr (kHalf) base = *base_pointer;
  for (int i = 0; i < kWidth; ++i) {
    S point = widen(theta.lane[i]);
    also_element<kAmsgrad, kHalf>(point, widen(grad.lane[i]), base.lane[i], m.lane[i], v.lane[i],
                                  v_max.lane[i], c);
    narrow(point, theta.lane[i]);
  }
  *param = theta;
  *exp_avg = m;
  *exp_avg_sq = v;
  if constexpr (kAmsgrad) *max_exp_avg_sq = v_max;
  if constexpr (kHalf) *base_pointer = base;
}

// What: Adam's main step and the next half step, one pass.  Equation: also_step.h.
// Grid: one block a chunk of 4096 elements of one tensor of the batch, 16-byte vectors.
// Shared memory: the coefficients of the tensor.
// Determinism: elementwise.
template <bool kAmsgrad, bool kHalf, typename P, typename S>
__global__ void __launch_bounds__(kAlsoThreads)
    also_step_kernel(const __grid_constant__ AlsoBatch<P, S> batch) {
  if (batch.skipped()) return;
  int low = 0;  // the first tensor whose chunks end behind this block's
  for (int high = batch.count - 1; low < high;) {
    const int middle = (low + high) / 2;
    if (batch.chunk_end[middle] > blockIdx.x) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const AlsoPointers<P, S>& t = batch.tensors[low];

  __shared__ AlsoCoefficients<S> shared;
  if (threadIdx.x == 0) {
    shared = also_coefficients<S>(batch.options,
                                  batch.lr_tensor != nullptr ? *batch.lr_tensor : batch.lr,
                                  batch.grad_scale != nullptr ? *batch.grad_scale : 1.0, *t.step);
  }
  __syncthreads();
  const AlsoCoefficients<S> c = shared;

  const int64_t first_chunk = low > 0 ? batch.chunk_end[low - 1] : 0;
  const int64_t begin = (blockIdx.x - first_chunk) * kAlsoChunk;
  const int64_t end = begin + kAlsoChunk < t.numel ? begin + kAlsoChunk : t.numel;
  constexpr int kWidth = 16 / sizeof(S);
  const auto state_bits =
      reinterpret_cast<uintptr_t>(t.exp_avg) | reinterpret_cast<uintptr_t>(t.exp_avg_sq) |
      reinterpret_cast<uintptr_t>(t.max_exp_avg_sq) | reinterpret_cast<uintptr_t>(t.base);
  const auto param_bits =
      reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad);
  const bool aligned = state_bits % 16 == 0 && param_bits % (kWidth * sizeof(P)) == 0;
  int64_t vectors_end = begin;
  if (aligned) {
    vectors_end = begin + (end - begin) / kWidth * kWidth;
    for (int64_t i = begin + threadIdx.x * kWidth; i < vectors_end; i += kAlsoThreads * kWidth) {
      also_step_vector<kAmsgrad, kHalf, kWidth>(t, i, c);
    }
  }
  for (int64_t i = vectors_end + threadIdx.x; i < end; i += kAlsoThreads) {
    also_step_vector<kAmsgrad, kHalf, 1>(t, i, c);
  }
}

// What: step <- step + advances, for every tensor of the batch. A launch of its own, because every
// block of also_step_kernel reads the step.  Grid: one block, one thread a tensor.
// Shared memory: none.  Determinism: integer.
template <typename P, typename S>
__global__ void also_advance_kernel(const __grid_constant__ AlsoBatch<P, S> batch,
                                    int64_t advances) {
  const auto i = static_cast<int>(threadIdx.x);
  if (i < batch.count && !batch.skipped()) *batch.tensors[i].step += advances;
}

}  // namespace als
