// Formulas of the pi step on its scaled state. Torch-free; one copy for CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace als {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// A step changes an entry by at most this: far beyond it float64 could not tell the top entry from
// the normaliser.
constexpr double kPiLimit = 1e6;
// The scale is folded into the entries before it or the entries leave float's range ...
constexpr double kPiScaleMin = 9.094947017729282e-13;  // 2^-40
// ... and the entries are centred again when their level makes up more than this part of r.
constexpr double kPiLevelMax = 4.0;

// The scalars of a distribution, float64, in device memory.
enum PiScalar : int {
  kPiScale = 0,        // A of r_i = A u_i
  kPiLogMean = 1,      // log of the mean over i of exp(c log(n prior_i) + r_i)
  kPiLogMeanHalf = 2,  // the same after the pending half step
  kPiHasPending = 3,   // 1 once a step has left a gradient for the half step
  kPiScalars = 4,
};

struct PiRule {
  double rho;    // kappa / T, in (0, 1]
  double step;   // +- lr
  double prior;  // c, the exponent of the prior
};

// How u becomes r before a step and r becomes u after it.
struct PiPlan {
  double scale;      // r = scale * u before the step
  double decay;      // r' = decay * (r + step * g) - shift
  double shift;      // common to all entries, so without effect on pi
  double new_scale;  // r' = new_scale * u'
  bool rewrite;      // untouched entries change their u; otherwise they are not written
};

// One step. Entries that the batch does not hold only shrink by rho, which the scale alone records.
ALS_HOST_DEVICE PiPlan plan_step(const double* scalars, const PiRule& rule) {
  const double scale = scalars[kPiScale];
  const double level = rule.rho * scalars[kPiLogMean];
  const double next = rule.rho * scale;
  const bool rewrite = next < kPiScaleMin || level > kPiLevelMax || level < -kPiLevelMax;
  return {scale, rule.rho, rewrite ? level : 0.0, rewrite ? 1.0 : next, rewrite};
}

// No step: only the normalisers are wanted.
ALS_HOST_DEVICE PiPlan plan_same(const double* scalars) {
  return {scalars[kPiScale], 1.0, 0.0, scalars[kPiScale], false};
}

// What the summed losses g add to r.
ALS_HOST_DEVICE double ascent(double g, double step) {
  return fmin(fmax(step * g, -kPiLimit), kPiLimit);
}

// u (float, or double in a lazy state) of an entry of the batch after the step.
template <typename U>
ALS_HOST_DEVICE U advance_entry(U u, double ascent, const PiPlan& plan) {
  const double r = plan.decay * (plan.scale * u + ascent) - plan.shift;
  return static_cast<U>(r / plan.new_scale);
}

// u of any other entry when the plan says rewrite.
template <typename U>
ALS_HOST_DEVICE U rewrite_entry(U u, const PiPlan& plan) {
  return static_cast<U>((plan.decay * plan.scale * u - plan.shift) / plan.new_scale);
}

// A sum of powers of two, kept as sum * 2^max.
struct LogSum {
  double max = -INFINITY;
  double sum = 0.0;

  ALS_HOST_DEVICE void add(double other_max, double other_sum) {
    if (other_max == -INFINITY) return;
    if (other_max <= max) {
      sum += other_sum * exp2(other_max - max);
    } else {
      sum = sum * exp2(max - other_max) + other_sum;
      max = other_max;
    }
  }
  // log(total / n) in nats.
  ALS_HOST_DEVICE double log_mean(int64_t n) const {
    return kLn2 * (max + log2(sum)) - log(static_cast<double>(n));
  }
};

// The factors of the normalisers' exponents x = log2(e) (c log_prior + scale u), for entries that
// the batch does not hold. A factor of u is split in two floats: rounding it to one would shift
// every exponent the same way.
struct PiExponent {
  float high, low;            // log2(e) scale
  float half_high, half_low;  // log2(e) rho scale
  float prior;                // log2(e) c
};

ALS_HOST_DEVICE PiExponent exponent_of(double scale, const PiRule& rule) {
  const double full = kLog2E * scale;
  const double half = full * rule.rho;
  const auto high = static_cast<float>(full);
  const auto half_high = static_cast<float>(half);
  return {high, static_cast<float>(full - high), half_high, static_cast<float>(half - half_high),
          static_cast<float>(kLog2E * rule.prior)};
}

// The losses of a batch: one of the two is null.
struct PiLosses {
  const float* single;
  const double* twice;

  ALS_HOST_DEVICE double operator[](int64_t i) const {
    return single != nullptr ? static_cast<double>(single[i]) : twice[i];
  }
};

// A loss takes part when it is finite as a float32.
ALS_HOST_DEVICE bool usable_loss(double loss) {
  return loss <= 3.4028234663852886e38 && loss >= -3.4028234663852886e38;
}

// First position in ascending values[0..count) that is not below key. No branch but the loop's: the
// outcomes of comparisons cannot be predicted.
ALS_HOST_DEVICE int64_t lower_bound(const int64_t* values, int64_t count, int64_t key) {
  int64_t low = 0;
  while (count > 1) {
    const int64_t half = count / 2;
    low += static_cast<int64_t>(values[low + half - 1] < key) * half;
    count -= half;
  }
  return low + static_cast<int64_t>(count == 1 && values[low] < key);
}

// Read access to a distribution.
struct PiView {
  const float* u;                // [n], or null in a lazy state
  const double* lazy_u;          // [n], or null in a dense one
  const float* log_prior;        // [n] log(n prior_i), or null for a uniform prior
  const double* scalars;         // [kPiScalars]
  const int64_t* pending_index;  // [capacity] ascending; the first of equal indices holds the sum
  const double* pending_grad;    // [capacity]
  int64_t n, capacity;
  PiRule rule;

  ALS_HOST_DEVICE double entry(int64_t i) const {
    return lazy_u != nullptr ? lazy_u[i] : static_cast<double>(u[i]);
  }
  ALS_HOST_DEVICE double prior_exponent(int64_t i) const {
    return log_prior != nullptr ? rule.prior * log_prior[i] : 0.0;
  }
};

// log(n pi_i), or of the half step's pi, of the entry u with c log_prior = x.
ALS_HOST_DEVICE double log_weight_of(const PiView& p, int64_t i, double u, double x, bool half) {
  const double r = p.scalars[kPiScale] * u;
  if (!half || p.scalars[kPiHasPending] == 0.0) return x + r - p.scalars[kPiLogMean];
  const int64_t at = lower_bound(p.pending_index, p.capacity, i);
  const double g = at < p.capacity && p.pending_index[at] == i ? p.pending_grad[at] : 0.0;
  return x + p.rule.rho * (r + ascent(g, p.rule.step)) - p.scalars[kPiLogMeanHalf];
}

// NaN for an index outside [0, n).
ALS_HOST_DEVICE double log_weight(const PiView& p, int64_t i, bool half) {
  if (i < 0 || i >= p.n) return NAN;
  return log_weight_of(p, i, p.entry(i), p.prior_exponent(i), half);
}

}  // namespace als
