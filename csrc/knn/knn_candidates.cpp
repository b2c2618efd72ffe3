#include "knn/knn_candidates.h"

#include <algorithm>

namespace als {
namespace {

// A row of the result of a query has at least this true score: k rows reach `bound`.
double lowest_result(const KnnRelation& relation, float bound) {
  return relation.lowest_score(relation.distance_of(bound));
}

}  // namespace

KnnCandidates::KnnCandidates(const KnnPlan& plan, int64_t neighbours, KnnListOps list_ops)
    : k(neighbours),
      capacity(plan.capacity),
      ops(list_ops),
      lower(plan.slots()),
      limit(plan.slots()),
      count(plan.slots()),
      score(plan.slots() * capacity),
      error(plan.slots() * capacity),
      index(plan.slots() * capacity) {}

void KnnCandidates::raise(int64_t slot, double lowest) {
  lower[slot] = lowest;
  limit[slot] = knn_limit(lowest);
}

void KnnCandidates::clear(int64_t slot, double lowest) {
  count[slot] = 0;
  raise(slot, lowest);
}

void KnnCandidates::cut_by_bound(int64_t slot, const KnnRelation& relation,
                                 std::vector<int32_t>& scratch) {
  float* s = score.get() + slot * capacity;
  float* e = error.get() + slot * capacity;
  const int64_t n = count[slot];
  scratch.resize(capacity);
  const float bound = ops.kth(s, e, n, k, scratch.data());
  raise(slot, std::max(lower[slot], lowest_result(relation, bound)));
  count[slot] = ops.keep(s, e, rows(slot), n, limit[slot]);
}

void KnnCandidates::keep_nearest(int64_t slot, const KnnRelation& relation,
                                 std::vector<Neighbour>& near) {
  std::nth_element(near.begin(), near.begin() + (k - 1), near.end());
  const float kth = key_distance(near[k - 1].key);
  const int64_t base = slot * capacity;
  for (int64_t e = 0; e < k; ++e) {
    const float d = key_distance(near[e].key);
    const double exact = relation.score_of(d);
    index[base + e] = near[e].index;
    score[base + e] = static_cast<float>(exact);
    error[base + e] = fabs(d) < 3.4e38
                          ? knn_coefficient(relation.error_of_score(d) + fabs(exact) * kFloatUnit)
                          : kKnnMaxFloat;
  }
  raise(slot, std::max(lower[slot], relation.lowest_score(kth)));
  count[slot] = k;
}

int64_t KnnCandidates::gather(int64_t i, const KnnPlan& plan, const KnnRelation& relation,
                              KnnGathered& g) const {
  g.score.clear();
  g.error.clear();
  g.index.clear();
  double lowest = -INFINITY;
  for (int64_t s = 0; s < plan.segments; ++s) {
    const int64_t slot = plan.slot_of(i, s);
    const int64_t begin = slot * capacity, end = begin + count[slot];
    g.score.insert(g.score.end(), &score[begin], &score[end]);
    g.error.insert(g.error.end(), &error[begin], &error[end]);
    g.index.insert(g.index.end(), &index[begin], &index[end]);
    lowest = std::max(lowest, lower[slot]);
  }
  const auto n = static_cast<int64_t>(g.index.size());
  if (n < k) return n;
  g.order.resize(n);
  const float bound = ops.kth(g.score.data(), g.error.data(), n, k, g.order.data());
  lowest = std::max(lowest, lowest_result(relation, bound));
  return ops.keep(g.score.data(), g.error.data(), g.index.data(), n, knn_limit(lowest));
}

}  // namespace als
