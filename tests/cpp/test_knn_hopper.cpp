// The scoring kernel of compute capability 9.0 on its own: tiles of small integers, for which every
// score is exact, in all the ways in which it lays out shared memory and shares out its work.
// test_knn.cpp runs whole searches with it.
#include <gtest/gtest.h>

#include <random>

// clang-format off: the emulation comes before the kernels
#include "emulate_cuda.h"
#include "emulate_mma.h"
#include "emulate_wgmma.h"
#include "knn/knn_score_hopper.cuh"
// clang-format on

namespace {

using als::kKnnSlabBytes;
using als::kKnnTile;
using als::KnnHopperPlan;

constexpr float kInf = INFINITY;

TEST(KnnHopperPlan, FitsSharedMemoryAndGoesOn) {
  for (int64_t dim : {1, 32, 33, 128, 256, 257, 288, 384, 385, 768, 4096, 1 << 20}) {
    const KnnHopperPlan plan = KnnHopperPlan::of(dim);
    EXPECT_GE(plan.stages, 4) << dim;
    EXPECT_LE(plan.stages, als::kKnnHopperStages) << dim;
    EXPECT_EQ(plan.resident, dim <= 384) << dim;
    EXPECT_EQ(plan.in_turn, dim <= 256) << dim;
    // What lies in a stage, and before the first one if the queries stay.
    std::vector<std::pair<int, int>> pieces;  // begin, bytes
    for (int stage = 0; stage < plan.stages; ++stage) {
      pieces.push_back({plan.database_at(stage), kKnnSlabBytes});
      pieces.push_back({plan.half_norm_at(stage), als::kKnnHalfNormBytes});
      for (int tile = 0; tile < 2 && !plan.resident; ++tile) {
        pieces.push_back({plan.query_at(tile, 7, stage), kKnnSlabBytes});
      }
    }
    for (int slab = 0; slab < plan.slabs && plan.resident; ++slab) {
      pieces.push_back({plan.query_at(0, slab, 1), kKnnSlabBytes});
      pieces.push_back({plan.query_at(1, slab, 2), kKnnSlabBytes});
    }
    std::sort(pieces.begin(), pieces.end());
    int end = 0;
    for (const auto& [begin, bytes] : pieces) {
      EXPECT_GE(begin, end) << dim;
      EXPECT_EQ(begin % als::kKnnHopperAlign, 0) << dim;
      end = begin + bytes;
    }
    const int barriers = 8 * (2 * als::kKnnHopperStages + 2);
    EXPECT_LE(als::kKnnHopperAlign + end + barriers, als::kKnnHopperShared) << dim;
  }
}

struct Shape {
  int64_t queries;
  int tiles;  // of the database
  int64_t dim;
  unsigned blocks;
  int segments = 1;
};

// As aligned as device memory; as large as the tiles, so that AddressSanitizer sees their end.
template <typename T>
std::unique_ptr<T[], void (*)(void*)> allocate(int64_t size) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, size * sizeof(T)) != 0) std::abort();
  return {static_cast<T*>(memory), std::free};
}

struct Tiles {
  int64_t rows, dim, bytes;
  std::vector<float> values;  // [rows][dim]
  std::unique_ptr<unsigned char[], void (*)(void*)> packed;

  template <typename Position>
  Tiles(int64_t tiles, int64_t width, unsigned seed, const Position& position)
      : rows(tiles * kKnnTile),
        dim(width),
        bytes(tiles * als::knn_slabs(dim) * kKnnSlabBytes),
        values(rows * dim),
        packed(allocate<unsigned char>(bytes)) {
    std::mt19937 random(seed);
    std::uniform_int_distribution<int> integer(-4, 4);
    for (float& value : values) value = static_cast<float>(integer(random));
    std::memset(packed.get(), 0, bytes);  // no feature: zero
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < dim; ++j) {
        const int64_t slab = row / kKnnTile * als::knn_slabs(dim) + j / als::kKnnFeatures;
        const int in_slab = static_cast<int>(j % als::kKnnFeatures);
        const auto bits = static_cast<uint16_t>(als::pack_bf16(values[row * dim + j], 0.0f));
        std::memcpy(
            packed.get() + slab * kKnnSlabBytes +
                als::knn_chunk_offset(position(static_cast<int>(row % kKnnTile)), in_slab / 8) +
                in_slab % 8 * 2,
            &bits, sizeof bits);
      }
    }
  }
};

// How many group maxima are wrong, those of other groups and queries included.
int64_t wrong_maxima(const Shape& s) {
  constexpr int64_t kBefore = 8, kAfter = 16, kMoreQueries = 2;  // that must not be touched
  const auto same = [](int row) { return row; };
  const Tiles query((s.queries + kKnnTile - 1) / kKnnTile, s.dim, 1, same);
  const Tiles database(s.tiles, s.dim, 2, als::knn_position);
  const auto half_norm = allocate<float>(database.rows);
  std::vector<float> h(database.rows);  // by row
  std::mt19937 random(3);
  for (int64_t row = 0; row < database.rows; ++row) {
    // The last rows do not exist, and neither does a whole group.
    h[row] = row > database.rows - 20 ? kInf : static_cast<float>(random() % 64);
    half_norm[row / kKnnTile * kKnnTile + als::knn_position(static_cast<int>(row % kKnnTile))] =
        h[row];
  }
  const int64_t groups = kBefore + s.tiles * als::kKnnTileGroups + kAfter;
  std::vector<float> want((s.queries + kMoreQueries) * groups, 7.5f);
  std::vector<float> got = want;
  for (int64_t q = 0; q < s.queries; ++q) {
    for (int64_t row = 0; row < database.rows; ++row) {
      float score = -h[row];
      for (int64_t j = 0; j < s.dim; ++j) {
        score += query.values[q * s.dim + j] * database.values[row * s.dim + j];
      }
      float& group = want[q * groups + kBefore + row / als::kKnnGroup];
      group = row % als::kKnnGroup == 0 ? score : std::max(group, score);
    }
  }
  const als::KnnScoreParams params{query.packed.get(),
                                   database.packed.get(),
                                   half_norm.get(),
                                   got.data(),
                                   s.queries,
                                   groups,
                                   kBefore,
                                   s.dim,
                                   s.tiles,
                                   0,
                                   s.segments};
  emulated::launch(
      s.blocks, als::kKnnHopperThreads, [&] { als::knn_score_hopper(params); },
      als::kKnnHopperShared);
  int64_t wrong = 0;
  for (size_t i = 0; i < want.size(); ++i) wrong += !(got[i] == want[i]);
  return wrong;
}

class KnnHopper : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override { emulated::copies_are_late = GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Copies, KnnHopper, testing::Bool(),
                         [](const auto& late) { return late.param ? "Late" : "Early"; });

TEST_P(KnnHopper, EveryLayoutOfSharedMemory) {
  // One slab; in turn with stages to spare and with few; not in turn; fewest stages; queries that
  // come again with every tile.
  for (int64_t dim : {3, 100, 256, 257, 384, 385}) {
    EXPECT_EQ(wrong_maxima({140, 3, dim, 1}), 0) << dim;
  }
}

TEST_P(KnnHopper, StagesComeRoundManyTimes) {
  EXPECT_EQ(wrong_maxima({130, 9, 70, 1}), 0);   // 27 slabs, 16 stages
  EXPECT_EQ(wrong_maxima({130, 4, 400, 1}), 0);  // 52 slabs, 9 stages
}

TEST_P(KnnHopper, SharesOfTheBlocks) {
  // Three pairs of query tiles of which the last has one tile, five tiles: segments of several
  // tiles, of unequal ones, of one; blocks that take several pairs, one tile in between, and none.
  for (int segments : {1, 2, 3, 5}) {
    for (unsigned blocks : {1, 2, 4, 15, 20}) {
      EXPECT_EQ(wrong_maxima({2 * 256 + 100, 5, 20, blocks, segments}), 0)
          << segments << " segments, " << blocks << " blocks";
    }
  }
  EXPECT_EQ(wrong_maxima({2 * 256 + 100, 5, 390, 2, 2}), 0);
}

TEST_P(KnnHopper, FewQueries) {
  EXPECT_EQ(wrong_maxima({1, 3, 40, 2}), 0);
  EXPECT_EQ(wrong_maxima({128, 2, 129, 1}), 0);
  EXPECT_EQ(wrong_maxima({129, 1, 40, 1}), 0);
}

}  // namespace
