// What the CUDA loss kernels have in common: elements, a row's target, its result, its gradient.
// Torch-free.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <cstring>

#include "common/store16.cuh"
#include "sample_loss/loss_job.h"

namespace als {

constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline float to_real(float x) { return x; }
__device__ inline double to_real(double x) { return x; }
__device__ inline float to_real(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_real(__half x) { return __half2float(x); }
__device__ inline void store(float* out, float x) { *out = x; }
__device__ inline void store(double* out, double x) { *out = x; }
__device__ inline void store(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }
__device__ inline void store(__half* out, float x) { *out = __float2half_rn(x); }

template <typename To, typename From>
__device__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// 16 aligned bytes of elements as numbers, and back. Of 16-bit ones as words: nvcc would take a
// structure of them apart into accesses of 2 bytes.
__device__ inline void load16(const float* from, float* x) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
__device__ inline void load16(const double* from, double* x) {
  const double2 v = *reinterpret_cast<const double2*>(from);
  x[0] = v.x, x[1] = v.y;
}
__device__ inline void split(uint32_t word, const __nv_bfloat16*, float* x) {
  x[0] = bits_as<float>(word << 16);
  x[1] = bits_as<float>(word & 0xFFFF0000u);
}
__device__ inline void split(uint32_t word, const __half*, float* x) {
  const float2 both = __half22float2(bits_as<__half2>(word));
  x[0] = both.x, x[1] = both.y;
}
template <typename half_t>
__device__ void load16(const half_t* from, float* x) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  split(v.x, from, x), split(v.y, from, x + 2), split(v.z, from, x + 4), split(v.w, from, x + 6);
}
__device__ inline float4 packed(const float*, const float* x) { return {x[0], x[1], x[2], x[3]}; }
__device__ inline double2 packed(const double*, const double* x) { return {x[0], x[1]}; }
__device__ inline uint32_t join(const __nv_bfloat16*, const float* x) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(x[0], x[1]));
}
__device__ inline uint32_t join(const __half*, const float* x) {
  return bits_as<uint32_t>(__floats2half2_rn(x[0], x[1]));
}
template <typename half_t>
__device__ uint4 packed(const half_t* to, const float* x) {
  return {join(to, x), join(to, x + 2), join(to, x + 4), join(to, x + 6)};
}

// Elements from a pointer to the next 16 bytes.
template <typename scalar_t>
__device__ int elements_to_pack(const scalar_t* from) {
  return static_cast<int>((0 - reinterpret_cast<uintptr_t>(from)) % 16 / sizeof(scalar_t));
}

// kSize neighbouring elements: one, or what fills 16 aligned bytes once or twice.
template <int kSize, typename scalar_t, typename T>
__device__ void load_numbers(const scalar_t* from, T* x) {
  if constexpr (kSize == 1) {
    *x = to_real(*from);
  } else {
    constexpr int kPack = 16 / sizeof(scalar_t);
    static_assert(kSize % kPack == 0);
    ALS_UNROLL
    for (int i = 0; i < kSize; i += kPack) load16(from + i, x + i);
  }
}
template <int kSize, typename scalar_t, typename T>
__device__ void store_numbers(scalar_t* to, const T* x) {
  if constexpr (kSize == 1) {
    store(to, *x);
  } else {
    constexpr int kPack = 16 / sizeof(scalar_t);
    static_assert(kSize % kPack == 0);
    ALS_UNROLL
    for (int i = 0; i < kSize; i += kPack) store16(to + i, packed(to, x + i));
  }
}

// A row's target: y < 0 without class indices, else a class that may be read.
template <typename T>
struct DeviceTarget {
  RowFate fate;
  int64_t y;
  T logit, class_weight;
};

template <typename scalar_t, typename grad_t>
__device__ auto target_of(const LossJob<scalar_t, grad_t>& job, int64_t r) {
  using T = accumulate_t<scalar_t>;
  if (!job.index) return DeviceTarget<T>{RowFate::kLoss, -1, T(0), T(1)};
  const int64_t y = job.index[r];
  const RowFate fate = fate_of(y, job.classes, job.ignore_index);
  const int64_t safe = fate == RowFate::kLoss ? y : 0;
  return DeviceTarget<T>{fate, safe, to_real(job.row(r)[safe]),
                         job.class_weight ? job.class_weight[safe] : T(1)};
}

// Loss and gradient of a row without a loss.
template <typename T>
__device__ T value_without_loss(RowFate fate) {
  return fate == RowFate::kIgnored ? T(0) : T(NAN);
}

template <typename scalar_t, typename grad_t>
__device__ auto side_weights(const LossJob<scalar_t, grad_t>& job, int64_t r) {
  using T = accumulate_t<scalar_t>;
  const T eps = job.spec.label_smoothing;
  return SideWeights<T>{job.dense ? job.dense + r * job.classes : nullptr, job.class_weight,
                        1 - eps, eps / static_cast<T>(job.classes)};
}

template <typename T>
struct Finish {
  const RowSums<T>& sums;
  const RowTarget<T>& target;
  T scale;
  RowResult<T>& result;
  template <class Loss>
  ALS_HOST_DEVICE void operator()(const Loss& loss) const {
    result = finish_row(loss, sums, target, scale);
  }
};

// What the gradient of a row needs.
template <typename T>
struct DeviceRow {
  DeviceTarget<T> target;
  SideTarget side;
  SideWeights<T> q;
  T scale, top_mass;
  RowResult<T> result;  // of finish_device_row
  int64_t top;          // arg max, of the hard bootstrap only

  // g dL/dz_c of a class c != y for e = exp(d), d = z_c - max.
  template <bool kGeneral>
  __device__ T slope(int64_t c, T e, T d) const {
    if constexpr (!kGeneral) return e * result.linear;
    const T slope = softmax_slope(e, d, result.linear, result.log);
    if (side == SideTarget::kArgmax) return c == top ? slope - scale * top_mass : slope;
    return side == SideTarget::kNone ? slope : slope - scale * q(c);
  }
  // Of any class, and whatever becomes of the row.
  template <bool kGeneral>
  __device__ T gradient(int64_t c, T e, T d) const {
    if (target.fate != RowFate::kLoss) return value_without_loss<T>(target.fate);
    return c == target.y ? result.at_target : slope<kGeneral>(c, e, d);
  }
};

// kGeneral: the loss has a side target or an entropy.
template <bool kGeneral, typename scalar_t, typename grad_t, typename T>
__device__ DeviceRow<T> device_row(const LossJob<scalar_t, grad_t>& job, int64_t r,
                                   const DeviceTarget<T>& target) {
  DeviceRow<T> row{};
  row.target = target;
  row.side = kGeneral ? job.spec.side() : SideTarget::kNone;
  row.q = side_weights(job, r);
  row.scale = job.grad ? job.scale[r] : T(0);
  row.top_mass = target.class_weight * (1 - job.spec.parameters[0]);
  return row;
}

template <typename scalar_t, typename grad_t, typename T>
__device__ void write_row(const LossJob<scalar_t, grad_t>& job, int64_t r, RowFate fate, T loss,
                          const RowSums<T>& sums) {
  if (job.losses) job.losses[r] = fate == RowFate::kLoss ? loss : value_without_loss<T>(fate);
  if (job.state_out) {
    job.state_out[3 * r] = sums.max;
    job.state_out[3 * r + 1] = sums.rest;
    job.state_out[3 * r + 2] = sums.extra;
  }
}

// Result of the sums of a row. Writes losses and state from one thread.
template <bool kGeneral, typename scalar_t, typename grad_t, typename T>
__device__ void finish_device_row(const LossJob<scalar_t, grad_t>& job, int64_t r,
                                  DeviceRow<T>& row, const RowSums<T>& sums, int64_t top,
                                  bool writes) {
  const DeviceTarget<T>& target = row.target;
  row.top = top;
  const bool indexed = target.y >= 0;
  const T log_hit = indexed ? target.logit - sums.max : T(0);
  RowTarget<T> row_target{indexed ? exp_of_nonpositive(log_hit) : T(0), log_hit,
                          target.class_weight, T(0), T(0)};
  if (row.side == SideTarget::kArgmax) {
    row_target.side_mass = row.top_mass;
    row_target.side = top == target.y ? row.top_mass : T(0);
  } else if (row.side != SideTarget::kNone) {
    row_target.side_mass = sums.extra;
    row_target.side = indexed ? row.q(target.y) : T(0);
  }
  visit_loss(job.spec, Finish<T>{sums, row_target, row.scale, row.result});
  if (writes) write_row(job, r, target.fate, row.result.loss, sums);
}

// The number where the other is NaN.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// Sums, maxima and minima over groups of `lanes` neighbouring lanes (a power of two); every lane of
// the group receives the result, and every lane of the warp must call.
template <typename T>
__device__ T group_sum(T x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}
template <typename T>
__device__ T group_max(T x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    x = larger(__shfl_xor_sync(kWholeWarp, x, step), x);
  }
  return x;
}
template <typename T>
__device__ T group_min(T x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    x = min(x, __shfl_xor_sync(kWholeWarp, x, step));
  }
  return x;
}

}  // namespace als
