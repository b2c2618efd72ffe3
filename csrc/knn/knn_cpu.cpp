// knn on the CPU.
//
//   1. mean of some rows of the database, extent of all (float64; knn_centring.h)
//   2. a block of queries x the whole database, bf16 or float32 scores (knn_tile_kernel.h); a row
//      whose score may belong to the k best goes to the query's list (knn_candidates.h). A full
//      list is cut back to what the error bound cannot exclude, or, where that is too much (ties),
//      to the k best by float64. knn_plan.h cuts the work up, knn_pack.h packs, knn_score.h scores.
//   3. what is left is measured in float64 (knn_measure.h) and sorted
//
// So a row is only ever dropped when the bound, or its float64 distance, proves that k others come
// first: the result does not depend on the order of the work, on threads or instruction sets.
//
// bf16 scores are twice as fast and 2^15 times less exact. A task (a block of queries and a part of
// the database) begins with them and goes on in float32 when its lists have cost too much float64
// work: entries carry their own error, so a list may hold both.
//
// Where the rows lie in clusters, most panels of the database are out of reach of most queries.
// Then database and queries are put in an order that makes panels and blocks compact (knn_place.h),
// float32 scores begin with the nearest panels, and a panel is left out when the triangle
// inequality over its centre proves that no row of it can come before the k best so far
// (knn_reach.h).
//
// Few queries take none of this: knn_scan_few.h.
#include <algorithm>
#include <vector>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "knn/knn.h"
#include "knn/knn_candidates.h"
#include "knn/knn_centring.h"
#include "knn/knn_list.h"
#include "knn/knn_measure.h"
#include "knn/knn_pack.h"
#include "knn/knn_place.h"
#include "knn/knn_plan.h"
#include "knn/knn_scan_few.h"
#include "knn/knn_score.h"
#include "knn/knn_smallest.h"
#include "knn/knn_tile.h"

namespace als {
namespace {

const KnnTileKernel& float_tile(CpuLevel level) {
#if defined(__x86_64__)
  if (level == CpuLevel::kAvx512) return knn_tile_avx512;
  if (level == CpuLevel::kAvx2) return knn_tile_avx2;
#endif
  return knn_tile_baseline;
}

// Below so many features bf16 saves too little of a score. Forced by a test: for rows of any
// length.
bool use_bf16(int64_t dim) {
  constexpr int64_t kFeatures = 32;
  return cpu_has_bf16() && (dim >= kFeatures || forced_cpu_level().load() == CpuLevel::kAvx512Bf16);
}

KnnScorers scorers_for(int64_t dim) {
  KnnScorers s{KnnOperands(float_tile(cpu_level()), dim), {}};
#if defined(__x86_64__)
  if (use_bf16(dim)) s.bf16 = KnnOperands(knn_tile_bf16, dim);
#endif
  return s;
}

template <typename T>
class Search {
  struct Scratch {
    typename KnnMeasure<T>::Scratch row;
    KnnGathered found;
    std::vector<Neighbour> near, sorting;
  };

 public:
  explicit Search(const KnnMeasure<T>& measure)
      : measure_(measure),
        in_(measure.in),
        scorers_(scorers_for(in_.dim)),
        centring_(knn_centring(measure)),
        plan_(plan()),
        places_(places()),
        scoring_(measure, centring_, plan_, places_, scorers_) {}

  void run(float* distance, int64_t* index) {
    for (int64_t first = 0; first < in_.queries; first += plan_.span) {
      const int64_t count = std::min(plan_.span, in_.queries - first);
      scoring_.run(first, count);
      const auto scratch = [&] { return Scratch{measure_.scratch(), {}, {}, {}}; };
      parallel_tasks(count, scratch, [&](int64_t i, Scratch& w) {
        const int64_t q = places_.query_at(first + i);
        finish(i, q, w, distance + q * in_.k, index + q * in_.k);
      });
    }
  }

 private:
  KnnPlan plan() const {
    const KnnOperands& first = scorers_.bf16.used() ? scorers_.bf16 : scorers_.float32;
    return KnnPlan::of(in_.queries, in_.rows, in_.k, *scorers_.float32.tile, first.depth,
                       scorers_.float32.depth + scorers_.bf16.depth);
  }

  KnnPlaces places() const {
    if (plan_.segments > 1 || !knn_order_may_pay(measure_, centring_.frame)) return {};
    return KnnPlacer<T>(measure_, centring_).places(plan_.columns, KnnReach::kQueries);
  }

  // Query q, which is the i-th of the round.
  void finish(int64_t i, int64_t q, Scratch& w, float* distance, int64_t* index) const {
    const int64_t n = scoring_.lists.gather(i, plan_, scoring_.round.relation[i], w.found);
    if (n < in_.k) {
      KnnSmallest best(in_.k);
      measure_.scan(q, 0, in_.rows, w.row, best);
      write_neighbours(best.sorted(), in_.k, distance, index);
      return;
    }
    w.near.resize(n);
    const bool nonzero = measure_.load_query(q, w.row);
    measure_.measure_rows(w.found.index.data(), n, nonzero, w.row, w.near.data());
    if (n > 2 * in_.k) {
      std::nth_element(w.near.begin(), w.near.begin() + (in_.k - 1), w.near.end());
      w.near.resize(in_.k);
    }
    sort_neighbours(w.near, w.sorting);
    write_neighbours(w.near, in_.k, distance, index);
  }

  const KnnMeasure<T>& measure_;
  const KnnInput<T>& in_;
  KnnScorers scorers_;
  const KnnCentring centring_;
  const KnnPlan plan_;
  const KnnPlaces places_;
  KnnScoring<T> scoring_;
};

template <typename T>
void search(const KnnInput<T>& in, float* distance, int64_t* index) {
  const KnnMeasure<T> measure(in);
  const KnnScanFew<T> few(measure);
  if (few.beats_packing()) {
    few.run(distance, index);
  } else {
    Search<T>(measure).run(distance, index);
  }
}

KnnOutputs knn_cpu(const Tensor& query, const Tensor& database, int64_t k, int64_t metric,
                   bool exclude_self, bool exact) {
  check_knn(query, database, k, metric, exclude_self);
  KnnOutputs outputs = empty_knn_outputs(query, k);
  if (query.size(0) == 0) return outputs;
  const Tensor q = torch::stable::contiguous(query);
  const Tensor y = torch::stable::contiguous(database);
  const auto search_rows_of = [&](auto zero) {
    using T = decltype(zero);
    const KnnInput<T> in{
        q.const_data_ptr<T>(),          y.const_data_ptr<T>(), q.size(0), y.size(0), q.size(1), k,
        static_cast<KnnMetric>(metric), exclude_self,          exact};
    search(in, std::get<0>(outputs).mutable_data_ptr<float>(),
           std::get<1>(outputs).mutable_data_ptr<int64_t>());
  };
  switch (query.scalar_type()) {
    case ScalarType::Double:
      search_rows_of(double{});
      break;
    case ScalarType::BFloat16:
      search_rows_of(torch::headeronly::BFloat16{});
      break;
    case ScalarType::Half:
      search_rows_of(torch::headeronly::Half{});
      break;
    default:
      search_rows_of(float{});
  }
  return outputs;
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CPU, m) { m.impl("knn", TORCH_BOX(&als::knn_cpu)); }
