// Device code of knn, step 3: scores on tensor cores, of which only the largest of each 16 rows is
// written. Torch-free.
#pragma once

#include "knn/knn_pack.cuh"

namespace als {

constexpr int kKnnStages = 4;    // slabs of the database in flight
constexpr int kKnnResident = 4;  // slabs of queries that stay: up to 128 features
// h of each stage, slabs of the database, slabs of the queries (resident, or of the stages)
constexpr int kKnnHalfNormBytes = kKnnTile * static_cast<int>(sizeof(float));
constexpr int kKnnScoreShared =
    kKnnStages * (kKnnHalfNormBytes + kKnnSlabBytes) + kKnnResident * kKnnSlabBytes;  // 66 KiB
static_assert(kKnnResident >= kKnnStages, "a stage has a slab of queries of its own");

struct KnnScoreParams {
  const unsigned char* query;     // [query tiles][slabs]
  const unsigned char* database;  // [tiles][slabs]
  const float* half_norm;         // [tiles][128], by position
  float* group_max;               // [queries][groups]
  int64_t queries, groups, first_group, dim;
  int tiles;        // of the database
  int block_tiles;  // of them for one block of knn_score
  int segments;     // of them, for knn_score_hopper; at least one tile each
};

// Copies a slab, two pieces a thread.
__device__ __forceinline__ void copy_slab(unsigned char* shared, const unsigned char* global) {
  static_assert(kKnnSlabBytes == 2 * 16 * kKnnThreads, "two pieces a thread");
  const int at = threadIdx.x * 16;
  copy16(shared + at, global + at);
  copy16(shared + at + kKnnSlabBytes / 2, global + at + kKnnSlabBytes / 2);
}

// What: max over each group of 16 rows of <q~, c~> - h, by mma.sync.
// Grid: (query tile, run of database tiles); a warp owns 32 queries x 64 rows, a lane the scores of
// 4 of those queries with a group of 16 of those rows.
// Shared memory: dynamic, kKnnScoreShared, filled by cp.async kKnnStages - 1 slabs ahead, across
// the tiles of the run.  Determinism: one accumulator a score, features in order.
__global__ void __launch_bounds__(kKnnThreads, 2) knn_score(KnnScoreParams p) {
  ALS_DYNAMIC_SHARED(knn_shared);
  unsigned char* const half_norms = knn_shared;
  unsigned char* const database = half_norms + kKnnStages * kKnnHalfNormBytes;
  unsigned char* const query = database + kKnnStages * kKnnSlabBytes;
  const int warp_row = threadIdx.x / 64 * 32;                      // its 32 queries
  const int warp_column = threadIdx.x / 32 % 2 * kKnnWarpColumns;  // its 64 database rows
  const int lane = threadIdx.x % 32;
  const int slabs = static_cast<int>(knn_slabs(p.dim));
  const bool resident = slabs <= kKnnResident;
  const int first_tile = blockIdx.y * p.block_tiles;
  const int tiles = min(p.block_tiles, p.tiles - first_tile);
  const int64_t tile_bytes = static_cast<int64_t>(slabs) * kKnnSlabBytes;
  const unsigned char* const query_tile = p.query + blockIdx.x * tile_bytes;
  const unsigned char* const database_tiles = p.database + first_tile * tile_bytes;
  const float* const tile_half_norms = p.half_norm + first_tile * int64_t{kKnnTile};

  // The next slab to copy. Slabs of a run follow one another in memory.
  int next_tile = 0, next_slab = 0, next_stage = 0;
  const auto copy_next = [&] {
    if (next_tile < tiles) {
      if (!resident || next_tile == 0) {
        copy_slab(query + (resident ? next_slab : next_stage) * kKnnSlabBytes,
                  query_tile + int64_t{next_slab} * kKnnSlabBytes);
      }
      copy_slab(database + next_stage * kKnnSlabBytes,
                database_tiles + next_tile * tile_bytes + int64_t{next_slab} * kKnnSlabBytes);
      if (next_slab == slabs - 1 && threadIdx.x < kKnnHalfNormBytes / 16) {
        copy16(half_norms + next_stage * kKnnHalfNormBytes + threadIdx.x * 16,
               tile_half_norms + next_tile * kKnnTile + threadIdx.x * 4);
      }
      next_stage = (next_stage + 1) % kKnnStages;
      if (++next_slab == slabs) next_slab = 0, ++next_tile;
    }
    commit_copies();  // also an empty group, so that the last slabs are waited for alike
  };
  for (int s = 0; s < kKnnStages - 1; ++s) copy_next();

  // Where a lane's rows of the matrices of ldmatrix begin.
  const int query_position = warp_row + lane % 16, query_chunk = lane / 16;
  const int column_position = warp_column + lane / 16 * 8 + lane % 8, column_chunk = lane / 8 % 2;
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    float sum[2][8][4] = {};  // [16 queries][8 rows of the database][mma_bf16]
    for (int slab = 0; slab < slabs; ++slab) {
      wait_copies<kKnnStages - 2>();
      __syncthreads();  // the slab is there for all, and all are done with the one before,
      copy_next();      // whose stage this takes
      const unsigned char* a = query + (resident ? slab : stage) * kKnnSlabBytes;
      const unsigned char* b = database + stage * kKnnSlabBytes;
      ALS_UNROLL
      for (int k = 0; k < kKnnFeatures / kKnnMmaFeatures; ++k) {
        if (int64_t{slab} * kKnnFeatures + k * kKnnMmaFeatures >= p.dim) break;  // only zeros left
        uint32_t left[2][4];
        ALS_UNROLL
        for (int i = 0; i < 2; ++i) {
          load_matrices(left[i],
                        a + knn_chunk_offset(query_position + i * 16, k * 2 + query_chunk));
        }
        ALS_UNROLL
        for (int j = 0; j < 8; j += 2) {
          uint32_t right[4];
          load_matrices(right, b + knn_chunk_offset(column_position + j * 8, k * 2 + column_chunk));
          ALS_UNROLL
          for (int i = 0; i < 2; ++i) {
            mma_bf16(sum[i][j], left[i], right[0], right[1]);
            mma_bf16(sum[i][j + 1], left[i], right[2], right[3]);
          }
        }
      }
      if (slab < slabs - 1) stage = (stage + 1) % kKnnStages;
    }

    const auto* h = reinterpret_cast<const float*>(half_norms + stage * kKnnHalfNormBytes) +
                    warp_column + lane % 4 * 2;
    stage = (stage + 1) % kKnnStages;
    float largest[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
    ALS_UNROLL
    for (int j = 0; j < 8; ++j) {
      const float2 h2 = *reinterpret_cast<const float2*>(h + j * kKnnMmaColumns);
      ALS_UNROLL
      for (int i = 0; i < 2; ++i) {
        ALS_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float* s = &sum[i][j][half * 2];
          largest[i][half] = fmaxf(largest[i][half], fmaxf(s[0] - h2.x, s[1] - h2.y));
        }
      }
    }
    const int64_t group = p.first_group + (first_tile + tile) * int64_t{kKnnTileGroups} +
                          lane % 4 * 2 + warp_column / kKnnWarpColumns;
    ALS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int64_t row = blockIdx.x * int64_t{kKnnTile} + warp_row + i * 8 + lane / 4;
      if (row < p.queries) p.group_max[row * p.groups + group] = largest[i / 2][i % 2];
    }
  }
}

}  // namespace als
