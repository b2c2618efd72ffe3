// Whether rows lie in clusters, and the order of knn_order.h for database and queries where they
// do. A heuristic: no result depends on it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "knn/knn_buffers.h"
#include "knn/knn_centring.h"
#include "knn/knn_math.h"
#include "knn/knn_measure.h"
#include "knn/knn_order.h"

namespace als {

// The rows and queries at the positions of the order; empty: as they come.
struct KnnPlaces {
  std::vector<int32_t> rows, queries;

  bool in_order() const { return !rows.empty(); }
  int64_t row_at(int64_t position) const { return in_order() ? rows[position] : position; }
  int64_t query_at(int64_t position) const { return in_order() ? queries[position] : position; }
};

// Distances (not squared) of a query from some rows of the database.
struct KnnProbe {
  double nearest, mean;
};

template <typename T>
KnnProbe knn_probe(const KnnMeasure<T>& measure, int64_t q, int64_t some,
                   typename KnnMeasure<T>::Scratch& w) {
  std::vector<int64_t> rows;
  for (int64_t s = 0; s < some; ++s) {
    const int64_t row = (2 * s + 1) * measure.in.rows / (2 * some);
    if (row != measure.in.self_of(q)) rows.push_back(row);
  }
  std::vector<Neighbour> near(rows.size());
  measure.measure_rows(rows.data(), static_cast<int64_t>(rows.size()), measure.load_query(q, w), w,
                       near.data());
  const auto distance = [](const Neighbour& n) {
    return sqrt(std::max(0.0f, key_distance(n.key)));
  };
  double sum = 0.0;
  for (const Neighbour& n : near) sum += distance(n);
  return {distance(*std::min_element(near.begin(), near.end())),
          sum / static_cast<double>(near.size())};
}

// Whether the k-th neighbour is much nearer than a row picked at random, for the cost of some
// distances: an m-th part of the rows has its nearest about where the whole has its m-th.
template <typename T>
bool knn_has_clusters(const KnnMeasure<T>& measure) {
  constexpr int64_t kProbes = 32;
  constexpr double kNear = 0.4;
  const KnnInput<T>& in = measure.in;
  const int64_t some = std::clamp<int64_t>(in.rows / in.k, 64, 4096);
  std::vector<KnnProbe> probes(kProbes);
  const auto scratch = [&] { return measure.scratch(); };
  parallel_tasks(kProbes, scratch, [&](int64_t p, auto& w) {
    probes[p] = knn_probe(measure, p * in.queries / kProbes, some, w);
  });
  KnnProbe sum{0.0, 0.0};
  for (const KnnProbe& probe : probes) {
    if (!is_finite(probe.mean)) continue;
    sum.nearest += probe.nearest;
    sum.mean += probe.mean;
  }
  return sum.nearest < kNear * sum.mean;
}

// Leaving out panels takes so many queries and rows, and a metric with a triangle inequality.
template <typename T>
bool knn_order_may_pay(const KnnMeasure<T>& measure, const KnnFrame& frame) {
  constexpr int64_t kQueries = 4096, kRows = 8192;
  constexpr int64_t kMostRows = 3 << 20;  // coordinates of 16 floats: 192 MiB
  const KnnInput<T>& in = measure.in;
  return in.metric != KnnMetric::kIp && in.queries >= kQueries && in.rows >= kRows &&
         std::max(in.rows, in.queries) <= kMostRows && frame.scorable && knn_has_clusters(measure);
}

// The points in their order, `leaf` at a time close together.
inline std::vector<int32_t> knn_sorted_by_place(const float* points, int64_t count, int64_t leaf) {
  using Part = std::pair<int64_t, int64_t>;
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::vector<Part> parts{{0, count}}, next;
  while (!parts.empty()) {
    next.assign(2 * parts.size(), {0, 0});
    const auto no_scratch = [] { return 0; };
    parallel_tasks(static_cast<int64_t>(parts.size()), no_scratch, [&](int64_t p, int) {
      const auto [begin, end] = parts[p];
      const int64_t middle = begin + knn_middle(end - begin, leaf);
      if (middle == begin) return;
      knn_split(points, order.data(), begin, middle, end);
      next[2 * p] = {begin, middle};
      next[2 * p + 1] = {middle, end};
    });
    next.erase(std::remove(next.begin(), next.end(), Part{0, 0}), next.end());
    parts.swap(next);
  }
  return order;
}

template <typename T>
class KnnPlacer {
  using Scratch = typename KnnMeasure<T>::Scratch;

 public:
  KnnPlacer(const KnnMeasure<T>& measure, const KnnCentring& centring)
      : measure_(measure), in_(measure.in), centring_(centring) {}

  // Leaves are the panels of the database, and the queries that share the decision on a panel.
  KnnPlaces places(int64_t row_leaf, int64_t query_leaf) const {
    const std::vector<float> directions = widest_directions();
    KnnPlaces places;
    places.rows = order_of(in_.database, in_.rows, row_leaf, directions);
    const bool same = in_.query == in_.database && in_.queries == in_.rows;
    places.queries = same ? places.rows : order_of(in_.query, in_.queries, query_leaf, directions);
    return places;
  }

 private:
  // The centred row in float32; 0 where it is not finite.
  void load(const T* base, int64_t row, Scratch& w, float* out) const {
    bool zero = false;
    if (!is_finite(measure_.centred(base, row, centring_.mean, w, &zero))) {
      std::fill_n(out, in_.dim, 0.0f);
    } else {
      measure_.row_ops.pack_float(w.query.data(), centring_.frame.scale, in_.dim, out);
    }
  }

  int64_t coordinates() const { return std::min<int64_t>(kKnnCoordinates, in_.dim); }

  std::vector<float> widest_directions() const {
    const int64_t fit = (int64_t{32} << 20) / (in_.dim * static_cast<int64_t>(sizeof(float)));
    const int64_t samples = std::min(in_.rows, std::clamp<int64_t>(fit, 1, 1024));
    std::vector<float> sample(samples * in_.dim);
    const auto scratch = [&] { return measure_.scratch(); };
    parallel_tasks(samples, scratch, [&](int64_t s, Scratch& w) {
      load(in_.database, s * in_.rows / samples, w, &sample[s * in_.dim]);
    });
    return knn_directions(sample.data(), samples, in_.dim, coordinates());
  }

  std::vector<int32_t> order_of(const T* base, int64_t rows, int64_t leaf,
                                const std::vector<float>& directions) const {
    constexpr int64_t kRun = 1024;
    const KnnBuffer<float> points(rows * kKnnCoordinates);
    const auto scratch = [&] { return measure_.scratch(); };
    parallel_tasks(ceil_div(rows, kRun), scratch, [&](int64_t run, Scratch& w) {
      std::vector<float> row(in_.dim);
      for (int64_t r = run * kRun; r < std::min(rows, (run + 1) * kRun); ++r) {
        load(base, r, w, row.data());
        knn_project(row.data(), directions.data(), in_.dim, coordinates(),
                    &points[r * kKnnCoordinates]);
      }
    });
    return knn_sorted_by_place(points.get(), rows, leaf);
  }

  const KnnMeasure<T>& measure_;
  const KnnInput<T>& in_;
  const KnnCentring& centring_;
};

}  // namespace als
