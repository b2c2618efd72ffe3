// The lists of candidates that the scoring kernels fill. Torch-free.
//
// Every slot (KnnPlan) has a list, and a lower limit of the true scores of the query's result. Only
// what the limit excludes, or what k rows of smaller float64 distance exclude, leaves a list.
#pragma once

#include <cstdint>
#include <vector>

#include "knn/knn_buffers.h"
#include "knn/knn_list.h"
#include "knn/knn_math.h"
#include "knn/knn_plan.h"

namespace als {

constexpr double kKnnNever = 3.4e38;  // above any score: the scoring kernel leaves the query alone
constexpr float kKnnMaxFloat = 3.4028235e38f;

// The lists of all segments of a query as one.
struct KnnGathered {
  std::vector<float> score, error;
  std::vector<int64_t> index;
  std::vector<int32_t> order;  // scratch
};

struct KnnCandidates {
  KnnCandidates(const KnnPlan& plan, int64_t k, KnnListOps ops);

  bool holds_k(int64_t slot) const { return count[slot] >= k; }
  int64_t* rows(int64_t slot) const { return index.get() + slot * capacity; }

  // An empty list.
  void clear(int64_t slot, double lowest);

  // Drops what the error bound excludes.
  void cut_by_bound(int64_t slot, const KnnRelation& relation, std::vector<int32_t>& scratch);

  // Less than a quarter of what a list holds beyond k is free.
  bool crowded(int64_t slot) const { return 4 * (capacity - count[slot]) < capacity - k; }

  // The list becomes the k smallest of its measured rows `near`, which end up in front there.
  void keep_nearest(int64_t slot, const KnnRelation& relation, std::vector<Neighbour>& near);

  // The lists of query i, less what the error bound excludes; returns how many are left. Fewer
  // than k: the query has no scores, or fewer than k rows are finite.
  int64_t gather(int64_t i, const KnnPlan& plan, const KnnRelation& relation, KnnGathered& g) const;

  int64_t k, capacity;
  KnnListOps ops;
  KnnBuffer<double> lower;        // [slots]: of the true scores of the result
  KnnBuffer<float> limit;         // [slots]: the same, rounded down
  KnnBuffer<int64_t> count;       // [slots]
  KnnBuffer<float> score, error;  // [slots][capacity]
  KnnBuffer<int64_t> index;       // [slots][capacity]

 private:
  void raise(int64_t slot, double lowest);
};

}  // namespace als
