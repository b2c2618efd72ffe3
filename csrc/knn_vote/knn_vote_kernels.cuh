// Device code of knn_vote. Torch-free.
#pragma once

#include <cstdint>

#include "knn_vote/knn_vote_math.h"

namespace als {

constexpr int kVoteThreads = 128;
// Table of 2k slots of 12 bytes: 96 KiB of shared memory, of the 99 KiB that a block of sm_86,
// sm_89 and sm_120 can have. The static part has to fit into the rest.
constexpr int64_t kVoteMaxK = 4096;
constexpr int kVoteStaticShared = 3 * 1024;

struct VoteParams {
  const float* distance;  // [Q, k]
  const int64_t* index;   // [Q, k]
  const int64_t* label;   // [N]
  int64_t* winner;        // [Q]
  float* share;           // [Q]
  float* margin;          // [Q]
  int64_t rows, k, num_labels, num_classes, ignore_label;
  VoteWeighting weighting;
  float inverse_temperature;
  int slots;  // power of two, >= 2k
};

// Joins two partial results of disjoint sets of classes.
__device__ inline VoteResult merge_votes(VoteResult a, const VoteResult& b) {
  if (b.best > 0) a.offer(b.winner, b.best);
  if (b.second > a.second) a.second = b.second;
  a.total += b.total;
  return a;
}

// What: weighted plurality per row.  Equation: knn_vote.h.
// Grid: one block a row (grid-stride), one thread an entry (block-stride).
// Shared memory: open-addressing table of `slots` (class, votes), so any number of classes fits.
// Determinism: integer sums; the slot of a class may differ between runs, its sum and the ranking
// cannot.
__global__ void __launch_bounds__(kVoteThreads) knn_vote_kernel(VoteParams p) {
  ALS_DYNAMIC_SHARED(vote_shared);
  auto* votes = reinterpret_cast<unsigned long long*>(vote_shared);  // [slots]
  int* classes = reinterpret_cast<int*>(votes + p.slots);            // [slots]
  __shared__ VoteResult partial[kVoteThreads / 2];
  __shared__ float low[kVoteThreads];
  static_assert(sizeof partial + sizeof low <= kVoteStaticShared, "see kVoteMaxK");

  for (int64_t q = blockIdx.x; q < p.rows; q += gridDim.x) {
    const float* distance = p.distance + q * p.k;
    const int64_t* index = p.index + q * p.k;
    const auto class_of = [&](int64_t j) -> int64_t {
      if (index[j] < 0 || index[j] >= p.num_labels) return -1;
      const int64_t c = p.label[index[j]];
      return c == p.ignore_label || c < 0 || c >= p.num_classes ? -1 : c;
    };

    float d_min = INFINITY;
    for (int64_t j = threadIdx.x; j < p.k; j += kVoteThreads) {
      if (class_of(j) >= 0 && distance[j] < d_min) d_min = distance[j];
    }
    low[threadIdx.x] = d_min;
    for (int s = threadIdx.x; s < p.slots; s += kVoteThreads) {
      votes[s] = 0;
      classes[s] = -1;
    }
    __syncthreads();
    for (unsigned step = kVoteThreads / 2; step > 0; step /= 2) {
      if (threadIdx.x < step) low[threadIdx.x] = fminf(low[threadIdx.x], low[threadIdx.x + step]);
      __syncthreads();
    }
    d_min = low[0];

    VoteResult mine;
    for (int64_t j = threadIdx.x; j < p.k; j += kVoteThreads) {
      const int64_t c = class_of(j);
      if (c < 0) continue;
      const int64_t weight = vote_weight(distance[j], d_min, p.weighting, p.inverse_temperature);
      mine.total += weight;
      unsigned slot = static_cast<unsigned>(c * 2654435761ull) & (p.slots - 1);
      for (;;) {  // at most k classes in 2k slots: an empty slot is always found
        const int seen = atomicCAS(&classes[slot], -1, static_cast<int>(c));
        if (seen == -1 || seen == static_cast<int>(c)) break;
        slot = (slot + 1) & (p.slots - 1);
      }
      atomicAdd(&votes[slot], static_cast<unsigned long long>(weight));
    }
    __syncthreads();
    for (int s = threadIdx.x; s < p.slots; s += kVoteThreads) {
      if (classes[s] >= 0) mine.offer(classes[s], static_cast<int64_t>(votes[s]));
    }
    // The upper half of the threads that are left hands its results to the lower half.
    for (unsigned step = kVoteThreads / 2; step > 0; step /= 2) {
      if (threadIdx.x >= step && threadIdx.x < 2 * step) partial[threadIdx.x - step] = mine;
      __syncthreads();
      if (threadIdx.x < step) mine = merge_votes(mine, partial[threadIdx.x]);
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      p.winner[q] = mine.best > 0 ? mine.winner : p.ignore_label;
      p.share[q] = mine.share();
      p.margin[q] = mine.margin();
    }
  }
}

}  // namespace als
