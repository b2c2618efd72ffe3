// Device code of knn, step 2: centred and scaled rows as tiles in bf16, the way the tensor cores
// take them, and the lengths that bound the error of their scores. Torch-free.
#pragma once

#include "common/mma.cuh"
#include "knn/knn_measure.cuh"

namespace als {

// A tile in bf16: [slabs][128 positions][32 features], zeros where there is no row or no feature.
// A slab is one contiguous copy into shared memory. The four 16-byte chunks of a row are swapped
// among each other so that the eight rows of a matrix of ldmatrix lie in different banks (the
// pattern is that of the 64-byte swizzle of wgmma).
constexpr int kKnnFeatures = 32;                         // of a slab
constexpr int kKnnRowBytes = 2 * kKnnFeatures;           // 64
constexpr int kKnnSlabBytes = kKnnTile * kKnnRowBytes;   // 8 KiB
constexpr int kKnnRowChunks = kKnnRowBytes / 16;         // 4
constexpr int kKnnWarpColumns = 64;                      // database rows before one warp
constexpr int kKnnMmaFeatures = 16, kKnnMmaColumns = 8;  // of one mma instruction

ALS_HOST_DEVICE int64_t knn_slabs(int64_t dim) { return (dim + kKnnFeatures - 1) / kKnnFeatures; }

__device__ __forceinline__ int knn_chunk_offset(int position, int chunk) {
  return position * kKnnRowBytes + ((chunk ^ (position >> 1 & 3)) * 16);
}

// Where row `row` of a database tile stands in it. In the result of the mma instructions a lane
// owns columns 2 (lane % 4) and the next of every 8: those are 16 of each 64 columns, and the rows
// placed there are 16 consecutive ones, a group. So a group is one lane's own maximum, groups 2 t
// and 2 t + 1 belong to the same lanes, and everywhere else group g is rows 16 g to 16 g + 15.
ALS_HOST_DEVICE int knn_position(int row) {
  const int group = row / kKnnGroup;
  return group % 2 * kKnnWarpColumns + row % kKnnGroup / 2 * kKnnMmaColumns + group / 2 * 2 +
         row % 2;
}
static_assert(kKnnGroup == 2 * kKnnWarpColumns / kKnnMmaColumns, "the columns that a lane owns");

struct KnnLengths {  // squared
  double packed;     // of the row in bf16
  double residual;   // of what the rounding took away
};

// Eight neighbouring threads write feature(0..dim-1) at `position` of a tile.
template <typename Feature>
__device__ KnnLengths pack_row(unsigned char* tile, int position, int lane, int64_t dim,
                               const Feature& feature) {
  KnnLengths lengths{0.0, 0.0};
  const int64_t chunks = knn_slabs(dim) * kKnnRowChunks;
  for (int64_t chunk = lane; chunk < chunks; chunk += kKnnLanes) {
    float rounded[8];
    for (int i = 0; i < 8; ++i) {
      const int64_t j = chunk * 8 + i;
      const double v = j < dim ? feature(j) : 0.0;
      rounded[i] = round_to_bf16(static_cast<float>(v));
      const double r = rounded[i];
      lengths.packed += r * r;
      lengths.residual += (v - r) * (v - r);
    }
    unsigned char* slab = tile + chunk / kKnnRowChunks * kKnnSlabBytes;
    *reinterpret_cast<uint4*>(slab + knn_chunk_offset(position, chunk % kKnnRowChunks)) = {
        pack_bf16(rounded[0], rounded[1]), pack_bf16(rounded[2], rounded[3]),
        pack_bf16(rounded[4], rounded[5]), pack_bf16(rounded[6], rounded[7])};
  }
  return {add_lanes(lengths.packed), add_lanes(lengths.residual)};
}

// What a score subtracts for a row, from its squared length: h, infinity for one that no score can
// choose.
__device__ inline float half_norm_of(KnnMetric metric, const KnnFrame& frame, bool usable,
                                     bool zero, double square) {
  if (!usable) return INFINITY;
  const double h = metric == KnnMetric::kIp ? 0.0 : 0.5 * square;
  return static_cast<float>(zero ? h + frame.zero_offset() : h);
}

struct KnnTiles {
  unsigned char* rows;    // [tiles][slabs] slabs
  float* half_norm;       // [tiles][128], by position
  float* group_norm;      // [tiles][8]: largest length of a row, before or after rounding
  float* group_residual;  // [tiles][8]: largest length of what rounding took from a row
};

// What: tiles of the database in bf16, h, and the lengths of each group.
// Grid: one block a tile; eight threads a row.
// Shared memory: two lengths of each row.
template <typename T>
__global__ void __launch_bounds__(kKnnThreads)
    knn_pack_database(KnnRows<T> y, int64_t first_row, const double* mean, const KnnExtent* extent,
                      KnnTiles tiles) {
  __shared__ double norm[kKnnTile], residual[kKnnTile];
  const KnnFrame frame = frame_of(*extent);
  const int64_t base = first_row + blockIdx.x * int64_t{kKnnTile};
  unsigned char* tile = tiles.rows + blockIdx.x * knn_slabs(y.dim) * kKnnSlabBytes;
  const int lane = threadIdx.x % kKnnLanes;
  for (int r = threadIdx.x / kKnnLanes; r < kKnnTile; r += kKnnSubgroups) {
    const bool exists = base + r < y.rows;
    const int64_t row = exists ? base + r : y.rows - 1;  // all lanes take part in the shuffles
    double raw;
    const double f = row_factor(y, row, lane, &raw);
    const auto centred = [&](int64_t j) { return unfused_mul(y.at(row, j), f) - mean[j]; };
    double square = 0.0;
    for (int64_t j = lane; j < y.dim; j += kKnnLanes) square += centred(j) * centred(j);
    square = add_lanes(square);
    const bool usable = exists && is_finite(square) && frame.scorable;  // NaN where f is
    square *= frame.scale * frame.scale;
    const KnnLengths lengths = pack_row(tile, knn_position(r), lane, y.dim, [&](int64_t j) {
      return usable ? centred(j) * frame.scale : 0.0;
    });
    if (lane == 0) {
      const bool zero = y.metric == KnnMetric::kCosine && f == 0.0;
      tiles.half_norm[blockIdx.x * int64_t{kKnnTile} + knn_position(r)] =
          half_norm_of(y.metric, frame, usable, zero, square);
      norm[r] = usable ? fmax(square, lengths.packed) : 0.0;  // h is bounded by it too
      residual[r] = lengths.residual;
    }
  }
  __syncthreads();
  if (threadIdx.x < kKnnTileGroups) {
    double longest = 0.0, lost = 0.0;
    for (int i = 0; i < kKnnGroup; ++i) {
      longest = fmax(longest, norm[threadIdx.x * kKnnGroup + i]);
      lost = fmax(lost, residual[threadIdx.x * kKnnGroup + i]);
    }
    // 1e-6: the float64 arithmetic behind the lengths, for rows of up to 2^30 features
    const int64_t group = blockIdx.x * int64_t{kKnnTileGroups} + threadIdx.x;
    tiles.group_norm[group] = __double2float_ru((1.0 + 1e-6) * sqrt(longest));
    tiles.group_residual[group] = __double2float_ru((1.0 + 1e-6) * sqrt(lost));
  }
}

// What: tiles of queries in bf16 and what is known of each query.
// Grid: one block a tile; eight threads a row.  Shared memory: none.
template <typename T>
__global__ void __launch_bounds__(kKnnThreads)
    knn_pack_queries(KnnRows<T> x, int64_t first_row, int64_t count, const double* mean,
                     const KnnExtent* extent, bool exact, unsigned char* tiles, KnnQuery* queries,
                     KnnBound* bounds) {
  const KnnFrame frame = frame_of(*extent);
  const KnnError float_error = exact ? score_error(x.dim) : KnnError{0.0, 0.0};
  const bool ip = x.metric == KnnMetric::kIp;
  const int lane = threadIdx.x % kKnnLanes;
  unsigned char* tile = tiles + blockIdx.x * knn_slabs(x.dim) * kKnnSlabBytes;
  for (int r = threadIdx.x / kKnnLanes; r < kKnnTile; r += kKnnSubgroups) {
    const int64_t at = blockIdx.x * int64_t{kKnnTile} + r;
    const bool exists = at < count;
    const int64_t row = first_row + (exists ? at : count - 1);
    double raw;
    const double f = row_factor(x, row, lane, &raw);
    const auto centred = [&](int64_t j) {
      const double v = unfused_mul(x.at(row, j), f);
      return ip ? v : v - mean[j];
    };
    double square = 0.0, largest = 0.0, product = 0.0;
    ALS_UNROLL_BY(2)  // by four, registers do not suffice
    for (int64_t j = lane; j < x.dim; j += kKnnLanes) {
      const double c = centred(j);
      square += c * c;
      largest = fmax(largest, fabs(c));
      if (ip) product += c * mean[j];
    }
    square = add_lanes(square);
    product = add_lanes(product);
    for (int step = kKnnLanes / 2; step > 0; step /= 2) {
      largest = fmax(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
    }
    const KnnQuery query = make_query(x.metric, frame, float_error, x.dim, square, largest, product,
                                      x.metric == KnnMetric::kCosine && f == 0.0);
    const bool usable = exists && query.usable;
    const KnnLengths lengths = pack_row(
        tile, r, lane, x.dim, [&](int64_t j) { return usable ? centred(j) * query.scale : 0.0; });
    if (exists && lane == 0) {
      queries[at] = query;
      const int64_t products = exact ? knn_slabs(x.dim) * kKnnFeatures : 0;
      const KnnBf16Error error = usable ? tensor_error(products, query.scale * sqrt(square),
                                                       sqrt(lengths.packed), sqrt(lengths.residual))
                                        : KnnBf16Error{0.0, 0.0};
      bounds[at] = KnnBound::of_packed(error.radius, error.spread, ip ? 0.0 : float_error.square,
                                       frame.has_zeros ? frame.zero_offset() : 0.0);
    }
  }
}

}  // namespace als
