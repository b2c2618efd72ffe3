// Device code of knn, steps 4 and 6: the rows that can belong to a result, in float64. Torch-free.
//
// A query's own block
//   1. reads the maxima of all groups once, for a true score that k rows reach: the k-th largest
//      lower bound, not of all groups, but of the best of each of many bins of them. Each bin
//      stands for a row of its own, so that is a bound too, and some hundred keys are soon sorted
//   2. lists the groups whose upper bound reaches that, those that the bound came from in front
//   3. measures the latter, which nearly always hold the result, so that the k-th distance is known
//   4. measures what that leaves of the others
// Measuring is float32 in difference form for all rows, and float64 for those that its bound does
// not exclude: the k nearest and a few more. Where rows lie in clusters, step 3 spares half and
// more of the groups that step 2 lists.
//
// By count, for Q = M = 100,000, D = 128, k = 10: step 1 takes 9 float32 instructions a group, 56
// thousand a query, and step 3 two an element of 160 rows, 41 thousand: 0.2 ms each on an H100 if
// nothing waits. What it waits for are 25 KB of maxima and 82 KB of rows a query (float32).
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
};

template <typename T, int kThreads>
struct KnnSelection {
  static constexpr int kTeams = kThreads / kKnnLanes;
  static constexpr int kWarpTeams = 32 / kKnnLanes;

  const KnnSelectParams<T>& p;
  KnnSelectShared& s;
  unsigned char* memory;  // dynamic shared memory
  float sure = INFINITY;  // lower bounds from here on made the first bound of the result
  float most = INFINITY;  // no group of this thread has a higher upper bound

  static __device__ int lane() { return threadIdx.x % kKnnLanes; }
  static __device__ int team() { return threadIdx.x / kKnnLanes; }
  __device__ float* bins() const { return reinterpret_cast<float*>(memory); }
  // The list of rows: [capacity] indices, then [capacity] keys.
  __device__ int64_t* rows() const { return reinterpret_cast<int64_t*>(memory); }
  __device__ uint32_t* keys() const {
    return reinterpret_cast<uint32_t*>(rows() + p.sizes.capacity);
  }
  __device__ int groups() const { return static_cast<int>(p.grouping.count); }
  __device__ const float* group_max() const { return p.group_max + s.at * p.grouping.count; }
  __device__ int needed() const { return static_cast<int>(p.k) + (p.exclude_self ? 1 : 0); }

  // Thread 0, when k rows are known to be no farther than this.
  __device__ void raise(double distance) {
    if (s.usable) s.lower = fmaxf(s.lower, __double2float_rd(s.relation.lowest_score(distance)));
    s.row_lower = fmaxf(s.row_lower, __double2float_rd(s.quick.relation.lowest_score(distance)));
  }

  __device__ void start(int64_t at) {
    if (threadIdx.x >= 32) return;  // all lanes of the first warp take part in shuffles
    const int64_t q = p.first_query + at;
    double square = 0.0, factor = 1.0;
    if (p.query.metric != KnnMetric::kL2) factor = row_factor(p.query, q, lane(), &square);
    if (threadIdx.x > 0) return;
    s.at = at;
    s.q = q;
    s.factor = factor;
    s.quick = KnnQuick::of(p.query.metric, p.query.dim, square);
    s.row_bound = KnnBound::of_quick(s.quick);
    if (p.queries != nullptr) {
      s.relation = p.queries[at].relation;
      s.usable = p.queries[at].usable;
      s.bound = p.bounds[at];
      if (p.rescored) {
        s.bound.radius = __double2float_ru(p.queries[at].radius);
        s.bound.spread = 0.0f;
      }
    } else {
      s.relation = s.quick.relation;
      s.usable = true;
      s.bound = s.row_bound;
    }
    s.lower = s.row_lower = -INFINITY;
    // A part of the database goes on with what the parts in front of it left.
    const int64_t before = p.database.first - (p.exclude_self && q < p.database.first);
    s.count = static_cast<int>(before < p.k ? before : p.k);
    s.full = s.count == p.k;
    if (s.full) {
      const int64_t worst = q * p.k + p.k - 1;
      s.last = {distance_key(p.distance[worst]), p.index[worst]};
      raise(p.distance[worst]);
    }
  }

  __device__ void load_known() {
    for (int j = threadIdx.x; j < s.count; j += kThreads) {
      keys()[j] = distance_key(p.distance[s.q * p.k + j]);
      rows()[j] = p.index[s.q * p.k + j];
    }
  }

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
  __device__ void find_lower() {
    const KnnBound bound = s.bound;
    const float* max = group_max();
    const int vectors = groups() / 4;
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
      *reinterpret_cast<float4*>(bins() + 4 * u) = {best[0], best[1], best[2], best[3]};
    }
    __syncthreads();
    sure = kth_largest<kThreads>(bins(), p.sizes.bins, needed(), s.radix);
    if (threadIdx.x == 0) raise(s.relation.farthest(sure));
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
      const float* max = group_max();
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
        const float score = group_max()[g];
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

  // Sorts the list of rows and cuts it to the k nearest. By all threads; ends with a barrier.
  __device__ void cut() {
    const int count = s.count;
    int n = 2;
    while (n < count) n *= 2;
    for (int i = count + threadIdx.x; i < n; i += kThreads) {
      keys()[i] = 0xFFFFFFFFu;
      rows()[i] = INT64_MAX;
    }
    sort_entries<kThreads>(keys(), rows(), n);
    if (count >= p.k && threadIdx.x == 0) {
      s.count = static_cast<int>(p.k);
      s.full = true;
      s.last = {keys()[p.k - 1], rows()[p.k - 1]};
      raise(key_distance(s.last.key));
    }
    __syncthreads();
  }

  // Which of rows i and i + 8 of a group (i = 0..7, 16..23, ...) float64 has to look at.
  __device__ void choose(bool exists, int64_t group, int64_t i) {
    int64_t row[2];
    bool wanted[2];
    for (int r = 0; r < 2; ++r) {
      row[r] = p.grouping.row(group, i + 8 * r);
      wanted[r] = exists && row[r] < p.database.rows &&
                  !(p.exclude_self && row[r] + p.database.first == s.q);
    }
    const int mine = lane() / (kKnnLanes / 2);  // whose sums this lane gets
    bool choose_mine = mine ? wanted[1] : wanted[0];
    if constexpr (!std::is_same_v<T, double>) {
      const float lower = s.row_lower;
      if (lower > -INFINITY) {
        const bool product = p.query.metric != KnnMetric::kL2;
        // Rows of one alignment: the second takes the place of one that is not there, or row 0
        const T* const x[1] = {p.query.data + s.q * p.query.dim};
        const T* y[2];
        y[0] = p.database.data + (exists && row[0] < p.database.rows ? row[0] : 0) * p.query.dim;
        y[1] = exists && row[1] < p.database.rows ? p.database.data + row[1] * p.query.dim : y[0];
        const float score = product ? quick_score<true>(x, y) : quick_score<false>(x, y);
        choose_mine &= !(score < lower);
      }
    }
    if (lane() % (kKnnLanes / 2) == 0 && choose_mine) {
      s.chosen[atomicAdd(&s.chosen_count, 1)] = mine ? row[1] : row[0];
    }
  }

  // The upper bound of the true score of row lane / 4, NaN where there is none.
  template <bool kProduct>
  __device__ float quick_score(const T* const (&x)[1], const T* const (&y)[2]) const {
    KnnQuickSums<1, 2, kProduct> sums{};
    if (rows_are_aligned(p.query, p.database)) {
      sums.template add_part<true>(x, y, p.query.dim, lane());
    } else {
      sums.template add_part<false>(x, y, p.query.dim, lane());
    }
    add_and_scatter(sums.a, lane());
    float norm = 0.0f;
    if constexpr (kProduct) {
      add_and_scatter(sums.b, lane());
      norm = quick_norm(sums.b[0]);
    }
    const float score = s.quick.score(p.query.metric, sums.a[0], kProduct ? sums.b[0] : 0.0f);
    return s.row_bound.highest(score, s.row_bound.error(score, norm, 0.0f));
  }

  // Rows to look at in float64, of the pairs [begin, end) of rows on the list.
  __device__ void choose_round(int begin, int end) {
    const int bits = p.grouping.row_bits - 1;
    // The bound is that of the warp: all lanes take part in the shuffles.
    for (int first = begin + threadIdx.x / 32 * kWarpTeams; first < end; first += kTeams) {
      const int pair = first + team() % kWarpTeams;
      const bool exists = pair < end;
      const int i = pair & ((1 << bits) - 1);
      choose(exists, s.listed[exists ? pair >> bits : 0], (i / 8) * 16 + i % 8);
    }
  }

  __device__ void measure_chosen(int chosen) {
    for (int first = threadIdx.x / 32 * kWarpTeams; first < chosen; first += kTeams) {
      const int i = first + team() % kWarpTeams;
      const int64_t row = s.chosen[i < chosen ? i : first];
      const float d = exact_distance(p.query, s.q, s.factor, p.database, row, lane());
      const Neighbour found{distance_key(d), row + p.database.first};
      if (lane() == 0 && i < chosen && (!s.full || found < s.last)) {
        const int place = atomicAdd(&s.count, 1);
        keys()[place] = found.key;
        rows()[place] = found.index;
      }
    }
  }

  // Of the rows of the first n groups on the list and those known, the k nearest, sorted.
  __device__ void measure(int n) {
    const int pairs = n << (p.grouping.row_bits - 1);
    for (int base = 0;; base += kKnnRound / 2) {
      const bool done = base >= pairs;
      const int count = s.count;
      int chosen = 0;
      if (!done) {
        if (threadIdx.x == 0) s.chosen_count = 0;
        __syncthreads();
        const int end = base + kKnnRound / 2;
        choose_round(base, end < pairs ? end : pairs);
        __syncthreads();
        chosen = s.chosen_count;
      }
      if (done || count + chosen > p.sizes.capacity) cut();
      if (done) return;
      measure_chosen(chosen);
      __syncthreads();
    }
  }

  // False: the groups on the list are too many after bf16 scores.
  __device__ bool measure_listed(int budget) {
    int n = s.front;
    for (bool again = false;; again = true) {
      measure(n);
      if (again || s.back == 0) return n <= budget;
      budget -= n;
      n = list_again();
      if (n > budget) return false;
    }
  }

  // False: query `at` needs float32 scores.
  __device__ bool run(int64_t at) {
    start(at);
    __syncthreads();
    int budget = INT32_MAX;
    if (s.usable && needed() <= groups()) {  // the same in all threads
      find_lower();
      if (!p.rescored) budget = p.budget;
    }
    load_known();  // where the bins were
    int page = groups();
    for (int begin = 0; begin < groups();) {
      const int end = groups() - begin < page ? groups() : begin + page;
      list(begin, end);
      const int passing = s.front + s.back;
      if (passing > kKnnListed) {  // only where a page is all groups
        if (passing > budget) return false;
        budget = INT32_MAX;
        page = kKnnListed;
        most = INFINITY;  // the threads take other groups now
        continue;
      }
      if (!measure_listed(budget)) return false;
      begin = end;
    }
    // k entries exist, or as many as rows up to here: a group is left out only when k others are
    // in.
    for (int j = threadIdx.x; j < s.count; j += kThreads) {
      p.distance[s.q * p.k + j] = key_distance(keys()[j]);
      p.index[s.q * p.k + j] = rows()[j];
    }
    return true;
  }
};

// What: the k nearest rows of each query.  Equation: knn_math.h.
// Grid: one block a query; of the listed queries, whose number only the device knows, at most.
// Eight threads measure two rows of a group at a time.
// Shared memory: static, the lists of groups and of rows for float64; dynamic, `sizes.bytes()`: the
// best lower bounds of bins of groups, then the list of `capacity` (index, key) pairs.
// Determinism: entries enter the lists in any order, but what is kept and its order are those of
// (distance, index), which is total, and whether a query is rescored goes by numbers alone.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 768 / kThreads) knn_select(KnnSelectParams<T> p) {
  ALS_DYNAMIC_SHARED(knn_shared);
  __shared__ KnnSelectShared shared;
  int64_t at = blockIdx.x;
  if (p.rescored) {
    if (at >= *p.listed.count) return;
    at = p.listed.query[at];
  }
  KnnSelection<T, kThreads> query{p, shared, knn_shared};
  if (!query.run(at) && threadIdx.x == 0) {
    p.listed.query[atomicAdd(p.listed.count, 1u)] = static_cast<int>(at);
  }
}

}  // namespace als
