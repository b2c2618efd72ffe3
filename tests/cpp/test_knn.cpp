#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>

#include "emulate_cuda.h"
// After the emulation:
#include "knn/knn_kernels.cuh"

namespace {

using als::KnnError;
using als::KnnFrame;
using als::KnnMetric;
using als::KnnQuery;
using als::Neighbour;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(DistanceKey, OrdersLikeTheNumbersWithNanLast) {
  const float ascending[] = {-kInf, -3.0f, -1e-45f, 0.0f, 1e-45f, 2.0f, 3e38f, kInf, kNan};
  for (size_t i = 0; i + 1 < std::size(ascending); ++i) {
    EXPECT_LT(als::distance_key(ascending[i]), als::distance_key(ascending[i + 1])) << i;
    EXPECT_EQ(als::key_distance(als::distance_key(ascending[i])), ascending[i]);
  }
  EXPECT_TRUE(std::isnan(als::key_distance(als::distance_key(-kNan))));
  EXPECT_EQ(als::distance_key(-0.0f), als::distance_key(0.0f));
}

TEST(Neighbour, EqualDistancesGoByIndex) {
  EXPECT_TRUE((Neighbour{5, 1} < Neighbour{5, 2}));
  EXPECT_FALSE((Neighbour{5, 2} < Neighbour{5, 2}));
  EXPECT_TRUE((Neighbour{4, 9} < Neighbour{5, 2}));
}

TEST(FinishDistance, ASumThatIsNotFiniteIsNan) {
  EXPECT_EQ(als::finish_distance(KnnMetric::kL2, 1e300), kInf);  // finite, but not as a float32
  EXPECT_TRUE(std::isnan(als::finish_distance(KnnMetric::kL2, INFINITY)));
  EXPECT_TRUE(std::isnan(als::finish_distance(KnnMetric::kIp, NAN)));
  EXPECT_EQ(als::finish_distance(KnnMetric::kCosine, 0.5), 0.25f);
  EXPECT_EQ(als::finish_distance(KnnMetric::kIp, 2.0), -2.0f);
}

TEST(UnitScale, IsAPowerOfTwoThatBringsTheSizeBelowOne) {
  for (double size : {1e-300, 3e-20, 0.5, 1.0, 7.0, 1e30}) {
    const double scaled = size * als::unit_scale(size);
    EXPECT_GE(scaled, 0.5);
    EXPECT_LT(scaled, 1.0);
    int exponent;
    EXPECT_EQ(std::frexp(als::unit_scale(size), &exponent), 0.5);
  }
  EXPECT_EQ(als::unit_scale(0.0), 1.0);
}

// ---- the order of the sums ----

template <typename Term>
double lane_sum(int64_t dim, const Term& term) {
  double lane[als::kKnnLanes] = {};
  for (int64_t j = 0; j < dim; ++j) lane[j % als::kKnnLanes] += term(j);
  return als::combine_lanes(lane);
}

// ---- the bound ----

TEST(ScoreError, BoundsFloat32ScoresOfRowsThatHurt) {
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform(0.5, 1.0);
  double worst = 0.0;
  for (int64_t dim : {1, 3, 64, 1000}) {
    for (int sign : {0, 1}) {  // all of one sign: the errors add up; of both: the score cancels
      for (int repeat = 0; repeat < 50; ++repeat) {
        float score = 0.0f;
        double exact = 0.0, qq = 0.0, cc = 0.0;
        for (int64_t j = 0; j < dim; ++j) {
          const double q = uniform(random), c = uniform(random) * (sign && j % 2 ? -1.0 : 1.0);
          score = std::fma(static_cast<float>(q), static_cast<float>(c), score);
          exact += q * c;
          qq += q * q;
          cc += c * c;
        }
        score -= static_cast<float>(0.5 * cc);
        exact -= 0.5 * cc;
        const KnnError e = als::score_error(dim);
        const double bound = e.product * std::sqrt(qq * cc) + e.square * 0.5 * cc;
        worst = std::max(worst, std::fabs(score - exact) / bound);
      }
    }
  }
  EXPECT_LE(worst, 1.0);
  EXPECT_GE(worst, 0.05);  // a bound far from what happens would re-examine far too much
}

TEST(KnnRelation, ScoreOfARowThatTiesInFloat32IsNotBelowTheLowest) {
  // d = alpha - 2 s
  const als::KnnRelation relation{10.0, 2.0, 0.0};
  for (double d : {0.0, 1e-42, 0.1, 1.0, 9.99}) {
    const auto rounded = static_cast<float>(d);
    const double tied = 0.5 * (static_cast<double>(rounded) +
                               std::nextafter(rounded, kInf));  // may round to `rounded`
    EXPECT_GE((relation.alpha - tied) / relation.beta, relation.lowest_score(d) - 1e-15);
    EXPECT_GT(relation.lowest_score(d), relation.lowest_score(d + 1e-3));
  }
  EXPECT_EQ(relation.lowest_score(1e39), -INFINITY);  // float32 infinity: everything ties
  EXPECT_EQ(relation.lowest_score(NAN), -INFINITY);
}

TEST(MakeQuery, IsNotUsableWhereNoScoreExists) {
  const KnnFrame frame = KnnFrame::of(0.75, 1.0, 2.0, false);
  const KnnError error = als::score_error(4);
  EXPECT_TRUE(als::make_query(KnnMetric::kL2, frame, error, 4, 3.0, 1.0, 0.0, false).usable);
  EXPECT_FALSE(als::make_query(KnnMetric::kL2, frame, error, 4, NAN, 1.0, 0.0, false).usable);
  EXPECT_FALSE(als::make_query(KnnMetric::kL2, frame, error, 4, 1e60, 1.0, 0.0, false).usable);
  EXPECT_FALSE(als::make_query(KnnMetric::kCosine, frame, error, 4, 1.0, 1.0, 0.0, true).usable);
  const KnnFrame far = KnnFrame::of(1e200, 1e200, 1e200, false);
  EXPECT_FALSE(als::make_query(KnnMetric::kL2, far, error, 4, 3.0, 1.0, 0.0, false).usable);
}

// ---- the device code on the CPU ----

struct Problem {
  int64_t queries, rows, dim, k;
  KnnMetric metric;
  bool exclude_self;
  std::vector<float> query, database;
};

unsigned blocks(int64_t n, int64_t size) { return static_cast<unsigned>((n + size - 1) / size); }

// The launches of knn_cuda.cu: `chunk` database tiles are packed at a time, and the queries are
// served in two spans.
std::vector<Neighbour> search(const Problem& p, KnnError error, int64_t chunk) {
  using namespace als;
  const KnnRows<float> x{p.query.data(), p.queries, p.dim, p.metric};
  const KnnRows<float> y{p.database.data(), p.rows, p.dim, p.metric};
  const int64_t part = (p.rows + 1) / 2, parts = blocks(p.rows, part);
  std::vector<double> sums(parts * p.dim), mean(p.dim);
  KnnExtent extent{};
  emulated::launch(parts, kKnnThreads, [&] { knn_column_sums(y, part, sums.data(), &extent); });
  emulated::launch(blocks(p.dim, kKnnThreads), kKnnThreads,
                   [&] { knn_mean(sums.data(), parts, p.dim, &extent, mean.data()); });
  emulated::launch(2, kKnnThreads, [&] { knn_extent(y, mean.data(), &extent); });
  const int64_t depth = blocks(p.dim, kKnnSlab) * int64_t{kKnnSlab};
  const int64_t span = (p.queries + 1) / 2;
  const unsigned tiles = blocks(p.rows, kKnnTile), query_tiles = blocks(span, kKnnTile);
  const int64_t groups = tiles * int64_t{kKnnTileGroups};
  // float4 is read from these: as aligned as device memory.
  std::vector<float4> packed_query(query_tiles * kKnnTile * depth / 4);
  std::vector<float4> packed(chunk * kKnnTile * depth / 4), half_norm(chunk * kKnnTile / 4);
  const auto floats = [](std::vector<float4>& v) { return reinterpret_cast<float*>(v.data()); };
  std::vector<float> group_max(span * groups), group_norm(groups);
  std::vector<KnnQuery> queries(span);
  int capacity = 64;  // smaller than in knn_cuda.cu: the list is cut more often
  while (capacity < 2 * p.k) capacity *= 2;
  std::vector<float> distance(p.queries * p.k);
  std::vector<int64_t> index(p.queries * p.k);
  for (int64_t first = 0; first < p.queries; first += span) {
    const int64_t count = std::min(span, p.queries - first);
    emulated::launch(blocks(count, kKnnTile), kKnnThreads, [&] {
      knn_pack_queries(x, first, count, depth, mean.data(), &extent, error, floats(packed_query),
                       queries.data());
    });
    for (int64_t tile = 0; tile < tiles; tile += chunk) {
      const auto here = static_cast<unsigned>(std::min<int64_t>(chunk, tiles - tile));
      if (first == 0 || chunk < tiles) {
        emulated::launch(here, kKnnThreads, [&] {
          knn_pack_database(y, tile * kKnnTile, depth, mean.data(), &extent, floats(packed),
                            floats(half_norm), group_norm.data() + tile * kKnnTileGroups);
        });
      }
      const KnnScoreParams score{floats(packed_query),  floats(packed), floats(half_norm),
                                 group_max.data(),      count,          groups,
                                 tile * kKnnTileGroups, depth};
      emulated::launch({here, blocks(count, kKnnTile)}, kKnnThreads, [&] { knn_score(score); });
    }
    const KnnSelectParams<float> select{x,
                                        y,
                                        first,
                                        groups,
                                        p.k,
                                        p.exclude_self,
                                        capacity,
                                        group_max.data(),
                                        group_norm.data(),
                                        queries.data(),
                                        &extent,
                                        p.metric == KnnMetric::kIp ? 0.0 : error.square,
                                        distance.data(),
                                        index.data()};
    emulated::launch(static_cast<unsigned>(count), kKnnThreads, [&] { knn_select(select); });
  }
  std::vector<Neighbour> result;
  for (size_t i = 0; i < index.size(); ++i) {
    result.push_back({als::distance_key(distance[i]), index[i]});
  }
  return result;
}

// The definition.
std::vector<Neighbour> nearest(const Problem& p) {
  std::vector<Neighbour> result;
  for (int64_t q = 0; q < p.queries; ++q) {
    const float* x = p.query.data() + q * p.dim;
    const auto norm = [&p](const float* v) {
      return als::inverse_norm(
          lane_sum(p.dim, [&](int64_t j) { return static_cast<double>(v[j]) * v[j]; }));
    };
    std::vector<Neighbour> all;
    for (int64_t row = 0; row < p.rows; ++row) {
      if (p.exclude_self && row == q) continue;
      const float* y = p.database.data() + row * p.dim;
      const bool cosine = p.metric == KnnMetric::kCosine;
      const double a = cosine ? norm(x) : 1.0, b = cosine ? norm(y) : 1.0;
      float d = als::finish_distance(p.metric, lane_sum(p.dim, [&](int64_t j) {
                                       return p.metric == KnnMetric::kIp
                                                  ? static_cast<double>(x[j]) * y[j]
                                                  : als::squared_difference(x[j] * a, y[j], b);
                                     }));
      if ((a == 0.0 || b == 0.0) && a == a && b == b) d = 1.0f;
      all.push_back({als::distance_key(d), row});
    }
    std::partial_sort(all.begin(), all.begin() + p.k, all.end());
    result.insert(result.end(), all.begin(), all.begin() + p.k);
  }
  return result;
}

int64_t differences(const Problem& p, KnnError error, int64_t chunk) {
  const auto got = search(p, error, chunk), want = nearest(p);
  int64_t wrong = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    wrong += got[i].key != want[i].key || got[i].index != want[i].index;
  }
  return wrong;
}

Problem gaussian(int64_t queries, int64_t rows, int64_t dim, int64_t k, KnnMetric metric,
                 float shift = 0.0f) {
  Problem p{queries, rows, dim, k, metric, false, {}, {}};
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < queries * dim; ++i) p.query.push_back(normal(random) + shift);
  for (int64_t i = 0; i < rows * dim; ++i) p.database.push_back(normal(random) + shift);
  return p;
}

TEST(KnnKernels, ScoresChooseTheRowsToMeasure) {  // 24 groups for k = 5
  for (auto metric : {KnnMetric::kL2, KnnMetric::kCosine, KnnMetric::kIp}) {
    Problem p = gaussian(2, 300, 19, 5, metric, 1e3f);
    std::copy_n(p.database.begin(), 4 * p.dim, p.database.begin() + 200 * p.dim);  // ties
    std::fill_n(p.database.begin() + 7 * p.dim, p.dim, 0.0f);
    EXPECT_EQ(differences(p, als::score_error(p.dim), 2), 0);
  }
}

TEST(KnnKernels, FewerGroupsThanNeighboursMeansEveryRow) {
  const Problem p = gaussian(2, 130, 3, 100, KnnMetric::kL2);
  EXPECT_EQ(differences(p, als::score_error(p.dim), 2), 0);
}

TEST(KnnKernels, QueriesWithoutScoresMeasureEveryRow) {
  Problem p = gaussian(3, 140, 5, 4, KnnMetric::kCosine);
  std::fill_n(p.query.begin(), p.dim, 0.0f);
  p.query[p.dim] = kNan;
  for (int64_t row = 3; row < 140; row += 2) p.database[row * p.dim] = row % 3 ? kNan : kInf;
  EXPECT_EQ(differences(p, als::score_error(p.dim), 2), 0);
}

TEST(KnnKernels, RowsThatAreNotFiniteComeWhenTheOthersAreUsedUp) {  // 24 groups, 4 finite rows
  Problem p = gaussian(2, 300, 3, 10, KnnMetric::kL2);
  for (int64_t row = 0; row < 300; ++row) {
    if (row % 80 != 5) p.database[row * p.dim + row % 3] = row % 2 ? kNan : kInf;
  }
  EXPECT_EQ(differences(p, als::score_error(p.dim), 3), 0);
}

TEST(KnnKernels, AllRowsEqualGoByIndexAndWithoutSelf) {
  Problem p{3, 300, 4, 5, KnnMetric::kL2, false, std::vector<float>(12, 2.5f), {}};
  p.database.assign(300 * 4, 2.5f);
  EXPECT_EQ(differences(p, als::score_error(p.dim), 3), 0);
  p.queries = p.rows = 40;
  p.query.assign(160, 2.5f);
  p.database = p.query;
  p.exclude_self = true;
  p.k = 2;
  EXPECT_EQ(differences(p, als::score_error(p.dim), 1), 0);
}

TEST(KnnKernels, WithoutTheBoundTightClustersComeOutWrong) {  // so the tests above can fail
  Problem p = gaussian(4, 300, 10, 5, KnnMetric::kL2);
  for (int64_t i = 0; i < 300 * 10; ++i) {
    p.database[i] = static_cast<float>(i / 10 % 2) * 100.0f + 1e-4f * p.database[i];
  }
  std::copy_n(p.database.begin(), 40, p.query.begin());
  EXPECT_EQ(differences(p, als::score_error(p.dim), 3), 0);
  EXPECT_GT(differences(p, KnnError{0.0, 0.0}, 3), 0);
}

}  // namespace
