// How a search on CUDA is cut up, and its memory on the device. Host code, torch-free.
#pragma once

#include <algorithm>

#include "knn/knn_kernels.cuh"

namespace als {

struct KnnCudaPlan {
  static constexpr int64_t kChunkBytes = int64_t{40} << 20;  // database tiles packed in bf16
  static constexpr int64_t kFloatBytes = int64_t{24} << 20;  // and in float32
  // Packed queries, their group maxima. Beside a database from the host there are its buffers.
  static constexpr int64_t kSpanBytes = int64_t{144} << 20;
  static constexpr int64_t kSpanBytesStaged = int64_t{128} << 20;
  static constexpr int64_t kSumBytes = int64_t{16} << 20;  // column sums of the parts

  int64_t dim;
  int64_t tile_bytes;   // of a tile in bf16
  int64_t depth;        // features of a row in float32, padded
  int64_t chunk;        // database tiles packed in bf16 at a time
  int64_t float_chunk;  // and in float32
  int64_t span;         // queries served at a time
  int64_t groups;       // of the database, whose maxima are stored for each query of a span
  int64_t sums;         // most parts of the column sums

  // `blocks`: of the Hopper kernel's grid; 0 for the other.
  static KnnCudaPlan of(int64_t queries, int64_t rows, int64_t dim, int64_t span_bytes = kSpanBytes,
                        int64_t blocks = 0) {
    KnnCudaPlan p{};
    p.dim = dim;
    p.tile_bytes = knn_slabs(dim) * kKnnSlabBytes;
    p.depth = ceil_div(dim, kKnnFloatSlab) * kKnnFloatSlab;
    p.sums =
        std::min(std::clamp<int64_t>(kSumBytes / (8 * dim), 1, 1024), ceil_div(rows, kKnnThreads));
    const int64_t tiles = ceil_div(rows, kKnnTile);
    p.groups = tiles * kKnnTileGroups;
    p.chunk = std::clamp<int64_t>(kChunkBytes / p.tile_bytes, 1, tiles);
    p.float_chunk = std::clamp<int64_t>(kFloatBytes / (4 * p.float_tile()), 1, tiles);
    const int64_t query_bytes = 4 * p.groups + 4 * p.depth + p.tile_bytes / kKnnTile +
                                static_cast<int64_t>(sizeof(KnnQuery) + sizeof(KnnBound) + 4);
    const int64_t most = span_bytes / query_bytes;
    p.span = std::clamp<int64_t>(most, 1, queries);
    if (ceil_div(queries, kKnnTile) * kKnnTile <= most) return p;
    for (const int64_t whole : {2 * kKnnTile, kKnnTile}) {  // two tiles are what a block has
      if (p.span > whole) p.span = p.span / whole * whole;
    }
    if (blocks > 0 && p.span > 2 * kKnnTile) {
      const int64_t pairs = ceil_div(queries, 2 * kKnnTile), fit = p.span / (2 * kKnnTile);
      p.span = even_pairs(pairs, fit, std::min(tiles, p.chunk), blocks) * 2 * kKnnTile;
    }
    return p;
  }

  // How the Hopper kernel's blocks share the pairs of query tiles and the tiles of the database: in
  // rounds, each block taking one (segment of the tiles, pair), all pairs of a segment before the
  // next segment. So blocks at work at a time read the same few segments, which come from memory
  // once and to the others from L2.
  struct Shares {
    int64_t segments;
    int64_t time;  // in tiles multiplied one after the other

    static Shares of(int64_t pairs, int64_t tiles, int64_t blocks) {
      constexpr int64_t kStart = 2;  // tiles that would be multiplied while new queries come
      Shares best{1, ceil_div(pairs, blocks) * (tiles + kStart)};
      for (int64_t segments = 2; segments <= std::min(tiles, 4 * blocks); ++segments) {
        const int64_t rounds = ceil_div(pairs * segments, blocks);
        const int64_t time = rounds * (ceil_div(tiles, segments) + kStart);
        if (time < best.time) best = {segments, time};
      }
      return best;
    }
  };

  // Pairs of query tiles for a span, of at most `most`, that serve all pairs the soonest.
  static int64_t even_pairs(int64_t all, int64_t most, int64_t tiles, int64_t blocks) {
    constexpr int64_t kSpan = 8;  // tiles that would be multiplied while a span begins and ends
    const auto time = [=](int64_t pairs) {
      const int64_t rest = all % pairs;
      const int64_t last = rest > 0 ? Shares::of(rest, tiles, blocks).time + kSpan : 0;
      return all / pairs * (Shares::of(pairs, tiles, blocks).time + kSpan) + last;
    };
    int64_t best = most, least = time(most);
    for (int64_t pairs = most - 1; 4 * pairs >= 3 * most; --pairs) {
      if (const int64_t other = time(pairs); other < least) best = pairs, least = other;
    }
    return best;
  }

  // Rows of a part of a database on the device: at most those of a chunk, which are packed once for
  // all spans, or 65,536 where that is more: each part has a selection of its own.
  static int64_t resident_rows(int64_t rows, int64_t dim) {
    return equal_parts(rows, std::max<int64_t>(of(1, rows, dim).chunk * kKnnTile, 1 << 16));
  }

  // Rows of a part of a database that comes from the host. Its tiles fit a chunk, so that they are
  // packed once for all spans.
  static int64_t part_rows(int64_t rows, int64_t dim, int64_t row_bytes, int64_t staging_bytes) {
    const KnnCudaPlan p = of(1, rows, dim);
    const int64_t part = std::min(staging_bytes / row_bytes, p.chunk * kKnnTile);
    return equal_parts(rows, part > kKnnTile ? part / kKnnTile * kKnnTile : part);
  }

  // Rows of a part, the last one's being no fewer by much: a part of one row would cost as many
  // launches as any. `most` is a multiple of a tile, or below one.
  static int64_t equal_parts(int64_t rows, int64_t most) {
    most = std::clamp<int64_t>(most, 1, rows);
    const int64_t part = ceil_div(rows, ceil_div(rows, most));
    return part < kKnnTile ? part : std::min(rows, ceil_div(part, kKnnTile) * kKnnTile);
  }

  int64_t float_tile() const { return kKnnTile * depth; }  // numbers
};

// Places in one allocation. Queries that are scored again in float32 have room for all of a span.
struct KnnCudaMemory {
  double* sums;             // [plan.sums, dim]
  double* mean;             // [dim]
  KnnExtent* extent;        // one
  unsigned char* query;     // [query tiles][slabs]
  KnnQuery* queries;        // [span]
  KnnBound* bounds;         // [span]
  float* group_max;         // [span][groups]
  unsigned char* database;  // [chunk][slabs]
  float* half_norm;         // [chunk][128]
  float* group_norm;        // [groups]
  float* group_residual;    // [groups]
  float* float_query;       // [query tiles][depth][128]
  float* float_database;    // [float_chunk][depth][128]
  float* float_half_norm;   // [float_chunk][128]
  KnnListed listed;         // [span], one
  int64_t bytes;            // of all of it

  // `start` is aligned to kAlign; 0 where only `bytes` is asked for.
  static constexpr uintptr_t kAlign = 256;
  static KnnCudaMemory of(const KnnCudaPlan& plan, uintptr_t start) {
    const int64_t query_tiles = ceil_div(plan.span, kKnnTile);
    KnnCudaMemory m{};
    uintptr_t at = start;
    const auto take = [&at](auto*& place, int64_t count) {
      place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(at);
      const uintptr_t size = static_cast<uintptr_t>(count) * sizeof *place;
      at += (size + kAlign - 1) / kAlign * kAlign;
    };
    take(m.sums, plan.sums * plan.dim);
    take(m.mean, plan.dim);
    take(m.extent, 1);
    take(m.query, query_tiles * plan.tile_bytes);
    take(m.queries, plan.span);
    take(m.bounds, plan.span);
    take(m.group_max, plan.span * plan.groups);
    take(m.database, plan.chunk * plan.tile_bytes);
    take(m.half_norm, plan.chunk * kKnnTile);
    take(m.group_norm, plan.groups);
    take(m.group_residual, plan.groups);
    take(m.float_query, query_tiles * plan.float_tile());
    take(m.float_database, plan.float_chunk * plan.float_tile());
    take(m.float_half_norm, plan.float_chunk * kKnnTile);
    take(m.listed.query, plan.span);
    take(m.listed.count, 1);
    m.bytes = static_cast<int64_t>(at - start);
    return m;
  }
};

}  // namespace als
