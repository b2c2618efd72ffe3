// Losses of long rows: a block a row, or the blocks of a cluster that share it. Torch-free.
#pragma once

#include "common/cluster.cuh"
#include "common/mma.cuh"
#include "sample_loss/loss_plan.h"
#include "sample_loss/loss_row.cuh"

namespace als {

constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / 32;
constexpr int64_t kNoClass = INT64_MAX;

// The sums of a part of a row, and its first class of logit `max`.
template <typename T>
struct PartSums : OnlineSums<T> {
  int64_t top = kNoClass;

  __device__ RowSums<T> row_sums(SideTarget side) const {
    const bool has_q = side == SideTarget::kSmoothing || side == SideTarget::kProbabilities;
    return {this->max, this->max == T(-INFINITY) ? T(NAN) : this->rest,
            has_q ? this->mass : this->log_sum, this->side};
  }
  __device__ void merge(const PartSums& other) {  // of later classes
    if (other.max > this->max) top = other.top;
    OnlineSums<T>::merge(other);
  }
};

// In front of the logits in dynamic shared memory.
template <typename T>
struct alignas(16) BlockShared {
  T max[kBlockWarps];
  PartSums<T> warp[kBlockWarps];
  PartSums<T> part[kMostLossBlocks];  // of the blocks of the cluster, which write them
  T row_max;                          // of the whole row, as the next two
  int64_t row_top;
  RowResult<T> row_result;
};

// Logits in shared memory, in the same places of 16 bytes as in the row.
template <typename scalar_t>
struct Chunk {
  static constexpr int kPack = 16 / sizeof(scalar_t);

  const scalar_t* logits;  // [count], then -inf up to a multiple of kPack
  int64_t begin;           // their first class
  int count;

  // The logits from `i` on; 16 bytes at a time where they stand so.
  template <int kSize, typename T>
  __device__ void get(int i, T (&z)[kSize]) const {
    const scalar_t* from = logits + i;
    if (kSize == 1 || elements_to_pack(from) == 0) {
      load_numbers<kSize>(from, z);
    } else {
      ALS_UNROLL
      for (int j = 0; j < kSize; ++j) z[j] = to_real(from[j]);
    }
  }
  // Where class c stands, or -1.
  __device__ int place_of(int64_t c) const {
    return c >= begin && c < begin + count ? static_cast<int>(c - begin) : -1;
  }
};

// All copies of 16 bytes are under way at a time; the ragged ends go through registers. Nothing may
// be read before await_chunk.
template <typename scalar_t>
__device__ Chunk<scalar_t> start_chunk(scalar_t* cache, const scalar_t* row, int64_t begin,
                                       int count) {
  constexpr int kPack = Chunk<scalar_t>::kPack;
  const scalar_t* from = row + begin;
  const int to_pack = elements_to_pack(from);
  const int head = min(to_pack, count);
  const int packs = (count - head) / kPack;
  scalar_t* to = cache + (kPack - to_pack) % kPack;
  __syncthreads();  // everyone is done with what was there
  for (int p = static_cast<int>(threadIdx.x); p < packs; p += kBlockThreads) {
    copy16(to + head + p * kPack, from + head + p * kPack);
  }
  commit_copies();
  const int t = static_cast<int>(threadIdx.x);
  if (t < count - packs * kPack) {
    const int i = t < head ? t : packs * kPack + t;
    to[i] = from[i];
  }
  if (t < (kPack - count % kPack) % kPack) store(to + count + t, -INFINITY);
  return {to, begin, count};
}
__device__ inline void await_chunk() {
  wait_copies<0>();
  __syncthreads();
}

template <typename T>
__device__ T block_max(T x, T* slots) {  // [kBlockWarps]
  x = group_max(x, 32);
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
  __syncthreads();
  return group_max(slots[threadIdx.x % kBlockWarps], kBlockWarps);
}

// Adds a thread's classes of a chunk to its sums; their max is that of the block so far. Which
// classes are a thread's depends on nothing but their number, so neither do the bits of the sums.
template <bool kGeneral, typename scalar_t, typename T>
__device__ void add_chunk(PartSums<T>& own, const Chunk<scalar_t>& chunk, const DeviceRow<T>& row,
                          T* slots) {
  constexpr int kPack = Chunk<scalar_t>::kPack, kStep = kBlockThreads * kPack;
  const int first = static_cast<int>(threadIdx.x) * kPack;
  T z[kPack], max = -INFINITY;
  for (int i = first; i < chunk.count; i += kStep) {
    chunk.get(i, z);
    ALS_UNROLL
    for (int j = 0; j < kPack; ++j) max = larger(z[j], max);
  }
  max = block_max(max, slots);
  if (max > own.max) {
    own.raise(max);
    own.top = kNoClass;
  }
  const T base = own.max == T(-INFINITY) ? T(0) : own.max;
  const int y = chunk.place_of(row.target.y);
  const bool has_q = row.side == SideTarget::kSmoothing || row.side == SideTarget::kProbabilities;
  for (int i = first; i < chunk.count; i += kStep) {
    chunk.get(i, z);
    const int target = y - i;  // which of them
    if (!kGeneral && static_cast<unsigned>(target) >= kPack) {
      T sum = 0;
      ALS_UNROLL
      for (int j = 0; j < kPack; ++j) sum += exp_of_nonpositive(z[j] - base);
      own.rest += sum;
      continue;
    }
    T sum = 0;
    ALS_UNROLL
    for (int j = 0; j < kPack; ++j) {
      const T d = z[j] - base, e = exp_of_nonpositive(d);
      sum += j == target ? T(0) : e;
      if constexpr (kGeneral) {
        own.hit += j == target ? e : T(0);
        own.log_sum += weighted(e, d);
        const int64_t c = chunk.begin + i + j;
        if (z[j] == own.max) own.top = min(own.top, c);
        if (has_q && i + j < chunk.count) {
          own.mass += row.q(c);
          own.side += weighted(row.q(c), d);
        }
      }
    }
    own.rest += sum;
  }
}

// The sums of a block, in the threads of its first warp: those of lanes in a tree, then of warps.
template <bool kGeneral, typename T>
__device__ PartSums<T> block_sums(PartSums<T> sums, PartSums<T>* slots) {  // [kBlockWarps]
  const auto add = [&](int lanes) {
    sums.rest = group_sum(sums.rest, lanes);
    if constexpr (kGeneral) {
      sums.hit = group_sum(sums.hit, lanes);
      sums.log_sum = group_sum(sums.log_sum, lanes);
      sums.mass = group_sum(sums.mass, lanes);
      sums.side = group_sum(sums.side, lanes);
      sums.top = group_min(sums.top, lanes);
    }
  };
  add(32);
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x < 32) {
    sums = slots[threadIdx.x % kBlockWarps];
    add(kBlockWarps);
  }
  return sums;
}

// The sums of a row from those of its blocks, in the first warp of each: a block sends its own to
// all, who add them up in the order of their classes. Begins with the arrival that says that `part`
// may be written, and ends with the next one.
template <typename T>
__device__ PartSums<T> cluster_sums(PartSums<T> sums, PartSums<T>* part,  // [kMostLossBlocks]
                                    unsigned rank, unsigned blocks) {
  cluster_wait();
  if (threadIdx.x < blocks) *map_shared_rank(part + rank, threadIdx.x) = sums;
  __syncwarp();
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < 32) {
    sums = part[0];
    for (unsigned b = 1; b < blocks; ++b) sums.merge(part[b]);
  }
  __syncwarp();
  cluster_arrive();
  return sums;
}

// Writes what make(i, x) puts into x to out[i, ...), for all of out + [0, count): kPack numbers at
// a time from `head` on.
template <int kPack, typename T, typename grad_t, typename Index, class Make>
__device__ void write_packs(grad_t* out, Index count, Index head, const Make& make) {
  const Index t = threadIdx.x, packs = (count - head) / kPack;
  for (Index p = t; p < packs; p += kBlockThreads) {
    T x[kPack];
    make(head + p * kPack, x);
    store_numbers<kPack>(out + head + p * kPack, x);
  }
  if (t < count - packs * kPack) {
    const Index i = t < head ? t : packs * kPack + t;
    T x[1];
    make(i, x);
    store(out + i, *x);
  }
}

// e^d for a gradient that is rounded to grad_t: 16 bits hide the few units in the 24th of __expf.
template <typename grad_t, typename T>
__device__ T exp_for(T d) {
  if constexpr (sizeof(grad_t) == 2) return __expf(d);
  return exp_of_nonpositive(d);
}

// The gradient of a chunk; out: its first class.
template <bool kGeneral, typename scalar_t, typename grad_t, typename T>
__device__ void write_gradient(grad_t* out, const Chunk<scalar_t>& chunk, const DeviceRow<T>& row,
                               T max) {
  constexpr int kPack = Chunk<scalar_t>::kPack;
  const int y = chunk.place_of(row.target.y);
  // Where reading starts in packs, writing mostly does, too; writing comes first.
  int head = elements_to_pack(chunk.logits);
  if (elements_to_pack(out + head) != 0) head = elements_to_pack(out);
  write_packs<kPack, T>(out, chunk.count, min(head, chunk.count), [&](int i, auto& x) {
    constexpr int kSize = std::extent_v<std::remove_reference_t<decltype(x)>>;
    chunk.get(i, x);
    ALS_UNROLL
    for (int j = 0; j < kSize; ++j) {
      const T d = x[j] - max;
      x[j] = row.template slope<kGeneral>(chunk.begin + i + j, exp_for<grad_t>(d), d);
    }
    const int target = y - i;
    if (static_cast<unsigned>(target) < kSize) {
      ALS_UNROLL
      for (int j = 0; j < kSize; ++j) x[j] = j == target ? row.result.at_target : x[j];
    }
  });
}

template <typename grad_t, typename T>
__device__ void fill(grad_t* out, int64_t count, T value) {
  const int64_t head = min(static_cast<int64_t>(elements_to_pack(out)), count);
  write_packs<16 / sizeof(grad_t), T>(out, count, head, [&](int64_t, auto& x) {
    ALS_UNROLL
    for (T& element : x) element = value;
  });
}

// What: losses, state and gradients of rows of any number of classes.  Equations: loss_math.h.
// Grid: a cluster a row, grid-stride; a block has plan.share neighbouring classes.
// Shared memory: BlockShared, and plan.chunk logits. A share that fits is read once, a longer one
// once for the sums and once for the gradient; a long one of a row without a loss is not.
// Determinism: a row's sums have one order: thread, lane, warp, block.
template <bool kGeneral, typename scalar_t, typename grad_t>
__global__ void __launch_bounds__(kBlockThreads, sizeof(accumulate_t<scalar_t>) == 8 ? 2 : 3)
    loss_rows_by_block(LossJob<scalar_t, grad_t> job, LossPlan plan) {
  using T = accumulate_t<scalar_t>;
  ALS_DYNAMIC_SHARED(loss_shared);
  auto& shared = *reinterpret_cast<BlockShared<T>*>(loss_shared);
  auto* cache = reinterpret_cast<scalar_t*>(loss_shared + sizeof shared);
  const unsigned blocks = cluster_blocks(), rank = cluster_rank();
  const int64_t begin = min(rank * plan.share, job.classes);
  const int64_t end = min(begin + plan.share, job.classes);
  const int64_t chunks = (end - begin + plan.chunk - 1) / plan.chunk;
  // The hard bootstrap's arg max is no part of the state: its backward looks for it again.
  const bool sums_up = !job.state_in || job.spec.side() == SideTarget::kArgmax;
  const bool writes = rank == 0 && threadIdx.x == 0;
  if (sums_up && blocks > 1) cluster_arrive();

  for (int64_t r = blockIdx.x / blocks; r < job.rows; r += gridDim.x / blocks) {
    const auto start = [&](int64_t from) {
      return start_chunk(cache, job.row(r), from, static_cast<int>(min(plan.chunk, end - from)));
    };
    Chunk<scalar_t> chunk;
    if (plan.early) chunk = start(begin);
    const DeviceTarget<T> target = target_of(job, r);
    grad_t* out = job.grad ? job.grad + r * job.classes : nullptr;
    if (target.fate != RowFate::kLoss) {
      if (writes) write_row(job, r, target.fate, T(0), RowSums<T>{});
      if (out) fill(out + begin, end - begin, value_without_loss<T>(target.fate));
      wait_copies<0>();  // the next row's go to the same places
      continue;
    }
    if (!plan.early) chunk = start(begin);
    DeviceRow<T> row = device_row<kGeneral>(job, r, target);
    RowSums<T> sums{};
    if (!sums_up)
      sums = {job.state_in[3 * r], job.state_in[3 * r + 1], job.state_in[3 * r + 2], T(0)};
    await_chunk();  // the state is on its way, too

    if (sums_up) {
      PartSums<T> all;
      for (;;) {
        add_chunk<kGeneral>(all, chunk, row, shared.max);
        if (chunk.begin + plan.chunk >= end) break;
        chunk = start(chunk.begin + plan.chunk);
        await_chunk();
      }
      all = block_sums<kGeneral>(all, shared.warp);
      if (blocks > 1) all = cluster_sums(all, shared.part, rank, blocks);
      sums = all.row_sums(row.side);
      row.top = all.top;
    }
    if (threadIdx.x < 32) {
      finish_device_row<kGeneral>(job, r, row, sums, row.top, writes);
      if (threadIdx.x == 0) {
        shared.row_max = sums.max;
        shared.row_top = row.top;
        shared.row_result = row.result;
      }
    }
    __syncthreads();
    const T max = shared.row_max;
    row.top = shared.row_top;
    row.result = shared.row_result;
    if (!out) continue;
    for (int64_t k = 0; k < chunks; ++k) {  // the one that is there comes first
      const int64_t from = begin + (sums_up ? chunks - 1 - k : k) * plan.chunk;
      if (chunk.begin != from) {
        chunk = start(from);
        await_chunk();
      }
      write_gradient<kGeneral>(out + from, chunk, row, max);
    }
  }
  if (sums_up && blocks > 1) cluster_wait();
}

}  // namespace als
