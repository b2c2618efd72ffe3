// The launches of a search on CUDA. Host code for nvcc; nothing in it waits for the device.
#pragma once

#include <algorithm>

#include "common/cuda.h"
#include "knn/knn_cuda_plan.h"

namespace als {

// Blocks of knn_score_hopper, one an SM, where the image of this library that the device runs holds
// that kernel; else 0. Images of other architectures, 9.0 without the "a" included, hold one that
// allows a single thread.
inline int knn_hopper_blocks() {
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, knn_score_hopper));
  if (attributes.maxThreadsPerBlock < kKnnHopperThreads) return 0;
  STD_CUDA_CHECK(cudaFuncSetAttribute(knn_score_hopper, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      kKnnHopperShared));
  int device = 0, blocks = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device));
  return blocks;
}

template <int kThreads, typename T>
void launch_select(const KnnSelectParams<T>& params, int64_t queries, cudaStream_t stream) {
  constexpr int kMost = 2 * kKnnMaxK * kKnnEntryBytes;  // the same value in every thread
  const auto select = knn_select<T, kThreads>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(select, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost));
  select<<<static_cast<unsigned>(queries), kThreads, params.sizes.bytes(), stream>>>(params);
  ALS_LAUNCH_CHECK();
}

// For queries `x`, into distance and index [Q, k].
template <typename T>
struct KnnCudaSearch {
  static constexpr int64_t kMostBlocks = 1024;    // where blocks take their work in turn
  static constexpr int64_t kFewestBlocks = 2048;  // of scoring, before runs of tiles get long
  static constexpr int64_t kLongestRun = 32;      // database tiles of a block

  KnnRows<T> x;
  int64_t k;
  bool exclude_self, exact;
  float* distance;
  int64_t* index;
  KnnCudaPlan plan;
  KnnCudaMemory memory;
  cudaStream_t stream;
  int hopper_blocks;  // 0: the kernel for other devices

  void run(const KnnRows<T>& y) const {
    STD_CUDA_CHECK(cudaFuncSetAttribute(knn_score, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        kKnnScoreShared));
    find_frame(y);
    for (int64_t first = 0; first < x.rows; first += plan.span) {
      const int64_t count = std::min(plan.span, x.rows - first);
      STD_CUDA_CHECK(cudaMemsetAsync(memory.listed.count, 0, sizeof(unsigned), stream));
      score(y, first, count);
      select(y, first, count, false);
      // The listed queries again, in float32. Nobody here knows whether there are any.
      rescore(y, first, count);
      select(y, first, count, true);
    }
  }

 private:
  static unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }
  static int64_t tiles_of(const KnnRows<T>& y) { return ceil_div(y.rows, kKnnTile); }

  // Mean and extent of the database.
  void find_frame(const KnnRows<T>& y) const {
    const int64_t part = ceil_div(y.rows, std::min(plan.sums, ceil_div(y.rows, kKnnThreads)));
    const int64_t parts = ceil_div(y.rows, part);
    STD_CUDA_CHECK(cudaMemsetAsync(memory.extent, 0, sizeof(KnnExtent), stream));
    knn_column_sums<<<grid(parts), kKnnThreads, 0, stream>>>(y, part, memory.sums, memory.extent);
    ALS_LAUNCH_CHECK();
    knn_mean<<<grid(ceil_div(y.dim, kKnnThreads)), kKnnThreads, 0, stream>>>(
        memory.sums, parts, y.dim, memory.extent, memory.mean);
    ALS_LAUNCH_CHECK();
    const int64_t blocks = std::min<int64_t>(ceil_div(y.rows, kKnnSubgroups), 2048);
    knn_extent<<<grid(blocks), kKnnThreads, 0, stream>>>(y, memory.mean, memory.extent);
    ALS_LAUNCH_CHECK();
  }

  // Group maxima by bf16 scores.
  void score(const KnnRows<T>& y, int64_t first, int64_t count) const {
    const int64_t tiles = tiles_of(y), count_tiles = ceil_div(count, kKnnTile);
    knn_pack_queries<<<grid(count_tiles), kKnnThreads, 0, stream>>>(
        x, first, count, memory.mean, memory.extent, exact, memory.query, memory.queries,
        memory.bounds);
    ALS_LAUNCH_CHECK();
    for (int64_t tile = 0; tile < tiles; tile += plan.chunk) {
      const int64_t here = std::min(plan.chunk, tiles - tile);
      const int64_t group = tile * kKnnTileGroups;
      if (first == 0 || plan.chunk < tiles) {
        const KnnTiles out{memory.database, memory.half_norm, memory.group_norm + group,
                           memory.group_residual + group};
        knn_pack_database<<<grid(here), kKnnThreads, 0, stream>>>(y, tile * kKnnTile, memory.mean,
                                                                  memory.extent, out);
        ALS_LAUNCH_CHECK();
      }
      launch_score({memory.query, memory.database, memory.half_norm, memory.group_max, count,
                    tiles * kKnnTileGroups, group, y.dim, static_cast<int>(here), 0, 0});
    }
  }

  void launch_score(KnnScoreParams params) const {
    const int64_t query_tiles = ceil_div(params.queries, kKnnTile);
    if (hopper_blocks > 0) {
      const int64_t pairs = ceil_div(query_tiles, 2);
      params.segments =
          static_cast<int>(KnnCudaPlan::Shares::of(pairs, params.tiles, hopper_blocks).segments);
      const int64_t shares = pairs * params.segments;
      knn_score_hopper<<<grid(std::min<int64_t>(shares, hopper_blocks)), kKnnHopperThreads,
                         kKnnHopperShared, stream>>>(params);
    } else {
      params.block_tiles = static_cast<int>(
          std::clamp<int64_t>(params.tiles * query_tiles / kFewestBlocks, 1, kLongestRun));
      const dim3 blocks(grid(query_tiles), grid(ceil_div(params.tiles, params.block_tiles)));
      knn_score<<<blocks, kKnnThreads, kKnnScoreShared, stream>>>(params);
    }
    ALS_LAUNCH_CHECK();
  }

  // Group maxima by float32 scores, of the listed queries.
  void rescore(const KnnRows<T>& y, int64_t first, int64_t count) const {
    const int64_t tiles = tiles_of(y), count_tiles = ceil_div(count, kKnnTile);
    knn_pack_queries_float<<<grid(count_tiles), kKnnThreads, 0, stream>>>(
        x, first, plan.depth, memory.mean, memory.queries, memory.listed, memory.float_query);
    ALS_LAUNCH_CHECK();
    for (int64_t tile = 0; tile < tiles; tile += plan.float_chunk) {
      const int64_t here = std::min(plan.float_chunk, tiles - tile);
      knn_pack_database_float<<<grid(here), kKnnThreads, 0, stream>>>(
          y, tile * kKnnTile, plan.depth, memory.mean, memory.extent, memory.listed,
          memory.float_database, memory.float_half_norm);
      ALS_LAUNCH_CHECK();
      const KnnRescoreParams rescore{memory.float_query,
                                     memory.float_database,
                                     memory.float_half_norm,
                                     memory.group_max,
                                     here,
                                     tiles * kKnnTileGroups,
                                     tile * kKnnTileGroups,
                                     plan.depth,
                                     memory.listed};
      const int64_t blocks = std::min(here * count_tiles, kMostBlocks);
      knn_rescore<<<grid(blocks), kKnnThreads, 0, stream>>>(rescore);
      ALS_LAUNCH_CHECK();
    }
  }

  void select(const KnnRows<T>& y, int64_t first, int64_t count, bool rescored) const {
    const int64_t groups = tiles_of(y) * kKnnTileGroups;
    const KnnSelectParams<T> params{x,
                                    y,
                                    first,
                                    k,
                                    exclude_self,
                                    KnnGrouping{groups, kKnnGroupBits, 0},
                                    KnnSelectSizes::of(k, kKnnSelectThreads),
                                    memory.group_max,
                                    memory.group_norm,
                                    memory.group_residual,
                                    memory.queries,
                                    memory.bounds,
                                    knn_budget(k, groups),
                                    rescored,
                                    memory.listed,
                                    distance,
                                    index};
    launch_select<kKnnSelectThreads>(params, count, stream);
  }
};

}  // namespace als
