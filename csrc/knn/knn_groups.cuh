// Device code of knn, step 4: the groups of rows that can hold one of the k best of a query.
// Torch-free.
#pragma once

#include "knn/knn_measure.cuh"
#include "knn/knn_rescore.cuh"
#include "knn/knn_top.cuh"

namespace als {

// Many blocks an SM, because most of a query's time is waiting: for memory, at barriers.
constexpr int kKnnSelectThreads = 128;
constexpr int kKnnSelectFewThreads = 512;  // where blocks are few
constexpr int kKnnListed = 512;            // groups on the list at a time
constexpr int kKnnRound = 256;             // rows measured at a time, at most
constexpr int kKnnEntryBytes = sizeof(int64_t) + sizeof(uint32_t);

struct KnnSelectSizes {
  int capacity;  // entries of the list of rows: the k nearest, and those of a round
  int bins;      // at most twice the capacity, whose memory they use first

  static KnnSelectSizes of(int64_t k, int threads) {
    KnnSelectSizes s{2 * threads, 4 * threads};  // four neighbouring groups a thread
    while (s.capacity < k + kKnnRound) s.capacity *= 2;
    while (s.bins < 2 * (k + 1)) s.bins *= 2;
    return s;
  }
  int bytes() const { return capacity * kKnnEntryBytes; }
};

template <typename T>
struct KnnSelectParams {
  KnnRows<T> query, database;
  int64_t first_query;  // row of query 0 of the span
  int64_t k;
  bool exclude_self;
  KnnGrouping grouping;
  KnnSelectSizes sizes;
  const float* group_max;       // [queries][groups]
  const float* group_norm;      // [groups]; null: no bound needs it
  const float* group_residual;  // [groups]
  const KnnQuery* queries;      // [queries]; null: the scores are those of knn_few
  const KnnBound* bounds;       // [queries], of bf16 scores
  int budget;                   // groups that may be measured after bf16 scores
  bool rescored;     // false: all queries, by their bf16 scores, and those beyond the budget go
  KnnListed listed;  // on this list; true: the listed ones, by the float32 scores they have now
  float* distance;   // [Q, k]; as it is given: of the rows in front of database.first
  int64_t* index;    // [Q, k]; the same
};

struct KnnSelectShared {
  KnnRadix radix;
  KnnRelation relation;  // of the scores of groups
  KnnQuick quick;        // of those of rows
  KnnBound bound, row_bound;
  float lower, row_lower;  // true scores of the result are at least this
  bool usable;             // whether scores of groups say anything
  int64_t at, q;           // the query: of the span, row
  double factor;           // its row_factor
  int front, back;         // groups on the list, from its begin and from its end
  int listed[kKnnListed];
  int count;       // entries of the list of rows
  bool full;       // whether k are known
  Neighbour last;  // the worst of them
  int chosen_count;
  int64_t chosen[kKnnRound];  // rows for float64

  // Thread 0, when k rows are known to be no farther than this.
  __device__ void raise(double distance) {
    if (usable) lower = fmaxf(lower, __double2float_rd(relation.lowest_score(distance)));
    row_lower = fmaxf(row_lower, __double2float_rd(quick.relation.lowest_score(distance)));
  }
};

template <typename T, int kThreads>
struct KnnGroups {
  const KnnSelectParams<T>& p;
  KnnSelectShared& s;
  float sure = INFINITY;  // lower bounds from here on made the first bound of the result
  float most = INFINITY;  // no group of this thread has a higher upper bound

  __device__ int count() const { return static_cast<int>(p.grouping.count); }
  __device__ int needed() const { return static_cast<int>(p.k) + (p.exclude_self ? 1 : 0); }
  __device__ const float* maxima() const { return p.group_max + s.at * p.grouping.count; }

  struct Four {  // neighbouring groups
    float score[4], error[4];
  };
  __device__ Four four_groups(int64_t vector, const float* max, const KnnBound& bound) const {
    Four f;
    float norm[4] = {}, residual[4] = {};
    *reinterpret_cast<float4*>(f.score) = *reinterpret_cast<const float4*>(max + 4 * vector);
    if (p.group_norm != nullptr) {
      *reinterpret_cast<float4*>(norm) =
          *reinterpret_cast<const float4*>(p.group_norm + 4 * vector);
      *reinterpret_cast<float4*>(residual) =
          *reinterpret_cast<const float4*>(p.group_residual + 4 * vector);
    }
    ALS_UNROLL
    for (int c = 0; c < 4; ++c) f.error[c] = bound.error(f.score[c], norm[c], residual[c]);
    return f;
  }

  // Each of the `needed` best bins holds a row of at least its best lower bound; with exclude_self
  // one of those rows may be the query's own.
  __device__ void find_lower(float* bins) {
    const KnnBound bound = s.bound;
    const float* max = maxima();
    const int vectors = count() / 4;
    most = -INFINITY;
    for (int u = threadIdx.x; u < p.sizes.bins / 4; u += kThreads) {
      float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      ALS_UNROLL_BY(2)
      for (int v = u; v < vectors; v += p.sizes.bins / 4) {
        const Four f = four_groups(v, max, bound);
        ALS_UNROLL
        for (int c = 0; c < 4; ++c) {  // fmaxf: the bound that is not NaN
          best[c] = fmaxf(best[c], bound.lowest(f.score[c], f.error[c]));
          most = fmaxf(most, bound.highest(f.score[c], f.error[c]));
        }
      }
      *reinterpret_cast<float4*>(bins + 4 * u) = {best[0], best[1], best[2], best[3]};
    }
    __syncthreads();
    sure = kth_largest<kThreads>(bins, p.sizes.bins, needed(), s.radix);
    if (threadIdx.x == 0) s.raise(s.relation.farthest(sure));
    __syncthreads();
  }

  static __device__ bool passes(float highest, float lower) {  // NaN: only where everything does
    return highest >= lower || lower == -INFINITY;
  }

  // Groups [begin, end), which begins at a multiple of 4, that pass. Those that find no room are
  // counted all the same.
  __device__ void list(int begin, int end) {
    __syncthreads();  // all are done with the list
    if (threadIdx.x == 0) s.front = s.back = 0;
    __syncthreads();
    const float lower = s.lower;
    if (passes(most, lower)) {
      const KnnBound bound = s.bound;
      const float* max = maxima();
      for (int v = begin / 4 + threadIdx.x; v < end / 4; v += kThreads) {
        const Four f = four_groups(v, max, bound);
        for (int c = 0; c < 4; ++c) {
          if (!passes(bound.highest(f.score[c], f.error[c]), lower)) continue;
          const bool in_front = bound.lowest(f.score[c], f.error[c]) >= sure;
          const int place = atomicAdd(in_front ? &s.front : &s.back, 1);
          if (place < kKnnListed) {
            s.listed[in_front ? place : kKnnListed - 1 - place] = 4 * v + c;
          }
        }
      }
    }
    __syncthreads();
  }

  // The groups in the back of the list that still pass move to its front; returns how many.
  __device__ int list_again() {
    const int back = s.back;
    const float lower = s.lower;
    const KnnBound bound = s.bound;
    __syncthreads();
    if (threadIdx.x == 0) s.front = 0;
    for (int base = kKnnListed - back; base < kKnnListed; base += kThreads) {
      const int e = base + threadIdx.x;
      int g = -1;
      if (e < kKnnListed) {
        g = s.listed[e];
        const float score = maxima()[g];
        const bool norms = p.group_norm != nullptr;
        const float error =
            bound.error(score, norms ? p.group_norm[g] : 0.0f, norms ? p.group_residual[g] : 0.0f);
        if (!passes(bound.highest(score, error), lower)) g = -1;
      }
      __syncthreads();  // what is written now has been read
      if (g >= 0) s.listed[atomicAdd(&s.front, 1)] = g;
    }
    __syncthreads();
    return s.front;
  }
};

}  // namespace als
