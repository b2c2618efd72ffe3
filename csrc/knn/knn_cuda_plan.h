// How a search on CUDA is cut up, and its memory on the device. Host code, torch-free.
#pragma once

#include <algorithm>

#include "knn/knn_kernels.cuh"

namespace als {

struct KnnCudaPlan {
  static constexpr int64_t kChunkBytes = int64_t{40} << 20;  // database tiles packed in bf16
  static constexpr int64_t kFloatBytes = int64_t{24} << 20;  // and in float32
  static constexpr int64_t kSpanBytes = int64_t{128} << 20;  // packed queries, their group maxima
  static constexpr int64_t kSumBytes = int64_t{16} << 20;    // column sums of the parts

  int64_t dim;
  int64_t tile_bytes;   // of a tile in bf16
  int64_t depth;        // features of a row in float32, padded
  int64_t chunk;        // database tiles packed in bf16 at a time
  int64_t float_chunk;  // and in float32
  int64_t span;         // queries served at a time
  int64_t groups;       // of the database, whose maxima are stored for each query of a span
  int64_t sums;         // most parts of the column sums

  static KnnCudaPlan of(int64_t queries, int64_t rows, int64_t dim) {
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
    p.span = std::clamp<int64_t>(kSpanBytes / query_bytes, 1, queries);
    for (const int64_t whole : {2 * kKnnTile, kKnnTile}) {  // two tiles are what a block has
      if (p.span > whole) p.span = p.span / whole * whole;
    }
    return p;
  }

  // Rows of a part of a database on the device: those of a chunk, which are packed once for all
  // spans, but no fewer than 65,536: each part has a selection of its own.
  static int64_t resident_rows(int64_t rows, int64_t dim) {
    return std::min(rows, std::max<int64_t>(of(1, rows, dim).chunk * kKnnTile, 1 << 16));
  }

  // Rows of a part of a database that comes from the host. Its tiles fit a chunk, so that they are
  // packed once for all spans.
  static int64_t part_rows(int64_t rows, int64_t dim, int64_t row_bytes, int64_t staging_bytes) {
    const KnnCudaPlan p = of(1, rows, dim);
    const int64_t part = std::min(staging_bytes / row_bytes, p.chunk * kKnnTile);
    return std::clamp<int64_t>(part > kKnnTile ? part / kKnnTile * kKnnTile : part, 1, rows);
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
