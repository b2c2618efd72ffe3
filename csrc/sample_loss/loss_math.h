// Per-sample losses of a row of logits z and their derivatives, side by side. Torch-free; one copy
// for both operations (sample_loss, weighted_loss) and both devices.
//
// Notation: m = max_c z_c, d_c = z_c - m, e_c = exp(d_c), S = sum_c e_c, p_c = e_c / S, y = the
// class index. Every loss here is
//
//   L = w_y F(p_y, H(p)) + sum_c q_c (log S - d_c)            F: a functor, q: the side target
//   dL/dz_c = w_y [ target (p_c - [c = y]) + p_c (mass + log d_c) ] + p_c sum_k q_k - q_c
//
// where target, mass and log are the functor's slopes, w the class weights, and q what
// label smoothing, class probabilities or the arg max of a hard bootstrap add (else zero).
#pragma once

#include <cstdint>

#include "common/elementary.h"

namespace als {

enum class LossKind : int64_t {  // the position in LOSSES of als_ext/ops/sample_loss.py
  kCrossEntropy = 0,
  kGce = 1,
  kSce = 2,
  kMae = 3,
  kFocal = 4,
  kBootstrapHard = 5,
  kBootstrapSoft = 6,
  kSquaredError = 7,
};
constexpr int64_t kLossKinds = 8;

enum class SideTarget {
  kNone,
  kSmoothing,      // q_c = w_c eps / C
  kProbabilities,  // q_c = w_c ((1 - eps) t_c + eps / C), t = the given class probabilities
  kArgmax,         // q_c = w_y (1 - beta) [c = argmax z]
};

// A loss and its constants.
template <typename T>
struct LossSpec {
  LossKind kind;
  T parameters[3];    // in the order of LOSSES
  T label_smoothing;  // eps
  bool probabilities;

  ALS_HOST_DEVICE SideTarget side() const {
    if (probabilities) return SideTarget::kProbabilities;
    if (kind == LossKind::kBootstrapHard) return SideTarget::kArgmax;
    if (kind == LossKind::kCrossEntropy && label_smoothing > 0) return SideTarget::kSmoothing;
    return SideTarget::kNone;
  }
  ALS_HOST_DEVICE bool needs_entropy() const { return kind == LossKind::kBootstrapSoft; }
};

// What one reading of a row leaves; sample_loss keeps max, rest and extra for its backward.
template <typename T>
struct RowSums {
  T max;    // m
  T rest;   // sum of e_c over c != y, so that 1 - p_y = rest / S has no cancellation
  T extra;  // soft bootstrap: sum of e_c d_c; otherwise sum of q_c
  T side;   // sum of q_c d_c, needed for the value only
};

template <typename T>
struct RowStats {
  T log_sum;   // log S
  T nll;       // -log p_y >= 0, to relative precision also where p_y -> 1
  T p;         // p_y
  T miss;      // 1 - p_y
  T mean_log;  // sum of p_c d_c
};

template <typename T>
struct Slopes {
  T target, mass, log;
};

// a b with 0 * inf = 0: what has no weight adds nothing.
template <typename T>
ALS_HOST_DEVICE T weighted(T weight, T value) {
  return select(weight == 0, T(0), weight * value);
}

// F = a (-log p_y). Cross-entropy: a = 1 - eps, or 0 when class probabilities (q) say it all; hard
// bootstrap (Reed et al. 2014, arXiv 1412.6596): a = beta, and q has the rest at the arg max.
template <typename T>
struct CrossEntropy {
  T a;
  ALS_HOST_DEVICE T value(const RowStats<T>& s) const { return weighted(a, s.nll); }
  ALS_HOST_DEVICE Slopes<T> slopes(const RowStats<T>&) const { return {a, T(0), T(0)}; }
};

// Generalised cross-entropy (Zhang, Sabuncu 2018, arXiv 1805.07836): F = (1 - p_y^q) / q.
template <typename T>
struct GeneralizedCrossEntropy {
  T q;
  ALS_HOST_DEVICE T value(const RowStats<T>& s) const {
    return -expm1_of_nonpositive(-q * s.nll) / q;
  }
  ALS_HOST_DEVICE Slopes<T> slopes(const RowStats<T>& s) const {
    return {exp_of_nonpositive(-q * s.nll), T(0), T(0)};
  }
};

// Symmetric cross-entropy (Wang et al. 2019, arXiv 1908.06112), log 0 taken as A < 0:
// F = alpha (-log p_y) - beta A (1 - p_y).
template <typename T>
struct SymmetricCrossEntropy {
  T alpha, beta, log_zero;
  ALS_HOST_DEVICE T value(const RowStats<T>& s) const {
    return weighted(alpha, s.nll) - beta * log_zero * s.miss;
  }
  ALS_HOST_DEVICE Slopes<T> slopes(const RowStats<T>& s) const {
    return {alpha - beta * log_zero * s.p, T(0), T(0)};
  }
};

// Mean absolute error (Ghosh et al. 2017, arXiv 1712.09482): F = sum_c |p_c - [c = y]| = 2 (1 -
// p_y).
template <typename T>
struct MeanAbsoluteError {
  ALS_HOST_DEVICE T value(const RowStats<T>& s) const { return 2 * s.miss; }
  ALS_HOST_DEVICE Slopes<T> slopes(const RowStats<T>& s) const { return {2 * s.p, T(0), T(0)}; }
};

// Focal loss (Lin et al. 2017, arXiv 1708.02002): F = (1 - p_y)^gamma (-log p_y).
template <typename T>
struct Focal {
  T gamma;
  ALS_HOST_DEVICE T value(const RowStats<T>& s) const {
    return pow_of_fraction(s.miss, gamma) * s.nll;
  }
  ALS_HOST_DEVICE Slopes<T> slopes(const RowStats<T>& s) const {
    const T ratio = select(s.miss > 0, s.nll / s.miss, T(1));  // -> 1 as p_y -> 1
    const T pull = select(s.p > 0, s.p * ratio, T(0));         // p log p -> 0 as p_y -> 0
    return {pow_of_fraction(s.miss, gamma) * (1 + gamma * pull), T(0), T(0)};
  }
};

// Soft bootstrap (Reed et al. 2014): F = beta (-log p_y) + (1 - beta) H(p), H = log S - sum p_c
// d_c.
template <typename T>
struct SoftBootstrap {
  T beta;
  ALS_HOST_DEVICE T value(const RowStats<T>& s) const {
    return weighted(beta, s.nll) + (1 - beta) * (s.log_sum - s.mean_log);
  }
  ALS_HOST_DEVICE Slopes<T> slopes(const RowStats<T>& s) const {
    return {beta, (1 - beta) * s.mean_log, beta - 1};
  }
};

// Calls visit(functor) for the loss of a spec; squared_error is no function of a softmax.
template <typename T, class Visit>
ALS_HOST_DEVICE void visit_loss(const LossSpec<T>& spec, const Visit& visit) {
  const T* p = spec.parameters;
  switch (spec.kind) {
    case LossKind::kCrossEntropy:
      return visit(CrossEntropy<T>{spec.probabilities ? T(0) : 1 - spec.label_smoothing});
    case LossKind::kGce:
      return visit(GeneralizedCrossEntropy<T>{p[0]});
    case LossKind::kSce:
      return visit(SymmetricCrossEntropy<T>{p[0], p[1], p[2]});
    case LossKind::kMae:
      return visit(MeanAbsoluteError<T>{});
    case LossKind::kFocal:
      return visit(Focal<T>{p[0]});
    case LossKind::kBootstrapHard:
      return visit(CrossEntropy<T>{p[0]});
    case LossKind::kBootstrapSoft:
      return visit(SoftBootstrap<T>{p[0]});
    case LossKind::kSquaredError:
      return;
  }
}

// q_c of label smoothing and of class probabilities.
template <typename T>
struct SideWeights {
  const T* probability;   // [C] the row's t, or null
  const T* class_weight;  // [C] w, or null
  T keep, uniform;        // 1 - eps, eps / C

  ALS_HOST_DEVICE T operator()(int64_t c) const {
    const T q = (probability ? keep * probability[c] : T(0)) + uniform;
    return class_weight ? q * class_weight[c] : q;
  }
};

// The row as its caller has it, beside RowSums.
template <typename T>
struct RowTarget {
  T hit;           // e_y; 0 without a class index
  T log_hit;       // d_y
  T class_weight;  // w_y
  T side_mass;     // sum of q_c
  T side;          // q_y
};

// g dL/dz_c = e_c (linear + log d_c) - g q_c for c != y, and at_target for c = y.
template <typename T>
struct RowResult {
  T loss, linear, log, at_target;
};

// e (linear + log d), with 0 log 0 = 0 and NaN kept.
template <typename T>
ALS_HOST_DEVICE T softmax_slope(T e, T d, T linear, T log) {
  return e * (linear + log * select(e == 0, T(0), d));
}

// scale: g, the weight of the row or the incoming gradient of its loss.
template <typename T, class Loss>
ALS_HOST_DEVICE RowResult<T> finish_row(const Loss& loss, const RowSums<T>& sums,
                                        const RowTarget<T>& target, T scale) {
  const T sum = sums.rest + target.hit;
  const T inverse = 1 / sum;
  const bool likely = sums.rest < target.hit;  // p_y > 1/2: log1p keeps the small difference
  const T odds = select(likely, sums.rest / target.hit, T(0));
  const T close = log1p_of_fraction(odds);
  const T log_sum = select(likely, close + target.log_hit, log_of_nonnegative(sum));
  const RowStats<T> stats{log_sum, select(likely, close, log_sum - target.log_hit),
                          target.hit * inverse, sums.rest * inverse, sums.extra * inverse};
  const Slopes<T> slope = loss.slopes(stats);
  const T w = target.class_weight;
  const T log_hit = select(target.hit > 0, target.log_hit, T(0));  // 0 log 0 = 0
  RowResult<T> r;
  r.loss = weighted(w, loss.value(stats)) + (target.side_mass * log_sum - sums.side);
  r.linear = scale * (w * (slope.target + slope.mass) + target.side_mass) * inverse;
  r.log = scale * w * slope.log * inverse;
  // p_y - 1 is written as -miss, and p_y sum(q) - q_y = p_y (sum(q) - q_y) - q_y miss.
  r.at_target =
      scale * (w * (stats.p * (slope.mass + slope.log * log_hit) - slope.target * stats.miss) +
               stats.p * (target.side_mass - target.side) - target.side * stats.miss);
  return r;
}

// Squared error of a regression row, the mean over its D values: L = sum_j (z_j - t_j)^2 / D.
template <typename T>
ALS_HOST_DEVICE T squared_error_term(T z, T t) {
  return (z - t) * (z - t);
}
// dL/dz_j, with 2 g / D as `scale`.
template <typename T>
ALS_HOST_DEVICE T squared_error_slope(T z, T t, T scale) {
  return scale * (z - t);
}

// RowSums of a row that is read once, in any number of parts: `max` may still rise, so every sum is
// kept relative to the largest logit so far (online softmax, Milakov, Gimelshein 2018, arXiv
// 1805.02867) and parts are joined with merge().
template <typename T>
struct OnlineSums {
  T max = -INFINITY;
  T rest = 0, hit = 0;   // sums of e_c over c != y, and e_y
  T log_sum = 0;         // sum of e_c d_c
  T mass = 0, side = 0;  // sums of q_c, q_c d_c

  ALS_HOST_DEVICE void raise(T new_max) {
    if (max == new_max) return;
    const bool first = max == T(-INFINITY);  // every sum is still 0, or NaN and must stay so
    const T shift = first ? T(0) : max - new_max;
    const T factor = exp_of_nonpositive(shift);
    log_sum = factor == 0 ? T(0) * rest : factor * (log_sum + shift * (rest + hit));
    rest *= factor;
    hit *= factor;
    side += weighted(mass, shift);
    max = new_max;
  }

  ALS_HOST_DEVICE void add(T z, bool is_target, T q) {
    if (z > max) raise(z);
    const bool zero = z == T(-INFINITY);
    const T d = zero ? z : z - max;
    const T e = zero ? T(0) : exp_of_nonpositive(d);
    if (is_target)
      hit += e;
    else
      rest += e;
    log_sum += weighted(e, d);
    mass += q;
    side += weighted(q, d);
  }

  ALS_HOST_DEVICE void merge(OnlineSums other) {
    if (other.max > max)
      raise(other.max);
    else
      other.raise(max);
    rest += other.rest;
    hit += other.hit;
    log_sum += other.log_sum;
    mass += other.mass;
    side += other.side;
  }
};

}  // namespace als
