// Rows -> the operands of the scoring kernels: centred, scaled, packed, with what bounds the error
// of their scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/parallel.h"
#include "knn/knn_buffers.h"
#include "knn/knn_candidates.h"
#include "knn/knn_centring.h"
#include "knn/knn_measure.h"
#include "knn/knn_place.h"
#include "knn/knn_plan.h"
#include "knn/knn_reach.h"
#include "knn/knn_tile.h"

namespace als {

// One way of scoring, and what is packed for it.
struct KnnOperands {
  KnnOperands() = default;  // a way that is not used
  KnnOperands(const KnnTileKernel& kernel, int64_t dim)
      : tile(&kernel), depth(ceil_div(dim, kernel.features)) {}

  bool used() const { return tile != nullptr; }
  bool bf16() const { return used() && tile->features == 2; }
  // Of a row on its way to the packed layout; more than it has, so that rows do not share their
  // cache sets.
  int64_t width() const { return depth + 16; }

  const KnnTileKernel* tile = nullptr;
  int64_t depth = 0;                           // units of a row
  KnnBuffer<float> query;                      // [groups][depth][rows]
  KnnBuffer<float> radius, spread;             // [span]
  KnnBuffer<float> database;                   // [panels of a chunk][depth][columns]
  KnnBuffer<float> half_norm, norm, residual;  // of panels
  int64_t first_panel = -1;                    // of the packed chunk
};

// The queries of a round: positions first, ..., first + count - 1.
struct KnnRound {
  int64_t first = 0, count = 0;
  KnnBuffer<KnnRelation> relation;  // [span]
  KnnBuffer<int64_t> self;          // [span]

  // |q|^2 of a packed query; 0 where it has no scores.
  double square_of(int64_t i) const {
    const KnnRelation& r = relation[i];
    return r.beta > 0.0 ? 2.0 * r.alpha / r.beta : 0.0;
  }
};

template <typename T>
class KnnPacker {
  struct Scratch {
    typename KnnMeasure<T>::Scratch row;
    KnnBuffer<float> units;  // packed rows, row by row
  };

 public:
  KnnPacker(const KnnMeasure<T>& measure, const KnnCentring& centring, const KnnPlan& plan,
            const KnnPlaces& places, KnnError error)
      : measure_(measure),
        in_(measure.in),
        centring_(centring),
        plan_(plan),
        places_(places),
        error_(error) {}

  // The round's queries, padded to whole blocks, with empty lists.
  void pack_queries(KnnOperands& s, KnnRound& round, KnnCandidates& lists) const {
    if (s.query.get() == nullptr) {
      s.query = KnnBuffer<float>(plan_.span * s.depth);
      s.radius = KnnBuffer<float>(plan_.span);
      s.spread = KnnBuffer<float>(plan_.span);
    }
    const int64_t rows = plan_.rows_at_once;
    const int64_t groups = plan_.blocks_of(round.count) * plan_.block / rows;
    const auto scratch = [&] { return make_scratch(s, rows); };
    parallel_tasks(groups, scratch, [&](int64_t group, Scratch& w) {
      for (int64_t r = 0; r < rows; ++r) pack_query(s, group * rows + r, r, round, lists, w);
      transpose(s, rows, w, s.query.get() + group * rows * s.depth);
    });
  }

  // Panels first, ..., first + count - 1; with `reach`, their centres too.
  void pack_database(KnnOperands& s, int64_t first, int64_t count, KnnReach* reach) const {
    if (s.first_panel == first) return;
    s.first_panel = first;
    if (s.database.get() == nullptr) {
      s.database = KnnBuffer<float>(plan_.chunk * s.depth * plan_.columns);
      s.half_norm = KnnBuffer<float>(plan_.chunk * plan_.columns);
      s.norm = KnnBuffer<float>(plan_.chunk);
      s.residual = KnnBuffer<float>(plan_.chunk);
    }
    const auto scratch = [&] { return make_scratch(s, plan_.columns); };
    parallel_tasks(count, scratch, [&](int64_t p, Scratch& w) {
      pack_panel(s, first, p, w);
      if (reach != nullptr) {
        reach->pack_centre(p, w.units.get(), s.width(), s.half_norm.get() + p * plan_.columns,
                           s.norm[p]);
      }
    });
  }

 private:
  Scratch make_scratch(const KnnOperands& s, int64_t rows) const {
    return {measure_.scratch(), KnnBuffer<float>(rows * s.width())};
  }

  // The row in w.row as row `r` of w.units, for transpose().
  KnnPackedSquares pack_row(const KnnOperands& s, int64_t r, double scale, Scratch& w) const {
    float* out = w.units.get() + r * s.width();
    const double* row = w.row.query.data();
    if (s.bf16()) return measure_.row_ops.pack_bf16(row, scale, in_.dim, out);
    measure_.row_ops.pack_float(row, scale, in_.dim, out);
    return {};
  }

  void transpose(const KnnOperands& s, int64_t rows, const Scratch& w, float* out) const {
    const int64_t width = s.width();
    for (int64_t u = 0; u < s.depth; ++u, out += rows) {
      for (int64_t r = 0; r < rows; ++r) out[r] = w.units[r * width + u];
    }
  }

  // What there is to know of query q, and its centred row (not for ip) in w; `square` of that.
  KnnQuery relate(int64_t q, double* square, Scratch& w) const {
    const bool ip = in_.metric == KnnMetric::kIp;
    const std::vector<double>& row = w.row.query;
    bool zero = false;
    *square = measure_.centred(in_.query, q, ip ? centring_.origin : centring_.mean, w.row, &zero);
    double extent = 0.0, mean_product = 0.0;
    for (int64_t j = 0; ip && j < in_.dim; ++j) {
      extent = std::max(extent, fabs(row[j]));
      mean_product += row[j] * centring_.mean[j];
    }
    return make_query(in_.metric, centring_.frame, error_, in_.dim, *square, extent, mean_product,
                      zero);
  }

  void pack_query(KnnOperands& s, int64_t at, int64_t r, KnnRound& round, KnnCandidates& lists,
                  Scratch& w) const {
    const bool exists = at < round.count;
    const int64_t q = exists ? places_.query_at(round.first + at) : -1;
    double square = 0.0;
    const KnnQuery query = exists ? relate(q, &square, w) : KnnQuery{};  // padding: not usable
    if (!query.usable) std::fill(w.row.query.begin(), w.row.query.end(), 0.0);
    const KnnPackedSquares packed = pack_row(s, r, query.scale, w);
    round.relation[at] = query.relation;
    round.self[at] = exists ? in_.self_of(q) : -1;
    KnnBf16Error error{query.radius, 0.0};
    if (s.bf16() && query.usable) {
      error = bf16_error(in_.exact ? knn_tile_chain(s.depth, 2) : 0, query.scale * sqrt(square),
                         sqrt(packed.packed), sqrt(packed.residual));
    }
    s.radius[at] = knn_coefficient(error.radius);
    s.spread[at] = knn_coefficient(error.spread);
    for (int64_t segment = 0; segment < plan_.segments; ++segment) {
      lists.clear(plan_.slot_of(at, segment), query.usable ? -INFINITY : kKnnNever);
    }
  }

  // Panel p of the chunk that begins at panel `first`; its rows stay in w.units.
  void pack_panel(KnnOperands& s, int64_t first, int64_t p, Scratch& w) const {
    const KnnFrame& frame = centring_.frame;
    double largest = 0.0, residual = 0.0;
    for (int64_t c = 0; c < plan_.columns; ++c) {
      const int64_t at = (first + p) * plan_.columns + c;
      bool zero = false;
      const double square = at < in_.rows ? scaled_square(places_.row_at(at), w, &zero) : NAN;
      const bool usable = is_finite(square) && frame.scorable;
      if (!usable) std::fill(w.row.query.begin(), w.row.query.end(), 0.0);
      const KnnPackedSquares packed = pack_row(s, c, frame.scale, w);
      double h = in_.metric == KnnMetric::kIp ? 0.0 : 0.5 * square;
      if (zero) h += frame.zero_offset();
      s.half_norm[p * plan_.columns + c] = usable ? static_cast<float>(h) : INFINITY;
      // max(square, packed): h is bounded by the norm too
      if (usable) largest = std::max({largest, square, packed.packed});
      residual = std::max(residual, packed.residual);
    }
    transpose(s, plan_.columns, w, s.database.get() + p * s.depth * plan_.columns);
    s.norm[p] = round_up(sqrt(largest));
    s.residual[p] = round_up((1.0 + 1e-6) * sqrt(residual));
  }

  // |c'|^2 of a row of the database, which is left in w, centred.
  double scaled_square(int64_t row, Scratch& w, bool* zero) const {
    const double scale = centring_.frame.scale;
    return scale * scale * measure_.centred(in_.database, row, centring_.mean, w.row, zero);
  }

  const KnnMeasure<T>& measure_;
  const KnnInput<T>& in_;
  const KnnCentring& centring_;
  const KnnPlan& plan_;
  const KnnPlaces& places_;
  const KnnError error_;
};

}  // namespace als
