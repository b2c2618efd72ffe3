// Device code of sample_loss, its backward and weighted_loss. Torch-free.
#pragma once

#ifdef __CUDACC__  // the tests run this file on the CPU, without 16-bit types
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>

#include "sample_loss/loss_job.h"

namespace als {

constexpr int kRegisterThreads = 128;
constexpr int kBlockThreads = 512;
constexpr int kBlockWarps = kBlockThreads / 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline float to_real(float x) { return x; }
__device__ inline double to_real(double x) { return x; }
__device__ inline void store(float* out, float x) { *out = x; }
__device__ inline void store(double* out, double x) { *out = x; }
#ifdef __CUDACC__
__device__ inline float to_real(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_real(__half x) { return __half2float(x); }
__device__ inline void store(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }
__device__ inline void store(__half* out, float x) { *out = __float2half_rn(x); }
#endif

// kSize neighbouring elements, moved in transactions of up to 16 bytes.
template <typename scalar_t, int kSize>
struct alignas(kSize * sizeof(scalar_t) < 16 ? kSize * sizeof(scalar_t) : 16) Pack {
  scalar_t value[kSize];
};

template <int kSize, typename scalar_t>
__device__ Pack<scalar_t, kSize> load_pack(const scalar_t* from) {
  return *reinterpret_cast<const Pack<scalar_t, kSize>*>(from);
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

// All that the gradient of a row needs; every thread of the row computes it.
template <typename T>
struct DeviceRow {
  DeviceTarget<T> target;
  RowResult<T> result;
  SideTarget side;
  SideWeights<T> q;
  T scale, top_mass;
  int64_t top;  // arg max, of the hard bootstrap only

  // g dL/dz_c for e = exp(d), d = z_c - max.
  template <bool kGeneral>
  __device__ T gradient(int64_t c, T e, T d) const {
    if (target.fate != RowFate::kLoss) return target.fate == RowFate::kIgnored ? T(0) : T(NAN);
    if (c == target.y) return result.at_target;
    if constexpr (!kGeneral) return e * result.linear;
    T slope = softmax_slope(e, d, result.linear, result.log);
    if (side == SideTarget::kArgmax) return c == top ? slope - scale * top_mass : slope;
    if (side != SideTarget::kNone) slope -= scale * q(c);
    return slope;
  }
};

// kGeneral: the loss has a side target or an entropy. Writes losses and state from one thread.
template <bool kGeneral, typename scalar_t, typename grad_t, typename T>
__device__ DeviceRow<T> finish_device_row(const LossJob<scalar_t, grad_t>& job, int64_t r,
                                          const DeviceTarget<T>& target, RowSums<T> sums,
                                          int64_t top, bool writes) {
  DeviceRow<T> row;
  row.target = target;
  row.side = kGeneral ? job.spec.side() : SideTarget::kNone;
  row.q = side_weights(job, r);
  row.scale = job.grad ? job.scale[r] : T(0);
  row.top = top;
  row.top_mass = target.class_weight * (1 - job.spec.parameters[0]);
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
  if (writes && job.losses) {
    job.losses[r] = target.fate == RowFate::kLoss      ? row.result.loss
                    : target.fate == RowFate::kIgnored ? T(0)
                                                       : T(NAN);
  }
  if (writes && job.state_out) {
    job.state_out[3 * r] = sums.max;
    job.state_out[3 * r + 1] = sums.rest;
    job.state_out[3 * r + 2] = sums.extra;
  }
  return row;
}

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
    const T other = __shfl_xor_sync(kWholeWarp, x, step);
    x = other > x ? other : x;
  }
  return x;
}
__device__ inline int group_min(int x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    x = min(x, __shfl_xor_sync(kWholeWarp, x, step));
  }
  return x;
}

// What: losses, state and gradients of rows of at most 32 * kElements classes.  Equations:
// loss_math.h. Grid: `lanes` threads a row (power of two, at most a warp), the row in their
// registers; grid-stride. Shared memory: none. Determinism: a row's sums have one order, by lanes
// and kVec, whatever the grid.
template <int kVec, int kElements, bool kGeneral, typename scalar_t, typename grad_t>
__global__ void __launch_bounds__(kRegisterThreads)
    loss_rows_in_registers(LossJob<scalar_t, grad_t> job, int lanes) {
  using T = accumulate_t<scalar_t>;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int classes = static_cast<int>(job.classes);
  const int64_t block_rows = kRegisterThreads / lanes;
  const auto class_of = [&](int i) { return (i / kVec * lanes + lane) * kVec + i % kVec; };

  for (int64_t first = blockIdx.x * block_rows; first < job.rows; first += gridDim.x * block_rows) {
    const int64_t own = first + threadIdx.x / lanes;
    const bool live = own < job.rows;
    const int64_t r = live ? own : job.rows - 1;  // the surplus repeats a row: shuffles need it
    const scalar_t* logits = job.row(r);
    T d[kElements], e[kElements];
    ALS_UNROLL
    for (int i = 0; i < kElements; i += kVec) {
      if (class_of(i) < classes) {  // kVec divides classes: the pack lies inside the row
        const auto pack = load_pack<kVec>(logits + class_of(i));
        ALS_UNROLL
        for (int j = 0; j < kVec; ++j) d[i + j] = to_real(pack.value[j]);
      } else {
        ALS_UNROLL
        for (int j = 0; j < kVec; ++j) d[i + j] = -INFINITY;
      }
    }
    const DeviceTarget<T> target = target_of(job, r);

    RowSums<T> sums{};
    if (job.state_in) {
      sums.max = job.state_in[3 * r];
      sums.rest = job.state_in[3 * r + 1];
      sums.extra = job.state_in[3 * r + 2];
    } else {
      T max = -INFINITY;
      ALS_UNROLL
      for (int i = 0; i < kElements; ++i) max = d[i] > max ? d[i] : max;
      sums.max = group_max(max, lanes);
    }
    ALS_UNROLL
    for (int i = 0; i < kElements; ++i) {
      d[i] -= sums.max;
      e[i] = exp_of_nonpositive(d[i]);
    }
    int top = classes;
    if (!job.state_in) {
      ALS_UNROLL
      for (int i = 0; i < kElements; ++i) sums.rest += class_of(i) == target.y ? T(0) : e[i];
      sums.rest = group_sum(sums.rest, lanes);
    }
    if constexpr (kGeneral) {
      const SideTarget side = job.spec.side();
      if (side == SideTarget::kArgmax) {
        ALS_UNROLL
        for (int i = kElements - 1; i >= 0; --i) top = d[i] == 0 ? class_of(i) : top;
        top = group_min(top, lanes);
      } else if (!job.state_in) {
        const SideWeights<T> q = side_weights(job, r);
        ALS_UNROLL
        for (int i = 0; i < kElements; ++i) {
          if (class_of(i) >= classes) continue;
          if (side == SideTarget::kNone) {
            sums.extra += weighted(e[i], d[i]);
          } else {
            sums.extra += q(class_of(i));
            sums.side += weighted(q(class_of(i)), d[i]);
          }
        }
        sums.extra = group_sum(sums.extra, lanes);
        sums.side = group_sum(sums.side, lanes);
      }
    }
    const DeviceRow<T> row =
        finish_device_row<kGeneral>(job, r, target, sums, top, live && lane == 0);
    if (!live || !job.grad) continue;  // no shuffle until the next row of all
    grad_t* out = job.grad + r * job.classes;
    ALS_UNROLL
    for (int i = 0; i < kElements; i += kVec) {
      if (class_of(i) >= classes) continue;
      Pack<grad_t, kVec> pack;
      ALS_UNROLL
      for (int j = 0; j < kVec; ++j) {
        store(&pack.value[j], row.template gradient<kGeneral>(class_of(i + j), e[i + j], d[i + j]));
      }
      *reinterpret_cast<Pack<grad_t, kVec>*>(out + class_of(i)) = pack;
    }
  }
}

// Joins the sums of all threads of a block, first within warps, then the warps, in one order.
// The last three fields are used by general losses only.
template <bool kGeneral, typename T>
__device__ OnlineSums<T> block_sums(OnlineSums<T> sums) {
  __shared__ T fields[6][kBlockWarps];
  const auto join = [&](int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) {
      OnlineSums<T> other;
      other.max = __shfl_xor_sync(kWholeWarp, sums.max, step);
      other.rest = __shfl_xor_sync(kWholeWarp, sums.rest, step);
      if constexpr (kGeneral) {
        other.hit = __shfl_xor_sync(kWholeWarp, sums.hit, step);
        other.log_sum = __shfl_xor_sync(kWholeWarp, sums.log_sum, step);
        other.mass = __shfl_xor_sync(kWholeWarp, sums.mass, step);
        other.side = __shfl_xor_sync(kWholeWarp, sums.side, step);
      }
      sums.merge(other);
    }
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  join(32);
  if (lane == 0) {
    fields[0][warp] = sums.max;
    fields[1][warp] = sums.rest;
    fields[2][warp] = sums.hit;
    fields[3][warp] = sums.log_sum;
    fields[4][warp] = sums.mass;
    fields[5][warp] = sums.side;
  }
  __syncthreads();
  const int from = lane % kBlockWarps;  // every warp joins the warps' results for itself
  sums.max = fields[0][from];
  sums.rest = fields[1][from];
  sums.hit = fields[2][from];
  sums.log_sum = fields[3][from];
  sums.mass = fields[4][from];
  sums.side = fields[5][from];
  join(kBlockWarps);
  // The lanes' sums may differ by the rounding of merge()'s two branches: lane 0's are the row's.
  sums.rest = __shfl_sync(kWholeWarp, sums.rest, 0);
  if constexpr (kGeneral) {
    sums.log_sum = __shfl_sync(kWholeWarp, sums.log_sum, 0);
    sums.mass = __shfl_sync(kWholeWarp, sums.mass, 0);
    sums.side = __shfl_sync(kWholeWarp, sums.side, 0);
  }
  return sums;
}

// What: losses, state and gradients of rows of any number of classes.  Equations: loss_math.h.
// Grid: one block a row, grid-stride; sums by online softmax, so the row is read once for them.
// Shared memory: the row, where it fits (`cached`), for the gradient; else that reads it again.
// Determinism: a row's sums have one order, by thread, lane and warp.
template <int kVec, bool kGeneral, typename scalar_t, typename grad_t>
__global__ void __launch_bounds__(kBlockThreads)
    loss_rows_by_block(LossJob<scalar_t, grad_t> job, bool cached) {
  using T = accumulate_t<scalar_t>;
  ALS_DYNAMIC_SHARED(loss_shared);
  auto* cache = reinterpret_cast<scalar_t*>(loss_shared);  // [C] if cached
  __shared__ unsigned long long shared_top;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * kVec;
  constexpr int64_t kStep = kBlockThreads * kVec;

  for (int64_t r = blockIdx.x; r < job.rows; r += gridDim.x) {
    const scalar_t* logits = job.row(r);
    const DeviceTarget<T> target = target_of(job, r);
    const SideTarget side = kGeneral ? job.spec.side() : SideTarget::kNone;
    const bool has_q = side == SideTarget::kSmoothing || side == SideTarget::kProbabilities;
    const SideWeights<T> q = side_weights(job, r);
    if (threadIdx.x == 0) shared_top = ~0ull;

    RowSums<T> sums{};
    if (job.state_in) {
      sums.max = job.state_in[3 * r];
      sums.rest = job.state_in[3 * r + 1];
      sums.extra = job.state_in[3 * r + 2];
      __syncthreads();
    } else {
      OnlineSums<T> own;
      for (int64_t c = begin; c < job.classes; c += kStep) {
        const auto pack = load_pack<kVec>(logits + c);
        if (cached) *reinterpret_cast<Pack<scalar_t, kVec>*>(cache + c) = pack;
        ALS_UNROLL
        for (int j = 0; j < kVec; ++j) {
          own.add(to_real(pack.value[j]), c + j == target.y, has_q ? q(c + j) : T(0));
        }
      }
      const OnlineSums<T> all = block_sums<kGeneral>(own);  // waits for every thread's cache, too
      sums.max = all.max;
      sums.rest = all.max == T(-INFINITY) ? T(NAN) : all.rest;
      if constexpr (kGeneral) {
        sums.extra = has_q ? all.mass : all.log_sum;
        sums.side = all.side;
      }
    }
    const scalar_t* again = cached && !job.state_in ? cache : logits;
    if (side == SideTarget::kArgmax) {
      for (int64_t c = begin; c < job.classes; c += kStep) {
        const auto pack = load_pack<kVec>(again + c);
        ALS_UNROLL
        for (int j = kVec - 1; j >= 0; --j) {
          if (to_real(pack.value[j]) == sums.max) {
            atomicMin(&shared_top, static_cast<unsigned long long>(c + j));
          }
        }
      }
      __syncthreads();
    }
    const DeviceRow<T> row = finish_device_row<kGeneral>(
        job, r, target, sums, static_cast<int64_t>(shared_top), threadIdx.x == 0);
    if (job.grad) {
      grad_t* out = job.grad + r * job.classes;
      for (int64_t c = begin; c < job.classes; c += kStep) {
        const auto pack = load_pack<kVec>(again + c);
        Pack<grad_t, kVec> result;
        ALS_UNROLL
        for (int j = 0; j < kVec; ++j) {
          const T d = to_real(pack.value[j]) - sums.max;
          store(&result.value[j], row.template gradient<kGeneral>(c + j, exp_of_nonpositive(d), d));
        }
        *reinterpret_cast<Pack<grad_t, kVec>*>(out + c) = result;
      }
    }
    __syncthreads();  // cache, shared_top and the fields of block_sums belong to the next row
  }
}

// What: squared error of regression rows, their mean over D values, and its gradient.
// Equation: loss_math.h.
// Grid: `lanes` threads a row (power of two, at most a warp); grid-stride.
// Shared memory: none.
// Determinism: a row's sum has one order, in float64.
template <typename scalar_t, typename grad_t>
__global__ void __launch_bounds__(kRegisterThreads)
    squared_error_rows(LossJob<scalar_t, grad_t> job, int lanes) {
  using T = accumulate_t<scalar_t>;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t block_rows = kRegisterThreads / lanes;
  for (int64_t first = blockIdx.x * block_rows; first < job.rows; first += gridDim.x * block_rows) {
    const int64_t own = first + threadIdx.x / lanes;
    const bool live = own < job.rows;
    const int64_t r = live ? own : job.rows - 1;
    const scalar_t* z = job.row(r);
    const T* t = job.dense + r * job.classes;
    if (job.losses) {
      double total = 0;
      for (int64_t j = lane; j < job.classes; j += lanes) {
        total += squared_error_term(to_real(z[j]), t[j]);
      }
      total = group_sum(total, lanes);
      if (live && lane == 0) job.losses[r] = static_cast<T>(total / job.classes);
    }
    if (live && job.grad) {
      const T scale = 2 * job.scale[r] / static_cast<T>(job.classes);
      for (int64_t j = lane; j < job.classes; j += lanes) {
        store(job.grad + r * job.classes + j, squared_error_slope(to_real(z[j]), t[j], scale));
      }
    }
  }
}

}  // namespace als
