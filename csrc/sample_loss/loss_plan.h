// How the CUDA kernel of long rows spreads a row over blocks and their shared memory. Torch-free.
#pragma once

#include <cstdint>

namespace als {

struct LossPlan {
  int blocks;     // that share a row: the blocks of a cluster, a power of two
  int64_t share;  // classes of a block; the last one has what is left
  int64_t chunk;  // classes that a block holds at a time; below `share` the logits are read twice
  bool early;     // reading begins before the target is known, which an ignored row has for nothing

  int64_t bytes(int64_t element) const { return chunk * element + 16; }  // rows may start anywhere
};

constexpr int kMostLossBlocks = 8;  // the most that every device with clusters takes

// Three blocks of an SM with 228 KiB: one loads while others compute and write. An estimate, by
// Little's law, of what has to be under way for all of the bandwidth of an H100 is 3.35 TB/s x 650
// ns / 132 SMs = 16 KiB an SM; a block that loads has all of its share under way.
constexpr int64_t kLossShareBytes = 72 << 10;
// Below it the wait for the target is long beside a share.
constexpr int64_t kLossEarlyBytes = 16 << 10;
// Without room for the share: many blocks an SM, so that they overlap.
constexpr int64_t kLossChunkBytes = 32 << 10;

// The fewest blocks with a share of kLossShareBytes, and no more than `most`. `shared`: bytes of a
// block for logits. The sums of a row have the order of the plan, which therefore knows nothing of
// the number of rows, of their address, or of what is computed.
inline LossPlan plan_loss(int64_t classes, int64_t element, int64_t shared, int most) {
  const int64_t pack = 16 / element;
  const auto round_up = [&](int64_t count) { return (count + pack - 1) / pack * pack; };
  const auto share = [&](int blocks) { return round_up((classes + blocks - 1) / blocks); };
  LossPlan plan{1, share(1), share(1), false};
  while (2 * plan.blocks <= most && plan.share * element > kLossShareBytes) {
    plan.blocks *= 2;
    plan.share = plan.chunk = share(plan.blocks);
  }
  if (plan.bytes(element) > shared) plan.chunk = kLossChunkBytes / element;
  plan.early = plan.share * element <= kLossEarlyBytes;
  return plan;
}

}  // namespace als
