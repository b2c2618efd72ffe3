// The twins of the instructions in common/wgmma.cuh against the layouts of the PTX documentation,
// and that they notice misuse.
#include <gtest/gtest.h>

#include <random>

// clang-format off: the emulation comes before what it stands in for
#include "emulate_cuda.h"
#include "emulate_mma.h"
#include "emulate_wgmma.h"
#include "common/wgmma.cuh"
// clang-format on

namespace {

constexpr int kRows = 128, kColumns = 128, kDepth = 32;  // two groups of eight warps; one slab

// Row `row` of a slab in shared memory, with the swizzle written as the documentation draws it: in
// two rows that follow each other, chunk c stands at c, c ^ 1, c ^ 2 and c ^ 3 in turn.
uint16_t* element(unsigned char* slab, int row, int k) {
  const int chunk = k / 8 ^ row / 2 % 4;
  return reinterpret_cast<uint16_t*>(slab + row * 64 + chunk * 16) + k % 8;
}

uint16_t bits_of(float x) { return static_cast<uint16_t>(als::pack_bf16(x, 0.0f)); }

struct Matrices {  // small integers: every sum is exact
  float a[kRows][kDepth], b[kColumns][kDepth];
  Matrices() {
    std::mt19937 random(1);
    std::uniform_int_distribution<int> integer(-8, 8);
    for (auto& row : a)
      for (float& x : row) x = static_cast<float>(integer(random));
    for (auto& row : b)
      for (float& x : row) x = static_cast<float>(integer(random));
  }
  void write(unsigned char* left, unsigned char* right) const {
    for (int row = 0; row < kRows; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        *element(left, row, k) = bits_of(a[row][k]);
        *element(right, row, k) = bits_of(b[row][k]);
      }
    }
  }
  float product(int row, int column) const {
    float sum = 0.0f;
    for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[column][k];
    return sum;
  }
};

// Slabs where the swizzle begins.
unsigned char* first_slab() {
  return emulated::block->shared.get() +
         (0u - als::shared_address(emulated::block->shared.get())) % 512;
}

class Wgmma : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override { emulated::copies_are_late = GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Copies, Wgmma, testing::Bool(),
                         [](const auto& late) { return late.param ? "Late" : "Early"; });

TEST_P(Wgmma, FragmentsAreThoseOfTheDocumentation) {
  // PTX ISA, register fragment of accumulator D of wgmma.m64nNk16: warp w of the warpgroup has rows
  // 16 w to 16 w + 15; d0, d1 are row lane / 4, d2, d3 row lane / 4 + 8, in columns 2 (lane % 4)
  // and the next; d4 to d7 the same, eight columns on.
  const Matrices m;
  static float got[64][kColumns];
  emulated::launch(
      1, 128,
      [&] {
        unsigned char *left = first_slab(), *right = left + 8192;
        if (threadIdx.x == 0) m.write(left, right);
        __syncthreads();
        float d[64];
        std::fill(d, d + 64, 1e9f);  // the first product does not add to it
        const uint64_t a = als::wgmma_descriptor(als::shared_address(left + 64 * 64));
        const uint64_t b = als::wgmma_descriptor(als::shared_address(right));
        als::wgmma_fence();
        als::wgmma_bf16(d, a, b, false);
        als::wgmma_bf16(d, als::advance_descriptor(a, 16), als::advance_descriptor(b, 16), true);
        als::wgmma_commit();
        EXPECT_EQ(d[5], emulated::kInFlight);
        als::wgmma_wait<0>();
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        for (int i = 0; i < 64; ++i) {
          const int row = 16 * warp + lane / 4 + (i % 4 >= 2 ? 8 : 0);
          got[row][i / 4 * 8 + 2 * (lane % 4) + i % 2] = d[i];
        }
      },
      3 * 8192);
  for (int row = 0; row < 64; ++row) {  // the second half of A
    for (int column = 0; column < kColumns; ++column) {
      ASSERT_EQ(got[row][column], m.product(64 + row, column)) << row << ' ' << column;
    }
  }
}

TEST_P(Wgmma, WaitLeavesTheLastGroupsInFlight) {
  emulated::launch(
      1, 128,
      [&] {
        std::memset(emulated::block->shared.get(), 0, 3 * 8192);
        __syncthreads();
        const uint64_t zeros = als::wgmma_descriptor(als::shared_address(first_slab()));
        float first[64] = {}, second[64] = {};
        als::wgmma_fence();
        als::wgmma_bf16(first, zeros, zeros, false);
        als::wgmma_commit();
        als::wgmma_bf16(second, zeros, zeros, false);
        als::wgmma_commit();
        als::wgmma_wait<1>();
        EXPECT_EQ(first[0], 0.0f);
        EXPECT_EQ(second[0], emulated::kInFlight);
        als::wgmma_wait<0>();
        EXPECT_EQ(second[63], 0.0f);
      },
      3 * 8192);
}

// A warp whose lane 0 copies and counts.
template <typename Body>
void with_barrier(const Body& body, unsigned threads = 32) {
  alignas(16) static const unsigned char source[64] = {1, 2, 3, 4};
  emulated::launch(
      1, threads,
      [&] {
        auto* barrier = reinterpret_cast<uint64_t*>(emulated::block->shared.get() + 128);
        if (threadIdx.x == 0) {
          als::barrier_init(barrier, 1);
          als::fence_async();
        }
        __syncthreads();
        body(barrier, source, emulated::block->shared.get());
      },
      256);
}

TEST_P(Wgmma, ACopyIsThereAfterTheWaitAndIfLateNotBefore) {
  with_barrier([&](uint64_t* barrier, const unsigned char* from, unsigned char* to) {
    if (threadIdx.x == 0) {
      als::barrier_arrive_expect(barrier, 48);
      als::bulk_copy(to, from, 16, barrier);
      als::bulk_copy(to + 16, from, 32, barrier);
      EXPECT_EQ(to[2], emulated::copies_are_late ? 0xFF : 3);
    }
    als::barrier_wait(barrier, 0);
    EXPECT_EQ(to[2], 3);
    EXPECT_EQ(to[18], 3);
    als::barrier_wait(barrier, 0);  // still over
  });
}

TEST_P(Wgmma, APhaseCountsArrivalsAndBytesInAnyOrder) {
  with_barrier(
      [&](uint64_t* barrier, const unsigned char* from, unsigned char* to) {
        if (threadIdx.x == 33) {  // before the bytes are announced
          als::bulk_copy(to, from, 16, barrier);
          als::barrier_arrive_expect(barrier, 16);
        }
        als::barrier_wait(barrier, 0);
        EXPECT_EQ(to[3], 4);
        __syncthreads();
        if (threadIdx.x == 0) als::barrier_arrive(barrier);
        als::barrier_wait(barrier, 1);
      },
      64);
}

// ---- misuse ----

using Barrier = uint64_t*;
using Source = const unsigned char*;
using Target = unsigned char*;

TEST(WgmmaDeathTest, BytesThatDoNotAddUp) {
  for (unsigned announced : {16u, 48u}) {
    EXPECT_DEATH(with_barrier([=](Barrier barrier, Source from, Target to) {
                   if (threadIdx.x == 0) {
                     als::barrier_arrive_expect(barrier, announced);
                     als::bulk_copy(to, from, 32, barrier);
                   }
                   als::barrier_wait(barrier, 0);
                 }),
                 "waits for others");
  }
}

TEST(WgmmaDeathTest, AWaitForAPhaseThatDoesNotCome) {
  EXPECT_DEATH(with_barrier([](Barrier barrier, Source, Target) { als::barrier_wait(barrier, 0); }),
               "waits for others");
}

TEST(WgmmaDeathTest, MoreArrivalsThanAPhaseCounts) {
  EXPECT_DEATH(with_barrier([](Barrier barrier, Source, Target) {
                 if (threadIdx.x > 0) return;
                 als::barrier_arrive_expect(barrier, 16);
                 als::barrier_arrive(barrier);
               }),
               "more arrivals");
}

TEST(WgmmaDeathTest, ACopyThatNobodyWaitsFor) {
  emulated::copies_are_late = true;
  EXPECT_DEATH(with_barrier([](Barrier barrier, Source from, Target to) {
                 if (threadIdx.x > 0) return;
                 als::barrier_arrive_expect(barrier, 16);
                 als::bulk_copy(to, from, 16, barrier);
               }),
               "before a copy was waited for");
}

TEST(WgmmaDeathTest, ACopyThatIsNotAligned) {
  EXPECT_DEATH(with_barrier([](Barrier barrier, Source from, Target to) {
                 als::bulk_copy(to + 8, from, 16, barrier);
               }),
               "not aligned");
}

TEST(WgmmaDeathTest, ABarrierThatCopiesDoNotSee) {
  EXPECT_DEATH(emulated::launch(1, 32,
                                [] {
                                  auto* barrier =
                                      reinterpret_cast<uint64_t*>(emulated::block->shared.get());
                                  if (threadIdx.x > 0) return;
                                  als::barrier_init(barrier, 1);
                                  als::bulk_copy(barrier + 2, barrier + 4, 16, barrier);
                                }),
               "no fence_async");
}

// A warpgroup with an accumulator and two operands of zeros.
template <typename Body>
void with_operand(const Body& body) {
  emulated::launch(
      1, 128,
      [&] {
        std::memset(emulated::block->shared.get(), 0, 3 * 8192);
        __syncthreads();
        float d[64] = {};
        body(d, als::wgmma_descriptor(als::shared_address(first_slab())));
      },
      3 * 8192);
}

TEST(WgmmaDeathTest, ProductsWithoutAFence) {
  EXPECT_DEATH(with_operand([](float (&d)[64], uint64_t a) { als::wgmma_bf16(d, a, a, false); }),
               "no fence");
  EXPECT_DEATH(with_operand([](float (&d)[64], uint64_t a) {
                 als::wgmma_fence();
                 als::wgmma_bf16(d, a, a, false);
                 als::wgmma_commit();
                 als::wgmma_wait<0>();
                 als::wgmma_bf16(d, a, a, true);
               }),
               "no fence");
}

TEST(WgmmaDeathTest, AnAccumulatorThatIsTakenForDoneTooEarly) {
  EXPECT_DEATH(with_operand([](float (&d)[64], uint64_t a) {
                 als::wgmma_fence();
                 als::wgmma_bf16(d, a, a, false);
                 als::wgmma_commit();
                 als::wgmma_done(d);
               }),
               "in flight");
}

TEST(WgmmaDeathTest, AnAccumulatorThatIsWrittenTooEarly) {
  EXPECT_DEATH(with_operand([](float (&d)[64], uint64_t a) {
                 als::wgmma_fence();
                 als::wgmma_bf16(d, a, a, false);
                 als::wgmma_commit();
                 d[7] = 0.0f;
                 als::wgmma_wait<0>();
               }),
               "was written while");
}

TEST(WgmmaDeathTest, AProductThatNobodyWaitsFor) {
  EXPECT_DEATH(with_operand([](float (&d)[64], uint64_t a) {
                 als::wgmma_fence();
                 als::wgmma_bf16(d, a, a, false);
                 als::wgmma_commit();
               }),
               "before a product was waited for");
}

TEST(WgmmaDeathTest, DescriptorsOfSomethingElse) {
  const auto multiply = [](uint64_t change) {
    emulated::copies_are_late = true;  // operands are read at once
    with_operand([=](float (&d)[64], uint64_t a) {
      als::wgmma_fence();
      als::wgmma_bf16(d, a ^ change, a, false);
    });
  };
  EXPECT_DEATH(multiply(uint64_t{3} << 62), "another swizzle");
  EXPECT_DEATH(multiply(uint64_t{1} << 49), "base offset");
  EXPECT_DEATH(multiply(4), "do not begin a pattern");      // 64 bytes on: the next row
  EXPECT_DEATH(multiply(uint64_t{1} << 12), "outside of");  // 64 KiB on
  EXPECT_DEATH(with_operand([](float (&d)[64], uint64_t a) {
                 als::wgmma_fence();
                 als::wgmma_bf16(d, a, a, threadIdx.x == 3);
               }),
               "different operands");
}

}  // namespace
