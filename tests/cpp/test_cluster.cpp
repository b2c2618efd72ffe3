// The twins of the instructions in common/cluster.cuh: what they do, and the misuse that they stop.
#include <gtest/gtest.h>

#include <vector>

// clang-format off: the emulation comes before what it stands in for
#include "emulate_cuda.h"
#include "emulate_cluster.h"
#include "common/cluster.cuh"
// clang-format on

namespace {

constexpr unsigned kThreads = 64, kSize = 4;

void barrier() {
  als::cluster_arrive();
  als::cluster_wait();
}

// Every block writes 100 x + its rank into its shared memory and reads that of all.
void exchange(int* out, bool starts, bool ends) {
  ALS_DYNAMIC_SHARED(bytes);
  int* mine = reinterpret_cast<int*>(bytes);
  mine[threadIdx.x] = static_cast<int>(100 * threadIdx.x + als::cluster_rank());
  if (starts) barrier();
  for (unsigned rank = 0; rank < als::cluster_blocks(); ++rank) {
    const unsigned other = kThreads - 1 - threadIdx.x;
    out[(blockIdx.x * kSize + rank) * kThreads + other] = als::map_shared_rank(mine, rank)[other];
  }
  if (ends) barrier();
}

void run(std::vector<int>& out, bool starts, bool ends) {
  emulated::launch(
      2 * kSize, kThreads, [&] { exchange(out.data(), starts, ends); }, kThreads * sizeof(int),
      kSize);
}

TEST(Cluster, BlocksReadEachOther) {
  std::vector<int> out(2 * kSize * kSize * kThreads, -1);
  run(out, true, true);
  for (unsigned block = 0; block < 2 * kSize; ++block) {
    for (unsigned rank = 0; rank < kSize; ++rank) {
      for (unsigned t = 0; t < kThreads; ++t) {
        ASSERT_EQ(out[(block * kSize + rank) * kThreads + t], static_cast<int>(100 * t + rank));
      }
    }
  }
}

TEST(Cluster, ABlockAloneIsAClusterOfOne) {
  int blocks = 0, value = 0;
  emulated::launch(1, 32, [&] {
    ALS_DYNAMIC_SHARED(bytes);
    int* mine = reinterpret_cast<int*>(bytes);
    if (threadIdx.x == 0) {
      *mine = 7;
      blocks = static_cast<int>(als::cluster_blocks());
      value = *als::map_shared_rank(mine, 0);
    }
    barrier();
  });
  EXPECT_EQ(blocks, 1);
  EXPECT_EQ(value, 7);
}

TEST(ClusterDeathTest, ABlockThatMayNotHaveStarted) {
  std::vector<int> out(2 * kSize * kSize * kThreads);
  EXPECT_DEATH(run(out, false, true), "may not have started");
}

TEST(ClusterDeathTest, ABlockThatMayHaveReturned) {
  std::vector<int> out(2 * kSize * kSize * kThreads);
  EXPECT_DEATH(run(out, true, false), "may have returned");
}

TEST(ClusterDeathTest, AnArrivalWithoutItsWait) {
  EXPECT_DEATH(emulated::launch(
                   2, 32,
                   [] {
                     als::cluster_arrive();
                     als::cluster_arrive();
                   },
                   16, 2),
               "arrives without having waited");
  EXPECT_DEATH(
      emulated::launch(2, 32, [] { als::cluster_wait(); }, 16, 2), "waits without having arrived");
}

TEST(ClusterDeathTest, ABlockThatDoesNotCome) {
  EXPECT_DEATH(emulated::launch(
                   2, 32,
                   [] {
                     if (blockIdx.x == 0) barrier();
                   },
                   16, 2),
               "waits for others that do not come");
}

}  // namespace
