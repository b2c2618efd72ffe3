// Device code of knn, steps 4 and 6: the rows that can belong to a result, in float64. Torch-free.
#pragma once

#include "knn/knn_rescore.cuh"

namespace als {

template <typename T>
struct KnnSelectParams {
  KnnRows<T> query, database;
  int64_t first_query;      // row of query 0 of the span
  int64_t queries_at_once;  // of the span
  int64_t groups, k;
  bool exclude_self;
  int capacity;                 // entries of the list, a power of two, >= k + kKnnSubgroups
  const float* group_max;       // [queries][groups]
  const float* group_norm;      // [groups]
  const float* group_residual;  // [groups]
  const KnnQuery* queries;      // [queries]
  const KnnBf16Error* errors;   // [queries]
  const KnnExtent* extent;
  double square_error;  // KnnError::square, 0 for ip
  int64_t budget;       // groups that may be measured after bf16 scores
  bool rescored;        // false: all queries, by their bf16 scores, and those beyond the budget go
  KnnListed listed;     // on this list; true: the listed ones, by the float32 scores they have now
  float* distance;      // [Q, k]; as it is given: of the rows in front of database.first
  int64_t* index;       // [Q, k]; the same
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

// Query `at` of the span.
template <typename T>
__device__ void select_query(const KnnSelectParams<T>& p, int64_t at) {
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
  __shared__ int passing;     // groups that reach it

  const int lane = threadIdx.x % kKnnLanes;
  const int64_t q = p.first_query + at;
  const KnnQuery query = p.queries[at];
  const KnnFrame frame = frame_of(*p.extent);
  const float* group_max = p.group_max + at * p.groups;
  const double offset = frame.has_zeros ? frame.zero_offset() : 0.0;
  const KnnBf16Error bound = p.rescored ? KnnBf16Error{query.radius, 0.0} : p.errors[at];
  const auto error = [&](int64_t g) {
    const double norm = p.group_norm[g];
    return bound.radius * norm + bound.spread * p.group_residual[g] +
           p.square_error * (0.5 * norm * norm + offset);
  };

  // A part of the database goes on with what the parts in front of it left: min(k, rows) entries.
  const int64_t before = p.database.first - (p.exclude_self && q < p.database.first);
  const auto known = static_cast<int>(before < p.k ? before : p.k);
  for (int j = threadIdx.x; j < known; j += kKnnThreads) {
    keys[j] = distance_key(p.distance[q * p.k + j]);
    rows[j] = p.index[q * p.k + j];
  }
  double reach = -INFINITY;
  if (known == p.k && query.usable) {
    reach = query.relation.lowest_score(p.distance[q * p.k + p.k - 1]);
  }

  // Each of the `needed` best groups holds a row at least that good; with exclude_self one of those
  // rows may be the query's own.
  const int64_t needed = p.k + (p.exclude_self ? 1 : 0);
  if (query.usable && needed <= p.groups) {  // the same in all threads
    const uint32_t key = kth_largest_key(
        p.groups, needed,
        [&](int64_t g) { return distance_key(__double2float_rd(group_max[g] - error(g))); },
        histogram, state);
    reach = fmax(reach, query.relation.lowest_score(query.relation.distance_of(key_distance(key))));
    if (!p.rescored) {
      if (threadIdx.x == 0) passing = 0;
      __syncthreads();
      int mine = 0;
      for (int64_t g = threadIdx.x; g < p.groups; g += kKnnThreads) {
        mine += group_max[g] + error(g) >= reach;
      }
      if (mine > 0) atomicAdd(&passing, mine);
      __syncthreads();
      if (passing > p.budget) {
        if (threadIdx.x == 0) p.listed.query[atomicAdd(p.listed.count, 1u)] = static_cast<int>(at);
        return;
      }
    }
  }
  if (threadIdx.x == 0) {
    count = known;
    full = known == p.k;
    if (full) {
      last = {distance_key(p.distance[q * p.k + p.k - 1]), p.index[q * p.k + p.k - 1]};
    }
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
      const bool exists =
          listed_row && row < p.database.rows && !(p.exclude_self && row + p.database.first == q);
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
      const Neighbour found{distance_key(d), row + p.database.first};
      if (lane == 0 && exists && (!full || found < last)) {
        const int place = atomicAdd(&count, 1);
        keys[place] = found.key;
        rows[place] = found.index;
      }
      __syncthreads();  // count and the entries are there for all
    }
  }

  cut();
  // k entries exist, or as many as rows up to here: a group is left out only when k others are in.
  for (int j = threadIdx.x; j < count; j += kKnnThreads) {
    p.distance[q * p.k + j] = key_distance(keys[j]);
    p.index[q * p.k + j] = rows[j];
  }
}

// What: the k nearest rows of each query.  Equation: knn_math.h.
// Grid: blocks take queries in turn. Eight threads measure a row, 32 rows at a time.
// Shared memory: dynamic, the list of `capacity` (index, key) pairs: 12 bytes each.
// Determinism: entries enter the list in any order, but what is kept and its order are those of
// (distance, index), which is total.
template <typename T>
__global__ void __launch_bounds__(kKnnThreads, 4) knn_select(KnnSelectParams<T> p) {
  const int64_t count = p.rescored ? *p.listed.count : p.queries_at_once;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    select_query(p, p.rescored ? p.listed.query[i] : i);
    __syncthreads();  // all are done with what the next query overwrites
  }
}

}  // namespace als
