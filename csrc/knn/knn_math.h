// What a nearest neighbour is, and how wrong a float32 score can be. Torch-free; one copy for CPU
// and CUDA.
//
// Distance.  Every distance that is returned, and the order of the result, come from float64 sums
// in ONE fixed order without fused multiply-adds (lane_sum), rounded to float32:
//   l2      sum_j (x_j - y_j)^2
//   cosine  1 - cos(x, y) = (1/2) sum_j (x_j / |x| - y_j / |y|)^2; 1 where x or y is all zero
//   ip      -sum_j x_j y_j
// The second form of the cosine distance is the first without its cancellation: a duplicate is at
// 0, not at 1e-16. A sum that is not finite (a NaN or infinite element) is NaN; NaN sorts last.
//
// Score.  Only a few rows are looked at in float64. They are found through float32 scores of
// centred and scaled rows, q' = a (x - mean), c' = b (y - mean):
//   s = <q', c'> - h,   h = |c'|^2 / 2 (0 for ip),   d = alpha - beta s   (KnnRelation)
// so a large score is a small distance. Centring changes no neighbour (ip: only y is centred, which
// shifts the scores of a query by a constant) and makes |q'| |c'|, hence the error, small.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace als {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class KnnMetric : int64_t { kL2 = 0, kCosine = 1, kIp = 2 };

// ---- order ----

// Maps float32 to uint32 so that unsigned order is ascending distance, NaN last, -0 = +0.
ALS_HOST_DEVICE uint32_t distance_key(float distance) {
  if (!(distance == distance)) return 0xFFFFFFFFu;
  const float d = distance + 0.0f;
  uint32_t bits;
  memcpy(&bits, &d, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

ALS_HOST_DEVICE float key_distance(uint32_t key) {
  const uint32_t bits = key == 0xFFFFFFFFu  ? 0x7FC00000u
                        : key & 0x80000000u ? key & 0x7FFFFFFFu
                                            : ~key;
  float d;
  memcpy(&d, &bits, sizeof d);
  return d;
}

struct Neighbour {
  uint32_t key;
  int64_t index;

  ALS_HOST_DEVICE bool operator<(const Neighbour& other) const {
    return key < other.key || (key == other.key && index < other.index);
  }
};

// ---- float64 sums in a fixed order ----

constexpr int kKnnLanes = 8;

// Products and sums that no compiler may fuse: on the host the product passes through an empty
// instruction, on the device the intrinsics forbid it.
ALS_HOST_DEVICE double unfused_mul(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  double product = a * b;
#ifdef __x86_64__
  asm("" : "+x"(product));
#endif
  return product;
#endif
}
ALS_HOST_DEVICE double unfused_add(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

// Lane l holds the terms j = l, l + 8, l + 16, ... added in that order.
ALS_HOST_DEVICE double combine_lanes(const double* lane) {
  return unfused_add(unfused_add(unfused_add(lane[0], lane[4]), unfused_add(lane[2], lane[6])),
                     unfused_add(unfused_add(lane[1], lane[5]), unfused_add(lane[3], lane[7])));
}

// (q - c * scale)^2: scale is 1 for l2 (then the product is exact) and 1/|y| for cosine.
ALS_HOST_DEVICE double squared_difference(double q, double c, double scale) {
  const double t = unfused_add(q, -unfused_mul(c, scale));
  return unfused_mul(t, t);
}

ALS_HOST_DEVICE bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

// 1/|x| from the sum of squares; 0 stands for a row that is all zero, NaN for one that is not
// finite.
ALS_HOST_DEVICE double inverse_norm(double sum_of_squares) {
  if (sum_of_squares == 0.0) return 0.0;
  return is_finite(sum_of_squares) ? 1.0 / sqrt(sum_of_squares) : NAN;
}

// Sum of a metric's terms -> the float32 distance.
ALS_HOST_DEVICE float finish_distance(KnnMetric metric, double sum) {
  const double d = metric == KnnMetric::kCosine ? 0.5 * sum : metric == KnnMetric::kIp ? -sum : sum;
  return is_finite(d) ? static_cast<float>(d) : NAN;
}

// ---- how wrong a float32 score can be ----

constexpr double kFloatUnit = 5.9604644775390625e-08;  // 2^-24, unit roundoff of float32

// Coefficients of |computed score - s| <= product |q'||c'| + square (h + h_extra) + slack.
// `chain` is the longest chain of float32 additions behind one score. Terms, in u = 2^-24:
//   chain  products and additions, Higham's gamma_chain with Cauchy-Schwarz
//   2      rounding q' and c' to float32
//   1 + 1  rounding h, and the subtraction of h (half of it charged to each coefficient)
// 2 % on top covers gamma's second-order terms and the float64 arithmetic of the bound itself.
struct KnnError {
  double product;
  double square;
};

ALS_HOST_DEVICE KnnError score_error(int64_t chain) {
  return {1.02 * (static_cast<double>(chain) + 3.0) * kFloatUnit, 1.02 * 2.0 * kFloatUnit};
}

// The bf16 score of rows q~, c~, the centred and scaled rows rounded to bf16:
//   <q', c'> - <q~, c~> = <q', c' - c~> + <q' - q~, c~>
// so it is off by at most |q'||c' - c~| + |q' - q~||c~|, lengths that packing computes in float64
// from the very numbers the instruction sees (subnormals already 0, which it would take for 0),
// plus what its additions round. A product of two bf16 numbers has 16 significant bits, exact in
// float32. vdpbf16ps rounds the sum after each of its two products, or once after both; to nearest
// by its manual, and charged here at the double unit of 2^-23, which covers truncation. Partial
// sums and products below 2^-126 are flushed: at most 2^-125 a feature, in score_slack.
//   2 chain  the additions, gamma_chain and Cauchy-Schwarz on |q~||c~|, in u = 2^-24
//   1, 2     h and its subtraction, as above
struct KnnBf16Error {
  double radius;  // of |c~|
  double spread;  // of |c' - c~|
};

ALS_HOST_DEVICE KnnBf16Error bf16_error(int64_t chain, double norm, double packed,
                                        double residual) {
  const double additions = 1.02 * (2.0 * static_cast<double>(chain) + 1.0) * kFloatUnit;
  // 1e-6: the float64 arithmetic behind the lengths, for rows of up to 2^30 features
  return {(1.0 + 1e-6) * (residual + additions * packed), (1.0 + 1e-6) * norm};
}

// The same for a score from the tensor cores of CUDA, of `features` products. Their sums are not
// documented. What was found (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021; Khattak
// and Mikaitis, arXiv 2512.07004, up to B200): products are exact; a sum and the next m >= 4
// products are aligned to the largest of them, cut off below its 24th bit or a later one, added,
// and cut to float32. So such a step loses at most (m + 2) 2^-23 of sum_j |q~_j c~_j|, in whatever
// order: at most 2^-22 a product even with m = 2. Each product counts as two additions of 2^-23.
// wgmma stays within it: m = 16 and a cut below the 26th bit (Xie et al., MMA-Sim, arXiv
// 2511.10909) lose less than a sixth of that.
ALS_HOST_DEVICE KnnBf16Error tensor_error(int64_t features, double norm, double packed,
                                          double residual) {
  return bf16_error(2 * features, norm, packed, residual);
}

// d = alpha - beta s for one query; `slack` bounds, in units of s, everything that is not relative
// to |q'||c'|: float64 rounding of d and alpha, and float32 underflow.
struct KnnRelation {
  double alpha;
  double beta;
  double slack;

  // A row whose float32 distance is <= that of some row at true distance <= `upper` has a score of
  // at least this. Rounding to float32 is monotone, so only its half unit in the last place is
  // given back: relative 2^-24, and the whole subnormal range where the processor flushes it.
  ALS_HOST_DEVICE double lowest_score(double upper) const {
    if (!(fabs(upper) < 3e38)) return -INFINITY;  // may round to infinity, where everything ties
    const double reach = upper + 4.0 * kFloatUnit * fabs(upper) + 1.2e-38;
    return (alpha - reach) / beta - 2.0 * slack;
  }
  ALS_HOST_DEVICE double distance_of(double score) const { return alpha - beta * score; }
  // The true distance of a row of at least this true score is at most this.
  ALS_HOST_DEVICE double farthest(double score) const {
    return distance_of(score) + 2.0 * slack * beta;
  }
  // The score of a row whose float32 distance is `d`, and how far the true score may be from it.
  ALS_HOST_DEVICE double score_of(float d) const { return (alpha - d) / beta; }
  ALS_HOST_DEVICE double error_of_score(float d) const {
    return (2.0 * kFloatUnit * fabs(d) + 1.2e-38) / beta + slack;
  }
};

// float32 underflow (also with flush-to-zero) and float64 rounding, in units of s; lengths are of
// scaled rows. `raw` is the largest scaled product |x||y| of rows that are not centred.
ALS_HOST_DEVICE double score_slack(int64_t dim, double query_norm, double max_norm, double raw) {
  const double d = static_cast<double>(dim) + 16.0;
  const double size = query_norm * query_norm + max_norm * max_norm + raw;
  return d * 4.5e-16 * size + d * 1e-37 * (1.0 + query_norm) * (1.0 + max_norm);
}

// ---- centring and scaling ----

// A power of two that brings `size` into [1/2, 1); 1 for 0.
ALS_HOST_DEVICE double unit_scale(double size) {
  if (size == 0.0) return 1.0;
  int exponent;
  frexp(size, &exponent);
  return ldexp(1.0, -exponent);
}

// What the finite rows of the database say. Norms are those of scaled rows.
struct KnnFrame {
  double scale;     // b
  double max_norm;  // largest |c'|
  double max_raw;   // largest b |y|, not centred
  bool has_zeros;   // all-zero rows under cosine
  bool scorable;    // false: float64 data where squares of scaled values do not exist

  // From the largest |y_j - mean_j|, the largest |y - mean| and the largest |y|.
  static ALS_HOST_DEVICE KnnFrame of(double extent, double norm, double raw, bool zeros) {
    const double b = unit_scale(extent);
    return {b, b * norm, b * raw, zeros, b > 1e-100 && b < 1e100};
  }
  // An all-zero row is at cosine distance 1, not at the 1/2 that |x|^2 / 2 says: h grows by this.
  ALS_HOST_DEVICE double zero_offset() const { return 0.5 * scale * scale; }
};

struct KnnQuery {
  KnnRelation relation;
  double scale;   // a
  double radius;  // error of a score is radius |c'| + ...
  bool usable;    // false: no score can serve this query, every row is measured in float64
};

// The query whose row (centred; not for ip) has the given sum of squares, largest element and, for
// ip, product with the mean. `zero`: all zero under cosine.
ALS_HOST_DEVICE KnnQuery make_query(KnnMetric metric, const KnnFrame& frame, KnnError error,
                                    int64_t dim, double square, double extent, double mean_product,
                                    bool zero) {
  KnnQuery q{};
  const double b = frame.scale;
  double raw = frame.has_zeros ? b * b : 0.0;
  if (metric == KnnMetric::kIp) {
    q.scale = is_finite(square) ? unit_scale(extent) : 1.0;
    q.relation.alpha = -mean_product;
    q.relation.beta = 1.0 / (q.scale * b);
    raw = q.scale * sqrt(square) * frame.max_raw;
  } else {
    const double half = metric == KnnMetric::kCosine ? 0.5 : 1.0;
    q.scale = b;
    q.relation.alpha = half * square;
    q.relation.beta = 2.0 * half / (b * b);
  }
  const double norm = q.scale * sqrt(square);
  q.usable = !zero && frame.scorable && norm < 1e25 && is_finite(q.relation.alpha) &&
             q.relation.beta > 0.0;
  q.radius = q.usable ? error.product * norm : 0.0;
  q.relation.slack = score_slack(dim, norm, frame.max_norm, raw);
  return q;
}

}  // namespace als
