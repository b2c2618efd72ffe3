// Device code of the pi step. Torch-free.
#pragma once

#include <cstdint>

#include "common/store16.cuh"
#include "pi_step/pi_step_math.h"

namespace als {

constexpr int kPiThreads = 256;
constexpr int kPiPack = 4;                                       // entries of 16 bytes
constexpr int kPiPerThread = 16;                                 // loads in flight: 64 bytes
constexpr int64_t kPiTile = int64_t{kPiThreads} * kPiPerThread;  // entries of a block at a time
constexpr int64_t kPiMaxBlocks = 4096;                           // then blocks take more tiles
constexpr int kPiCombineThreads = 1024;
constexpr int64_t kPiPadding = INT64_MAX;

struct PiSums {
  LogSum total, half;

  __device__ void add(const PiSums& other) {
    total.add(other.total.max, other.total.sum);
    half.add(other.half.max, other.half.sum);
  }
};

struct PiStepParams {
  float* u;                // [n]
  const float* log_prior;  // [n] or null
  double* scalars;         // [kPiScalars]
  int64_t* skipped;        // []
  int64_t* batch_index;    // [capacity] ascending
  double* batch_grad;      // [capacity] the sum of equal indices, at the first of them
  float* lifted;           // [capacity] u after the step of the entries that are out of u
  PiSums* partial;         // [blocks]
  const float* found_inf;  // [] or null
  const int64_t* index;    // [B] ascending
  const int64_t* order;    // [B] where they stood in the batch
  PiLosses loss;           // [B]
  int64_t n, capacity, batch;
  int64_t tiles;   // a block
  int64_t blocks;  // of the pass
  PiRule rule;
  bool advance;  // a step; otherwise only the normalisers, with the pending batch

  __device__ bool skip() const { return found_inf != nullptr && *found_inf != 0.0f; }
  __device__ PiPlan plan() const { return advance ? plan_step(scalars, rule) : plan_same(scalars); }
  // Whether position p of the batch stands for an entry: the first of equal indices, inside [0, n).
  __device__ bool counts(const int64_t* keys, int64_t p) const {
    return (p == 0 || keys[p] != keys[p - 1]) && keys[p] >= 0 && keys[p] < n;
  }
};

// What: sums the losses of equal indices, keeps them for the half step, lifts their entries out.
// Equation: g_i = sum of losses of i; u_i' = rho (r_i + step g_i) / A'.
// Grid: one warp a position of the batch (grid-stride).  Shared memory: none.
// Determinism: lanes stride over a run of equal indices, then a fixed tree; counts are integers.
__global__ void __launch_bounds__(kPiThreads) pi_lift_kernel(PiStepParams p) {
  if (p.skip()) return;
  const PiPlan plan = p.plan();
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t{gridDim.x} * (kPiThreads / 32);
  for (int64_t at = (int64_t{blockIdx.x} * kPiThreads + threadIdx.x) / 32; at < p.capacity;
       at += warps) {
    double grad = 0.0;
    if (p.advance) {
      const bool inside = at < p.batch;
      if (inside && p.counts(p.index, at)) {
        const int64_t key = p.index[at];
        unsigned long long unusable = 0;
        for (int64_t j = at + lane; j < p.batch && p.index[j] == key; j += 32) {
          const int64_t from = p.order[j];
          const double loss = from >= 0 && from < p.batch ? p.loss[from] : NAN;
          if (usable_loss(loss)) {
            grad += loss;
          } else {
            ++unusable;
          }
        }
        for (int step = 16; step > 0; step /= 2) grad += __shfl_xor_sync(~0u, grad, step);
        if (unusable > 0) atomicAdd(reinterpret_cast<unsigned long long*>(p.skipped), unusable);
      }
      if (lane == 0) {
        p.batch_index[at] = inside ? p.index[at] : kPiPadding;
        p.batch_grad[at] = grad;
      }
    }
    const bool entry =
        p.advance ? at < p.batch && p.counts(p.index, at) : p.counts(p.batch_index, at);
    if (lane == 0 && entry) {
      float& u = p.u[p.advance ? p.index[at] : p.batch_index[at]];
      p.lifted[at] = advance_entry(u, p.advance ? ascent(grad, p.rule.step) : 0.0, plan);
      u = -INFINITY;
    }
  }
}

// Adds up one value a thread in a fixed tree; the result is thread 0's.
template <int kThreads, typename Sums>
__device__ inline Sums block_sum(Sums mine) {
  __shared__ Sums slots[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  slots[thread] = mine;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (thread < step) slots[thread].add(slots[thread + step]);
  }
  return thread == 0 ? slots[0] : mine;
}

// 2^(x - max), the large terms cancelling in the first multiply-add; NaN (-inf entries) becomes 0.
template <bool kPrior>
__device__ inline float pi_term(float u, float prior, float high, float low, float c, float max) {
  float x = fmaf(low, u, fmaf(high, u, -max));
  if (kPrior) x = fmaf(c, prior, x);
  return exp2f(fmaxf(x, -150.0f));
}

// A thread's LogSum: float32 exponentials, float64 sum.
struct ThreadSum {
  float max = -INFINITY;
  double sum = 0.0;

  __device__ void add(float other_max, float other_sum) {
    const float top = fmaxf(max, other_max);
    sum = sum * exp2f(max - top) + static_cast<double>(other_sum) * exp2f(other_max - top);
    max = top;
  }
};

// A thread's entries of a tile: packs of neighbours, a block's packs side by side. x[k] is entry
// place(k); kWhole tiles lie inside the row and are moved 16 bytes at a time.
struct PiPlaces {
  int64_t start;

  __device__ int64_t place(int k) const {
    return start + (k / kPiPack * kPiThreads + static_cast<int>(threadIdx.x)) * kPiPack +
           k % kPiPack;
  }
  template <bool kWhole>
  __device__ void load(const float* from, int64_t last, float beyond, float* x) const {
    ALS_UNROLL
    for (int k = 0; k < kPiPerThread; k += kWhole ? kPiPack : 1) {
      if constexpr (kWhole) {
        const float4 pack = *reinterpret_cast<const float4*>(from + place(k));
        x[k] = pack.x, x[k + 1] = pack.y, x[k + 2] = pack.z, x[k + 3] = pack.w;
      } else {
        x[k] = place(k) < last ? from[place(k)] : beyond;
      }
    }
  }
  template <bool kWhole>
  __device__ void store(float* to, int64_t last, const float* x) const {
    ALS_UNROLL
    for (int k = 0; k < kPiPerThread; k += kWhole ? kPiPack : 1) {
      if constexpr (kWhole) {
        store16(to + place(k), float4{x[k], x[k + 1], x[k + 2], x[k + 3]});
      } else if (place(k) < last) {
        to[place(k)] = x[k];
      }
    }
  }
};

// What: the pass over all entries, u rewritten where the plan says so.
// Equation: sums of 2^(x_i - max) for x = log2(e) (c log_prior + A u) and with rho A for the half.
// Grid: blocks of `tiles` consecutive tiles, by n alone; a thread takes kPiPerThread entries of a
// tile: 16 KiB (32 with a prior) of loads under way in a block, where all of the bandwidth of an
// H100 takes some 16 KiB an SM (3.35 TB/s x 650 ns / 132, an estimate).
// Shared memory: the block's tree, 8 KiB.
// Determinism: float32 within a thread's tile, float64 beyond, fixed order; no atomics. The same
// wherever u begins.
template <bool kPrior>
__global__ void __launch_bounds__(kPiThreads) pi_pass_kernel(PiStepParams p) {
  if (p.skip()) return;
  const PiPlan plan = p.plan();
  const PiExponent e = exponent_of(plan.new_scale, p.rule);
  ThreadSum total, half;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(p.u) | reinterpret_cast<uintptr_t>(p.log_prior)) % 16 == 0;
  const int64_t first = blockIdx.x * p.tiles * kPiTile;
  const int64_t last = min(first + p.tiles * kPiTile, p.n);
  for (int64_t start = first; start < last; start += kPiTile) {
    float u[kPiPerThread], prior[kPiPerThread];
    const PiPlaces places{start};
    const bool whole = aligned && start + kPiTile <= last;
    whole ? places.load<true>(p.u, last, -INFINITY, u)
          : places.load<false>(p.u, last, -INFINITY, u);
    if constexpr (kPrior) {
      whole ? places.load<true>(p.log_prior, last, 0.0f, prior)
            : places.load<false>(p.log_prior, last, 0.0f, prior);
    }
    if (plan.rewrite) {
      ALS_UNROLL
      for (int k = 0; k < kPiPerThread; ++k) u[k] = rewrite_entry(u[k], plan);
      whole ? places.store<true>(p.u, last, u) : places.store<false>(p.u, last, u);
    }
    float max = -INFINITY, max_half = -INFINITY;
    ALS_UNROLL
    for (int k = 0; k < kPiPerThread; ++k) {
      const float c = kPrior ? e.prior * prior[k] : 0.0f;
      max = fmaxf(max, fmaf(e.high, u[k], c));
      max_half = fmaxf(max_half, fmaf(e.half_high, u[k], c));
    }
    if (max == -INFINITY) continue;
    float sum = 0.0f, sum_half = 0.0f;
    ALS_UNROLL
    for (int k = 0; k < kPiPerThread; ++k) {
      sum += pi_term<kPrior>(u[k], prior[k], e.high, e.low, e.prior, max);
      sum_half += pi_term<kPrior>(u[k], prior[k], e.half_high, e.half_low, e.prior, max_half);
    }
    total.add(max, sum);
    half.add(max_half, sum_half);
  }
  const PiSums sums = block_sum<kPiThreads>(PiSums{{total.max, total.sum}, {half.max, half.sum}});
  if (threadIdx.x == 0) p.partial[blockIdx.x] = sums;
}

// What: adds up the blocks and the batch's entries, puts those back, writes the scalars.
// Equation: log mean exp, and the same after the half step rho (r_i + step g_i).
// Grid: one block, strided.  Shared memory: its tree, 32 KiB.
// Determinism: fixed strides and a fixed tree, float64.
__global__ void __launch_bounds__(kPiCombineThreads, 1) pi_combine_kernel(PiStepParams p) {
  if (p.skip()) return;
  const PiPlan plan = p.plan();
  PiSums sums;
  for (int64_t b = threadIdx.x; b < p.blocks; b += kPiCombineThreads) sums.add(p.partial[b]);
  for (int64_t at = threadIdx.x; at < p.capacity; at += kPiCombineThreads) {
    if (!p.counts(p.batch_index, at)) continue;
    const int64_t i = p.batch_index[at];
    p.u[i] = p.lifted[at];
    const double prior = p.log_prior != nullptr ? p.rule.prior * p.log_prior[i] : 0.0;
    const double r = plan.new_scale * p.lifted[at];
    sums.total.add(kLog2E * (prior + r), 1.0);
    sums.half.add(kLog2E * (prior + p.rule.rho * (r + ascent(p.batch_grad[at], p.rule.step))), 1.0);
  }
  sums = block_sum<kPiCombineThreads>(sums);  // every thread has read the plan before this
  if (threadIdx.x != 0) return;
  p.scalars[kPiScale] = plan.new_scale;
  p.scalars[kPiLogMean] = sums.total.log_mean(p.n);
  p.scalars[kPiLogMeanHalf] = sums.half.log_mean(p.n);
  if (p.advance) p.scalars[kPiHasPending] = 1.0;
}

// What: weights of a batch or of all entries.  Equation: n pi_i = exp(log_weight).
// Grid: one thread a value (grid-stride).  Shared memory: none.  Determinism: no reduction.
__global__ void __launch_bounds__(kPiThreads)
    pi_weight_kernel(PiView view, const int64_t* index, float* out, int64_t count, bool half,
                     bool log) {
  for (int64_t at = int64_t{blockIdx.x} * kPiThreads + threadIdx.x; at < count;
       at += int64_t{gridDim.x} * kPiThreads) {
    const double value = log_weight(view, index != nullptr ? index[at] : at, half);
    out[at] = static_cast<float>(log ? value : exp(value));
  }
}

}  // namespace als
