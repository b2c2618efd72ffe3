// Device code of knn. Torch-free.
//
//   1. column sums -> mean, extent (float64)                          knn_column_sums ...
//   knn_extent
//   2. centred, scaled float32 tiles of database and queries          knn_pack_database, _queries
//   3. float32 scores; only the largest of each 16 rows is written    knn_score
//   4. per query: the groups that can hold one of the k best (error   knn_select
//      bound of knn_math.h), their rows in float64, the k smallest
//
// A group is left out only when the bound proves that k other rows come first, so the result is
// exact. Where the bound cannot help (all-zero query under cosine, fewer groups than k, overflow)
// every group is taken: the fall-back is the same code and needs no word from the host.
#pragma once

#ifdef __CUDACC__  // the tests run this file on the CPU, without 16-bit types
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>

#include "knn/knn_math.h"

#ifdef __CUDACC__
#define ALS_UNROLL _Pragma("unroll")
#else
#define ALS_UNROLL
#endif

namespace als {

constexpr int kKnnThreads = 256;
constexpr int kKnnTile = 128;                           // rows of a packed tile
constexpr int kKnnGroup = 16;                           // rows behind one stored score
constexpr int kKnnTileGroups = kKnnTile / kKnnGroup;    // 8
constexpr int kKnnSlab = 16;                            // features in shared memory at a time
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

  __device__ double at(int64_t row, int64_t j) const { return widen(data[row * dim + j]); }
  static __device__ double widen(float x) { return x; }
  static __device__ double widen(double x) { return x; }
#ifdef __CUDACC__
  static __device__ double widen(__half x) { return __half2float(x); }
  static __device__ double widen(__nv_bfloat16 x) { return __bfloat162float(x); }
#endif
};

// Eight neighbouring threads hold the lanes of knn_math.h; the shuffles add them in its order.
__device__ __forceinline__ double add_lanes(double v) {
  v = unfused_add(v, __shfl_xor_sync(0xFFFFFFFFu, v, 4));
  v = unfused_add(v, __shfl_xor_sync(0xFFFFFFFFu, v, 2));
  return unfused_add(v, __shfl_xor_sync(0xFFFFFFFFu, v, 1));
}

template <typename T>
__device__ double sum_of_squares(const KnnRows<T>& y, int64_t row, int lane) {
  double sum = 0.0;
  for (int64_t j = lane; j < y.dim; j += kKnnLanes) {
    const double v = y.at(row, j);
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

// Packed tiles: [tile][depth][128], depth a multiple of kKnnSlab, zeros where there is no row or no
// feature. So a slab of a tile is one contiguous copy into shared memory.

// What: a tile of the database, its h and the largest norm of each group.
// Grid: one block a tile; thread = (row of the tile, half of the features).
// Shared memory: factors, sums of squares.
template <typename T>
__global__ void __launch_bounds__(kKnnThreads)
    knn_pack_database(KnnRows<T> y, int64_t first_row, int64_t depth, const double* mean,
                      const KnnExtent* extent, float* packed, float* half_norm, float* group_norm) {
  __shared__ double factor[kKnnTile];
  __shared__ double squares[kKnnThreads];
  const KnnFrame frame = frame_of(*extent);
  const int64_t base = first_row + blockIdx.x * int64_t{kKnnTile};
  const int lane = threadIdx.x % kKnnLanes;
  for (int r = threadIdx.x / kKnnLanes; r < kKnnTile; r += kKnnSubgroups) {
    const int64_t row = base + r < y.rows ? base + r : y.rows - 1;
    double square;
    const double f = row_factor(y, row, lane, &square);
    if (lane == 0) factor[r] = base + r < y.rows ? f : NAN;
  }
  __syncthreads();
  const int r = threadIdx.x % kKnnTile;
  const int half = threadIdx.x / kKnnTile;
  const double f = factor[r];
  double sum = 0.0;
  if (f == f) {
    for (int64_t j = half; j < y.dim; j += 2) {
      const double v = unfused_mul(y.at(base + r, j), f) - mean[j];
      sum += v * v;
    }
  }
  squares[threadIdx.x] = sum;
  __syncthreads();
  const double square = (squares[r] + squares[r + kKnnTile]) * frame.scale * frame.scale;
  const bool usable = f == f && is_finite(square) && frame.scorable;
  float* out = packed + blockIdx.x * depth * kKnnTile + r;
  for (int64_t j = half; j < depth; j += 2) {
    out[j * kKnnTile] =
        usable && j < y.dim
            ? static_cast<float>((unfused_mul(y.at(base + r, j), f) - mean[j]) * frame.scale)
            : 0.0f;
  }
  __syncthreads();  // squares is read above and reused below
  if (half == 0) {
    double h = y.metric == KnnMetric::kIp ? 0.0 : 0.5 * square;
    if (y.metric == KnnMetric::kCosine && f == 0.0) h += frame.zero_offset();
    half_norm[blockIdx.x * int64_t{kKnnTile} + r] = usable ? static_cast<float>(h) : INFINITY;
    squares[r] = usable ? square : 0.0;
  }
  __syncthreads();
  if (threadIdx.x < kKnnTileGroups) {
    double largest = 0.0;
    for (int i = 0; i < kKnnGroup; ++i) {
      largest = fmax(largest, squares[threadIdx.x * kKnnGroup + i]);
    }
    group_norm[blockIdx.x * int64_t{kKnnTileGroups} + threadIdx.x] =
        __double2float_ru(sqrt(largest) * (1.0 + 1e-15));
  }
}

// What: a tile of queries and what is known of each query.
// Grid: one block a tile; eight threads a row.  Shared memory: none.
template <typename T>
__global__ void __launch_bounds__(kKnnThreads)
    knn_pack_queries(KnnRows<T> x, int64_t first_row, int64_t count, int64_t depth,
                     const double* mean, const KnnExtent* extent, KnnError error, float* packed,
                     KnnQuery* queries) {
  const KnnFrame frame = frame_of(*extent);
  const bool ip = x.metric == KnnMetric::kIp;
  const int lane = threadIdx.x % kKnnLanes;
  for (int r = threadIdx.x / kKnnLanes; r < kKnnTile; r += kKnnSubgroups) {
    const int64_t at = blockIdx.x * int64_t{kKnnTile} + r;
    const bool exists = at < count;
    const int64_t row = first_row + (exists ? at : count - 1);
    double square;
    const double f = row_factor(x, row, lane, &square);
    double sum = 0.0, largest = 0.0, product = 0.0;
    for (int64_t j = lane; j < x.dim; j += kKnnLanes) {
      const double v = unfused_mul(x.at(row, j), f);
      const double c = ip ? v : v - mean[j];
      sum += c * c;
      product += v * mean[j];
      largest = fmax(largest, fabs(c));
    }
    sum = add_lanes(sum);
    product = add_lanes(product);
    for (int step = kKnnLanes / 2; step > 0; step /= 2) {
      largest = fmax(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
    }
    const KnnQuery query = make_query(x.metric, frame, error, x.dim, sum, largest, product,
                                      x.metric == KnnMetric::kCosine && f == 0.0);
    if (exists && lane == 0) queries[at] = query;
    float* out = packed + blockIdx.x * depth * kKnnTile + r;
    for (int64_t j = lane; j < depth; j += kKnnLanes) {
      double v = 0.0;
      if (exists && query.usable && j < x.dim) {
        v = unfused_mul(x.at(row, j), f);
        v = (ip ? v : v - mean[j]) * query.scale;
      }
      out[j * kKnnTile] = static_cast<float>(v);
    }
  }
}

struct KnnScoreParams {
  const float* query;      // [query tiles][depth][128]
  const float* database;   // [tiles of the chunk][depth][128]
  const float* half_norm;  // [tiles of the chunk][128]
  float* group_max;        // [queries][groups]
  int64_t queries, groups, first_group, depth;
};

// Asynchronous copies into shared memory, in groups; wait_copies<n> waits for all but the last n.
#ifdef __CUDACC__
__device__ __forceinline__ void copy16(float* shared, const float* global) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#else
inline void copy16(float* shared, const float* global) { memcpy(shared, global, 16); }
inline void commit_copies() {}
template <int kPending>
void wait_copies() {}
#endif

// One slab, two pieces a thread.
__device__ __forceinline__ void copy_slab(float* shared, const float* global) {
  static_assert(kKnnSlab * kKnnTile == 8 * kKnnThreads, "two pieces of four floats a thread");
  const int at = threadIdx.x * 4;
  copy16(shared + at, global + at);
  copy16(shared + at + kKnnThreads * 4, global + at + kKnnThreads * 4);
}

// What: max over each group of 16 rows of <q', c'> - h.
// Grid: (database tile, query tile); thread (tx, ty) owns 8 x 8 scores in four 4 x 4 corners.
// Shared memory: two slabs of 16 features of both tiles (32 KiB), filled by cp.async.
// Determinism: one accumulator a score, features in order: a chain of `dim` fused multiply-adds.
__global__ void __launch_bounds__(kKnnThreads, 2) knn_score(KnnScoreParams p) {
  alignas(16) __shared__ float a[2][kKnnSlab][kKnnTile];
  alignas(16) __shared__ float b[2][kKnnSlab][kKnnTile];
  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;
  const float* query = p.query + blockIdx.y * p.depth * kKnnTile;
  const float* database = p.database + blockIdx.x * p.depth * kKnnTile;
  float acc[8][8] = {};

  copy_slab(&a[0][0][0], query);
  copy_slab(&b[0][0][0], database);
  commit_copies();
  const int64_t slabs = p.depth / kKnnSlab;
  for (int64_t s = 0; s < slabs; ++s) {
    const int now = s % 2;
    if (s + 1 < slabs) {
      copy_slab(&a[1 - now][0][0], query + (s + 1) * (kKnnSlab * kKnnTile));
      copy_slab(&b[1 - now][0][0], database + (s + 1) * (kKnnSlab * kKnnTile));
      commit_copies();
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();  // slab `now` is there for all
    ALS_UNROLL
    for (int d = 0; d < kKnnSlab; ++d) {
      float q[8], c[8];
      *reinterpret_cast<float4*>(q) = *reinterpret_cast<const float4*>(&a[now][d][ty * 4]);
      *reinterpret_cast<float4*>(q + 4) = *reinterpret_cast<const float4*>(&a[now][d][64 + ty * 4]);
      *reinterpret_cast<float4*>(c) = *reinterpret_cast<const float4*>(&b[now][d][tx * 4]);
      *reinterpret_cast<float4*>(c + 4) = *reinterpret_cast<const float4*>(&b[now][d][64 + tx * 4]);
      ALS_UNROLL
      for (int i = 0; i < 8; ++i) {
        ALS_UNROLL
        for (int j = 0; j < 8; ++j) acc[i][j] = fmaf(q[i], c[j], acc[i][j]);
      }
    }
    __syncthreads();  // all are done with slab `now`: the next round overwrites it
  }

  const float* h = p.half_norm + blockIdx.x * int64_t{kKnnTile};
  ALS_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float4 h4 = *reinterpret_cast<const float4*>(h + half * 64 + tx * 4);
    ALS_UNROLL
    for (int i = 0; i < 8; ++i) {
      const float* s = &acc[i][half * 4];
      float m = fmaxf(fmaxf(s[0] - h4.x, s[1] - h4.y), fmaxf(s[2] - h4.z, s[3] - h4.w));
      m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 1));  // 4 threads x 4 columns = a group
      m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 2));
      const int64_t row = blockIdx.y * int64_t{kKnnTile} + (i / 4) * 64 + ty * 4 + i % 4;
      if (tx % 4 == 0 && row < p.queries) {
        const int64_t group =
            p.first_group + blockIdx.x * int64_t{kKnnTileGroups} + half * 4 + tx / 4;
        p.group_max[row * p.groups + group] = m;
      }
    }
  }
}

template <typename T>
struct KnnSelectParams {
  KnnRows<T> query, database;
  int64_t first_query;  // query row of block 0
  int64_t groups, k;
  bool exclude_self;
  int capacity;             // entries of the list, a power of two, >= k + kKnnSubgroups
  const float* group_max;   // [queries][groups]
  const float* group_norm;  // [groups]
  const KnnQuery* queries;  // [queries]
  const KnnExtent* extent;
  double square_error;  // KnnError::square, 0 for ip
  float* distance;      // [Q, k]
  int64_t* index;       // [Q, k]
};

// The k-th largest of the keys key(0..n-1), exactly, by four rounds over 8 bits of it. All threads
// of the block call it and get the result; `histogram` has 256 counters.
template <typename Key>
__device__ uint32_t kth_largest_key(int64_t n, int64_t k, const Key& key, unsigned* histogram,
                                    int64_t* state /* [2]: prefix, rank */) {
  if (threadIdx.x == 0) {
    state[0] = 0;
    state[1] = k;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kKnnThreads) histogram[i] = 0;
    __syncthreads();
    const auto prefix = static_cast<uint32_t>(state[0]);
    const uint32_t known = shift == 24 ? 0u : 0xFFFFFFFFu << (shift + 8);
    for (int64_t i = threadIdx.x; i < n; i += kKnnThreads) {
      const uint32_t value = key(i);
      if ((value & known) == prefix) atomicAdd(&histogram[value >> shift & 255u], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t rank = state[1];
      int digit = 255;
      for (; digit > 0 && histogram[digit] < rank; --digit) rank -= histogram[digit];
      state[0] = prefix | static_cast<uint32_t>(digit) << shift;
      state[1] = rank;
    }
    __syncthreads();
  }
  return static_cast<uint32_t>(state[0]);
}

// Ascending bitonic sort of the first n (a power of two) entries. Ends with a barrier.
__device__ inline void sort_entries(uint32_t* keys, int64_t* rows, int n) {
  for (int size = 2; size <= n; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < n / 2; i += kKnnThreads) {
        const int low = 2 * step * (i / step) + i % step;
        const int high = low + step;
        const bool ascending = (low & size) == 0;
        const Neighbour x{keys[low], rows[low]}, y{keys[high], rows[high]};
        if ((y < x) == ascending) {
          keys[low] = y.key, rows[low] = y.index;
          keys[high] = x.key, rows[high] = x.index;
        }
      }
    }
  }
  __syncthreads();
}

// What: the k nearest rows of one query.  Equation: knn_math.h.
// Grid: one block a query. Eight threads measure a row, 32 rows at a time.
// Shared memory: dynamic, the list of `capacity` (index, key) pairs: 12 bytes each.
// Determinism: entries enter the list in any order, but what is kept and its order are those of
// (distance, index), which is total.
template <typename T>
__global__ void __launch_bounds__(kKnnThreads, 4) knn_select(KnnSelectParams<T> p) {
  ALS_DYNAMIC_SHARED(knn_shared);
  auto* rows = reinterpret_cast<int64_t*>(knn_shared);          // [capacity]
  auto* keys = reinterpret_cast<uint32_t*>(rows + p.capacity);  // [capacity]
  __shared__ unsigned histogram[256];
  __shared__ int64_t state[2];
  __shared__ int64_t listed[kKnnThreads];  // groups to measure
  __shared__ int warp_count[kKnnThreads / 32];
  __shared__ int count;       // entries of the list
  __shared__ bool full;       // whether k entries are known
  __shared__ Neighbour last;  // the worst of them
  __shared__ double lower;    // a row of the result has a true score of at least this

  const int lane = threadIdx.x % kKnnLanes;
  const int64_t at = blockIdx.x;
  const int64_t q = p.first_query + at;
  const KnnQuery query = p.queries[at];
  const KnnFrame frame = frame_of(*p.extent);
  const float* group_max = p.group_max + at * p.groups;
  const double offset = frame.has_zeros ? frame.zero_offset() : 0.0;
  const auto error = [&](int64_t g) {
    const double norm = p.group_norm[g];
    return query.radius * norm + p.square_error * (0.5 * norm * norm + offset);
  };

  // Each of the `needed` best groups holds a row at least that good; with exclude_self one of those
  // rows may be the query's own.
  const int64_t needed = p.k + (p.exclude_self ? 1 : 0);
  double reach = -INFINITY;
  if (query.usable && needed <= p.groups) {  // the same in all threads
    const uint32_t key = kth_largest_key(
        p.groups, needed,
        [&](int64_t g) { return distance_key(__double2float_rd(group_max[g] - error(g))); },
        histogram, state);
    reach = query.relation.lowest_score(query.relation.distance_of(key_distance(key)));
  }
  if (threadIdx.x == 0) {
    count = 0;
    full = false;
    lower = reach;
  }
  double square;
  const double query_factor = row_factor(p.query, q, lane, &square);
  const bool cosine = p.database.metric == KnnMetric::kCosine;
  const auto cut = [&]() {  // all threads, between barriers
    int n = 2;
    while (n < count) n *= 2;
    for (int i = count + threadIdx.x; i < n; i += kKnnThreads) {
      keys[i] = 0xFFFFFFFFu;
      rows[i] = INT64_MAX;
    }
    sort_entries(keys, rows, n);
    if (threadIdx.x == 0 && count >= p.k) {
      count = static_cast<int>(p.k);
      full = true;
      last = {keys[p.k - 1], rows[p.k - 1]};
      if (query.usable) {
        lower = fmax(lower, query.relation.lowest_score(key_distance(last.key)));
      }
    }
    __syncthreads();
  };
  __syncthreads();

  for (int64_t base = 0; base < p.groups; base += kKnnThreads) {
    // Groups that pass, in order.
    const int64_t g = base + threadIdx.x;
    const bool pass = g < p.groups && group_max[g] + error(g) >= lower;
    const unsigned ballot = __ballot_sync(0xFFFFFFFFu, pass);
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) warp_count[warp] = __popc(ballot);
    __syncthreads();
    int start = 0, total = 0;
    for (int w = 0; w < kKnnThreads / 32; ++w) {
      if (w < warp) start += warp_count[w];
      total += warp_count[w];
    }
    if (pass) listed[start + __popc(ballot & ((1u << threadIdx.x % 32) - 1))] = g;
    __syncthreads();

    for (int first = 0; first < total * kKnnGroup; first += kKnnSubgroups) {
      const bool crowded = count > p.capacity - kKnnSubgroups;
      __syncthreads();  // all have read count before anyone adds to it
      if (crowded) cut();
      const int i = first + threadIdx.x / kKnnLanes;
      const bool listed_row = i < total * kKnnGroup;
      const int64_t row = listed_row ? listed[i / kKnnGroup] * kKnnGroup + i % kKnnGroup : 0;
      const bool exists = listed_row && row < p.database.rows && !(p.exclude_self && row == q);
      const int64_t safe = exists ? row : 0;  // all lanes take part in the shuffles
      double sum = 0.0;
      float d;
      if (p.database.metric == KnnMetric::kIp) {
        for (int64_t j = lane; j < p.query.dim; j += kKnnLanes) {
          sum = unfused_add(sum, unfused_mul(p.query.at(q, j), p.database.at(safe, j)));
        }
        d = finish_distance(KnnMetric::kIp, add_lanes(sum));
      } else {
        double scale = 1.0;
        if (cosine) scale = inverse_norm(sum_of_squares(p.database, safe, lane));
        for (int64_t j = lane; j < p.query.dim; j += kKnnLanes) {
          const double x = cosine ? unfused_mul(p.query.at(q, j), query_factor) : p.query.at(q, j);
          sum = unfused_add(sum, squared_difference(x, p.database.at(safe, j), scale));
        }
        d = finish_distance(p.database.metric, add_lanes(sum));
        if (cosine && (query_factor == 0.0 || scale == 0.0) && query_factor == query_factor &&
            scale == scale) {
          d = 1.0f;
        }
      }
      const Neighbour found{distance_key(d), row};
      if (lane == 0 && exists && (!full || found < last)) {
        const int place = atomicAdd(&count, 1);
        keys[place] = found.key;
        rows[place] = found.index;
      }
      __syncthreads();  // count and the entries are there for all
    }
  }

  cut();
  // k entries exist: k <= rows available, and a group is left out only when k others are in.
  for (int64_t j = threadIdx.x; j < p.k; j += kKnnThreads) {
    p.distance[q * p.k + j] = key_distance(keys[j]);
    p.index[q * p.k + j] = rows[j];
  }
}

}  // namespace als

#undef ALS_UNROLL
