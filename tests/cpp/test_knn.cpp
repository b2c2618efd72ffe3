#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>

// clang-format off: the emulation comes before the kernels
#include "emulate_cuda.h"
#include "emulate_mma.h"
#include "emulate_wgmma.h"
#include "knn/knn_kernels.cuh"
#include "knn_problem.h"
// clang-format on

namespace {

using namespace knn_problem;

using als::KnnError;
using als::KnnFrame;
using als::KnnQuery;

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

bool hopper = false;  // which of the two scoring kernels; set by the tests below

// How the host would launch it.
struct Plan {
  int64_t chunk = 2;  // database tiles packed at a time
  int run = 2;        // database tiles of a scoring block
  int budget = -1;    // -1: knn_budget
  bool exact = true;
  int64_t part = 0;  // database rows that are searched at a time, 0: all
};

constexpr int kNever = 1 << 30;  // a budget: bf16 scores serve every query

struct Found {
  std::vector<Neighbour> neighbours;
  int64_t rescored;  // queries
};

// Mean and extent of the database.
template <typename T>
struct Frame {
  explicit Frame(const als::KnnRows<T>& y) : mean(y.dim) {
    using namespace als;
    const int64_t part = (y.rows + 1) / 2, parts = blocks(y.rows, part);
    std::vector<double> sums(parts * y.dim);
    emulated::launch(parts, kKnnThreads, [&] { knn_column_sums(y, part, sums.data(), &extent); });
    emulated::launch(blocks(y.dim, kKnnThreads), kKnnThreads,
                     [&] { knn_mean(sums.data(), parts, y.dim, &extent, mean.data()); });
    emulated::launch(2, kKnnThreads, [&] { knn_extent(y, mean.data(), &extent); });
  }
  std::vector<double> mean;
  als::KnnExtent extent{};
};

// bf16 tiles and group maxima of `span` queries against all rows, packed `chunk` tiles at a time.
template <typename T>
struct Scores {
  Scores(const als::KnnRows<T>& database, int64_t span, int64_t chunk)
      : y(database),
        tiles(blocks(y.rows, als::kKnnTile)),
        groups(tiles * als::kKnnTileGroups),
        tile_bytes(als::knn_slabs(y.dim) * als::kKnnSlabBytes),
        packed_query(ceil_div(span, als::kKnnTile) * tile_bytes),
        packed(chunk * tile_bytes),
        half_norm(chunk * als::kKnnTile),
        group_max(span * groups),
        group_norm(groups),
        group_residual(groups),
        queries(span),
        bounds(span) {}

  void run(const als::KnnRows<T>& x, int64_t first, int64_t count, Frame<T>& frame,
           const Plan& plan) {
    using namespace als;
    emulated::launch(blocks(count, kKnnTile), kKnnThreads, [&] {
      knn_pack_queries(x, first, count, frame.mean.data(), &frame.extent, plan.exact,
                       packed_query.get(), queries.get(), bounds.get());
    });
    for (int64_t tile = 0; tile < tiles; tile += plan.chunk) {
      const int64_t here = std::min<int64_t>(plan.chunk, tiles - tile);
      const int64_t group = tile * kKnnTileGroups;
      const KnnTiles out{packed.get(), half_norm.get(), group_norm.get() + group,
                         group_residual.get() + group};
      emulated::launch(static_cast<unsigned>(here), kKnnThreads, [&] {
        knn_pack_database(y, tile * kKnnTile, frame.mean.data(), &frame.extent, out);
      });
      const KnnScoreParams score{packed_query.get(),
                                 packed.get(),
                                 half_norm.get(),
                                 group_max.get(),
                                 count,
                                 groups,
                                 group,
                                 y.dim,
                                 static_cast<int>(here),
                                 plan.run,
                                 static_cast<int>(std::min<int64_t>(2, here))};
      if (hopper) {
        emulated::launch(3, kKnnHopperThreads, [&] { knn_score_hopper(score); }, kKnnHopperShared);
      } else {
        emulated::launch(
            {blocks(count, kKnnTile), blocks(here, plan.run)}, kKnnThreads,
            [&] { knn_score(score); }, kKnnScoreShared);
      }
    }
  }

  als::KnnRows<T> y;
  int64_t tiles, groups, tile_bytes;
  Memory<unsigned char> packed_query, packed;
  Memory<float> half_norm, group_max, group_norm, group_residual;
  Memory<KnnQuery> queries;
  Memory<als::KnnBound> bounds;
};

// The launches of knn_cuda_search.h for the rows `y` of the database, into distance and index; the
// queries are served in two spans. Gives the number of those that were scored again.
template <typename T>
int64_t search(const Problem<T>& p, const Plan& plan, const als::KnnRows<T>& y, float* distance,
               int64_t* index) {
  using namespace als;
  const KnnRows<T> x{p.query.data(), p.queries, p.dim, p.metric};
  Frame<T> frame(y);
  const int64_t span = (p.queries + 1) / 2;
  Scores<T> scores(y, span, plan.chunk);
  const int64_t depth = blocks(p.dim, kKnnFloatSlab) * int64_t{kKnnFloatSlab};
  Memory<float> float_query(ceil_div(span, kKnnTile) * kKnnTile * depth);
  Memory<float> float_packed(plan.chunk * kKnnTile * depth);
  Memory<float> float_half_norm(plan.chunk * kKnnTile);
  Memory<int> listed_query(span);
  unsigned listed_count;
  const KnnListed listed{listed_query.get(), &listed_count};
  const auto sizes = KnnSelectSizes::of(p.k, kKnnSelectThreads);
  int64_t rescored = 0;
  for (int64_t first = 0; first < p.queries; first += span) {
    const int64_t count = std::min(span, p.queries - first);
    listed_count = 0;
    scores.run(x, first, count, frame, plan);
    KnnSelectParams<T> select{x,
                              y,
                              first,
                              p.k,
                              p.exclude_self,
                              {scores.groups, kKnnGroupBits, 0},
                              sizes,
                              scores.group_max.get(),
                              scores.group_norm.get(),
                              scores.group_residual.get(),
                              scores.queries.get(),
                              scores.bounds.get(),
                              plan.budget < 0 ? knn_budget(p.k, scores.groups) : plan.budget,
                              false,
                              listed,
                              distance,
                              index};
    const auto select_rows = [&] { knn_select<T, kKnnSelectThreads>(select); };
    emulated::launch(static_cast<unsigned>(count), kKnnSelectThreads, select_rows, sizes.bytes());
    rescored += listed_count;

    emulated::launch(blocks(count, kKnnTile), kKnnThreads, [&] {
      knn_pack_queries_float(x, first, depth, frame.mean.data(), scores.queries.get(), listed,
                             float_query.get());
    });
    for (int64_t tile = 0; tile < scores.tiles; tile += plan.chunk) {
      const int64_t here = std::min<int64_t>(plan.chunk, scores.tiles - tile);
      emulated::launch(static_cast<unsigned>(here), kKnnThreads, [&] {
        knn_pack_database_float(y, tile * kKnnTile, depth, frame.mean.data(), &frame.extent, listed,
                                float_packed.get(), float_half_norm.get());
      });
      const KnnRescoreParams rescore{float_query.get(),
                                     float_packed.get(),
                                     float_half_norm.get(),
                                     scores.group_max.get(),
                                     here,
                                     scores.groups,
                                     tile * kKnnTileGroups,
                                     depth,
                                     listed};
      emulated::launch(2, kKnnThreads, [&] { knn_rescore(rescore); });
    }
    select.rescored = true;
    emulated::launch(static_cast<unsigned>(count), kKnnSelectThreads, select_rows, sizes.bytes());
  }
  return rescored;
}

// Part after part of the database, as knn_cuda.cu does.
template <typename T>
Found search(const Problem<T>& p, const Plan& plan) {
  std::vector<float> distance(p.queries * p.k, -kInf);  // would be the nearest of all
  std::vector<int64_t> index(p.queries * p.k, -1);
  Found found{{}, 0};
  const int64_t part = plan.part > 0 ? plan.part : p.rows;
  for (int64_t first = 0; first < p.rows; first += part) {
    const int64_t rows = std::min(part, p.rows - first);
    // On its own, so that AddressSanitizer sees its end.
    const std::vector<T> data(p.database.begin() + first * p.dim,
                              p.database.begin() + (first + rows) * p.dim);
    found.rescored +=
        search(p, plan, {data.data(), rows, p.dim, p.metric, first}, distance.data(), index.data());
  }
  for (size_t i = 0; i < index.size(); ++i) {
    found.neighbours.push_back({als::distance_key(distance[i]), index[i]});
  }
  return found;
}

struct Outcome {
  int64_t wrong, rescored;
};

template <typename T>
Outcome compare(const Problem<T>& p, const Plan& plan = {}) {
  const Found found = search(p, plan);
  const auto want = nearest(p);
  int64_t wrong = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const Neighbour& got = found.neighbours[i];
    wrong += got.key != want[i].key || got.index != want[i].index;
  }
  return {wrong, found.rescored};
}

// Both scoring kernels, with copies as early and as late as they may come.
struct Way {
  bool late, hopper;
};
class KnnKernels : public testing::TestWithParam<Way> {
 protected:
  void SetUp() override {
    emulated::copies_are_late = GetParam().late;
    hopper = GetParam().hopper;
  }
};
INSTANTIATE_TEST_SUITE_P(Ways, KnnKernels,
                         testing::Values(Way{false, false}, Way{true, false}, Way{false, true},
                                         Way{true, true}),
                         [](const auto& way) {
                           return std::string(way.param.hopper ? "Wgmma" : "Mma") +
                                  (way.param.late ? "Late" : "Early");
                         });

// ---- scores ----

TEST(Position, IsAPermutationOfATile) {
  std::vector<int> seen(als::kKnnTile);
  for (int row = 0; row < als::kKnnTile; ++row) ++seen.at(als::knn_position(row));
  EXPECT_EQ(seen, std::vector<int>(als::kKnnTile, 1));
}

// The largest true score of each group, the stored one, and the error that is granted.
TEST_P(KnnKernels, GroupMaximaAreWithinTheBound) {
  double worst = 0.0;
  for (auto [dim, metric] : {std::pair{5, KnnMetric::kL2},
                             {70, KnnMetric::kIp},
                             {128, KnnMetric::kCosine},
                             {161, KnnMetric::kL2}}) {
    const Problem<float> p = gaussian(131, 300, dim, 1, metric);  // the last query tile: 3 rows
    const als::KnnRows<float> x{p.query.data(), p.queries, p.dim, p.metric};
    const als::KnnRows<float> y{p.database.data(), p.rows, p.dim, p.metric};
    Frame<float> frame(y);
    Scores<float> scores(y, p.queries, 3);
    scores.run(x, 0, p.queries, frame, {3, 2});
    for (int64_t q = 0; q < p.queries; ++q) {
      const KnnQuery& query = scores.queries.get()[q];
      const als::KnnBound error = scores.bounds.get()[q];
      std::vector<double> largest(scores.groups, -INFINITY);
      for (int64_t row = 0; row < p.rows; ++row) {
        double distance = 0.0, xx = 0.0, yy = 0.0, xy = 0.0;
        for (int64_t j = 0; j < dim; ++j) {
          distance += als::squared_difference(x.at(q, j), y.at(row, j), 1.0);
          xx += x.at(q, j) * x.at(q, j);
          yy += y.at(row, j) * y.at(row, j);
          xy += x.at(q, j) * y.at(row, j);
        }
        if (metric == KnnMetric::kIp) distance = -xy;
        if (metric == KnnMetric::kCosine) distance = 1.0 - xy / std::sqrt(xx * yy);
        const double score = (query.relation.alpha - distance) / query.relation.beta;
        double& group = largest[row / als::kKnnGroup];
        group = std::max(group, score);
      }
      for (int64_t g = 0; g < scores.groups; ++g) {
        const float stored = scores.group_max.get()[q * scores.groups + g];
        if (g * als::kKnnGroup >= p.rows) {  // no row
          ASSERT_EQ(stored, -INFINITY);
          continue;
        }
        const float norm = scores.group_norm.get()[g];
        const double bound = error.error(stored, norm, scores.group_residual.get()[g]);
        ASSERT_LE(std::fabs(stored - largest[g]), bound) << dim << ' ' << q << ' ' << g;
        worst = std::max(worst, std::fabs(stored - largest[g]) / bound);
      }
    }
  }
  EXPECT_GE(worst, 0.2);  // a bound far from what happens would measure far too much
}

template <int kProducts>
void expect_bounded_sums() {
  // All of one sign, so that what is cut off adds up; exact in bf16, so that nothing else is lost.
  std::mt19937 random(3);
  std::uniform_int_distribution<int> integer(129, 255);
  double worst = 0.0;
  for (int64_t dim : {16, 1024, 1 << 16}) {
    float score = 0.0f;
    double exact = 0.0, qq = 0.0, cc = 0.0;
    for (int64_t j = 0; j < dim; j += kProducts) {
      double product[kProducts];
      for (double& value : product) {
        const double q = integer(random), c = integer(random);
        value = q * c;
        exact += value;
        qq += q * q;
        cc += c * c;
      }
      score = emulated::add_block(score, product);
    }
    const double bound =
        als::tensor_error(dim, std::sqrt(qq), std::sqrt(qq), 0.0).radius * std::sqrt(cc);
    ASSERT_LE(std::fabs(score - exact), bound) << dim;
    worst = std::max(worst, std::fabs(score - exact) / bound);
  }
  EXPECT_GE(worst, 0.05);
}

TEST(TensorError, BoundsTheSumsOfMma) { expect_bounded_sums<8>(); }
TEST(TensorError, BoundsTheSumsOfWgmma) { expect_bounded_sums<16>(); }

// ---- results ----

TEST_P(KnnKernels, EveryWidthAndMetric) {
  int turn = 0;
  for (int64_t dim : {1, 2, 3, 7, 16, 17, 127, 128, 129, 768}) {
    const KnnMetric metric = kMetrics[turn % 3];
    Problem<float> p = gaussian(3, 290 + turn, dim, 5, metric, turn % 2 ? 1e3 : 0.0);
    p.exclude_self = turn % 2 == 1;
    std::copy_n(p.database.begin(), 4 * p.dim, p.database.begin() + 200 * p.dim);  // ties
    std::fill_n(p.database.begin() + 7 * p.dim, p.dim, 0.0f);
    const Outcome bf16 = compare(p, {3, 1 + turn % 3, kNever});
    EXPECT_EQ(bf16.wrong, 0) << dim;
    EXPECT_EQ(bf16.rescored, 0) << dim;
    const Outcome rescored = compare(p, {2, 2, 0});
    EXPECT_EQ(rescored.wrong, 0) << dim;
    EXPECT_EQ(rescored.rescored, p.queries) << dim;
    ++turn;
  }
}

TEST_P(KnnKernels, ManyQueriesOfWhichSomeAreRescored) {  // two query tiles in a span
  Problem<float> p = gaussian(260, 300, 12, 3, KnnMetric::kL2);
  // Rows 100 to 299 are clusters far away and too tight for bf16. Every third query is in one.
  for (int64_t i = 100 * p.dim; i < 300 * p.dim; ++i) {
    p.database[i] = static_cast<float>(i / p.dim % 2 ? 50.0 : -50.0) + 1e-3f * p.database[i];
  }
  for (int64_t q = 0; q < p.queries; q += 3) {
    std::copy_n(p.database.begin() + (100 + q % 150) * p.dim, p.dim, p.query.begin() + q * p.dim);
  }
  for (int64_t j = 0; j < p.dim; ++j) p.database[j] = 40.0f;  // keeps the frame off the clusters
  const Outcome outcome = compare(p, {3, 2, 8});
  EXPECT_EQ(outcome.wrong, 0);
  EXPECT_GT(outcome.rescored, 0);
  EXPECT_LT(outcome.rescored, p.queries);
}

TEST_P(KnnKernels, TheBoundCoversWhatRoundingTakesFromTheDatabase) {
  // Row 40 is the best for (1, 1), by 2^-10; in bf16 it is (1, 1) and row 3 beats it by 2^-7. The
  // query is exact in bf16, and -y stands with every y: the mean is 0.
  Problem<float> p{2, 128, 2, 1, KnnMetric::kIp, false, {1.0f, 1.0f, -1.0f, -1.0f}, {}};
  p.database.assign(p.rows * p.dim, 0.0f);
  const auto put = [&p](int64_t row, float x, float y) {
    p.database[2 * row] = x, p.database[2 * row + 1] = y;
    p.database[2 * (row + 64)] = -x, p.database[2 * (row + 64) + 1] = -y;
  };
  put(40, 1.0f + 0x3p-10f, 1.0f + 0x3p-10f);
  put(3, 1.0f + 0x5p-10f, 1.0f);
  EXPECT_EQ(nearest(p)[0].index, 40);
  const Outcome outcome = compare(p, {1, 1, kNever});
  EXPECT_EQ(outcome.wrong, 0);
  EXPECT_EQ(outcome.rescored, 0);
}

TEST_P(KnnKernels, OtherTypes) {
  for (auto metric : {KnnMetric::kL2, KnnMetric::kCosine}) {
    EXPECT_EQ(compare(gaussian<double>(3, 200, 20, 4, metric, 1e6)).wrong, 0);
    EXPECT_EQ(compare(gaussian<__half>(3, 200, 20, 4, metric)).wrong, 0);
    EXPECT_EQ(compare(gaussian<__nv_bfloat16>(3, 200, 20, 4, metric, 8.0)).wrong, 0);  // ties
  }
}

TEST_P(KnnKernels, FewerGroupsThanNeighboursMeansEveryRow) {
  EXPECT_EQ(compare(gaussian(2, 130, 3, 100, KnnMetric::kL2)).wrong, 0);
}

TEST_P(KnnKernels, QueriesWithoutScoresMeasureEveryRow) {
  Problem<float> p = gaussian(3, 140, 5, 4, KnnMetric::kCosine);
  std::fill_n(p.query.begin(), p.dim, 0.0f);
  p.query[p.dim] = kNan;
  for (int64_t row = 3; row < 140; row += 2) p.database[row * p.dim] = row % 3 ? kNan : kInf;
  EXPECT_EQ(compare(p, {2, 2, 0}).wrong, 0);
}

TEST_P(KnnKernels, RowsThatAreNotFiniteComeWhenTheOthersAreUsedUp) {  // 24 groups, 4 finite rows
  Problem<float> p = gaussian(2, 300, 3, 10, KnnMetric::kL2);
  for (int64_t row = 0; row < 300; ++row) {
    if (row % 80 != 5) p.database[row * p.dim + row % 3] = row % 2 ? kNan : kInf;
  }
  EXPECT_EQ(compare(p, {3, 3, kNever}).wrong, 0);
  EXPECT_EQ(compare(p, {3, 3, 0}).wrong, 0);
}

TEST_P(KnnKernels, AllRowsEqualGoByIndexAndWithoutSelf) {
  Problem<float> p{3, 300, 4, 5, KnnMetric::kL2, false, std::vector<float>(12, 2.5f), {}};
  p.database.assign(300 * 4, 2.5f);
  EXPECT_EQ(compare(p, {3, 2}).wrong, 0);
  p.queries = p.rows = 40;
  p.query.assign(160, 2.5f);
  p.database = p.query;
  p.exclude_self = true;
  p.k = 2;
  EXPECT_EQ(compare(p, {1, 1}).wrong, 0);
}

// ---- a database in parts ----

constexpr Plan parts_of(int64_t rows, int budget = -1) { return {2, 2, budget, true, rows}; }

TEST_P(KnnKernels, PartsOfADatabaseContinueTheLists) {
  int turn = 0;
  for (int64_t part : {100, 128, 130, 299}) {
    Problem<float> p = gaussian(3, 300, 7, 9, kMetrics[turn % 3], 5.0);
    std::copy_n(p.database.begin(), 40 * p.dim, p.database.begin() + 200 * p.dim);  // ties
    std::fill_n(p.database.begin() + 150 * p.dim, p.dim, 0.0f);
    for (int64_t row : {0, 4, 180, 299}) p.database[row * p.dim + 2] = row % 2 ? kNan : kInf;
    EXPECT_EQ(compare(p, parts_of(part, turn % 2 ? 0 : kNever)).wrong, 0) << part;
    EXPECT_EQ(compare(p, parts_of(part)).wrong, 0) << part;
    ++turn;
  }
}

TEST_P(KnnKernels, PartsWithFewerRowsThanNeighbours) {
  Problem<float> p = gaussian(3, 290, 3, 130, KnnMetric::kL2);
  for (int64_t row = 0; row < 290; row += 3) p.database[row * p.dim] = kNan;  // needed at the end
  EXPECT_EQ(compare(p, parts_of(60)).wrong, 0);
  p.k = 290;
  EXPECT_EQ(compare(p, parts_of(130)).wrong, 0);
}

TEST_P(KnnKernels, PartsLeaveOutTheQueryItself) {
  Problem<float> p = gaussian(24, 24, 4, 9, KnnMetric::kL2);
  std::copy_n(p.database.begin(), 12 * p.dim, p.database.begin() + 12 * p.dim);  // twins
  p.query = p.database;
  p.exclude_self = true;
  for (auto [k, part] : {std::pair{1, 8}, {9, 5}, {9, 9}, {9, 10}, {23, 12}, {23, 23}}) {
    p.k = k;
    EXPECT_EQ(compare(p, parts_of(part)).wrong, 0) << k << ' ' << part;
  }
}

TEST_P(KnnKernels, PartsOfASortedDatabase) {  // every part is nearer than those before, or none is
  for (bool nearer : {false, true}) {
    Problem<float> p = gaussian(2, 600, 2, 12, KnnMetric::kL2);
    for (int64_t row = 0; row < p.rows; ++row) {
      const auto far = static_cast<float>(nearer ? p.rows - row : row);
      p.database[2 * row] = far, p.database[2 * row + 1] = 0.5f * far;
    }
    EXPECT_EQ(compare(p, parts_of(256)).wrong, 0);
    EXPECT_EQ(compare(p, parts_of(256, 0)).wrong, 0);
  }
}

TEST(KnnSelect, ListsOverflowAndAreCut) {  // more rows and groups tie than a list holds
  Problem<float> p{2, 9000, 1, 300, KnnMetric::kL2, false, {0.25f, 1.0f}, {}};
  p.database.assign(p.rows, 0.25f);
  for (int64_t row = 0; row < p.rows; row += 3) p.database[row] = 0.5f;
  EXPECT_EQ(compare(p, {80, 8, kNever}).wrong, 0);
}

TEST(KnnSelect, TheBestGroupOfAQueryMayHoldOnlyTheQuery) {
  Problem<float> p = gaussian(128, 128, 4, 3, KnnMetric::kL2);
  p.query = p.database;
  p.exclude_self = true;
  EXPECT_EQ(compare(p, {1, 1, kNever}).wrong, 0);
}

TEST(KnnSelect, TheMostNeighbours) {  // fewer than groups, or nearly as many as rows
  EXPECT_EQ(compare(gaussian(1, 33100, 1, 2048, KnnMetric::kL2), {260, 32, kNever}).wrong, 0);
  Problem<float> p = gaussian(2, 2049, 3, 2048, KnnMetric::kCosine);
  EXPECT_EQ(compare(p).wrong, 0);
  p.k = 2047;
  EXPECT_EQ(compare(p).wrong, 0);
}

TEST_P(KnnKernels, WithoutTheBoundTightClustersComeOutWrong) {  // so the tests above can fail
  Problem<float> p = gaussian(4, 300, 10, 5, KnnMetric::kL2);
  for (int64_t i = 0; i < 300 * 10; ++i) {
    p.database[i] = static_cast<float>(i / 10 % 2) * 100.0f + 1e-4f * p.database[i];
  }
  std::copy_n(p.database.begin(), 40, p.query.begin());
  EXPECT_EQ(compare(p, {3, 3, kNever}).wrong, 0);
  EXPECT_EQ(compare(p, {3, 3, 0}).wrong, 0);
  Plan fast{3, 3, 0};
  fast.exact = false;
  EXPECT_GT(compare(p, fast).wrong, 0);
}

}  // namespace
