// Device code of knn, step 5: float32 scores for the queries that bf16 scores cannot serve. How
// many those are is known on the device only: the grids are fixed, and without work a block does
// nothing. Torch-free.
#pragma once

#include "knn/knn_score.cuh"

namespace als {

// Packed float32 tiles: [tile][depth][128], depth a multiple of kKnnFloatSlab, zeros where there is
// no row or no feature. So a slab of a tile is one contiguous copy into shared memory.
constexpr int kKnnFloatSlab = 16;  // features in shared memory at a time

// Queries of a span whose bf16 scores leave too much to measure, in no particular order: every
// query's result is the same wherever it stands.
struct KnnListed {
  int* query;  // [queries], positions in the span
  unsigned* count;
};

// Groups that a query may measure after bf16 scores: the k best and as many again, and 1/64 of all.
// Beyond, a float32 pass over the database costs less than what it spares (estimated, not
// measured).
inline int knn_budget(int64_t k, int64_t groups) {
  return static_cast<int>(2 * k + 2 + groups / 64);
}

// What: a tile of the database in float32 and its h.
// Grid: one block a tile; thread = (row of the tile, half of the features).
// Shared memory: factors, sums of squares.
template <typename T>
__global__ void __launch_bounds__(kKnnThreads)
    knn_pack_database_float(KnnRows<T> y, int64_t first_row, int64_t depth, const double* mean,
                            const KnnExtent* extent, KnnListed listed, float* packed,
                            float* half_norm) {
  __shared__ double factor[kKnnTile];
  __shared__ double squares[kKnnThreads];
  if (*listed.count == 0) return;
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
  if (half == 0) {
    const bool zero = y.metric == KnnMetric::kCosine && f == 0.0;
    half_norm[blockIdx.x * int64_t{kKnnTile} + r] =
        half_norm_of(y.metric, frame, usable, zero, square);
  }
}

// What: a tile of listed queries in float32.
// Grid: one block a tile; eight threads a row.  Shared memory: none.
template <typename T>
__global__ void __launch_bounds__(kKnnThreads)
    knn_pack_queries_float(KnnRows<T> x, int64_t first_row, int64_t depth, const double* mean,
                           const KnnQuery* queries, KnnListed listed, float* packed) {
  const auto count = static_cast<int64_t>(*listed.count);
  if (blockIdx.x * int64_t{kKnnTile} >= count) return;
  const bool ip = x.metric == KnnMetric::kIp;
  const int lane = threadIdx.x % kKnnLanes;
  for (int r = threadIdx.x / kKnnLanes; r < kKnnTile; r += kKnnSubgroups) {
    const int64_t at = blockIdx.x * int64_t{kKnnTile} + r;
    const bool exists = at < count;
    const int64_t q = listed.query[exists ? at : 0];
    double square;
    const double f = row_factor(x, first_row + q, lane, &square);
    const double scale = queries[q].scale;
    float* out = packed + blockIdx.x * depth * kKnnTile + r;
    for (int64_t j = lane; j < depth; j += kKnnLanes) {
      double v = 0.0;
      if (exists && j < x.dim) {
        v = unfused_mul(x.at(first_row + q, j), f);
        v = (ip ? v : v - mean[j]) * scale;
      }
      out[j * kKnnTile] = static_cast<float>(v);
    }
  }
}

struct KnnRescoreParams {
  const float* query;      // [query tiles][depth][128], listed queries
  const float* database;   // [tiles of the chunk][depth][128]
  const float* half_norm;  // [tiles of the chunk][128]
  float* group_max;        // [queries][groups]
  int64_t tiles, groups, first_group, depth;
  KnnListed listed;
};

// One slab, two pieces a thread.
__device__ __forceinline__ void copy_float_slab(float* shared, const float* global) {
  static_assert(kKnnFloatSlab * kKnnTile == 8 * kKnnThreads, "two pieces of four floats a thread");
  const int at = threadIdx.x * 4;
  copy16(shared + at, global + at);
  copy16(shared + at + kKnnThreads * 4, global + at + kKnnThreads * 4);
}

// What: max over each group of 16 rows of <q', c'> - h, for listed queries.
// Grid: blocks take (query tile, database tile) in turn; thread (tx, ty) owns 8 x 8 scores in four
// 4 x 4 corners.
// Shared memory: two slabs of 16 features of both tiles (32 KiB), filled by cp.async.
// Determinism: one accumulator a score, features in order: a chain of `dim` fused multiply-adds.
__global__ void __launch_bounds__(kKnnThreads, 2) knn_rescore(KnnRescoreParams p) {
  alignas(16) __shared__ float a[2][kKnnFloatSlab][kKnnTile];
  alignas(16) __shared__ float b[2][kKnnFloatSlab][kKnnTile];
  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;
  const auto count = static_cast<int64_t>(*p.listed.count);
  const int64_t query_tiles = (count + kKnnTile - 1) / kKnnTile;
  for (int64_t item = blockIdx.x; item < query_tiles * p.tiles; item += gridDim.x) {
    const int64_t tile = item % p.tiles, query_tile = item / p.tiles;
    const float* query = p.query + query_tile * p.depth * kKnnTile;
    const float* database = p.database + tile * p.depth * kKnnTile;
    float acc[8][8] = {};

    copy_float_slab(&a[0][0][0], query);
    copy_float_slab(&b[0][0][0], database);
    commit_copies();
    const int64_t slabs = p.depth / kKnnFloatSlab;
    for (int64_t s = 0; s < slabs; ++s) {
      const int now = s % 2;
      if (s + 1 < slabs) {
        copy_float_slab(&a[1 - now][0][0], query + (s + 1) * (kKnnFloatSlab * kKnnTile));
        copy_float_slab(&b[1 - now][0][0], database + (s + 1) * (kKnnFloatSlab * kKnnTile));
        commit_copies();
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();  // slab `now` is there for all
      ALS_UNROLL
      for (int d = 0; d < kKnnFloatSlab; ++d) {
        float q[8], c[8];
        *reinterpret_cast<float4*>(q) = *reinterpret_cast<const float4*>(&a[now][d][ty * 4]);
        *reinterpret_cast<float4*>(q + 4) =
            *reinterpret_cast<const float4*>(&a[now][d][64 + ty * 4]);
        *reinterpret_cast<float4*>(c) = *reinterpret_cast<const float4*>(&b[now][d][tx * 4]);
        *reinterpret_cast<float4*>(c + 4) =
            *reinterpret_cast<const float4*>(&b[now][d][64 + tx * 4]);
        ALS_UNROLL
        for (int i = 0; i < 8; ++i) {
          ALS_UNROLL
          for (int j = 0; j < 8; ++j) acc[i][j] = fmaf(q[i], c[j], acc[i][j]);
        }
      }
      __syncthreads();  // all are done with slab `now`: the next round overwrites it
    }

    const float* h = p.half_norm + tile * kKnnTile;
    ALS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float4 h4 = *reinterpret_cast<const float4*>(h + half * 64 + tx * 4);
      ALS_UNROLL
      for (int i = 0; i < 8; ++i) {
        const float* s = &acc[i][half * 4];
        float m = fmaxf(fmaxf(s[0] - h4.x, s[1] - h4.y), fmaxf(s[2] - h4.z, s[3] - h4.w));
        m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 1));  // 4 threads x 4 columns = a group
        m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 2));
        const int64_t at = query_tile * kKnnTile + (i / 4) * 64 + ty * 4 + i % 4;
        if (tx % 4 == 0 && at < count) {
          const int64_t group = p.first_group + tile * kKnnTileGroups + half * 4 + tx / 4;
          p.group_max[p.listed.query[at] * p.groups + group] = m;
        }
      }
    }
  }
}

}  // namespace als
