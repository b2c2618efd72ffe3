// The twins of the instructions in common/mma.cuh against the layouts of the PTX documentation.
#include <gtest/gtest.h>

#include <random>

// clang-format off: the emulation comes before what it stands in for
#include "emulate_cuda.h"
#include "emulate_mma.h"
#include "common/mma.cuh"
// clang-format on

namespace {

float bf16(float x) { return als::round_to_bf16(x); }

TEST(Bf16, RoundsToTheNearestEvenAndSubnormalsToZero) {
  EXPECT_EQ(bf16(1.0f), 1.0f);
  EXPECT_EQ(bf16(1.0f + 0x1p-8f), 1.0f);                // a tie: to the even one below
  EXPECT_EQ(bf16(1.0f + 0x3p-8f), 1.0f + 0x1p-6f);      // a tie: to the even one above
  EXPECT_EQ(bf16(-1.0f - 0x1.8p-8f), -1.0f - 0x1p-7f);  // the nearest
  EXPECT_EQ(bf16(0x1p-127f), 0.0f);
  EXPECT_EQ(bf16(0x1p-126f), 0x1p-126f);
  EXPECT_EQ(als::pack_bf16(1.0f, -2.0f), 0xC0003F80u);
}

// Small integers: every sum is exact.
TEST(Mma, FragmentsAreThoseOfTheDocumentation) {
  std::mt19937 random(1);
  std::uniform_int_distribution<int> integer(-8, 8);
  float a[16][16], b[16][8], d[16][8], want[16][8];
  for (auto& row : a)
    for (float& x : row) x = integer(random);
  for (auto& row : b)
    for (float& x : row) x = integer(random);
  for (auto& row : d)
    for (float& x : row) x = integer(random);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      want[i][j] = d[i][j];
      for (int k = 0; k < 16; ++k) want[i][j] += a[i][k] * b[k][j];
    }
  }
  emulated::launch(1, 32, [&] {
    // PTX ISA, mma.m16n8k16: groupID = lane >> 2, threadID_in_group = lane % 4;
    //   a_i  row groupID for i in 0, 1, 4, 5, else groupID + 8
    //        column threadID_in_group * 2 + (i & 1), + 8 for i >= 4
    //   b_i  row threadID_in_group * 2 + (i & 1), + 8 for i >= 2;  column groupID
    //   c_i  row groupID for i < 2, else groupID + 8;  column threadID_in_group * 2 + (i & 1)
    const int group = static_cast<int>(threadIdx.x) >> 2;
    const int thread = static_cast<int>(threadIdx.x) % 4;
    float ai[8], bi[4], ci[4];
    for (int i = 0; i < 8; ++i) {
      const bool upper = i == 0 || i == 1 || i == 4 || i == 5;
      ai[i] = a[upper ? group : group + 8][thread * 2 + (i & 1) + (i >= 4 ? 8 : 0)];
    }
    for (int i = 0; i < 4; ++i) bi[i] = b[thread * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group];
    for (int i = 0; i < 4; ++i) ci[i] = d[i < 2 ? group : group + 8][thread * 2 + (i & 1)];
    const uint32_t left[4] = {als::pack_bf16(ai[0], ai[1]), als::pack_bf16(ai[2], ai[3]),
                              als::pack_bf16(ai[4], ai[5]), als::pack_bf16(ai[6], ai[7])};
    als::mma_bf16(ci, left, als::pack_bf16(bi[0], bi[1]), als::pack_bf16(bi[2], bi[3]));
    for (int i = 0; i < 4; ++i) d[i < 2 ? group : group + 8][thread * 2 + (i & 1)] = ci[i];
  });
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) EXPECT_EQ(d[i][j], want[i][j]) << i << ' ' << j;
  }
}

TEST(Mma, CutsOffBelowTheLargestTerm) {
  double product[8] = {1.0, 0x1p-24, 0x1p-24, 0.0, 0.0, 0.0, 0.0, 0.0};
  EXPECT_EQ(emulated::add_block(0.0f, product), 1.0f);  // exactly 1 + 2^-23, a float32
  product[0] = 0.0;
  EXPECT_EQ(emulated::add_block(0.0f, product), 0x1p-23f);
  product[0] = -1.0;
  EXPECT_EQ(emulated::add_block(1.0f, product), 0.0f);
}

TEST(LoadMatrices, FragmentsAreThoseOfTheDocumentation) {
  // PTX ISA, ldmatrix .x4: lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i; lane l
  // receives of each matrix row l / 4, elements 2 (l % 4) and 2 (l % 4) + 1.
  alignas(16) uint16_t rows[32][8];
  uint32_t got[32][4];
  for (int row = 0; row < 32; ++row) {
    for (int column = 0; column < 8; ++column) {
      rows[row][column] = static_cast<uint16_t>(100 * row + column);
    }
  }
  emulated::launch(1, 32, [&] { als::load_matrices(got[threadIdx.x], rows[31 - threadIdx.x]); });
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int row = 31 - (8 * matrix + lane / 4);
      const uint32_t low = 100 * row + 2 * (lane % 4);
      EXPECT_EQ(got[lane][matrix], low | (low + 1) << 16) << lane << ' ' << matrix;
    }
  }
}

TEST(Copies, AreThereAfterTheWaitAndIfLateNotBefore) {
  for (bool late : {false, true}) {
    emulated::copies_are_late = late;
    emulated::launch(1, 32, [&] {
      if (threadIdx.x > 0) return;
      alignas(16) const int from[2][4] = {{1, 2, 3, 4}, {5, 6, 7, 8}};
      alignas(16) int to[2][4] = {};
      als::copy16(to[0], from[0]);
      als::commit_copies();
      als::copy16(to[1], from[1]);
      als::commit_copies();
      EXPECT_EQ(to[0][0], late ? 0 : 1);
      als::wait_copies<1>();
      EXPECT_EQ(to[0][3], 4);
      EXPECT_EQ(to[1][0], late ? 0 : 5);
      als::wait_copies<0>();
      EXPECT_EQ(to[1][3], 8);
    });
  }
}

}  // namespace
