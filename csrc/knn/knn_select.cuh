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
// not exclude: the k nearest and a few more. What step 4 looks at is within one error of the k-th
// score, what step 2 lists within two: where rows lie in clusters, that is much more.
//
// By count, for Q = M = 100,000, D = 128, k = 10: step 1 takes 9 float32 instructions a group, 56
// thousand a query, and step 3 two an element of 160 rows, 41 thousand: 0.2 ms each on an H100 if
// nothing waits. What it waits for are 25 KB of maxima and 82 KB of rows a query (float32).
#pragma once

#include <type_traits>

#include "knn/knn_groups.cuh"

namespace als {

template <typename T, int kThreads>
struct KnnSelection {
  static constexpr int kTeams = kThreads / kKnnLanes;
  static constexpr int kWarpTeams = 32 / kKnnLanes;

  const KnnSelectParams<T>& p;
  KnnSelectShared& s;
  unsigned char* memory;  // dynamic shared memory
  KnnGroups<T, kThreads> groups{p, s};

  static __device__ int lane() { return threadIdx.x % kKnnLanes; }
  static __device__ int team() { return threadIdx.x / kKnnLanes; }
  // The list of rows: [capacity] indices, then [capacity] keys.
  __device__ int64_t* rows() const { return reinterpret_cast<int64_t*>(memory); }
  __device__ uint32_t* keys() const {
    return reinterpret_cast<uint32_t*>(rows() + p.sizes.capacity);
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
      s.raise(p.distance[worst]);
    }
  }

  __device__ void load_known() {
    for (int j = threadIdx.x; j < s.count; j += kThreads) {
      keys()[j] = distance_key(p.distance[s.q * p.k + j]);
      rows()[j] = p.index[s.q * p.k + j];
    }
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
      s.raise(key_distance(s.last.key));
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
      n = groups.list_again();
      if (n > budget) return false;
    }
  }

  // False: query `at` needs float32 scores.
  __device__ bool run(int64_t at) {
    start(at);
    __syncthreads();
    int budget = INT32_MAX;
    if (s.usable && groups.needed() <= groups.count()) {  // the same in all threads
      groups.find_lower(reinterpret_cast<float*>(memory));
      if (!p.rescored) budget = p.budget;
    }
    load_known();  // where the bins were
    int page = groups.count();
    for (int begin = 0; begin < groups.count();) {
      const int end = groups.count() - begin < page ? groups.count() : begin + page;
      groups.list(begin, end);
      const int passing = s.front + s.back;
      if (passing > kKnnListed) {  // only where a page is all groups
        if (passing > budget) return false;
        budget = INT32_MAX;
        page = kKnnListed;
        groups.most = INFINITY;  // the threads take other groups now
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
