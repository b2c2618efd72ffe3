// How the work of a search on the CPU is cut up. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>

#include "knn/knn_buffers.h"
#include "knn/knn_math.h"
#include "knn/knn_tile.h"

namespace als {

// A round scores `span` queries against the whole database, chunk of panels by chunk. A task of it
// is a block of queries and, where blocks are few, one of several segments of the chunk. Each
// segment has a list of its own for each of its queries: a slot.
struct KnnPlan {
  int64_t rows_at_once, columns;  // of a tile
  int64_t panels, chunk;          // of the database; per packed chunk
  int64_t capacity;               // list entries
  int64_t block, span;            // queries per task; per round
  int64_t segments;               // database parts per query

  // `depth`: units of a row in the way of scoring that comes first; `units`: in all of them.
  static KnnPlan of(int64_t queries, int64_t rows, int64_t k, const KnnTileKernel& tile,
                    int64_t depth, int64_t units) {
    constexpr int64_t kPackedBytes = int64_t{96} << 20;  // packed database chunk
    constexpr int64_t kStateBytes = int64_t{64} << 20;   // packed queries and candidate lists
    constexpr int64_t kBlockBytes = int64_t{256} << 10;  // packed block of a task: half of L2
    constexpr int64_t kBlockQueries = 192;
    constexpr int64_t kMinBlockQueries = 48;  // fewer would stream the panels too often
    constexpr int64_t kMinTasks = 32;  // smaller blocks, then parts of the database, to have these
    KnnPlan p{};
    p.rows_at_once = tile.rows;
    p.columns = tile.columns;
    p.panels = ceil_div(rows, p.columns);
    p.chunk = std::clamp<int64_t>(kPackedBytes / (p.columns * units * 4), 1, p.panels);
    p.capacity = std::min(2 * k + 256, rows + kKnnMaxColumns);
    const int64_t entries = p.capacity * (sizeof(float) * 2 + sizeof(int64_t));
    const int64_t fit = std::min({kBlockBytes / (4 * depth), kBlockQueries, queries / kMinTasks});
    p.block = std::min({std::max<int64_t>(fit, kMinBlockQueries), kStateBytes / entries,
                        queries + p.rows_at_once - 1});
    p.block = std::max<int64_t>(p.block / p.rows_at_once, 1) * p.rows_at_once;
    const int64_t blocks = ceil_div(queries, p.block);
    p.segments = std::min(
        {ceil_div(kMinTasks, blocks), kStateBytes / (p.block * entries), ceil_div(p.chunk, 8)});
    p.segments = std::max<int64_t>(p.segments, 1);
    p.span = kStateBytes / (p.segments * entries + 4 * units) / p.block * p.block;
    p.span = std::clamp(p.span, p.block, blocks * p.block);
    return p;
  }

  int64_t slots() const { return span * segments; }
  int64_t blocks_of(int64_t queries) const { return ceil_div(queries, block); }
  int64_t tasks_of(int64_t queries) const { return blocks_of(queries) * segments; }

  // Slots are laid out as [block][segment][query of the block]: task t begins at t * block.
  int64_t slot_of(int64_t i, int64_t segment) const {
    return (i / block * segments + segment) * block + i % block;
  }
  int64_t query_of(int64_t slot) const { return slot / (block * segments) * block + slot % block; }
};

}  // namespace als
