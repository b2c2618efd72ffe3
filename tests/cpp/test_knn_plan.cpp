// How a search on CUDA is cut up. No kernel runs here.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

// clang-format off: the emulation comes before the kernels, whose sizes the plan uses
#include "emulate_cuda.h"
#include "emulate_mma.h"
#include "emulate_wgmma.h"
#include "common/staging.h"
#include "knn/knn_cuda_plan.h"
// clang-format on

namespace {

using als::KnnCudaMemory;
using als::KnnCudaPlan;

constexpr int64_t kPromise = 256'000'000;  // bytes: docs/ops/knn.md, up to D = 100,000
constexpr int64_t kDims[] = {1, 2, 8, 17, 64, 128, 129, 768, 4096, 20'000, 100'000};
constexpr int64_t kCounts[] = {1, 127, 128, 129, 5000, 100'000, 1 << 20, 100'000'000};
constexpr int64_t kElements[] = {2, 4, 8};

// The most that any number of queries takes: also of as many as are just served in one span.
int64_t workspace(int64_t part, int64_t dim, int64_t span_bytes, int64_t blocks) {
  const auto plan = [&](int64_t queries) {
    return KnnCudaPlan::of(queries, part, dim, span_bytes, blocks);
  };
  int64_t most = 0;
  const int64_t span = plan(100'000'000).span;
  for (int64_t queries : {int64_t{1}, int64_t{127}, int64_t{129}, span, span + 1,
                          span + als::kKnnTile, 4 * span / 3, int64_t{100'000'000}}) {
    most = std::max(most, KnnCudaMemory::of(plan(queries), 0).bytes);
  }
  return most;
}

TEST(KnnCudaPlan, MemoryIsWithinThePromise) {
  int64_t most = 0;
  std::vector<int64_t> dims(std::begin(kDims), std::end(kDims));
  for (int64_t dim = 3; dim <= 100'000; dim += 1 + dim / 100) dims.push_back(dim);
  for (int64_t dim : dims) {
    for (int64_t rows : kCounts) {
      for (int64_t blocks : {0, 132}) {
        const int64_t resident = KnnCudaPlan::resident_rows(rows, dim);
        if (resident * dim * 2 < int64_t{200} << 30) {  // exists on a device
          const int64_t bytes = workspace(resident, dim, KnnCudaPlan::kSpanBytes, blocks);
          ASSERT_LE(bytes, kPromise) << rows << " rows on the device, D = " << dim;
          most = std::max(most, bytes);
        }
        for (int64_t element : kElements) {
          const int64_t row = dim * element;
          const int64_t part = KnnCudaPlan::part_rows(rows, dim, row, als::kStagingBytes);
          const int64_t bytes =
              workspace(part, dim, KnnCudaPlan::kSpanBytesStaged, blocks) + 2 * part * row;
          ASSERT_LE(bytes, kPromise) << rows << " rows from the host, D = " << dim;
          most = std::max(most, bytes);
        }
      }
    }
  }
  EXPECT_GE(most, kPromise / 2);  // and it is made use of
}

TEST(KnnCudaPlan, PartsFillTheirBuffersAndArePackedOnce) {
  for (int64_t dim : kDims) {
    for (int64_t element : kElements) {
      const int64_t row = dim * element, rows = 100'000'000;
      const int64_t part = KnnCudaPlan::part_rows(rows, dim, row, als::kStagingBytes);
      EXPECT_LE(part * row, als::kStagingBytes);
      const KnnCudaPlan plan = KnnCudaPlan::of(1000, part, dim);
      EXPECT_EQ(plan.groups, plan.chunk * als::kKnnTileGroups) << dim;  // all tiles are a chunk
      EXPECT_TRUE(part < als::kKnnTile || part % als::kKnnTile == 0) << part;
      const bool fills = 4 * part * row >= 3 * als::kStagingBytes;
      EXPECT_TRUE(fills || plan.chunk > 1) << dim;
      EXPECT_TRUE(fills || (part + part / 64 + als::kKnnTile) * plan.tile_bytes >
                               KnnCudaPlan::kChunkBytes * als::kKnnTile)
          << dim;
    }
  }
}

TEST(KnnCudaPlan, APartHasAtLeastOneRowAndNoMoreThanThereAre) {
  EXPECT_EQ(KnnCudaPlan::part_rows(7, 3, 12, als::kStagingBytes), 7);
  EXPECT_EQ(KnnCudaPlan::part_rows(7, 3, 12, 1), 1);
  EXPECT_EQ(KnnCudaPlan::part_rows(500, 3, 12, 12 * 100), 100);
  EXPECT_EQ(KnnCudaPlan::part_rows(500, 3, 12, 12 * 300), 256);
  EXPECT_EQ(KnnCudaPlan::part_rows(500, 10'000'000, 40'000'000, als::kStagingBytes), 1);
}

TEST(KnnCudaPlan, TheLastPartIsNotMuchSmallerThanTheOthers) {
  EXPECT_EQ(KnnCudaPlan::resident_rows(65'536, 768), 65'536);
  EXPECT_EQ(KnnCudaPlan::resident_rows(65'537, 768), 32'896);
  for (int64_t dim : kDims) {
    for (int64_t rows : {1, 127, 129, 65'537, 163'841, 1'000'001}) {
      const int64_t row = 4 * dim;
      for (int64_t part : {KnnCudaPlan::resident_rows(rows, dim),
                           KnnCudaPlan::part_rows(rows, dim, row, als::kStagingBytes)}) {
        const int64_t parts = als::ceil_div(rows, part), last = rows - (parts - 1) * part;
        EXPECT_GT(last, part - std::min(part, als::kKnnTile * parts)) << rows << ", D = " << dim;
        EXPECT_LE(last, part);
      }
    }
  }
}

TEST(KnnCudaPlan, BlocksHaveEqualShares) {
  using Shares = KnnCudaPlan::Shares;
  EXPECT_EQ(Shares::of(22, 782, 132).segments, 6);  // one round
  EXPECT_EQ(als::ceil_div(782, Shares::of(1, 782, 132).segments), 6);
  EXPECT_EQ(Shares::of(1, 5, 132).segments, 5);  // no segment without a tile
  EXPECT_EQ(Shares::of(391, 1, 132).segments, 1);
  for (int64_t dim : {32, 128, 256, 512, 768}) {
    for (int64_t queries : {6000, 16'384, 100'000}) {
      const int64_t part = KnnCudaPlan::resident_rows(100'000, dim);
      const KnnCudaPlan plan = KnnCudaPlan::of(queries, part, dim, KnnCudaPlan::kSpanBytes, 132);
      const int64_t tiles = std::min(plan.chunk, als::ceil_div(part, als::kKnnTile));
      int64_t time = 0;
      for (int64_t first = 0; first < queries; first += plan.span) {
        const int64_t count = std::min(plan.span, queries - first);
        time += Shares::of(als::ceil_div(count, 2 * als::kKnnTile), tiles, 132).time;
      }
      const double busy = als::ceil_div(queries, 2 * als::kKnnTile) * tiles / 132.0 / time;
      EXPECT_GE(busy, queries == 100'000 ? 0.93 : 0.85) << queries << ", D = " << dim;
    }
  }
  // One span serves all.
  EXPECT_EQ(KnnCudaPlan::of(20'000, 1000, 128, KnnCudaPlan::kSpanBytes, 132).span, 20'000);
}

TEST(KnnCudaPlan, ALaterSmallerPartFitsTheMemoryOfTheFirst) {
  for (int64_t rows : {1, 100, 128, 1000, 49'152}) {
    const KnnCudaPlan large = KnnCudaPlan::of(1000, 49'152, 128);
    const KnnCudaPlan small = KnnCudaPlan::of(1000, rows, 128);
    EXPECT_LE(small.groups, large.groups);
    EXPECT_LE(small.chunk, large.chunk);
    EXPECT_LE(small.sums, large.sums);
  }
}

TEST(KnnCudaMemory, PlacesAreAlignedAndApart) {
  const KnnCudaPlan plan = KnnCudaPlan::of(300, 1000, 33);
  const KnnCudaMemory m = KnnCudaMemory::of(plan, 4096);
  const int64_t query_tiles = als::ceil_div(plan.span, als::kKnnTile);
  const std::vector<std::pair<void*, int64_t>> places = {
      {m.sums, plan.sums * plan.dim * 8},
      {m.mean, plan.dim * 8},
      {m.extent, sizeof *m.extent},
      {m.query, query_tiles * plan.tile_bytes},
      {m.queries, plan.span * static_cast<int64_t>(sizeof *m.queries)},
      {m.bounds, plan.span * static_cast<int64_t>(sizeof *m.bounds)},
      {m.group_max, plan.span * plan.groups * 4},
      {m.database, plan.chunk * plan.tile_bytes},
      {m.half_norm, plan.chunk * 128 * 4},
      {m.group_norm, plan.groups * 4},
      {m.group_residual, plan.groups * 4},
      {m.float_query, query_tiles * 128 * plan.depth * 4},
      {m.float_database, plan.float_chunk * 128 * plan.depth * 4},
      {m.float_half_norm, plan.float_chunk * 128 * 4},
      {m.listed.query, plan.span * 4},
      {m.listed.count, 4}};
  uintptr_t end = 4096;
  for (const auto& [place, bytes] : places) {
    const auto at = reinterpret_cast<uintptr_t>(place);
    EXPECT_EQ(at % KnnCudaMemory::kAlign, 0u);
    EXPECT_GE(at, end);
    end = at + bytes;
  }
  EXPECT_LE(end, static_cast<uintptr_t>(4096 + m.bytes));
  EXPECT_EQ(m.bytes, KnnCudaMemory::of(plan, 0).bytes);
}

}  // namespace
