#include "knn/knn_reach.h"

#include <cmath>
#include <numeric>

#include "knn/knn_candidates.h"

namespace als {

KnnReach::KnnReach(const KnnTileKernel& tile, int64_t depth, int64_t chunk)
    : tile_(tile),
      depth_(depth),
      columns_(tile.columns),
      most_centres_(ceil_div(chunk, columns_)),
      centre_(most_centres_ * columns_ * depth),
      half_(most_centres_ * columns_),
      radius_(most_centres_ * columns_) {
  // Centres beyond the last panel are computed with, not looked at.
  std::fill_n(centre_.get(), most_centres_ * columns_ * depth, 0.0f);
  std::fill_n(half_.get(), most_centres_ * columns_, 0.0f);
  std::fill_n(radius_.get(), most_centres_ * columns_, 0.0f);
}

double KnnReach::error() const {
  return 0.5 * score_error(knn_tile_chain(depth_, 1)).product + 16.0 * kFloatUnit;
}

void KnnReach::pack_centre(int64_t p, const float* units, int64_t width, const float* half_norm,
                           float norm) {
  float* centre = centre_.get() + p / columns_ * depth_ * columns_ + p % columns_;
  double usable = 0.0, square = 0.0;
  for (int64_t c = 0; c < columns_; ++c) usable += half_norm[c] < INFINITY;
  double away[kKnnMaxColumns] = {};
  for (int64_t u = 0; u < depth_; ++u) {
    double sum = 0.0;
    for (int64_t c = 0; c < columns_; ++c) {
      if (half_norm[c] < INFINITY) sum += units[c * width + u];
    }
    const auto m = static_cast<float>(sum / std::max(usable, 1.0));
    centre[u * columns_] = m;
    square += double{m} * m;
    for (int64_t c = 0; c < columns_; ++c) {
      const double off = double{units[c * width + u]} - m;
      away[c] += off * off;
    }
  }
  double radius = 0.0;
  for (int64_t c = 0; c < columns_; ++c) {
    if (half_norm[c] < INFINITY) radius = std::max(radius, away[c]);
  }
  // What packing rounded away belongs to the distance from the centre too.
  radius = (1.0 + 1e-6) * sqrt(radius) + 2.0 * kFloatUnit * norm;
  radius_[p] = round_up(radius);
  half_[p] =
      static_cast<float>(0.5 * (square - radius * radius) - error() * (square + radius * radius));
}

void KnnReach::face(const float* query, int64_t groups, int64_t count, Panels& panels) const {
  if (panels.products.get() == nullptr) {
    panels.products = KnnBuffer<float>(kQueries * most_centres_ * columns_);
    panels.best = KnnBuffer<float>(most_centres_ * columns_);
    panels.tau = KnnBuffer<float>(kQueries);
    panels.cut = KnnBuffer<float>(kQueries);
  }
  panels.queries = groups * tile_.rows;
  panels.centres = ceil_div(count, columns_);
  panels.left.resize(count);
  std::iota(panels.left.begin(), panels.left.end(), 0);
  tile_.products(query, groups, centre_.get(), panels.centres, depth_, panels.products.get());
}

void KnnReach::by_distance(int64_t i, bool scored, double square, Panels& panels) const {
  panels.tau[i] = 0.0f;
  panels.cut[i] = scored ? static_cast<float>(0.5 * square) : kKnnMaxFloat;
}

// Rows of true scores >= lower lie within tau,
//   |q - c|^2 = |q|^2 - 2 <q, c> + |c|^2 <= |q|^2 - 2 lower,
// and no row is farther away than |q| + the largest |c|.
void KnnReach::look_for(int64_t i, double lower, double square, double slack, double max_norm,
                        Panels& panels) const {
  const double reach = square - 2.0 * lower + 1e-14 * (square + 2.0 * fabs(lower));
  const double farthest = sqrt(square) + max_norm;
  const double within = std::min(sqrt(std::max(0.0, reach)), farthest);
  panels.tau[i] = round_up((1.0 + 1e-6) * within);
  const double off = error() * (square + within * within) + slack;
  panels.cut[i] = nextafterf(static_cast<float>(lower - off), -INFINITY);
}

void KnnReach::find_best(Panels& panels) const {
  const KnnReachTask task{panels.queries, panels.centres,   panels.products.get(), half_.get(),
                          radius_.get(),  panels.tau.get(), panels.cut.get()};
  tile_.reach(task, panels.best.get());
}

void KnnReach::sort_nearest_first(Panels& panels) const {
  find_best(panels);
  const float* best = panels.best.get();
  std::sort(panels.left.begin(), panels.left.end(), [best](int32_t a, int32_t b) {
    return best[a] > best[b] || (best[a] == best[b] && a < b);
  });
}

void KnnReach::drop_unreachable(Panels& panels) const {
  find_best(panels);
  const float* best = panels.best.get();
  panels.left.erase(std::remove_if(panels.left.begin(), panels.left.end(),
                                   [best](int32_t panel) { return best[panel] < 0.0f; }),
                    panels.left.end());
}

}  // namespace als
