// Device code of knn for few queries, or few rows: the database is read once, as it lies.
// Torch-free.
//
// No mean, no packing, no tensor cores, and so no float64 but where float32 fails: the scores are
// those of knn_quick_math.h. Only the largest of the rows of a group is written; knn_select does
// the rest, as for packed rows.
#pragma once

#include "knn/knn_measure.cuh"

namespace als {

constexpr int kKnnFewThreads = 128;
constexpr int kKnnFewGroups = kKnnFewThreads / kKnnLanes;  // 16: of a block, eight threads each
constexpr int kKnnFewStrideBits = 4;                       // so far apart are the rows of a group
constexpr int kKnnFewRows = 4;                             // of a group, at a time
constexpr int kKnnFewAtOnce = 4;                           // queries
constexpr int kKnnFewQueries = 16;                         // of a block
static_assert(kKnnFewGroups == 1 << kKnnFewStrideBits, "the groups of a block fill the gaps");

template <typename T>
struct KnnFewParams {
  KnnRows<T> query, database;
  KnnGrouping grouping;
  float* group_max;   // [queries][groups]
  float* group_norm;  // [groups]: largest length of a row; ip only
};

struct KnnFewShared {
  KnnQuick quick[kKnnFewQueries];
  double factor[kKnnFewQueries];                     // row_factor
  float largest[kKnnFewQueries][2 * kKnnFewGroups];  // two halves of a group's rows
};

template <typename T, bool kProduct>  // kProduct: not l2
struct KnnFewBlock {
  static constexpr int kRows = kKnnFewRows, kQueries = kKnnFewAtOnce;
  static_assert(kRows * kQueries == 2 * kKnnLanes, "two scores a lane");

  const KnnFewParams<T>& p;
  KnnFewShared& s;
  int64_t first_query;
  int count;        // of queries
  int lane, group;  // of the block
  bool aligned;     // all rows and queries begin at a multiple of 16 bytes
  float norm = 0.0f;

  // A lane has the scores of query lane / 2 (of those at once) and of rows 2 (lane % 2) and the
  // next.
  __device__ int my_row(int c) const { return 2 * (lane % 2) + c; }
  __device__ float& largest(int query) { return s.largest[query][2 * group + lane % 2]; }

  // `row` and those 1, 2 and 3 strides behind it, with queries base to base + 3.
  __device__ void add_rows(int64_t row, int base) {
    const int64_t dim = p.database.dim;
    const int mine = base + lane / 2;
    float score[2] = {NAN, NAN};
    if constexpr (!std::is_same_v<T, double>) {
      // All of one alignment. The first, or row 0, stands in for one that is not there.
      const T *x[kQueries], *y[kRows];
      y[0] = p.database.data + (row < p.database.rows ? row : 0) * dim;
      ALS_UNROLL
      for (int r = 1; r < kRows; ++r) {
        const int64_t other = row + (r << kKnnFewStrideBits);
        y[r] = other < p.database.rows ? p.database.data + other * dim : y[0];
      }
      ALS_UNROLL
      for (int i = 0; i < kQueries; ++i) {
        const int q = base + i < count ? base + i : base;
        x[i] = p.query.data + (first_query + q) * dim;
      }
      KnnQuickSums<kQueries, kRows, kProduct> sums{};
      if (aligned) {
        sums.template add_part<true>(x, y, dim, lane);
      } else {
        sums.template add_part<false>(x, y, dim, lane);
      }
      add_and_scatter(sums.a, lane);
      float b[2] = {};
      if constexpr (kProduct) {
        add_and_scatter(sums.b, lane);  // lane l has that of row l / 2
        if (sums.b[0] < 3e38f) norm = fmaxf(norm, quick_norm(sums.b[0]));
        const int team = threadIdx.x % 32 & ~(kKnnLanes - 1);
        ALS_UNROLL
        for (int c = 0; c < 2; ++c) {
          b[c] = __shfl_sync(0xFFFFFFFFu, sums.b[0], team + 2 * my_row(c));
        }
      }
      if (mine < count) {
        ALS_UNROLL
        for (int c = 0; c < 2; ++c) {
          score[c] = s.quick[mine].score(p.query.metric, sums.a[c], b[c]);
        }
      }
    }
    bool exists[2], open[2];
    ALS_UNROLL
    for (int c = 0; c < 2; ++c) {
      exists[c] = mine < count && row + (my_row(c) << kKnnFewStrideBits) < p.database.rows;
      open[c] = exists[c] && !(score[c] == score[c]);
    }
    score_exactly(row, base, open, score);
    if (exists[0]) largest(mine) = fmaxf(largest(mine), score[0]);
    if (exists[1]) largest(mine) = fmaxf(largest(mine), score[1]);
  }

  // Where float32 says nothing, the score is that of the float64 distance; -infinity where that is
  // NaN. All lanes of the warp take part, whoever needs it.
  __device__ void score_exactly(int64_t row, int base, const bool (&open)[2], float (&score)[2]) {
    const unsigned first = __ballot_sync(0xFFFFFFFFu, open[0]);
    const unsigned second = __ballot_sync(0xFFFFFFFFu, open[1]);
    if ((first | second) == 0) return;
    for (int n = 0; n < kQueries * kRows; ++n) {
      const int owner = n / 2;
      if (((n % 2 ? second : first) & 0x01010101u << owner) == 0) continue;  // of no eight lanes
      const int64_t other = row + (n % kRows << kKnnFewStrideBits);
      const int i = base + n / kRows < count ? base + n / kRows : base;
      const float d = exact_distance(p.query, first_query + i, s.factor[i], p.database,
                                     other < p.database.rows ? other : 0, lane);
      auto exact = static_cast<float>(s.quick[i].relation.alpha - d);
      if (!(exact == exact)) exact = -INFINITY;
      if (owner == lane && n % 2 == 0 && open[0]) score[0] = exact;
      if (owner == lane && n % 2 == 1 && open[1]) score[1] = exact;
    }
  }

  __device__ void start() {
    const int mine = group < count ? group : 0;  // 16 groups, 16 queries
    double square = 0.0, factor = 1.0;
    if (kProduct) factor = row_factor(p.query, first_query + mine, lane, &square);
    if (lane == 0) {
      s.quick[group] = KnnQuick::of(p.query.metric, p.query.dim, square);
      s.factor[group] = factor;
    }
    for (int query = lane / 2; query < kKnnFewQueries; query += kQueries) {
      largest(query) = -INFINITY;
    }
    __syncthreads();
  }

  __device__ void run(int64_t first_group) {
    start();
    const int64_t rows = int64_t{1} << p.grouping.row_bits;
    for (int64_t i = 0; i < rows; i += kRows) {
      if (p.grouping.row(first_group, i) >= p.database.rows) break;  // the same in all threads
      const int64_t row = p.grouping.row(first_group + group, i);
      for (int base = 0; base < count; base += kQueries) add_rows(row, base);
    }
    const int64_t g = first_group + group;
    for (int base = 0; base < count; base += kQueries) {
      const int mine = base + lane / 2;
      float m = largest(mine);
      m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 1));
      if (lane % 2 == 0 && mine < count) {
        p.group_max[(first_query + mine) * p.grouping.count + g] = m;
      }
    }
    if (kProduct && first_query == 0) {
      for (int step = 2; step < kKnnLanes; step *= 2) {
        norm = fmaxf(norm, __shfl_xor_sync(0xFFFFFFFFu, norm, step));
      }
      if (lane == 0) p.group_norm[g] = norm;
    }
  }
};

// What: max over each group of rows of the scores of knn_quick_math.h.
// Grid: a block has 16 groups, eight threads each, and up to 16 queries; the next queries are other
// blocks. A thread has 4 rows and 4 queries at a time, so the rows come from HBM once and for the
// other queries of the block from L1.
// Shared memory: what is known of the queries, the largest scores so far.
// Determinism: maxima of sums in a fixed order.
template <typename T, bool kProduct>
__global__ void __launch_bounds__(kKnnFewThreads, 4) knn_few(KnnFewParams<T> p) {
  __shared__ KnnFewShared shared;
  const int64_t blocks = p.grouping.count / kKnnFewGroups;
  const int64_t first_query = blockIdx.x / blocks * kKnnFewQueries;
  const int64_t left = p.query.rows - first_query;
  const int count = left < kKnnFewQueries ? static_cast<int>(left) : kKnnFewQueries;
  const int64_t first_group = blockIdx.x % blocks * kKnnFewGroups;
  const int lane = threadIdx.x % kKnnLanes, group = threadIdx.x / kKnnLanes;
  const bool aligned = rows_are_aligned(p.query, p.database);
  KnnFewBlock<T, kProduct>{p, shared, first_query, count, lane, group, aligned}.run(first_group);
}

}  // namespace als
