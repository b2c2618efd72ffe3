// Device code of knn, step 3 for compute capability 9.0: the scores of knn_score.cuh, by wgmma.
// Torch-free.
#pragma once

#include "common/wgmma.cuh"
#include "knn/knn_score.cuh"

namespace als {

constexpr int kKnnHopperThreads = 3 * 128;         // a warpgroup that copies, two that multiply
constexpr int kKnnHopperShared = 227 * 1024;       // all that a block may have: one block an SM
constexpr int kKnnHopperStages = 16;               // at most
constexpr int kKnnHopperLag = 4;                   // slabs by which the lower half is behind
constexpr int kKnnHopperHalf = kKnnTile / 2;       // queries behind one accumulator
constexpr int kKnnHopperArrivals = 2 * 128 / 32;   // warps that give a stage back
constexpr int kKnnHopperAlignment = kWgmmaPattern;  // of slabs
static_assert(kKnnRowBytes == kWgmmaRow && kKnnSlabBytes % kKnnHopperAlignment == 0 &&
                  kKnnHalfNormBytes % kKnnHopperAlignment == 0,
              "packed slabs are operands of wgmma as they are");

// Shared memory: queries if they stay, stages, barriers. A stage is a slab of the database, slabs
// of both query tiles if they do not stay, and h for the last slab of a tile.
struct KnnHopperRing {
  int slabs;  // of a row
  bool resident;
  int stages, stage_bytes;

  static ALS_HOST_DEVICE KnnHopperRing of(int slabs) {
    constexpr int kBarriers = 2 * kKnnHopperStages * static_cast<int>(sizeof(uint64_t));
    constexpr int kRoom = kKnnHopperShared - kKnnHopperAlignment - kBarriers;
    // Stages that hold the queries too, in which 2 kKnnHopperLag slabs are held at a time
    constexpr int kFewest = 2 * kKnnHopperLag + 1;
    KnnHopperRing r{slabs, false, 0, 0};
    r.stage_bytes = kKnnSlabBytes + kKnnHalfNormBytes;
    int stages = slabs > kRoom / (2 * kKnnSlabBytes) ? 0 : (kRoom - r.query_bytes()) / r.stage_bytes;
    r.resident = stages >= kFewest;
    if (!r.resident) {
      r.stage_bytes += 2 * kKnnSlabBytes;
      stages = kRoom / r.stage_bytes;
      static_assert(kRoom / (3 * kKnnSlabBytes + kKnnHalfNormBytes) >= kFewest, "room to go on");
    }
    r.stages = stages < kKnnHopperStages ? stages : kKnnHopperStages;
    return r;
  }
  ALS_HOST_DEVICE int query_bytes() const { return 2 * slabs * kKnnSlabBytes; }
  ALS_HOST_DEVICE int stage_offset(int stage) const {
    return (resident ? query_bytes() : 0) + stage * stage_bytes;
  }
  ALS_HOST_DEVICE int query_offset(int slab, int stage, int tile) const {
    return tile * kKnnSlabBytes + (resident ? 2 * slab * kKnnSlabBytes
                                            : stage_offset(stage) + kKnnSlabBytes);
  }
  ALS_HOST_DEVICE int half_norm_offset(int stage) const {
    return stage_offset(stage) + stage_bytes - kKnnHalfNormBytes;
  }
};

#ifdef ALS_HAS_WGMMA

struct KnnHopperBlock {
  KnnHopperRing ring;
  unsigned char* shared;
  uint64_t *full, *empty;  // [stages]
};

// Where in the ring somebody is, and how often it went round.
struct KnnCursor {
  int stage = 0;
  unsigned round = 0;
  __device__ void next(int stages) {
    if (++stage == stages) stage = 0, round ^= 1;
  }
};

// What a block does: its share of all (pair of query tiles, database tile), as runs of database
// tiles before one pair.
struct KnnRuns {
  int64_t at, end, tiles;
  int64_t pair;
  int first, count;  // database tiles of the run

  __device__ explicit KnnRuns(const KnnScoreParams& p) : tiles(p.tiles) {
    const int64_t pairs = (p.queries + 2 * kKnnTile - 1) / (2 * kKnnTile);
    at = pairs * tiles * blockIdx.x / gridDim.x;
    end = pairs * tiles * (blockIdx.x + 1) / gridDim.x;
  }
  __device__ bool next() {
    if (at == end) return false;
    pair = at / tiles;
    first = static_cast<int>(at % tiles);
    count = static_cast<int>(min(tiles - first, end - at));
    at += count;
    return true;
  }
};

// One thread copies everything, in the order in which it is multiplied.
__device__ inline void knn_hopper_copy(const KnnScoreParams& p, const KnnHopperBlock& block) {
  const KnnHopperRing& ring = block.ring;
  const int64_t tile_bytes = int64_t{ring.slabs} * kKnnSlabBytes;
  KnnCursor stage, last;
  KnnRuns run(p);
  for (bool started = false; run.next(); started = true) {
    // Nobody reads the queries of the run before any more.
    if (started) barrier_wait(block.empty + last.stage, last.round);
    const int query_tiles = p.queries > (2 * run.pair + 1) * kKnnTile ? 2 : 1;
    for (int tile = 0; tile < run.count; ++tile) {
      for (int slab = 0; slab < ring.slabs; ++slab) {
        uint64_t* full = block.full + stage.stage;
        unsigned char* const place = block.shared + ring.stage_offset(stage.stage);
        const bool with_queries = !ring.resident || tile == 0, with_h = slab == ring.slabs - 1;
        barrier_wait(block.empty + stage.stage, stage.round ^ 1);
        barrier_arrive_expect(full, kKnnSlabBytes * (with_queries ? 1 + query_tiles : 1) +
                                        (with_h ? kKnnHalfNormBytes : 0));
        for (int i = 0; with_queries && i < query_tiles; ++i) {
          bulk_copy(block.shared + ring.query_offset(slab, stage.stage, i),
                    p.query + (2 * run.pair + i) * tile_bytes + int64_t{slab} * kKnnSlabBytes,
                    kKnnSlabBytes, full);
        }
        bulk_copy(place,
                  p.database + (run.first + tile) * tile_bytes + int64_t{slab} * kKnnSlabBytes,
                  kKnnSlabBytes, full);
        if (with_h) {
          bulk_copy(block.shared + ring.half_norm_offset(stage.stage),
                    p.half_norm + (run.first + tile) * int64_t{kKnnTile}, kKnnHalfNormBytes, full);
        }
        last = stage;
        stage.next(ring.stages);
      }
    }
  }
}

// A warpgroup multiplies query tile `half` of each pair.
__device__ inline void knn_hopper_multiply(const KnnScoreParams& p, const KnnHopperBlock& block,
                                           int of_pair) {
  const KnnHopperRing& ring = block.ring;
  const unsigned shared = shared_address(block.shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int slabs = ring.slabs;
  const int lag = min(slabs, kKnnHopperLag);
  KnnCursor ahead, behind, freed;  // slabs of the upper half, of the lower half, given back

  // A slab into an accumulator, of 64 queries from `row` on.
  const auto multiply = [&](float (&sum)[64], int row, int slab, int stage) {
    const uint64_t a = wgmma_descriptor(shared + ring.query_offset(slab, stage, of_pair) +
                                        row * kKnnRowBytes);
    const uint64_t b = wgmma_descriptor(shared + ring.stage_offset(stage));
    wgmma_bf16(sum, a, b, slab > 0);
    if (int64_t{slab} * kKnnFeatures + kKnnMmaFeatures < p.dim) {  // else only zeros left
      wgmma_bf16(sum, advance_descriptor(a, kKnnMmaFeatures),
                 advance_descriptor(b, kKnnMmaFeatures), true);
    }
  };
  const auto release = [&](int stages) {
    for (int i = 0; i < stages; ++i) {
      if (lane == 0) barrier_arrive(block.empty + freed.stage);
      freed.next(ring.stages);
    }
  };

  float upper[64] = {}, lower[64] = {};
  float h[kKnnTile / 4];
  KnnRuns run(p);
  while (run.next()) {
    const int64_t query_tile = 2 * run.pair + of_pair;
    if (query_tile * kKnnTile >= p.queries) {  // without queries: only keeps the ring going
      for (int64_t i = int64_t{run.count} * slabs; i > 0; --i) {
        barrier_wait(block.full + ahead.stage, ahead.round);
        release(1);
        ahead.next(ring.stages), behind.next(ring.stages);
      }
      continue;
    }
    const auto store = [&](const float (&sum)[64], int row, int tile) {
      const int64_t group = p.first_group + (run.first + tile) * int64_t{kKnnTileGroups} +
                            2 * (lane % 4);
      ALS_UNROLL
      for (int i = 0; i < 2; ++i) {
        float largest[2];
        ALS_UNROLL
        for (int g = 0; g < 2; ++g) {
          largest[g] = -INFINITY;
          ALS_UNROLL
          for (int j = 8 * g; j < 8 * g + 8; ++j) {
            const float* s = sum + 4 * j + 2 * i;
            largest[g] = fmaxf(largest[g], fmaxf(s[0] - h[2 * j], s[1] - h[2 * j + 1]));
          }
        }
        const int64_t query = query_tile * kKnnTile + row + 16 * warp + 8 * i + lane / 4;
        if (query < p.queries) {
          *reinterpret_cast<float2*>(p.group_max + query * p.groups + group) = {largest[0],
                                                                                largest[1]};
        }
      }
    };
    for (int tile = 0; tile < run.count; ++tile) {
      wgmma_fence();
      for (int slab = 0; slab < lag; ++slab) {
        barrier_wait(block.full + ahead.stage, ahead.round);
        multiply(upper, 0, slab, ahead.stage);
        ahead.next(ring.stages);
      }
      wgmma_commit();
      if (tile > 0) {  // the lower half of the tile before
        wgmma_wait<1>();
        release(lag);
        store(lower, kKnnHopperHalf, tile - 1);
      }
      for (int slab = lag; slab < slabs; ++slab) {
        barrier_wait(block.full + ahead.stage, ahead.round);
        wgmma_fence();
        multiply(upper, 0, slab, ahead.stage);
        multiply(lower, kKnnHopperHalf, slab - lag, behind.stage);
        wgmma_commit();
        ahead.next(ring.stages), behind.next(ring.stages);
        wgmma_wait<1>();
        if (slab > lag) release(1);
      }
      const auto* from = reinterpret_cast<const float*>(block.shared + ring.half_norm_offset((ahead.stage + ring.stages - 1) % ring.stages));
      wgmma_fence();
      for (int slab = slabs - lag; slab < slabs; ++slab) {
        multiply(lower, kKnnHopperHalf, slab, behind.stage);
        behind.next(ring.stages);
      }
      wgmma_commit();
      ALS_UNROLL
      for (int j = 0; j < kKnnTile / 8; ++j) {
        const float2 two = *reinterpret_cast<const float2*>(from + 8 * j + 2 * (lane % 4));
        h[2 * j] = two.x, h[2 * j + 1] = two.y;
      }
      fence_async();  // h is read: the next copy may take its place
      wgmma_wait<1>();
      if (slabs > lag) release(1);
      store(upper, 0, tile);
    }
    wgmma_wait<0>();
    release(lag);
    store(lower, kKnnHopperHalf, run.count - 1);
  }
}

#endif

#ifdef ALS_HAS_WGMMA
#define ALS_KNN_HOPPER_BOUNDS kKnnHopperThreads, 1
#else
#define ALS_KNN_HOPPER_BOUNDS 1
#endif

__global__ void __launch_bounds__(ALS_KNN_HOPPER_BOUNDS) knn_score_hopper(KnnScoreParams p) {
#ifdef ALS_HAS_WGMMA
  ALS_DYNAMIC_SHARED(knn_shared);
  unsigned char* const end = knn_shared + kKnnHopperShared;
  KnnHopperBlock block;
  block.ring = KnnHopperRing::of(static_cast<int>(knn_slabs(p.dim)));
  block.shared = knn_shared + (-shared_address(knn_shared) & (kKnnHopperAlignment - 1u));
  block.full = reinterpret_cast<uint64_t*>(end) - 2 * kKnnHopperStages;
  block.empty = block.full + kKnnHopperStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < block.ring.stages; ++i) {
      barrier_init(block.full + i, 1);
      barrier_init(block.empty + i, kKnnHopperArrivals);
    }
    fence_async();  // copies see the barriers
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) knn_hopper_copy(p, block);
  } else {
    take_registers<232>();
    knn_hopper_multiply(p, block, warpgroup - 1);
  }
#else
  __trap();
#endif
}

}  // namespace als
