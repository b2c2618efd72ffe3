// What the CPU runs at each instruction set, against plain loops.
// sources: knn/knn_tile_*.cpp knn/knn_list.cpp knn/knn_order.cpp knn/knn_rows.cpp knn/knn_scan.cpp
// sources: knn/knn_sums.cpp
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "knn/knn_list.h"
#include "knn/knn_order.h"
#include "knn/knn_reach.h"
#include "knn/knn_rows.h"
#include "knn/knn_scan.h"
#include "knn/knn_sums.h"
#include "knn/knn_tile.h"

namespace {

using als::Neighbour;

constexpr float kInf = std::numeric_limits<float>::infinity();

// ---- the order of the sums ----

template <typename Term>
double lane_sum(int64_t dim, const Term& term) {
  double lane[als::kKnnLanes] = {};
  for (int64_t j = 0; j < dim; ++j) lane[j % als::kKnnLanes] += term(j);
  return als::combine_lanes(lane);
}

std::vector<als::CpuLevel> levels() {
  std::vector<als::CpuLevel> found;
  for (auto level : {als::CpuLevel::kBaseline, als::CpuLevel::kAvx2, als::CpuLevel::kAvx512}) {
    if (level <= als::best_cpu_level()) found.push_back(level);
  }
  return found;
}

template <typename T>
void compare_sums(als::CpuLevel level) {
  const auto sums = als::knn_sums<T>(level);
  std::mt19937 random(0);
  std::normal_distribution<double> normal;
  constexpr int kRows = 6;  // four at a time, then one by one
  for (int64_t dim : {1, 2, 7, 8, 9, 15, 16, 17, 128, 1025}) {
    std::vector<double> q(dim);
    std::vector<T> c(kRows * dim);
    for (double& x : q) x = normal(random);
    for (T& x : c) x = static_cast<T>(1e3 * normal(random));
    const T* rows[kRows];
    double scale[kRows], plain[kRows], scaled[kRows], product[kRows], square[kRows];
    for (int r = 0; r < kRows; ++r) {
      rows[r] = c.data() + r * dim;
      scale[r] = 0.3 + 0.1 * r;
    }
    sums.difference(q.data(), rows, kRows, dim, plain);
    sums.scaled_difference(q.data(), rows, scale, kRows, dim, scaled);
    sums.product(q.data(), rows, kRows, dim, product);
    sums.square(rows, kRows, dim, square);
    for (int r = 0; r < kRows; ++r) {
      const auto value = [&](int64_t j) { return static_cast<double>(rows[r][j]); };
      const auto difference = [&](double s) {
        return lane_sum(dim, [&](int64_t j) { return als::squared_difference(q[j], value(j), s); });
      };
      EXPECT_EQ(plain[r], difference(1.0));
      EXPECT_EQ(scaled[r], difference(scale[r]));
      EXPECT_EQ(product[r],
                lane_sum(dim, [&](int64_t j) { return als::unfused_mul(q[j], value(j)); }));
      EXPECT_EQ(square[r],
                lane_sum(dim, [&](int64_t j) { return als::unfused_mul(value(j), value(j)); }));
    }
  }
}

TEST(KnnSums, EveryLevelGivesTheSameBits) {
  for (auto level : levels()) {
    compare_sums<float>(level);
    compare_sums<double>(level);
  }
}

// ---- lists ----

TEST(KnnList, KthIsALowerBoundThatKEntriesReach) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  for (auto level : levels()) {
    const als::KnnListOps ops = als::knn_list_ops(level);
    for (int64_t n : {1, 15, 16, 17, 300}) {
      std::vector<float> score(n), error(n);
      std::vector<int32_t> scratch(n);
      for (int64_t e = 0; e < n; ++e) {
        score[e] = e % 3 == 0 && e > 0 ? score[e - 1] : 1e3f * normal(random);  // ties
        error[e] = e % 5 == 0 ? 3.4028235e38f : std::fabs(normal(random));
      }
      std::vector<double> exact(n);
      for (int64_t e = 0; e < n; ++e) exact[e] = static_cast<double>(score[e]) - error[e];
      std::sort(exact.rbegin(), exact.rend());
      for (int64_t k : {int64_t{1}, (n + 1) / 2, n}) {
        const double got = ops.kth(score.data(), error.data(), n, k, scratch.data());
        EXPECT_LE(got, exact[k - 1]);
        if (k < n) {
          EXPECT_GE(got, exact[k] - 1e-6 * std::fabs(exact[k])) << n << " " << k;
        }
      }
    }
  }
}

TEST(KnnList, KeepsInOrderWhatMayReachTheLimit) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (auto level : levels()) {
    for (int64_t n : {0, 1, 15, 16, 17, 31, 32, 33, 300}) {
      std::vector<float> score(n), error(n), want_score, want_error;
      std::vector<int64_t> index(n), want_index;
      for (int64_t e = 0; e < n; ++e) {
        score[e] = normal(random);
        error[e] = 0.25f;
        index[e] = (int64_t{1} << 40) + e;
        if (score[e] + error[e] >= 0.1f) {
          want_score.push_back(score[e]);
          want_error.push_back(error[e]);
          want_index.push_back(index[e]);
        }
      }
      const int64_t kept =
          als::knn_list_ops(level).keep(score.data(), error.data(), index.data(), n, 0.1f);
      score.resize(kept);
      error.resize(kept);
      index.resize(kept);
      EXPECT_EQ(score, want_score);
      EXPECT_EQ(error, want_error);
      EXPECT_EQ(index, want_index);
    }
  }
}

TEST(KnnList, SortsByKeyThenIndex) {
  std::mt19937 random(6);
  for (uint32_t keys : {1u, 7u, 70000u, 0xFFFFFFFFu}) {
    for (size_t n : {0u, 1u, 63u, 64u, 1000u}) {
      std::vector<Neighbour> list, scratch;
      for (size_t e = 0; e < n; ++e) {
        list.push_back({static_cast<uint32_t>(random() % keys), static_cast<int64_t>(random())});
      }
      auto want = list;
      std::sort(want.begin(), want.end());
      als::sort_neighbours(list, scratch);
      for (size_t e = 0; e < n; ++e) {
        EXPECT_EQ(list[e].key, want[e].key);
        EXPECT_EQ(list[e].index, want[e].index);
      }
    }
  }
}

// ---- float32 distances of a scan ----

TEST(KnnScan, IsWithinItsShareOfTheDistance) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (auto level : levels()) {
    for (int64_t dim : {1, 7, 8, 16, 17, 33, 128, 1000}) {
      for (float scale : {1e-30f, 1e-20f, 1.0f, 1e15f}) {
        constexpr int64_t kRows = 7;
        std::vector<float> q(4 * dim), c(kRows * dim), out(kRows * 4);
        for (float& x : q) x = scale * normal(random);
        for (float& x : c) x = scale * normal(random);
        for (int64_t j = 0; j < dim; ++j) c[j] = std::nextafter(q[j], kInf);  // near, cancelling
        als::knn_scan(level)(q.data(), c.data(), kRows, dim, out.data());
        for (int64_t r = 0; r < kRows; ++r) {
          for (int64_t i = 0; i < 4; ++i) {
            double exact = 0.0;
            for (int64_t j = 0; j < dim; ++j) {
              const double t = static_cast<double>(q[i * dim + j]) - c[r * dim + j];
              exact += t * t;
            }
            EXPECT_LE(std::fabs(out[r * 4 + i] - exact),
                      als::quick_share(dim) * exact + als::quick_flush(dim));
            EXPECT_LE(out[r * 4 + i], als::knn_scan_limit(static_cast<float>(exact), dim));
          }
        }
      }
    }
  }
  EXPECT_EQ(als::knn_scan_limit(kInf, 8), kInf);
  EXPECT_EQ(als::knn_scan_limit(3.3e38f, 8), kInf);
}

// ---- packing ----

TEST(KnnRows, Bf16RoundsToNearestEvenAndDropsSubnormals) {
  for (auto level : levels()) {
    const als::KnnRowOps<double> ops = als::knn_rows<double>(level);
    const double inputs[] = {1.0,       1.00390625, 1.01171875, -1.0 / 3, 1e-39,     0x1p-126,
                             -0x1p-127, 0.0,        255.0,      257.0,    1.9999999, 3.0};
    constexpr int64_t kDim = std::size(inputs) - 1;  // odd: the last unit is half full
    float units[(kDim + 1) / 2];
    const als::KnnPackedSquares squares = ops.pack_bf16(inputs, 1.0, kDim, units);
    uint16_t half[kDim + 1];
    memcpy(half, units, sizeof half);
    double packed = 0.0, residual = 0.0;
    const double want[] = {1.0, 1.0, 1.015625, -0x1.56p-2, 0.0, 0x1p-126,
                           0.0, 0.0, 255.0,    256.0,      2.0, 0.0};
    for (int64_t j = 0; j <= kDim; ++j) {
      const uint32_t bits = static_cast<uint32_t>(half[j]) << 16;
      float value;
      memcpy(&value, &bits, sizeof value);
      EXPECT_EQ(value, want[j]) << j;
      if (j == kDim) continue;
      packed += want[j] * want[j];
      residual += (inputs[j] - want[j]) * (inputs[j] - want[j]);
    }
    EXPECT_NEAR(squares.packed, packed, 1e-12 * packed);
    EXPECT_NEAR(squares.residual, residual, 1e-12 * residual);
  }
}

#if defined(__x86_64__)
// The kernel itself: every score it pushes, against float64.
TEST(Bf16Error, BoundsTheScoresOfTheInstruction) {
  if (!als::cpu_has_bf16()) GTEST_SKIP() << "no avx512_bf16";
  const als::KnnTileKernel& tile = als::knn_tile_bf16;
  const als::KnnRowOps<double> ops = als::knn_rows<double>(als::cpu_level());
  std::mt19937 random(8);
  std::normal_distribution<double> normal;
  double worst = 0.0;
  for (int64_t dim : {1, 2, 31, 128, 257, 600}) {
    for (int kind = 0; kind < 5; ++kind) {
      for (double scale :
           {1e-30, 1e-20, 1e-10, 1.0, 1e12, 1e24}) {  // of the queries; rows are <= 1
        const int64_t depth = (dim + 1) / 2, n = tile.columns, m = tile.rows;
        const auto value = [&](int64_t j) {
          switch (kind) {
            case 0:
              return normal(random);
            case 1:  // one sign, just above the middle between two bf16 numbers: errors add up
              return 1.0 + (2 * (j % 64) + 1) * 0x1p-8 + 0x1p-20;
            case 2:  // cancelling
              return (j % 2 ? 1.0 : -1.0) * (1.0 + 1e-3 * normal(random));
            case 3:  // from subnormal to large
              return std::ldexp(normal(random), -static_cast<int>(random() % 140));
            default:  // exact in bf16
              return static_cast<double>(static_cast<int>(random() % 512) - 256) / 256.0;
          }
        };
        std::vector<double> q(m * dim), c(n * dim);
        for (int64_t i = 0; i < m * dim; ++i) q[i] = scale * value(i % dim);
        for (int64_t i = 0; i < n * dim; ++i) c[i] = value(i % dim) / 2.0;
        std::vector<float> units(depth);
        const auto packed = [&](int64_t rows, const std::vector<double>& x, float* out,
                                std::vector<als::KnnPackedSquares>* squares) {
          for (int64_t r = 0; r < rows; ++r) {
            squares->push_back(ops.pack_bf16(x.data() + r * dim, 1.0, dim, units.data()));
            for (int64_t u = 0; u < depth; ++u) out[u * rows + r] = units[u];
          }
        };
        struct alignas(64) Line {
          float x[16];
        };
        std::vector<Line> query(m * depth / 16 + 2), database(n * depth / 16 + 2), scratch(m * 2);
        std::vector<Line> half(2);
        std::vector<als::KnnPackedSquares> qs, cs;
        packed(m, q, query[0].x, &qs);
        packed(n, c, database[0].x, &cs);
        double norm = 0.0, residual = 0.0;
        for (const auto& s : cs) {
          norm = std::max(norm, std::sqrt(s.packed));
          residual = std::max(residual, std::sqrt(s.residual));
        }
        const auto length = [&](const double* x) {
          double sum = 0.0;
          for (int64_t j = 0; j < dim; ++j) sum += x[j] * x[j];
          return std::sqrt(sum);
        };
        std::vector<double> radius(m), spread(m);
        for (int64_t i = 0; i < m; ++i) {
          const als::KnnBf16Error e =
              als::bf16_error(als::knn_tile_chain(depth, 2), length(q.data() + i * dim),
                              std::sqrt(qs[i].packed), std::sqrt(qs[i].residual));
          radius[i] = e.radius;
          spread[i] = e.spread;
        }
        const float norm_of = std::nextafter(static_cast<float>(norm), kInf);
        const float residual_of = std::nextafter(static_cast<float>(residual), kInf);
        std::vector<float> lower(m, -3.3e38f), r(m), s(m), score(m * 64), error(m * 64);
        for (int64_t i = 0; i < m; ++i) {
          r[i] = als::knn_coefficient(radius[i]);
          s[i] = als::knn_coefficient(spread[i]);
        }
        std::vector<int64_t> count(m, 0), self(m, -1), index(m * 64);
        const bool stop = false;
        als::KnnTileTask t{};
        t.depth = depth;
        const int32_t visit = 0;
        t.groups = t.end = 1;
        t.visits = &visit;
        t.query = query[0].x;
        t.database = database[0].x;
        t.half_norm = half[0].x;
        t.norm = &norm_of;
        t.residual = &residual_of;
        t.lower = lower.data();
        t.radius = r.data();
        t.spread = s.data();
        t.square = als::score_error(1).square;
        t.capacity = 64;
        t.count = count.data();
        t.self = self.data();
        t.entry_score = score.data();
        t.entry_error = error.data();
        t.entry_index = index.data();
        t.scratch = scratch[0].x;
        t.stop = &stop;
        EXPECT_EQ(tile.run(t), 1);
        for (int64_t i = 0; i < m; ++i) {
          ASSERT_EQ(count[i], n);
          const double slack = als::score_slack(dim, length(q.data() + i * dim), norm, 0.0);
          for (int64_t e = 0; e < n; ++e) {
            double exact = 0.0;
            for (int64_t j = 0; j < dim; ++j)
              exact += q[i * dim + j] * c[index[i * 64 + e] * dim + j];
            const double off = std::fabs(score[i * 64 + e] - exact);
            EXPECT_LE(off, error[i * 64 + e] + slack) << dim << " " << kind << " " << scale;
            worst = std::max(worst, off / (error[i * 64 + e] + slack));
          }
        }
      }
    }
  }
  EXPECT_GE(worst, 0.3);  // a bound far from what happens would re-examine far too much
}
#endif

// ---- panels out of reach ----

std::vector<const als::KnnTileKernel*> float_tiles() {
  std::vector<const als::KnnTileKernel*> found{&als::knn_tile_baseline};
#if defined(__x86_64__)
  if (als::best_cpu_level() >= als::CpuLevel::kAvx2) found.push_back(&als::knn_tile_avx2);
  if (als::best_cpu_level() >= als::CpuLevel::kAvx512) found.push_back(&als::knn_tile_avx512);
#endif
  return found;
}

struct alignas(64) Floats {
  explicit Floats(size_t n) : lines(n / 16 + 1) {}
  float& operator[](size_t i) { return lines[i / 16].x[i % 16]; }
  float* data() { return lines[0].x; }
  struct alignas(64) Line {
    float x[16] = {};
  };
  std::vector<Line> lines;
};

TEST(KnnReach, ProductsAndReachAreThoseOfPlainLoops) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const als::KnnTileKernel* tile : float_tiles()) {
    for (int64_t depth : {1, 7, 128, 129, 300}) {
      const int64_t groups = 2, panels = 3, m = groups * tile->rows, columns = tile->columns;
      Floats query(m * depth), centres(panels * columns * depth), out(m * panels * columns);
      for (int64_t i = 0; i < m * depth; ++i) query[i] = normal(random);
      for (int64_t i = 0; i < panels * columns * depth; ++i) centres[i] = normal(random);
      tile->products(query.data(), groups, centres.data(), panels, depth, out.data());
      Floats half(panels * columns), radius(panels * columns), best(panels * columns);
      std::vector<float> tau(m), cut(m);
      for (int64_t c = 0; c < panels * columns; ++c) {
        half[c] = normal(random);
        radius[c] = std::fabs(normal(random));
      }
      for (int64_t i = 0; i < m; ++i) {
        tau[i] = std::fabs(normal(random));
        cut[i] = 10.0f + normal(random);
      }
      cut[3] = -kInf;  // a query without a limit yet reaches everything
      const auto largest = [&](bool unlimited) {
        cut[3] = unlimited ? -kInf : 10.0f;
        const als::KnnReachTask task{m,          panels,    out.data(), half.data(), radius.data(),
                                     tau.data(), cut.data()};
        tile->reach(task, best.data());
      };
      largest(true);
      for (int64_t c = 0; c < panels * columns; ++c) EXPECT_EQ(best[c], kInf);
      largest(false);
      for (int64_t c = 0; c < panels * columns; ++c) {
        double want = -1e300;
        for (int64_t i = 0; i < m; ++i) {
          double exact = 0.0;
          for (int64_t d = 0; d < depth; ++d) {
            exact += double{query[(i / tile->rows * depth + d) * tile->rows + i % tile->rows]} *
                     centres[(c / columns * depth + d) * columns + c % columns];
          }
          EXPECT_NEAR(out[(c / columns * m + i) * columns + c % columns], exact, 1e-4);
          want = std::max(want, exact + double{radius[c]} * tau[i] - cut[i]);
        }
        EXPECT_NEAR(best[c], want - half[c], 1e-4);
      }
    }
  }
}

TEST(KnnReach, QueriesOfADecisionAreWholeGroupsOfEveryTile) {
  for (const als::KnnTileKernel* tile : float_tiles()) {
    EXPECT_EQ(als::KnnReach::kQueries % tile->rows, 0);
  }
}

TEST(KnnOrder, SplitsAcrossTheWidestDirectionAndKeepsEveryPoint) {
  constexpr int64_t kPoints = 1000, kLeft = 384;
  std::vector<float> points(kPoints * als::kKnnCoordinates, 0.0f);
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < kPoints; ++i) {
    float* point = &points[i * als::kKnnCoordinates];
    for (int j = 0; j < als::kKnnCoordinates; ++j) point[j] = 0.1f * normal(random);
    const float along = 5.0f * normal(random);
    point[2] += along;
    point[5] -= along;
  }
  std::vector<int32_t> order(kPoints);
  std::iota(order.begin(), order.end(), 0);
  als::knn_split(points.data(), order.data(), 0, kLeft, kPoints);
  const auto place = [&](int64_t i) {
    const float* point = &points[order[i] * als::kKnnCoordinates];
    return point[2] - point[5];
  };
  double left = 0.0, right = 0.0;
  for (int64_t i = 0; i < kLeft; ++i) left += place(i) / kLeft;
  for (int64_t i = kLeft; i < kPoints; ++i) right += place(i) / (kPoints - kLeft);
  EXPECT_GT(std::fabs(left - right), 10.0);
  std::vector<int32_t> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  for (int64_t i = 0; i < kPoints; ++i) EXPECT_EQ(sorted[i], i);
}

TEST(KnnOrder, EqualPointsArePartedByPosition) {
  std::vector<float> points(40 * als::kKnnCoordinates, 1.0f);
  std::vector<int32_t> order(40);
  std::iota(order.rbegin(), order.rend(), 0);
  als::knn_split(points.data(), order.data(), 0, 8, 40);
  std::sort(order.begin(), order.begin() + 8);
  for (int32_t i = 0; i < 8; ++i) EXPECT_EQ(order[i], i);
}

TEST(KnnOrder, LeavesAreWholeButForTheLast) {
  EXPECT_EQ(als::knn_middle(32, 32), 0);
  EXPECT_EQ(als::knn_middle(33, 32), 32);
  EXPECT_EQ(als::knn_middle(100, 32), 64);
  EXPECT_EQ(als::knn_middle(60000, 32), 30016);
}

TEST(KnnOrder, DirectionsAreOrthonormalAndSpanTheRows) {
  constexpr int64_t kRows = 200, kDim = 50;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> rows(kRows * kDim, 0.0f);
  for (int64_t r = 0; r < kRows; ++r) {  // three directions, of falling variance
    for (int j = 0; j < 3; ++j) rows[r * kDim + 7 * j] = normal(random) * (9.0f / (1 + j));
  }
  const std::vector<float> directions = als::knn_directions(rows.data(), kRows, kDim, 4);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j <= i; ++j) {
      float dot = 0.0f;
      for (int64_t d = 0; d < kDim; ++d) dot += directions[i * kDim + d] * directions[j * kDim + d];
      EXPECT_NEAR(dot, i == j && i < 3 ? 1.0f : 0.0f, 1e-4f);
    }
  }
  float point[als::kKnnCoordinates];
  for (int64_t r = 0; r < kRows; ++r) {
    als::knn_project(&rows[r * kDim], directions.data(), kDim, 4, point);
    float length = 0.0f, want = 0.0f;
    for (float x : point) length += x * x;
    for (int64_t d = 0; d < kDim; ++d) want += rows[r * kDim + d] * rows[r * kDim + d];
    EXPECT_NEAR(length, want, 1e-3f * want);
  }
}

}  // namespace
