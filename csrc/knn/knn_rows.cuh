// Device code of knn: sizes, rows as they are given, and step 1, the mean of the database and how
// far it reaches. Torch-free.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>

#include "common/host_device.h"
#include "knn/knn_math.h"

namespace als {

constexpr int kKnnThreads = 256;
constexpr int kKnnTile = 128;  // rows of a packed tile
constexpr int kKnnGroupBits = 4;
constexpr int kKnnGroup = 1 << kKnnGroupBits;           // rows behind one stored score
constexpr int kKnnTileGroups = kKnnTile / kKnnGroup;    // 8
constexpr int kKnnSubgroups = kKnnThreads / kKnnLanes;  // rows measured at a time
constexpr int64_t kKnnMaxK = 2048;                      // list of 4096 x 12 bytes: 48 KiB

// Written by the kernels of step 1. Non-negative doubles are kept as their bits, which order like
// the numbers, so that atomicMax can take them.
struct KnnExtent {
  unsigned long long element;  // largest |y_j - mean_j|
  unsigned long long norm;     // largest |y - mean|^2
  unsigned long long raw;      // largest |y|^2
  unsigned long long finite;   // rows without NaN and infinity
  unsigned int zeros;          // whether there are all-zero rows (cosine)
};

template <typename T>
struct KnnRows {
  const T* data;  // [rows, dim]
  int64_t rows, dim;
  KnnMetric metric;
  int64_t first = 0;  // number of row 0, where these are a part of all rows

  __device__ double at(int64_t row, int64_t j) const { return widen(data[row * dim + j]); }
  static __device__ double widen(float x) { return x; }
  static __device__ double widen(double x) { return x; }
  static __device__ double widen(__half x) { return __half2float(x); }
  static __device__ double widen(__nv_bfloat16 x) { return __bfloat162float(x); }
};

// Which rows a group has: 2^row_bits of them, 2^stride_bits apart. They begin at consecutive rows
// until the gaps are full.
struct KnnGrouping {
  int64_t count;  // of groups, a multiple of 4, below 2^31: more than 3e10 rows
  int row_bits, stride_bits;

  __device__ int64_t row(int64_t group, int64_t i) const {
    const int64_t first = group >> stride_bits << (stride_bits + row_bits);
    return first + (group & ((int64_t{1} << stride_bits) - 1)) + (i << stride_bits);
  }
};

// Eight neighbouring threads hold the lanes of knn_math.h; the shuffles add them in its order.
__device__ __forceinline__ double add_lanes(double v) {
  v = unfused_add(v, __shfl_xor_sync(0xFFFFFFFFu, v, 4));
  v = unfused_add(v, __shfl_xor_sync(0xFFFFFFFFu, v, 2));
  return unfused_add(v, __shfl_xor_sync(0xFFFFFFFFu, v, 1));
}

template <typename T>
__device__ double sum_of_squares(const KnnRows<T>& y, int64_t row, int lane) {
  const T* const data = y.data + row * y.dim;
  double sum = 0.0;
  ALS_UNROLL_BY(4)
  for (int64_t j = lane; j < y.dim; j += kKnnLanes) {
    const double v = KnnRows<T>::widen(data[j]);
    sum = unfused_add(sum, unfused_mul(v, v));
  }
  return add_lanes(sum);
}

// What a row is multiplied by before anything else: 1, or 1/|y| for cosine (0: all zero). NaN where
// an element is not finite. All eight lanes get it.
template <typename T>
__device__ double row_factor(const KnnRows<T>& y, int64_t row, int lane, double* square) {
  *square = sum_of_squares(y, row, lane);
  if (y.metric == KnnMetric::kCosine) return inverse_norm(*square);
  return is_finite(*square) ? 1.0 : NAN;
}

__device__ __forceinline__ unsigned long long bits_of(double x) {
  return static_cast<unsigned long long>(__double_as_longlong(x));
}
__device__ __forceinline__ double double_of(unsigned long long x) {
  return __longlong_as_double(static_cast<long long>(x));
}

__device__ inline KnnFrame frame_of(const KnnExtent& e) {
  return KnnFrame::of(double_of(e.element), sqrt(double_of(e.norm)), sqrt(double_of(e.raw)),
                      e.zeros != 0);
}

// What: sums of the finite (cosine: normalised) rows of a part, and how many there are.
// Grid: one block a part of `part` rows; threads own columns.
// Shared memory: the factors of 256 rows.  Determinism: fixed order in a part; counts and maxima.
template <typename T>
__global__ void __launch_bounds__(kKnnThreads)
    knn_column_sums(KnnRows<T> y, int64_t part, double* sums /* [parts, dim] */,
                    KnnExtent* extent) {
  __shared__ double factor[kKnnThreads];
  const int lane = threadIdx.x % kKnnLanes;
  const int64_t begin = blockIdx.x * part;
  const int64_t end = begin + part < y.rows ? begin + part : y.rows;
  double* mine = sums + blockIdx.x * y.dim;
  for (int64_t j = threadIdx.x; j < y.dim; j += kKnnThreads) mine[j] = 0.0;
  unsigned long long finite = 0;
  double raw = 0.0;
  for (int64_t base = begin; base < end; base += kKnnThreads) {
    for (int r = threadIdx.x / kKnnLanes; r < kKnnThreads; r += kKnnSubgroups) {
      const int64_t row = base + r < end ? base + r : end - 1;  // all lanes take part in shuffles
      double square;
      const double f = row_factor(y, row, lane, &square);
      if (lane == 0) {
        const bool counts = base + r < end && is_finite(f);
        factor[r] = counts ? f : NAN;
        finite += counts;
        if (counts) raw = fmax(raw, square);
        if (counts && f == 0.0) extent->zeros = 1;  // every writer writes 1
      }
    }
    __syncthreads();
    const int rows = static_cast<int>(end - base < kKnnThreads ? end - base : kKnnThreads);
    for (int64_t j = threadIdx.x; j < y.dim; j += kKnnThreads) {
      double sum = mine[j];
      for (int r = 0; r < rows; ++r) {
        const double f = factor[r];
        if (f == f) sum += unfused_mul(y.at(base + r, j), f);
      }
      mine[j] = sum;
    }
    __syncthreads();
  }
  if (finite > 0) {
    atomicAdd(&extent->finite, finite);
    atomicMax(&extent->raw, bits_of(raw));
  }
}

// What: mean of the finite rows.  Grid: a thread a column.
__global__ void __launch_bounds__(kKnnThreads)
    knn_mean(const double* sums /* [parts, dim] */, int64_t parts, int64_t dim,
             const KnnExtent* extent, double* mean /* [dim] */) {
  const int64_t j = blockIdx.x * int64_t{kKnnThreads} + threadIdx.x;
  if (j >= dim) return;
  double sum = 0.0;
  for (int64_t p = 0; p < parts; ++p) sum += sums[p * dim + j];
  mean[j] = extent->finite > 0 ? sum / static_cast<double>(extent->finite) : 0.0;
}

// What: how far the finite rows reach from the mean.  Grid: eight threads a row, grid-stride.
// Determinism: maxima.
template <typename T>
__global__ void __launch_bounds__(kKnnThreads)
    knn_extent(KnnRows<T> y, const double* mean, KnnExtent* extent) {
  const int lane = threadIdx.x % kKnnLanes;
  double norm = 0.0, element = 0.0;
  // The bound is that of the block, not of the row: all lanes of a warp take part in the shuffles.
  for (int64_t base = blockIdx.x * int64_t{kKnnSubgroups}; base < y.rows;
       base += gridDim.x * int64_t{kKnnSubgroups}) {
    const int64_t at = base + threadIdx.x / kKnnLanes;
    const int64_t row = at < y.rows ? at : y.rows - 1;
    double square;
    const double f = row_factor(y, row, lane, &square);
    double sum = 0.0, largest = 0.0;
    for (int64_t j = lane; j < y.dim; j += kKnnLanes) {
      const double v = unfused_mul(y.at(row, j), f) - mean[j];
      sum += v * v;
      largest = fmax(largest, fabs(v));
    }
    sum = add_lanes(sum);
    if (is_finite(sum)) {  // false for NaN
      norm = fmax(norm, sum);
      element = fmax(element, largest);
    }
  }
  __shared__ double norms[kKnnThreads], elements[kKnnThreads];
  norms[threadIdx.x] = norm;
  elements[threadIdx.x] = element;
  __syncthreads();
  for (unsigned step = kKnnThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) {
      norms[threadIdx.x] = fmax(norms[threadIdx.x], norms[threadIdx.x + step]);
      elements[threadIdx.x] = fmax(elements[threadIdx.x], elements[threadIdx.x + step]);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    atomicMax(&extent->norm, bits_of(norms[0]));
    atomicMax(&extent->element, bits_of(elements[0]));
  }
}

}  // namespace als
