// The parts of knn_select: bounds in float32, sums of rows as they lie, k-th largest, order.
#include <gtest/gtest.h>

#include <cfenv>

// clang-format off: the emulation comes before the kernels
#include "emulate_cuda.h"
#include "emulate_mma.h"
#include "emulate_wgmma.h"
#include "knn/knn_kernels.cuh"
#include "knn_problem.h"
// clang-format on

namespace {

using namespace knn_problem;
using als::KnnBound;
using als::KnnQuick;

// ---- rounding ----

TEST(DirectedRounding, IsThatOfTheProcessor) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> mantissa(-2.0f, 2.0f);
  std::uniform_int_distribution<int> exponent(-100, 60);
  const auto number = [&] { return std::ldexp(mantissa(random), exponent(random)); };
  std::fesetround(FE_UPWARD);
  for (int i = 0; i < 20000; ++i) {
    volatile float a = number(), b = number(), c = i % 2 ? number() : -a * b;
    ASSERT_EQ(__fmaf_ru(a, b, c), std::fma(a, b, c)) << a << ' ' << b << ' ' << c;
    volatile float sum = a + c;
    ASSERT_EQ(__fadd_ru(a, c), sum);
    volatile float root = std::sqrt(std::fabs(a));
    ASSERT_EQ(__fsqrt_ru(std::fabs(a)), root);
  }
  std::fesetround(FE_TONEAREST);
  EXPECT_EQ(__fadd_rd(1.0f, -1e-30f), std::nextafter(1.0f, 0.0f));
  EXPECT_EQ(__fadd_ru(kInf, 1.0f), kInf);
  EXPECT_TRUE(std::isnan(__fmaf_ru(0.0f, kInf, 1.0f)));
}

TEST(KnnBound, CoversTheFloat64Formula) {
  std::mt19937 random(2);
  std::lognormal_distribution<double> number(0.0, 9.0);
  for (int i = 0; i < 5000; ++i) {
    const double radius = 1e-3 * number(random), spread = number(random), square = 1e-7;
    const double offset = i % 3 ? 0.0 : number(random);
    const auto norm = static_cast<float>(number(random));
    const auto residual = static_cast<float>(1e-3 * number(random));
    const auto score = static_cast<float>(i % 2 ? -number(random) : number(random));
    const KnnBound bound = KnnBound::of_packed(radius, spread, square, offset);
    const double error = radius * norm + spread * residual +
                         square * (0.5 * static_cast<double>(norm) * norm + offset);
    const float e = bound.error(score, norm, residual);
    ASSERT_GE(e, error);
    ASSERT_LE(e, error * (1.0 + 1e-6));
    ASSERT_GE(bound.highest(score, e), score + error);
    ASSERT_LE(bound.lowest(score, e), score - error);
  }
  // No row: never in front, and passes only where everything does.
  const KnnBound bound = KnnBound::of_packed(1.0, 1.0, 1e-7, 0.0);
  const float e = bound.error(-kInf, 1.0f, 0.0f);
  EXPECT_FALSE(bound.lowest(-kInf, e) >= -kInf);
  EXPECT_FALSE(bound.highest(-kInf, e) >= -kInf);
}

// ---- rows as they lie ----

// The largest share of its bound that an error takes, over rows of every alignment.
template <typename T, bool kProduct>
double worst_quick_error(KnnMetric metric, int64_t dim, double scale, int64_t skip) {
  constexpr int kQueries = 2, kRows = 2;
  Problem<T> p = gaussian<T>(kQueries, 40, dim, 1, metric);
  std::vector<T> query(skip), database(skip);  // nothing begins where the allocation does
  for (T x : p.query) query.push_back(convert<T>(scale * als::KnnRows<T>::widen(x)));
  for (T y : p.database) database.push_back(convert<T>(scale * als::KnnRows<T>::widen(y)));
  for (int64_t j = 0; j < dim; ++j) {  // near rows cancel
    const double near = als::KnnRows<T>::widen(query[skip + j]) * (1.0 + 0.01 * (j % 3));
    database[skip + 3 * dim + j] = convert<T>(near);
  }
  const als::KnnRows<T> x{query.data() + skip, kQueries, dim, metric};
  const als::KnnRows<T> y{database.data() + skip, 40, dim, metric};
  double worst = 0.0;
  for (int64_t row = 0; row < 32; ++row) {
    float a[kQueries][kRows], b[kRows];
    emulated::launch(1, 32, [&] {
      const int lane = threadIdx.x % als::kKnnLanes;
      const T* const left[kQueries] = {x.data, x.data + dim};
      const T* const right[kRows] = {y.data + row * dim, y.data + (row + 8) * dim};
      als::KnnQuickSums<kQueries, kRows, kProduct> sums{};
      if (als::rows_are_aligned(x, y)) {
        sums.template add_part<true>(left, right, dim, lane);
      } else {
        sums.template add_part<false>(left, right, dim, lane);
      }
      als::add_and_scatter(sums.a, lane);  // four sums: two lanes each
      als::add_and_scatter(sums.b, lane);
      a[lane / 2 / kRows][lane / 2 % kRows] = sums.a[0];
      b[lane / 4] = sums.b[0];
    });
    for (int i = 0; i < kQueries; ++i) {
      for (int r = 0; r < kRows; ++r) {
        double xx = 0.0, xy = 0.0, yy = 0.0, difference = 0.0;
        for (int64_t j = 0; j < dim; ++j) {
          const double u = x.at(i, j), v = y.at(row + 8 * r, j);
          xx += u * u, xy += u * v, yy += v * v, difference += (u - v) * (u - v);
        }
        const double exact = metric == KnnMetric::kL2   ? -difference
                             : metric == KnnMetric::kIp ? xy
                                                        : xy / std::sqrt(xx * yy);
        const KnnQuick quick = KnnQuick::of(metric, dim, xx);
        const float norm = kProduct ? als::quick_norm(b[r]) : 0.0f;
        EXPECT_GE(norm, kProduct ? std::sqrt(yy) : 0.0);
        const float score = quick.score(metric, a[i][r], kProduct ? b[r] : 0.0f);
        const float error = KnnBound::of_quick(quick).error(score, norm, 0.0f);
        EXPECT_LE(std::fabs(score - exact), error) << dim << ' ' << row << ' ' << i << ' ' << r;
        worst = std::max(worst, std::fabs(score - exact) / error);
      }
    }
  }
  return worst;
}

TEST(KnnQuick, ScoresAreWithinTheirBoundAtEveryAlignment) {
  double worst = 0.0;
  for (int64_t dim : {1, 2, 3, 5, 8, 15, 16, 17, 31, 50, 64, 127, 300}) {
    for (double scale : {1.0, 1e6, 1e-6}) {
      const int64_t skip = dim % 5;
      worst = std::max({worst, worst_quick_error<float, false>(KnnMetric::kL2, dim, scale, skip),
                        worst_quick_error<float, true>(KnnMetric::kIp, dim, scale, skip),
                        worst_quick_error<float, true>(KnnMetric::kCosine, dim, scale, skip)});
    }
    worst_quick_error<__nv_bfloat16, false>(KnnMetric::kL2, dim, 1.0, dim % 7);
    worst_quick_error<__half, true>(KnnMetric::kCosine, dim, 1.0, dim % 9);
  }
  EXPECT_GE(worst, 0.02);  // a bound far from what happens would measure far too much
}

TEST(KnnQuick, SaysNothingWhereFloat32CannotHold) {
  const KnnQuick l2 = KnnQuick::of(KnnMetric::kL2, 4, 1.0);
  EXPECT_TRUE(std::isnan(l2.score(KnnMetric::kL2, kInf, 0.0f)));
  EXPECT_TRUE(std::isnan(l2.score(KnnMetric::kL2, kNan, 0.0f)));
  const KnnQuick cosine = KnnQuick::of(KnnMetric::kCosine, 4, 1.0);
  for (float b : {0.0f, 1e-30f, 1e37f, kInf, kNan}) {
    EXPECT_TRUE(std::isnan(cosine.score(KnnMetric::kCosine, 0.5f, b))) << b;
  }
  EXPECT_EQ(cosine.score(KnnMetric::kCosine, 0.5f, 1.0f), 0.5f);
  for (double square : {0.0, 1e-30, 1e40, static_cast<double>(kNan)}) {
    const KnnQuick bad = KnnQuick::of(KnnMetric::kCosine, 4, square);
    EXPECT_TRUE(std::isnan(bad.score(KnnMetric::kCosine, 0.5f, 1.0f))) << square;
  }
  EXPECT_EQ(KnnQuick::of(KnnMetric::kL2, int64_t{1} << 40, 1.0).constant, INFINITY);
}

// ---- k-th largest, order, groups ----

TEST(KthLargest, IsExact) {
  constexpr int kThreads = 128;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> few(-2, 2);
  for (int n : {512, 1024, 4096}) {
    for (int kind = 0; kind < 3; ++kind) {
      std::vector<float> value(n);
      for (float& v : value) v = kind == 0 ? normal(random) : static_cast<float>(few(random));
      if (kind == 2) std::fill(value.begin() + 7, value.end(), -kInf);
      std::vector<float> sorted = value;
      std::sort(sorted.rbegin(), sorted.rend());
      for (int k : {1, 2, 8, 200, n}) {
        float found = kNan;
        als::KnnRadix radix;
        emulated::launch(1, kThreads, [&] {
          const float mine = als::kth_largest<kThreads>(value.data(), n, k, radix);
          if (threadIdx.x == 77) found = mine;
        });
        ASSERT_EQ(found, sorted[k - 1]) << n << ' ' << kind << ' ' << k;
      }
    }
  }
}

TEST(SortEntries, AscendingByKeyThenIndex) {
  constexpr int kThreads = 128;
  std::mt19937 random(4);
  for (int n : {2, 64, 1024}) {
    std::vector<uint32_t> keys(n);
    std::vector<int64_t> rows(n);
    std::vector<Neighbour> want;
    for (int i = 0; i < n; ++i) {
      keys[i] = random() % 50;
      rows[i] = static_cast<int64_t>(random()) << 20;
      want.push_back({keys[i], rows[i]});
    }
    std::sort(want.begin(), want.end());
    emulated::launch(1, kThreads,
                     [&] { als::sort_entries<kThreads>(keys.data(), rows.data(), n); });
    for (int i = 0; i < n; ++i) {
      ASSERT_EQ(keys[i], want[i].key);
      ASSERT_EQ(rows[i], want[i].index);
    }
  }
}

TEST(KnnGrouping, EveryRowHasOnePlace) {
  for (auto [row_bits, stride_bits] : {std::pair{4, 0}, {4, 4}, {6, 4}}) {
    const als::KnnGrouping grouping{64, row_bits, stride_bits};
    std::vector<int> seen(64 << row_bits);
    for (int64_t g = 0; g < 64; ++g) {
      for (int64_t i = 0; i < int64_t{1} << row_bits; ++i) ++seen.at(grouping.row(g, i));
    }
    EXPECT_EQ(seen, std::vector<int>(64 << row_bits, 1));
  }
}

TEST(KnnSelectSizes, HaveRoomForWhatIsPutThere) {
  for (int threads : {128, 512}) {
    for (int64_t k = 1; k <= als::kKnnMaxK; ++k) {
      const als::KnnSelectSizes sizes = als::KnnSelectSizes::of(k, threads);
      ASSERT_GE(sizes.capacity, k + als::kKnnRound);
      ASSERT_LE(sizes.bins * 4, sizes.bytes());
      ASSERT_GE(sizes.bins, 2 * (k + 1));
      ASSERT_EQ(sizes.bins % (4 * threads), 0);
      ASSERT_EQ(sizes.capacity & (sizes.capacity - 1), 0);
    }
  }
}

}  // namespace
