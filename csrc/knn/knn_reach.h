// Which packed panels can still matter to some queries: the triangle inequality over the centres of
// panels. Torch-free; KnnReachTask in knn_tile.h has the test itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "knn/knn_buffers.h"
#include "knn/knn_math.h"
#include "knn/knn_tile.h"

namespace als {

// For float32 scores. Written by pack_centre, a panel at a time; read by the queries.
class KnnReach {
 public:
  static constexpr int64_t kQueries = 48;  // share a decision; fewer reach less, but stream more

  // The panels in reach of the queries of one thread, and what decides that.
  struct Panels {
    std::vector<int32_t> left;  // not visited yet; nearest first
    KnnBuffer<float> products;  // [panels of centres][queries][columns]
    KnnBuffer<float> best;      // [panels]
    KnnBuffer<float> tau, cut;  // [queries]
    int64_t queries = 0, centres = 0;
  };

  KnnReach(const KnnTileKernel& tile, int64_t depth, int64_t chunk);

  // Centre and radius of packed panel p, whose rows are `units`, `width` apart; `norm` is the
  // largest length of one.
  void pack_centre(int64_t p, const float* units, int64_t width, const float* half_norm,
                   float norm);

  // `groups` packed query groups face the first `count` panels. Their tau and cut are to be set.
  void face(const float* query, int64_t groups, int64_t count, Panels& panels) const;

  // tau and cut that rank panels by their distance from the query, |q|^2 = square. `scored`: the
  // query has scores.
  void by_distance(int64_t i, bool scored, double square, Panels& panels) const;

  // tau and cut for what is looked for: rows of true scores >= lower.
  void look_for(int64_t i, double lower, double square, double slack, double max_norm,
                Panels& panels) const;

  void sort_nearest_first(Panels& panels) const;
  void drop_unreachable(Panels& panels) const;

 private:
  // What the kernel computes is off by at most product |q||m| of score_error, and a few roundings
  // of terms of the size of |q|^2, tau^2, |m|^2 and radius^2: at most this times their sum. The
  // panel pays for its terms and the query for its own, so that no far row costs the others.
  double error() const;
  void find_best(Panels& panels) const;

  const KnnTileKernel& tile_;
  const int64_t depth_, columns_, most_centres_;  // centres: in panels of them
  const KnnBuffer<float> centre_;                 // [panels of centres][depth][columns]
  const KnnBuffer<float> half_, radius_;          // [panels of centres][columns]
};

}  // namespace als
