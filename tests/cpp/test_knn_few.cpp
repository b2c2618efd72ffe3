// Few queries, or few rows: knn_few and knn_select on the CPU.
#include <gtest/gtest.h>

// clang-format off: the emulation comes before the kernels
#include "emulate_cuda.h"
#include "emulate_mma.h"
#include "emulate_wgmma.h"
#include "knn/knn_kernels.cuh"
#include "knn/knn_few_plan.h"
#include "knn_problem.h"
// clang-format on

namespace {

using namespace knn_problem;
using als::KnnFewPlan;

template <typename T>
KnnFewPlan plan_of(const Problem<T>& p) {
  return KnnFewPlan::of(p.queries, p.rows, p.dim, p.dim * sizeof(T), p.k);
}

// The launches of knn_cuda.cu. `skip`: elements in front of both inputs, so that nothing is
// aligned.
template <int kThreads, typename T>
std::vector<Neighbour> search(const Problem<T>& p, const KnnFewPlan& plan, int64_t skip = 0) {
  using namespace als;
  std::vector<T> query(skip), database(skip);
  query.insert(query.end(), p.query.begin(), p.query.end());
  database.insert(database.end(), p.database.begin(), p.database.end());
  const KnnRows<T> x{query.data() + skip, p.queries, p.dim, p.metric};
  const KnnRows<T> y{database.data() + skip, p.rows, p.dim, p.metric};
  const bool ip = p.metric == KnnMetric::kIp;
  Memory<float> group_max(p.queries * plan.grouping.count), group_norm(plan.grouping.count);
  const KnnFewParams<T> few{x, y, plan.grouping, group_max.get(), group_norm.get()};
  emulated::launch(static_cast<unsigned>(plan.blocks(p.queries)), kKnnFewThreads, [&] {
    p.metric == KnnMetric::kL2 ? knn_few<T, false>(few) : knn_few<T, true>(few);
  });
  const float* norm = ip ? group_norm.get() : nullptr;
  const KnnSelectSizes sizes = KnnSelectSizes::of(p.k, kThreads);
  std::vector<float> distance(p.queries * p.k);
  std::vector<int64_t> index(p.queries * p.k);
  const KnnSelectParams<T> select{
      x,           y,    0,       p.k,     p.exclude_self, plan.grouping, sizes, group_max.get(),
      norm,        norm, nullptr, nullptr, INT32_MAX,      false,         {},    distance.data(),
      index.data()};
  emulated::launch(
      static_cast<unsigned>(p.queries), kThreads, [&] { knn_select<T, kThreads>(select); },
      sizes.bytes());
  std::vector<Neighbour> found;
  for (size_t i = 0; i < index.size(); ++i) {
    found.push_back({distance_key(distance[i]), index[i]});
  }
  return found;
}

// Blocks smaller than those of knn_cuda.cu where nothing else is said: fibers are slow.
template <int kThreads = als::kKnnSelectThreads, typename T>
int64_t wrong(const Problem<T>& p, const KnnFewPlan& plan, int64_t skip = 0) {
  const auto found = search<kThreads>(p, plan, skip);
  const auto want = nearest(p);
  int64_t count = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    count += found[i].key != want[i].key || found[i].index != want[i].index;
  }
  return count;
}

template <int kThreads = als::kKnnSelectThreads, typename T>
int64_t wrong(const Problem<T>& p, int64_t skip = 0) {
  return wrong<kThreads>(p, plan_of(p), skip);
}

// Groups of 2^row_bits rows.
KnnFewPlan groups_of(int row_bits, int64_t rows) {
  return {{als::kKnnFewGroups * ceil_div(rows, int64_t{als::kKnnFewGroups} << row_bits), row_bits,
           als::kKnnFewStrideBits},
          true};
}

// ---- the plan ----

TEST(KnnFewPlan, ServesFewQueriesOrLittleWork) {
  const auto serves = [](int64_t queries, int64_t rows, int64_t dim, int64_t k = 10) {
    return KnnFewPlan::of(queries, rows, dim, 4 * dim, k).serves;
  };
  EXPECT_TRUE(serves(1, 10'000'000, 128));
  EXPECT_TRUE(serves(16, 100'000, 128, 2048));
  EXPECT_FALSE(serves(17, 100'000, 128));
  EXPECT_TRUE(serves(300, 1000, 128));
  EXPECT_FALSE(serves(30'000'000, 2, 1));  // the maxima would take too much memory
  als::small_input_paths() = false;
  EXPECT_FALSE(serves(1, 1000, 128));
  als::small_input_paths() = true;
}

TEST(KnnFewPlan, KeepsTheMemoryPromiseAndHasAPlaceForEveryRow) {
  for (int64_t queries : {1, 7, 16}) {
    for (int64_t rows : {int64_t{1}, int64_t{5000}, int64_t{1} << 24, int64_t{1} << 36}) {
      for (int64_t dim : {1, 128, 4000}) {
        for (int64_t k : {1, 100, 2048}) {
          const KnnFewPlan plan = KnnFewPlan::of(queries, rows, dim, 2 * dim, k);
          ASSERT_TRUE(plan.serves);
          ASSERT_LE(plan.bytes(queries), int64_t{64} << 20);
          ASSERT_GE(plan.grouping.count << plan.grouping.row_bits, rows);
          ASSERT_LE(plan.grouping.row_bits, 21);  // pairs of rows of 512 groups count in an int
          ASSERT_LT(plan.blocks(queries), int64_t{1} << 31);
        }
      }
    }
  }
}

TEST(KnnFewPlan, GroupsGrowWithTheDatabase) {
  const auto rows = [](int64_t database, int64_t dim, int64_t k) {
    return 1 << KnnFewPlan::of(1, database, dim, 4 * dim, k).grouping.row_bits;
  };
  EXPECT_EQ(rows(100'000, 128, 10), 16);
  EXPECT_EQ(rows(10'000'000, 128, 10), 128);
  EXPECT_EQ(rows(10'000'000, 128, 2048), 16);
}

// ---- results ----

TEST(KnnFew, EveryWidthMetricAndAlignment) {
  int turn = 0;
  for (int64_t dim : {1, 2, 3, 7, 8, 16, 17, 50, 127, 128, 129, 768}) {
    Problem<float> p =
        gaussian(1 + turn % 6, 290 + turn, dim, 5, kMetrics[turn % 3], turn % 2 ? 1e3 : 0.0);
    p.exclude_self = turn % 2 == 1;
    std::copy_n(p.database.begin(), 4 * p.dim, p.database.begin() + 200 * p.dim);  // ties
    std::fill_n(p.database.begin() + 7 * p.dim, p.dim, 0.0f);
    EXPECT_EQ(wrong<als::kKnnSelectFewThreads>(p, turn % 4), 0) << dim;
    ++turn;
  }
}

TEST(KnnFew, GroupsOfEverySize) {
  for (KnnMetric metric : kMetrics) {
    for (int row_bits : {4, 5, 7}) {
      for (int64_t rows : {1, 16, 257, 700}) {
        Problem<float> p = gaussian(3, rows, 6, std::min<int64_t>(rows, 9), metric);
        EXPECT_EQ(wrong(p, groups_of(row_bits, rows)), 0) << row_bits << ' ' << rows;
      }
    }
  }
}

TEST(KnnFew, GroupsWithoutRowsStandForNone) {  // 15 of the second block; row 0 is the nearest
  for (KnnMetric metric : kMetrics) {
    Problem<float> p = gaussian(1, 257, 6, 9, metric);
    const float length = metric == KnnMetric::kL2 ? 1.0f : 5.0f;
    for (int64_t j = 0; j < p.dim; ++j) p.database[j] = length * p.query[j];
    EXPECT_EQ(nearest(p)[0].index, 0);
    EXPECT_EQ(wrong(p, groups_of(4, p.rows)), 0);
  }
}

TEST(KnnFew, MoreQueriesThanABlockTakes) {
  for (int64_t queries : {4, 5, 15, 16, 17, 33}) {
    Problem<float> p = gaussian(queries, 300, 12, 3, kMetrics[queries % 3]);
    EXPECT_EQ(wrong(p), 0) << queries;
  }
}

TEST(KnnFew, OtherTypes) {
  for (KnnMetric metric : kMetrics) {
    for (int64_t dim : {20, 24, 33}) {
      EXPECT_EQ(wrong(gaussian<double>(2, 200, dim, 4, metric, 1e6)), 0);
      EXPECT_EQ(wrong(gaussian<__half>(5, 300, dim, 4, metric), dim % 8), 0);
      EXPECT_EQ(wrong(gaussian<__nv_bfloat16>(5, 300, dim, 4, metric, 8.0), dim % 8), 0);  // ties
    }
  }
}

TEST(KnnFew, RowsThatHurt) {
  for (KnnMetric metric : kMetrics) {
    Problem<float> p = gaussian(5, 400, 6, 60, metric);
    std::fill_n(p.query.begin(), p.dim, 0.0f);
    p.query[p.dim] = kNan;
    std::fill_n(p.query.begin() + 2 * p.dim, p.dim, 3e38f);
    std::fill_n(p.query.begin() + 3 * p.dim, p.dim, 1e-30f);
    for (int64_t row = 0; row < p.rows; ++row) {
      float* y = p.database.data() + row * p.dim;
      if (row % 10 == 0) std::fill_n(y, p.dim, 0.0f);
      if (row % 10 == 1) y[row % 6] = row % 20 == 1 ? kNan : kInf;
      const float scale = row % 10 == 2   ? 1e-25f
                          : row % 10 == 3 ? 1e25f
                          : row % 10 == 4 ? 5e37f
                                          : 1;
      for (int64_t j = 0; j < p.dim; ++j) y[j] *= scale;
    }
    for (int64_t k : {8, 60, 400}) {  // some groups, all groups, all rows
      p.k = k;
      EXPECT_EQ(wrong(p, groups_of(4, p.rows)), 0) << k;
    }
  }
}

TEST(KnnFew, FarBeyondFloat32) {  // |x|, and in the end |y|^2 too, which float32 then knows as 0
  Problem<double> p = gaussian<double>(1, 20'000, 4, 5, KnnMetric::kIp);
  for (double& x : p.query) x *= 1e50;
  for (double& y : p.database) y *= 1e-50;
  EXPECT_EQ(wrong(p, groups_of(4, p.rows)), 0);
  p.query[3] = 0.0;
  for (int64_t row = 0; row < p.rows; ++row) p.database[row * p.dim + 3] = 1e25;
  EXPECT_EQ(wrong(p, groups_of(4, p.rows)), 0);
}

TEST(KnnFew, FarFewerFiniteRowsThanNeighbours) {
  Problem<float> p = gaussian(2, 600, 3, 10, KnnMetric::kL2);
  for (int64_t row = 0; row < p.rows; ++row) {
    if (row % 150 != 5) p.database[row * p.dim + row % 3] = row % 2 ? kNan : kInf;
  }
  EXPECT_EQ(wrong(p, groups_of(4, p.rows)), 0);
}

TEST(KnnFew, TightClustersFarFromTheOriginAndSortedRows) {
  for (bool nearer : {false, true}) {
    Problem<float> p = gaussian(3, 1500, 4, 12, KnnMetric::kL2);
    for (int64_t row = 0; row < p.rows; ++row) {  // each is nearer than those before, or none is
      const auto far = static_cast<float>(nearer ? p.rows - row : row);
      for (int64_t j = 0; j < p.dim; ++j) {
        p.database[row * p.dim + j] = 1e4f + far * 0.0078125f * static_cast<float>(j + 1);
      }
    }
    std::fill(p.query.begin(), p.query.end(), 1e4f);
    EXPECT_EQ(wrong(p), 0);
    p.metric = KnnMetric::kCosine;  // all at nearly the same angle: float32 tells none apart
    EXPECT_EQ(wrong(p), 0);
  }
}

TEST(KnnFew, TiesGoByIndexAndSelfIsLeftOut) {
  for (KnnMetric metric : kMetrics) {
    Problem<float> p = gaussian(18, 18, 4, 7, metric);
    std::copy_n(p.database.begin(), 9 * p.dim, p.database.begin() + 9 * p.dim);  // twins
    p.query = p.database;
    p.exclude_self = true;
    EXPECT_EQ(wrong(p), 0);
    Problem<float> single = gaussian(18, 18, 4, 5, metric);
    single.query = single.database;
    single.exclude_self = true;
    EXPECT_EQ(wrong(single), 0);
    p.query.assign(p.query.size(), 2.5f);
    p.database = p.query;
    p.k = 17;
    EXPECT_EQ(wrong(p), 0);
  }
}

TEST(KnnFew, ListsOverflowAndAreCut) {  // more rows and groups tie than a list holds
  Problem<float> p{1, 20'000, 1, 300, KnnMetric::kL2, false, {0.25f}, {}};
  p.database.assign(p.rows, 0.25f);
  for (int64_t row = 0; row < p.rows; row += 3) p.database[row] = 0.5f;
  EXPECT_EQ(wrong(p, groups_of(4, p.rows)), 0);
}

TEST(KnnFew, TheMostNeighbours) {
  constexpr int kThreads = als::kKnnSelectFewThreads;
  EXPECT_EQ(wrong<kThreads>(gaussian(1, 33'000, 1, 2048, KnnMetric::kIp)), 0);
  Problem<float> p = gaussian(2, 2048, 3, 2047, KnnMetric::kL2);
  p.exclude_self = true;
  EXPECT_EQ(wrong<kThreads>(p), 0);
}

TEST(KnnFew, DistancesCloserThanFloat32SumsAreWrong) {
  // The five nearest rows are one number 2000 times: every addition to a lane's sum of 250 rounds
  // up, by a third of a unit in the last place. The others have all of their length in one element,
  // so that their sums are right, and are a few units farther.
  Problem<float> p{1, 300, 2000, 5, KnnMetric::kL2, false, std::vector<float>(2000), {}};
  p.database.resize(p.rows * p.dim);
  for (int64_t row = 0; row < p.rows; ++row) {
    const auto y = p.database.begin() + row * p.dim;
    const double unit = 0x1p-23;
    if (row % 60 == 7) {
      std::fill_n(y, p.dim, static_cast<float>(1.0 + unit * static_cast<double>(40 + row / 60)));
    } else {
      const auto far = static_cast<double>(46 + row % 100);
      y[row % p.dim] = static_cast<float>(std::sqrt(2000.0) * (1.0 + unit * far));
    }
  }
  EXPECT_EQ(nearest(p)[0].index, 7);
  EXPECT_EQ(wrong(p), 0);
}

}  // namespace
