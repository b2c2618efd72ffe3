// Device code of knn, step 3 on compute capability 9.0: the scores of knn_score.cuh by wgmma, the
// tiles brought by bulk copies. Torch-free.
#pragma once

#include "common/wgmma.cuh"
#include "knn/knn_score.cuh"

namespace als {

constexpr int kKnnHopperThreads = 3 * 128;    // a warpgroup that copies, two that multiply
constexpr int kKnnHopperShared = 227 * 1024;  // all that a block may have: one block an SM
constexpr int kKnnHopperStages = 16;          // at most
constexpr int kKnnHopperWarps = 4;            // of a warpgroup
// Of a thread. Those of a block are handed out at its launch, in eights a thread, and stay as many:
// a warpgroup that asks for more than others gave would wait for ever.
constexpr int kKnnHopperRegisters = (1 << 16) / kKnnHopperThreads / 8 * 8;
constexpr int kKnnCopyRegisters = 40, kKnnMultiplyRegisters = 232;
static_assert(kKnnCopyRegisters + 2 * kKnnMultiplyRegisters <= 3 * kKnnHopperRegisters &&
              kKnnCopyRegisters % 8 == 0 && kKnnMultiplyRegisters % 8 == 0);
constexpr int kKnnHopperAlign = kWgmmaPattern;
static_assert(kKnnRowBytes == kWgmmaRow && kKnnSlabBytes % kKnnHopperAlign == 0 &&
                  kKnnHalfNormBytes % kKnnHopperAlign == 0,
              "packed slabs are operands of wgmma as they are, wherever a stage begins");

// What lies where in shared memory: the slabs of two query tiles, if they stay; stages; barriers.
// A stage is a slab of the database, those of both query tiles if they do not stay, and room for h.
struct KnnHopperPlan {
  int slabs;  // of a tile
  bool resident;
  int stages, stage_bytes;
  // The warpgroups multiply in turn, so that one reduces its scores while the other multiplies. The
  // second one is a tile behind then: that tile has to fit, and copies have to go on.
  bool in_turn;

  static ALS_HOST_DEVICE KnnHopperPlan of(int64_t dim) {
    constexpr int kBarriers = (2 * kKnnHopperStages + 2) * static_cast<int>(sizeof(uint64_t));
    constexpr int kRoom = kKnnHopperShared - kKnnHopperAlign - kBarriers;
    constexpr int kFewest = 4;  // two in use, two on their way
    constexpr int kMostResident =
        (kRoom - kFewest * (kKnnSlabBytes + kKnnHalfNormBytes)) / (2 * kKnnSlabBytes);
    KnnHopperPlan p{};
    p.slabs = static_cast<int>(knn_slabs(dim));
    p.resident = p.slabs <= kMostResident;  // up to 384 features
    p.stage_bytes = (p.resident ? 1 : 3) * kKnnSlabBytes + kKnnHalfNormBytes;
    const int stages = (kRoom - (p.resident ? 2 * p.slabs * kKnnSlabBytes : 0)) / p.stage_bytes;
    p.stages = stages < kKnnHopperStages ? stages : kKnnHopperStages;
    p.in_turn = p.slabs + 2 < p.stages;
    return p;
  }
  ALS_HOST_DEVICE int database_at(int stage) const {
    return (resident ? 2 * slabs * kKnnSlabBytes : 0) + stage * stage_bytes;
  }
  ALS_HOST_DEVICE int query_at(int tile, int slab, int stage) const {
    return resident ? (2 * slab + tile) * kKnnSlabBytes
                    : database_at(stage) + (1 + tile) * kKnnSlabBytes;
  }
  ALS_HOST_DEVICE int half_norm_at(int stage) const {
    return database_at(stage) + stage_bytes - kKnnHalfNormBytes;
  }
};

#ifdef ALS_HAS_WGMMA

struct KnnHopperBlock {
  KnnHopperPlan plan;
  unsigned char* shared;
  uint64_t *full, *empty;  // [stages]
  uint64_t* turn;          // [2], of the warpgroups that multiply
};

// The stage that comes next, and the parity of its round.
struct KnnStage {
  int index = 0;
  unsigned parity = 0;
  __device__ void next(int stages) {
    if (++index == stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// What a block does: every gridDim.x-th of all (segment of the database's tiles, pair of query
// tiles), all pairs of a segment before the next (KnnCudaPlan::Shares).
struct KnnRuns {
  int64_t at, pairs;
  int64_t pair = 0;
  int first = 0, count = 0;  // tiles of the run
  bool both = false;         // whether the second query tile of the pair exists

  __device__ explicit KnnRuns(const KnnScoreParams& p)
      : at(blockIdx.x), pairs((p.queries + 2 * kKnnTile - 1) / (2 * kKnnTile)) {}
  __device__ bool next(const KnnScoreParams& p) {
    const int64_t segment = at / pairs;
    if (segment >= p.segments) return false;
    pair = at - segment * pairs;
    first = static_cast<int>(segment * p.tiles / p.segments);
    count = static_cast<int>((segment + 1) * p.tiles / p.segments) - first;
    both = p.queries > (2 * pair + 1) * kKnnTile;
    at += gridDim.x;
    return true;
  }
};

// One thread orders all copies, in the order in which they are multiplied.
__device__ inline void knn_hopper_copy(const KnnScoreParams& p, const KnnHopperBlock& block) {
  const KnnHopperPlan& plan = block.plan;
  const int64_t tile_bytes = int64_t{plan.slabs} * kKnnSlabBytes;
  KnnStage stage, last;
  KnnRuns run(p);
  for (bool started = false; run.next(p); started = true) {
    if (started) barrier_wait(block.empty + last.index, last.parity);  // its queries are done with
    const int query_tiles = run.both ? 2 : 1;
    for (int tile = 0; tile < run.count; ++tile) {
      const int64_t database_tile = run.first + tile;
      for (int slab = 0; slab < plan.slabs; ++slab) {
        const int64_t slab_bytes = int64_t{slab} * kKnnSlabBytes;
        const bool queries = !plan.resident || tile == 0, half_norms = slab == plan.slabs - 1;
        uint64_t* const full = block.full + stage.index;
        barrier_wait(block.empty + stage.index, stage.parity ^ 1);
        barrier_arrive_expect(full, (queries ? 1 + query_tiles : 1) * kKnnSlabBytes +
                                        (half_norms ? kKnnHalfNormBytes : 0));
        for (int i = 0; queries && i < query_tiles; ++i) {
          bulk_copy(block.shared + plan.query_at(i, slab, stage.index),
                    p.query + (2 * run.pair + i) * tile_bytes + slab_bytes, kKnnSlabBytes, full);
        }
        bulk_copy(block.shared + plan.database_at(stage.index),
                  p.database + database_tile * tile_bytes + slab_bytes, kKnnSlabBytes, full);
        if (half_norms) {
          bulk_copy(block.shared + plan.half_norm_at(stage.index),
                    p.half_norm + database_tile * kKnnTile, kKnnHalfNormBytes, full);
        }
        last = stage;
        stage.next(plan.stages);
      }
    }
  }
}

// The largest score of each group, for 64 queries of which the first is `query`. A lane owns two
// queries and two neighbouring groups of the tile (knn_position).
__device__ __forceinline__ void knn_hopper_store(const KnnScoreParams& p, const float (&sum)[64],
                                                 const float (&h)[kKnnTile / 4], int64_t query,
                                                 int64_t tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kKnnHopperWarps;
  const int64_t row = query + warp * 16 + lane / 4;
  const int64_t pair = (p.first_group + tile * kKnnTileGroups) / 2 + lane % 4;
  ALS_UNROLL
  for (int half = 0; half < 2; ++half) {
    float largest[2] = {-INFINITY, -INFINITY};
    ALS_UNROLL
    for (int j = 0; j < kKnnTile / kKnnMmaColumns; ++j) {
      const float* s = sum + 4 * j + 2 * half;
      float& most = largest[j * kKnnMmaColumns / kKnnWarpColumns];
      most = fmaxf(most, fmaxf(s[0] - h[2 * j], s[1] - h[2 * j + 1]));
    }
    if (row + 8 * half < p.queries) {
      reinterpret_cast<float2*>(p.group_max)[(row + 8 * half) * (p.groups / 2) + pair] = {
          largest[0], largest[1]};
    }
  }
}

// A warpgroup multiplies one query tile of each pair. What a group of wgmma holds is written
// without a branch in it: ptxas would end the group there, and wait for more than is asked for.
__device__ __forceinline__ void knn_hopper_multiply(const KnnScoreParams& p,
                                                    const KnnHopperBlock& block, int mine) {
  const KnnHopperPlan& plan = block.plan;
  const unsigned shared = shared_address(block.shared);
  const int lane = threadIdx.x % 32;
  const auto arrive = [&](uint64_t* barrier) {
    if (lane == 0) barrier_arrive(barrier);
  };
  KnnStage stage;
  unsigned turn = mine ^ 1;              // the first one has the first turn
  float upper[64] = {}, lower[64] = {};  // its first and its last 64 queries
  KnnRuns run(p);
  while (run.next(p)) {
    if (mine == 1 && !run.both) {  // no queries: only keeps the stages going
      for (int64_t i = int64_t{run.count} * plan.slabs; i > 0; --i) {
        barrier_wait(block.full + stage.index, stage.parity);
        __syncwarp();  // no lane is left waiting when the parity comes round
        arrive(block.empty + stage.index);
        stage.next(plan.stages);
      }
      continue;
    }
    const bool in_turn = plan.in_turn && run.both;
    for (int tile = 0; tile < run.count; ++tile) {
      if (in_turn) {
        barrier_wait(block.turn + mine, turn);
        turn ^= 1;
      }
      int last = 0;  // the stage before
      for (int slab = 0; slab < plan.slabs; ++slab) {
        barrier_wait(block.full + stage.index, stage.parity);
        const unsigned query = shared + plan.query_at(mine, slab, stage.index);
        const uint64_t above = wgmma_descriptor(query);
        const uint64_t below = wgmma_descriptor(query + kKnnSlabBytes / 2);
        const uint64_t right = wgmma_descriptor(shared + plan.database_at(stage.index));
        wgmma_fence();
        ALS_UNROLL
        for (int k = 0; k < kKnnFeatures; k += kKnnMmaFeatures) {
          const bool add = k > 0 || slab > 0;
          wgmma_bf16(upper, advance_descriptor(above, k), advance_descriptor(right, k), add);
          wgmma_bf16(lower, advance_descriptor(below, k), advance_descriptor(right, k), add);
        }
        wgmma_commit();
        if (slab > 0) {
          wgmma_wait<1>();
          arrive(block.empty + last);
        }
        last = stage.index;
        stage.next(plan.stages);
      }
      if (in_turn) arrive(block.turn + 1 - mine);
      float h[kKnnTile / 4];
      const auto* from = reinterpret_cast<const float*>(block.shared + plan.half_norm_at(last));
      ALS_UNROLL
      for (int j = 0; j < kKnnTile / kKnnMmaColumns; ++j) {
        const float2 two =
            *reinterpret_cast<const float2*>(from + j * kKnnMmaColumns + lane % 4 * 2);
        h[2 * j] = two.x;
        h[2 * j + 1] = two.y;
      }
      fence_async();  // the next copy into this stage comes after these reads
      wgmma_wait<0>();
      wgmma_done(upper);
      wgmma_done(lower);
      arrive(block.empty + last);
      const int64_t query = (2 * run.pair + mine) * kKnnTile;
      knn_hopper_store(p, upper, h, query, run.first + tile);
      knn_hopper_store(p, lower, h, query + kKnnTile / 2, run.first + tile);
    }
  }
}

#define ALS_KNN_HOPPER_THREADS kKnnHopperThreads, 1
#else
#define ALS_KNN_HOPPER_THREADS 1
#endif

// What: max over each group of 16 rows of <q~, c~> - h, by wgmma.
// Grid: a block an SM, for shares in turn of all (segment of tiles, pair of query tiles): a slab of
// the database comes from L2 once for 256 queries. Warpgroup 0 copies, 1 and 2 multiply; a thread
// owns the scores of 4 of 128 queries with 2 groups of rows.
// Shared memory: dynamic, kKnnHopperShared, as KnnHopperPlan lays it out. `full` says that a stage
// is there, `empty` that both warpgroups are done with it, `turn` that the other one has
// multiplied. Determinism: one accumulator a score, features in order. Compiled without wgmma it
// allows one thread a block, by which the host knows (knn_cuda.cu), and fails to launch as what it
// is not.
__global__ void __launch_bounds__(ALS_KNN_HOPPER_THREADS) knn_score_hopper(KnnScoreParams p) {
#ifdef ALS_HAS_WGMMA
  ALS_DYNAMIC_SHARED(knn_shared);
  KnnHopperBlock block;
  block.plan = KnnHopperPlan::of(p.dim);
  block.shared = knn_shared + (0u - shared_address(knn_shared)) % kKnnHopperAlign;
  block.turn = reinterpret_cast<uint64_t*>(knn_shared + kKnnHopperShared) - 2;
  block.empty = block.turn - kKnnHopperStages;
  block.full = block.empty - kKnnHopperStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < block.plan.stages; ++i) {
      barrier_init(block.full + i, 1);
      barrier_init(block.empty + i, 2 * kKnnHopperWarps);
    }
    for (int i = 0; i < 2; ++i) barrier_init(block.turn + i, kKnnHopperWarps);
    fence_async();  // the copies see the barriers
  }
  __syncthreads();
  // The same in the whole warp, and told so: ptxas lets no wgmma overlap where threads may diverge.
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 128), 0);
  if (warpgroup == 0) {
    give_registers<kKnnCopyRegisters>();
    if (threadIdx.x == 0) knn_hopper_copy(p, block);
  } else {
    take_registers<kKnnMultiplyRegisters>();
    knn_hopper_multiply(p, block, warpgroup - 1);
  }
#else
  __trap();
#endif
}

}  // namespace als
