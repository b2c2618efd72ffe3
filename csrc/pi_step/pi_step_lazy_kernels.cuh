// Device code of the lazy pi step. Torch-free.
#pragma once

#include "pi_step/pi_step_kernels.cuh"
#include "pi_step/pi_step_lazy_math.h"

namespace als {

constexpr int64_t kPiLazyBlocks = 1024;  // of a pass; then threads take more entries
constexpr int64_t kPiLazyPerThread = 8;  // entries worth a thread
constexpr int kPiExtras = 3;             // mass, half, half mass
constexpr int kPiTotals = kPiMoments + kPiExtras;

// What the step kernel tells the kernels of a pass, float64 in device memory.
enum PiOrder : int { kPiDemand = 0, kPiShift = 1, kPiRewrite = 2, kPiOrders = 3 };

struct PiLazyParams {
  double* u;               // [n]
  const float* log_prior;  // [n] or null
  double* scalars;         // [kPiScalars]
  double* sums;            // [kPiSumsSize]
  int64_t* skipped;        // []
  int64_t* batch_index;    // [capacity] ascending
  double* batch_grad;      // [capacity] the sum of equal indices, at the first of them
  const float* found_inf;  // [] or null
  const int64_t* index;    // [B] ascending
  const int64_t* order;    // [B] where they stood in the batch
  PiLosses loss;           // [B]
  double* orders;          // [kPiOrders], or null: new sums whatever happened
  double* lifted;          // [capacity]
  PiNormalisers* partial;  // [blocks]
  double* moments;         // [blocks, kPiMoments]
  int64_t n, capacity, batch;
  int64_t blocks;  // of a pass
  PiRule rule;

  __device__ bool skip() const { return found_inf != nullptr && *found_inf != 0.0f; }
  __device__ bool wants(PiDemand what) const {
    return orders == nullptr || orders[kPiDemand] >= static_cast<double>(what);
  }
  __device__ PiPlan plan() const {
    const double scale = scalars[kPiScale];
    const bool rewrite = orders != nullptr && orders[kPiRewrite] != 0.0;
    return {scale, 1.0, rewrite ? orders[kPiShift] : 0.0, rewrite ? 1.0 : scale, rewrite};
  }
  __device__ bool counts(const int64_t* keys, int64_t p) const {
    return (p == 0 || keys[p] != keys[p - 1]) && keys[p] >= 0 && keys[p] < n;
  }
  __device__ double prior_exponent(int64_t i) const {
    return log_prior != nullptr ? rule.prior * log_prior[i] : 0.0;
  }
  __device__ int64_t chain() const {  // additions in a row behind a moment
    return n / (blocks * kPiThreads) + 1 + 5 + kPiThreads / 32;
  }
};

// Adds up kCount values a thread: lanes in a tree, then warps in order; totals[kCount] in shared
// memory, to be read after a barrier.
template <int kCount>
__device__ inline void block_totals(const double (&mine)[kCount], double* totals) {
  __shared__ double slots[kPiThreads / 32][kCount];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  ALS_UNROLL
  for (int j = 0; j < kCount; ++j) {
    double value = mine[j];
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    if (lane == 0) slots[warp][j] = value;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < kCount; j += kPiThreads) {
    double total = 0.0;
    for (int w = 0; w < kPiThreads / 32; ++w) total += slots[w][j];
    totals[j] = total;
  }
}

// What: a step of the batch's entries, the sums with it, and the scalars; or the order for a pass.
// Equation: u_i' = rho (r_i + step g_i) / A', T_j += (e' v'^j - e v^j) / n (pi_step_lazy_math.h).
// Grid: one block, a thread a position of the batch, strided.  Shared memory: 3 KiB.
// Determinism: losses of equal indices in batch order; lanes in a tree, warps in order.
__global__ void __launch_bounds__(kPiThreads) pi_lazy_step_kernel(PiLazyParams p) {
  if (p.skip()) {
    if (threadIdx.x == 0) p.orders[kPiDemand] = 0.0;
    return;
  }
  const PiLazyPlan plan = plan_lazy(p.scalars, p.rule);
  const PiFrame frame = PiFrame::of(p.sums);
  const bool paused = p.sums[kPiPauseLeft] != 0.0;
  const double scale = plan.step.new_scale;
  const double half_level = level_at(p.sums, p.rule.rho * scale);
  double mine[kPiTotals] = {};
  double reach = 0.0;
  for (int64_t at = threadIdx.x; at < p.capacity; at += kPiThreads) {
    const bool inside = at < p.batch;
    const bool counts = inside && p.counts(p.index, at);
    double grad = 0.0;
    if (counts) {
      unsigned long long unusable = 0;
      for (int64_t j = at; j < p.batch && p.index[j] == p.index[at]; ++j) {
        const int64_t from = p.order[j];
        const double loss = from >= 0 && from < p.batch ? p.loss[from] : NAN;
        if (usable_loss(loss)) {
          grad += loss;
        } else {
          ++unusable;
        }
      }
      if (unusable > 0) atomicAdd(reinterpret_cast<unsigned long long*>(p.skipped), unusable);
    }
    p.batch_index[at] = inside ? p.index[at] : kPiPadding;
    p.batch_grad[at] = grad;
    if (!counts) continue;
    const int64_t i = p.index[at];
    const double x = p.prior_exponent(i);
    const double gain = ascent(grad, p.rule.step);
    const double u = advance_entry(p.u[i], gain, plan.step);
    const PiTerm before = frame.term(p.u[i], x);
    const PiTerm after = frame.term(u, x);
    p.u[i] = u;
    double e_before = before.e, e_after = after.e;
    ALS_UNROLL
    for (int j = 0; j < kPiMoments; ++j) {
      mine[j] += e_after - e_before;
      e_after *= after.v;
      e_before *= before.v;
    }
    const double without = exp_of(x + p.rule.rho * (scale * u) - half_level);
    const double with = exp_of(x + p.rule.rho * (scale * u + gain) - half_level);
    mine[kPiMoments] += before.e + after.e;
    mine[kPiMoments + 1] += with - without;
    mine[kPiMoments + 2] += with + without;
    reach = larger_or_nan(fabs(after.v), larger_or_nan(fabs(before.v), reach));
  }
  __shared__ double totals[kPiTotals];
  __shared__ double reaches[kPiThreads];
  reaches[threadIdx.x] = reach;
  block_totals(mine, totals);
  __syncthreads();  // every thread has read the scalars and sums
  const auto n = static_cast<double>(p.n);
  for (int j = threadIdx.x; j < kPiMoments && !paused; j += kPiThreads) {
    add_moment(p.sums, j, totals[j] / n);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int t = 0; t < kPiThreads; ++t) reach = larger_or_nan(reaches[t], reach);
  const PiChange change{totals[kPiMoments] / n, reach, totals[kPiMoments + 1] / n,
                        totals[kPiMoments + 2] / n};
  const PiDemand demand = settle(p.scalars, p.sums, p.rule, plan, change, p.batch);
  p.orders[kPiDemand] = static_cast<double>(demand);
  p.orders[kPiShift] = plan.after.shift;
  p.orders[kPiRewrite] = plan.after.rewrite ? 1.0 : 0.0;
}

// What: lifts the batch's entries out of u before a pass.  Equation: u_i = -inf.
// Grid: one thread a position of the batch, strided.  Shared memory: none.
// Determinism: no reduction.
__global__ void __launch_bounds__(kPiThreads) pi_lazy_lift_kernel(PiLazyParams p) {
  if (!p.wants(PiDemand::kNormalisers)) return;
  const PiPlan plan = p.plan();
  for (int64_t at = int64_t{blockIdx.x} * kPiThreads + threadIdx.x; at < p.capacity;
       at += int64_t{gridDim.x} * kPiThreads) {
    if (!p.counts(p.batch_index, at)) continue;
    double& u = p.u[p.batch_index[at]];
    p.lifted[at] = plan.rewrite ? rewrite_entry(u, plan) : u;
    u = -INFINITY;
  }
}

// What: the pass over all entries, u rewritten where the order says so.
// Equation: sums of exp(c log_prior + A u) and of exp(c log_prior + rho A u), float64.
// Grid: `blocks` by n alone; entries strided over all threads.  Shared memory: the tree, 12 KiB.
// Determinism: fixed strides and a fixed tree.
__global__ void __launch_bounds__(kPiThreads) pi_lazy_pass_kernel(PiLazyParams p) {
  if (!p.wants(PiDemand::kNormalisers)) return;
  const PiPlan plan = p.plan();
  PiNormalisers mine;
  for (int64_t i = blockIdx.x * kPiThreads + threadIdx.x; i < p.n; i += p.blocks * kPiThreads) {
    if (plan.rewrite) p.u[i] = rewrite_entry(p.u[i], plan);
    mine.add_entry(p.u[i], p.prior_exponent(i), 0.0, plan.new_scale, p.rule.rho);
  }
  mine = block_sum<kPiThreads>(mine);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = mine;
}

// What: adds up the blocks and the batch's entries, puts those back, writes the scalars, starts new
// sums.  Equation: log mean exp, and the same after the half step rho (r_i + step g_i).
// Grid: one block, strided.  Shared memory: its tree, 12 KiB.
// Determinism: fixed strides and a fixed tree.
__global__ void __launch_bounds__(kPiThreads) pi_lazy_combine_kernel(PiLazyParams p) {
  if (!p.wants(PiDemand::kNormalisers)) return;
  const PiPlan plan = p.plan();
  PiNormalisers all;
  for (int64_t b = threadIdx.x; b < p.blocks; b += kPiThreads) all.add(p.partial[b]);
  for (int64_t at = threadIdx.x; at < p.capacity; at += kPiThreads) {
    if (!p.counts(p.batch_index, at)) continue;
    const int64_t i = p.batch_index[at];
    p.u[i] = p.lifted[at];
    all.add_entry(p.lifted[at], p.prior_exponent(i), ascent(p.batch_grad[at], p.rule.step),
                  plan.new_scale, p.rule.rho);
  }
  all = block_sum<kPiThreads>(all);  // every thread has read the plan before this
  if (threadIdx.x != 0) return;
  p.scalars[kPiScale] = plan.new_scale;
  p.scalars[kPiLogMean] = all.total.log_mean(p.n);
  p.scalars[kPiLogMeanHalf] = all.half.log_mean(p.n);
  if (p.wants(PiDemand::kSums)) {
    start_sums(p.sums, all.low, all.high, plan.new_scale, p.scalars[kPiLogMean]);
  }
}

// What: the power sums of all entries, a row a block.  Equation: sum of e_i v_i^j.
// Grid: as the pass.  Shared memory: 3 KiB.
// Determinism: fixed strides; lanes in a tree, warps in order.
__global__ void __launch_bounds__(kPiThreads) pi_lazy_moments_kernel(PiLazyParams p) {
  if (!p.wants(PiDemand::kSums)) return;
  const PiFrame frame = PiFrame::of(p.sums);
  double mine[kPiMoments] = {};
  for (int64_t i = blockIdx.x * kPiThreads + threadIdx.x; i < p.n; i += p.blocks * kPiThreads) {
    const PiTerm term = frame.term(p.u[i], p.prior_exponent(i));
    double e = term.e;
    ALS_UNROLL
    for (int j = 0; j < kPiMoments; ++j) {
      mine[j] += e;
      e *= term.v;
    }
  }
  block_totals(mine, p.moments + blockIdx.x * kPiMoments);
}

// What: the power sums from their blocks.  Equation: T_j = sum of the blocks' sums / n.
// Grid: one block, a thread a power.  Shared memory: none.  Determinism: blocks in order.
__global__ void __launch_bounds__(64) pi_lazy_sums_kernel(PiLazyParams p) {
  if (!p.wants(PiDemand::kSums)) return;
  const int j = static_cast<int>(threadIdx.x);
  if (j < kPiMoments) {
    for (int64_t b = 0; b < p.blocks; ++b) {
      add_moment(p.sums, j, p.moments[b * kPiMoments + j] / static_cast<double>(p.n));
    }
  }
  if (j == 0) end_sums(p.sums, p.chain());
}

}  // namespace als
