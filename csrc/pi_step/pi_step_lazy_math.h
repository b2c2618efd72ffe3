// The lazy pi step: normalisers from power sums, so that a step costs the same for any n.
// Torch-free; one copy for CPU and CUDA.
//
// With r_i = A u_i only A changes for an entry that the batch does not hold, so the normaliser is a
// function of A alone, and its Taylor series needs a few sums that a step mends in O(B):
//
//   Z(A) = mean_i exp(c log_prior_i + A u_i)
//        = exp(L + (A - A0) m) sum_j ((A - A0) w)^j T_j / j!
//   T_j  = mean_i e_i v_i^j,   e_i = exp(c log_prior_i + A0 u_i - L),   v_i = (u_i - m) / w
//
// A0 is 0 while the entries lie within kPiPlainReach of their middle m (moments of r: good for any
// A to come), else the A of the last exact pass (then only the change of A counts, however far the
// entries are apart). The half step's normaliser is the same series at rho A, plus the batch.
//
// Error, relative to Z and always computed: with |v| <= V and x = |A - A0| w V
//   truncation <= e^x (x/V)^J T_J / J!           Lagrange's remainder, J = kPiPowers even, v^J >= 0
//   rounding   <= 2^-53 e^x G                    G: additions behind the sums times what they added
// When they exceed kPiTolerance, or anything is not finite, the step makes an exact pass and sums
// anew. T_j is kept in two doubles, so adding to it again and again loses nothing.
//
// u is float64 here: an entry is read when a batch holds it, so width costs no time, and pi stays
// within 1e-8 of float64 arithmetic after any number of steps.
#pragma once

#include "common/elementary.h"
#include "pi_step/pi_step_math.h"

namespace als {

constexpr int kPiPowers = 40;  // J, even; the series is cut after the term J - 1
constexpr int kPiMoments = kPiPowers + 1;
constexpr double kPiTolerance = 1e-8;                // relative error of a normaliser
constexpr double kPiPlainReach = 6.0;                // nats
constexpr double kPiRound = 1.1102230246251565e-16;  // 2^-53
// Sums that end before this many steps do not pay for themselves: exact passes alone for a while.
constexpr double kPiShortAge = 16.0;
constexpr double kPiPause = 64.0;
// float64 entries are rewritten (A = 1, centred) late: for their range and for digits of the level.
constexpr double kPiLazyScaleMin = 1e-270;
constexpr double kPiLazyLevelMax = 1e4;
constexpr int kPiSumsLanes = 8;  // at least this many partial sums of a batch
// New entries have u = r / A: as A falls, w follows by factors of 2^8, or powers of v would
// overflow.
constexpr double kPiWidthStep = 256.0;

// The tensor `sums`, float64, in device memory.
enum PiSum : int {
  kPiTilt = 0,          // A0
  kPiLevel = 1,         // L
  kPiMiddle = 2,        // m
  kPiInverseWidth = 3,  // 1 / w
  kPiReach = 4,         // V
  kPiRounding = 5,      // G
  kPiAge = 6,           // steps since the sums were made
  kPiPauseLeft = 7,     // exact passes to come before sums are made again
  kPiHigh = 8,          // T_0 ... T_J, the leading parts
  kPiLow = kPiHigh + kPiMoments,
  kPiSumsSize = kPiLow + kPiMoments,
};

// What some entries add to the normalisers, and where they lie.
struct PiNormalisers {
  LogSum total, half;
  double low = INFINITY, high = -INFINITY;  // of u

  ALS_HOST_DEVICE void add(const PiNormalisers& other) {
    total.add(other.total.max, other.total.sum);
    half.add(other.half.max, other.half.sum);
    low = fmin(low, other.low);
    high = fmax(high, other.high);
  }
  // One entry with c log_prior = x; gain: what the pending batch adds in the half step.
  ALS_HOST_DEVICE void add_entry(double u, double x, double gain, double scale, double rho) {
    if (!(u > -INFINITY)) return;  // lifted out
    total.add(kLog2E * (x + scale * u), 1.0);
    half.add(kLog2E * (x + rho * (scale * u + gain)), 1.0);
    low = fmin(low, u);
    high = fmax(high, u);
  }
};

// What a step leaves to do.
enum class PiDemand : int { kNothing = 0, kNormalisers = 1, kSums = 2 };

// e_i and v_i of an entry; x = c log_prior. An entry of -inf (lifted out) adds nothing.
struct PiTerm {
  double e, v;
};

struct PiFrame {
  double tilt, level, middle, inverse_width;

  static ALS_HOST_DEVICE PiFrame of(const double* sums) {
    return {sums[kPiTilt], sums[kPiLevel], sums[kPiMiddle], sums[kPiInverseWidth]};
  }
  ALS_HOST_DEVICE PiTerm term(double u, double x) const {
    const bool there = u > -INFINITY;
    const double at = select(there, u, middle);
    const double e = exp_of(x + tilt * at - level);
    return {select(there, e, 0.0), (at - middle) * inverse_width};
  }
};

// Middle and width of entries in [low, high] at scale A, and the mean exponential's logarithm.
ALS_HOST_DEVICE void start_sums(double* sums, double low, double high, double scale,
                                double log_mean) {
  const double width = high > low ? 0.5 * (high - low) : 1.0;
  const bool plain = scale * width <= kPiPlainReach;
  sums[kPiTilt] = plain ? 0.0 : scale;
  sums[kPiLevel] = plain ? 0.0 : log_mean;
  sums[kPiMiddle] = low + 0.5 * (high - low);
  sums[kPiInverseWidth] = 1.0 / width;
  sums[kPiReach] = 1.0000001;  // (high - middle) / width, rounded
  sums[kPiAge] = 0.0;
  sums[kPiPauseLeft] = 0.0;
  for (int j = kPiHigh; j < kPiSumsSize; ++j) sums[j] = 0.0;
}

// T_j += value, nothing lost (Knuth's two-sum).
ALS_HOST_DEVICE void add_moment(double* sums, int j, double value) {
  const double high = sums[kPiHigh + j];
  const double sum = high + value;
  const double back = sum - high;
  sums[kPiLow + j] += (high - (sum - back)) + (value - back);
  sums[kPiHigh + j] = sum;
}

// After a pass has added every entry: the error that its additions (at most `chain` in a row),
// exponentials and powers leave.
ALS_HOST_DEVICE void end_sums(double* sums, int64_t chain) {
  sums[kPiRounding] = (static_cast<double>(chain) + 2.0 * kPiPowers) * sums[kPiHigh];
}

// What a step has changed, beside the moments: sums over the batch's entries, divided by n.
struct PiChange {
  double mass;       // sum of e, old and new
  double reach;      // largest |v|, old and new
  double half;       // sum of exp(half step with g) - exp(without), times exp(-half level)
  double half_mass;  // the sum of both instead
};

ALS_HOST_DEVICE double larger_or_nan(double a, double b) { return a > b || a != a ? a : b; }

// Scales w and with it every power exactly (a power of two), before they leave float64's range.
ALS_HOST_DEVICE void widen(double* sums, double scale) {
  if (sums[kPiTilt] != 0.0) return;  // A stays near A0
  if (!(2.0 * kPiWidthStep * scale < sums[kPiInverseWidth])) return;
  double factor = 1.0;
  for (int j = 0; j < kPiMoments; ++j, factor /= kPiWidthStep) {
    sums[kPiHigh + j] *= factor;
    sums[kPiLow + j] *= factor;
  }
  sums[kPiInverseWidth] /= kPiWidthStep;
  sums[kPiReach] /= kPiWidthStep;
}

// log Z at `scale`, if the error is within the tolerance. extra, extra_mass: what the batch adds to
// the series' value in units of exp(level_at), and the size of the numbers behind it.
struct PiSeries {
  double log_mean;
  bool good;
};
ALS_HOST_DEVICE double level_at(const double* sums, double scale) {
  return sums[kPiLevel] + (scale - sums[kPiTilt]) * sums[kPiMiddle];
}
ALS_HOST_DEVICE PiSeries series_at(const double* sums, double scale, double extra,
                                   double extra_error) {
  const double step = (scale - sums[kPiTilt]) / sums[kPiInverseWidth];
  double value = 0.0, power = 1.0;
  for (int j = 0; j < kPiPowers; ++j) {
    value += power * (sums[kPiHigh + j] + sums[kPiLow + j]);
    power *= step / (j + 1.0);
  }
  const double top = fabs(power) * (sums[kPiHigh + kPiPowers] + sums[kPiLow + kPiPowers]);
  const double spread = exp(fabs(step) * sums[kPiReach]);
  const double error = spread * (top + kPiRound * sums[kPiRounding]) + extra_error;
  const double total = value + extra;
  // NaN and infinities compare false.
  return {level_at(sums, scale) + log(total),
          error <= kPiTolerance * total && total < INFINITY && spread < INFINITY};
}

// The plan of a lazy step: entries change their scale only, and are rewritten afterwards by `after`
// if that is not the identity.
struct PiLazyPlan {
  PiPlan step;   // of the batch's entries
  PiPlan after;  // of all entries, in the pass that follows when rewrite is set
};
ALS_HOST_DEVICE PiLazyPlan plan_lazy(const double* scalars, const PiRule& rule) {
  const double scale = scalars[kPiScale];
  const double level = rule.rho * scalars[kPiLogMean];
  const double next = rule.rho * scale;
  const bool rewrite = next < kPiLazyScaleMin || fabs(level) > kPiLazyLevelMax;
  const PiPlan step{scale, rule.rho, 0.0, next, false};
  const PiPlan after{next, 1.0, rewrite ? level : 0.0, rewrite ? 1.0 : next, rewrite};
  return {step, after};
}

// After the batch's entries have changed: the scalars from the sums, or the demand for a pass. The
// moments hold the change already (but not in a pause). batch: how many numbers were added up.
ALS_HOST_DEVICE PiDemand settle(double* scalars, double* sums, const PiRule& rule,
                                const PiLazyPlan& plan, const PiChange& change, int64_t batch) {
  scalars[kPiHasPending] = 1.0;
  scalars[kPiScale] = plan.step.new_scale;
  if (sums[kPiPauseLeft] > 0.0) {
    sums[kPiPauseLeft] -= 1.0;
    return sums[kPiPauseLeft] > 0.0 ? PiDemand::kNormalisers : PiDemand::kSums;
  }
  const double chain = static_cast<double>(batch / kPiSumsLanes) + 2.0 * kPiPowers;
  sums[kPiRounding] += chain * change.mass;
  sums[kPiReach] = larger_or_nan(change.reach, sums[kPiReach]);
  const double scale = plan.step.new_scale;
  const PiSeries now = series_at(sums, scale, 0.0, 0.0);
  const PiSeries half =
      series_at(sums, rule.rho * scale, change.half, kPiRound * chain * change.half_mass);
  if (now.good && half.good && !plan.after.rewrite) {
    scalars[kPiLogMean] = now.log_mean;
    scalars[kPiLogMeanHalf] = half.log_mean;
    sums[kPiAge] += 1.0;
    widen(sums, scale);
    return PiDemand::kNothing;
  }
  if (plan.after.rewrite || sums[kPiAge] >= kPiShortAge) return PiDemand::kSums;
  sums[kPiPauseLeft] = kPiPause;
  return PiDemand::kNormalisers;
}

}  // namespace als
