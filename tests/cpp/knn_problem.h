// A kNN problem for the emulated kernels, and its solution by definition. Include after the
// kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace knn_problem {

using als::ceil_div;
using als::KnnMetric;
using als::Neighbour;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr KnnMetric kMetrics[] = {KnnMetric::kL2, KnnMetric::kCosine, KnnMetric::kIp};

inline unsigned blocks(int64_t n, int64_t size) { return static_cast<unsigned>(ceil_div(n, size)); }

// As aligned as device memory. Starts as NaNs: what is read must have been written.
template <typename V>
class Memory {
 public:
  explicit Memory(int64_t size) : pieces_((size * sizeof(V) + 127) / 128) {
    std::memset(static_cast<void*>(pieces_.data()), 0xFF, pieces_.size() * sizeof(Piece));
  }
  V* get() { return reinterpret_cast<V*>(pieces_.data()); }

 private:
  struct alignas(128) Piece {
    unsigned char bytes[128];
  };
  std::vector<Piece> pieces_;
};

template <typename Term>
double lane_sum(int64_t dim, const Term& term) {
  double lane[als::kKnnLanes] = {};
  for (int64_t j = 0; j < dim; ++j) lane[j % als::kKnnLanes] += term(j);
  return als::combine_lanes(lane);
}

template <typename T>
struct Problem {
  int64_t queries, rows, dim, k;
  KnnMetric metric;
  bool exclude_self;
  std::vector<T> query, database;
};

// The definition.
template <typename T>
std::vector<Neighbour> nearest(const Problem<T>& p) {
  const als::KnnRows<T> x{p.query.data(), p.queries, p.dim, p.metric};
  const als::KnnRows<T> y{p.database.data(), p.rows, p.dim, p.metric};
  const bool cosine = p.metric == KnnMetric::kCosine;
  const auto factor = [&](const als::KnnRows<T>& rows, int64_t row) {
    if (!cosine) return 1.0;
    return als::inverse_norm(
        lane_sum(p.dim, [&](int64_t j) { return rows.at(row, j) * rows.at(row, j); }));
  };
  std::vector<Neighbour> result;
  for (int64_t q = 0; q < p.queries; ++q) {
    std::vector<Neighbour> all;
    const double a = factor(x, q);
    for (int64_t row = 0; row < p.rows; ++row) {
      if (p.exclude_self && row == q) continue;
      const double b = factor(y, row);
      float d = als::finish_distance(p.metric, lane_sum(p.dim, [&](int64_t j) {
                                       return p.metric == KnnMetric::kIp
                                                  ? x.at(q, j) * y.at(row, j)
                                                  : als::squared_difference(x.at(q, j) * a,
                                                                            y.at(row, j), b);
                                     }));
      if ((a == 0.0 || b == 0.0) && a == a && b == b) d = 1.0f;
      all.push_back({als::distance_key(d), row});
    }
    std::partial_sort(all.begin(), all.begin() + p.k, all.end());
    result.insert(result.end(), all.begin(), all.begin() + p.k);
  }
  return result;
}

template <typename T>
T convert(double x);
template <>
inline float convert(double x) {
  return static_cast<float>(x);
}
template <>
inline double convert(double x) {
  return x;
}
template <>
inline __nv_bfloat16 convert(double x) {
  const float rounded = als::round_to_bf16(static_cast<float>(x));
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return {static_cast<uint16_t>(bits >> 16)};
}
template <>
inline __half convert(double x) {  // truncates; 0 below the normal range
  if (std::fabs(x) < 6.2e-5) return {0};
  const int exponent = std::ilogb(x);
  const auto fraction = static_cast<int>(std::ldexp(std::fabs(x), 10 - exponent)) - 1024;
  return {static_cast<uint16_t>((x < 0.0) << 15 | (exponent + 15) << 10 | fraction)};
}

template <typename T = float>
Problem<T> gaussian(int64_t queries, int64_t rows, int64_t dim, int64_t k, KnnMetric metric,
                    double shift = 0.0) {
  Problem<T> p{queries, rows, dim, k, metric, false, {}, {}};
  std::mt19937 random(2);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < queries * dim; ++i) p.query.push_back(convert<T>(normal(random) + shift));
  for (int64_t i = 0; i < rows * dim; ++i) p.database.push_back(convert<T>(normal(random) + shift));
  return p;
}

}  // namespace knn_problem
