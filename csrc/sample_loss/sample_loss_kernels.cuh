// Device code of sample_loss, its backward and weighted_loss. Torch-free.
#pragma once

#include <cstdint>

#include "sample_loss/loss_block.cuh"
#include "sample_loss/loss_row.cuh"
#include "sample_loss/loss_total.cuh"

namespace als {

constexpr int kRegisterThreads = 128;
constexpr int kTotalRowThreads = 256;                // of a block whose cluster is the whole grid
constexpr int kFewElements = 8, kManyElements = 32;  // of a row that a thread has

// What: losses, state and gradients of rows of at most 32 * kElements classes, and the weighted
// total of the losses, unless that is null: then the grid is one cluster.  Equations: loss_math.h.
// Grid: `lanes` threads a row (power of two, at most a warp), the row in their registers;
// grid-stride.
// Shared memory: none, or the sums of weighted_sum.
// Determinism: a row's sums have one order, by lanes and kVec, whatever the grid.
template <int kVec, int kElements, bool kGeneral, typename scalar_t, typename grad_t>
__global__ void __launch_bounds__(kElements > kFewElements ? kRegisterThreads : kTotalRowThreads)
    loss_rows_in_registers(LossJob<scalar_t, grad_t> job, int lanes,
                           accumulate_t<scalar_t>* total) {
  using T = accumulate_t<scalar_t>;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int classes = static_cast<int>(job.classes);
  const int64_t block_rows = blockDim.x / lanes;
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
        load_numbers<kVec>(logits + class_of(i), d + i);
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
    DeviceRow<T> row = device_row<kGeneral>(job, r, target);
    finish_device_row<kGeneral>(job, r, row, sums, top, live && lane == 0);
    if (!live || !job.grad) continue;  // no shuffle until the next row of all
    grad_t* out = job.grad + r * job.classes;
    ALS_UNROLL
    for (int i = 0; i < kElements; i += kVec) {
      if (class_of(i) >= classes) continue;
      T slope[kVec];
      ALS_UNROLL
      for (int j = 0; j < kVec; ++j) {
        slope[j] = row.template gradient<kGeneral>(class_of(i + j), e[i + j], d[i + j]);
      }
      store_numbers<kVec>(out + class_of(i), slope);
    }
  }
  if constexpr (kElements <= kFewElements) {
    if (!total) return;
    ALS_DYNAMIC_SHARED(loss_shared);
    __syncwarp();  // a warp arrives as a whole: surplus rows went on without a gradient
    cluster_arrive();
    cluster_wait();
    if (cluster_rank() != 0) return;
    const double sum =
        weighted_sum(job.scale, job.losses, job.rows, reinterpret_cast<double*>(loss_shared));
    if (threadIdx.x == 0) *total = static_cast<accumulate_t<scalar_t>>(sum);
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
