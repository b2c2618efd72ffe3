// Warpgroup tensor cores, bulk copies and their barriers: every function here is at most one
// instruction, but for the descriptor. Torch-free. The C++ tests put plain code in their place
// (tests/cpp/emulate_wgmma.h). For compute capability 9.0, compiled for sm_90a.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/mma.cuh"

// Where these instructions can be compiled: the pass of nvcc for sm_90a, and the tests on the CPU.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
#define ALS_HAS_WGMMA
#endif

namespace als {

// A matrix in shared memory as wgmma takes it: rows of 64 bytes (32 numbers of bf16 along k), eight
// of them, 512 bytes, one after the other, their 16-byte chunks swapped by the 64-byte swizzle:
// bits 4 and 5 of an address are xored with bits 7 and 8. PTX ISA, matrix descriptor: start
// address, distance of the groups of eight rows (both without their last four bits), swizzle
// mode 2. The pattern repeats every 512 bytes and begins at a multiple of them.
constexpr uint64_t kWgmmaRow = 64, kWgmmaPattern = 8 * kWgmmaRow;
ALS_HOST_DEVICE uint64_t wgmma_descriptor(unsigned shared) {
  return uint64_t{2} << 62 | (kWgmmaPattern >> 4) << 32 | (shared & 0x3FFFFu) >> 4;
}
// `features` (a multiple of 8, below 32) further along k.
ALS_HOST_DEVICE uint64_t advance_descriptor(uint64_t descriptor, unsigned features) {
  return descriptor + features / 8;
}

#ifdef __CUDACC__

// A barrier in shared memory goes to its next phase when `arrivals` have come and as many bytes as
// were announced have been copied. Phases count from 0.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and announces bytes.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Whether a phase of this parity is over, and no later one; may sleep before it says no. A new
// barrier says yes for parity 1.
__device__ __forceinline__ bool barrier_try_wait(uint64_t* barrier, unsigned parity) {
  unsigned over;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over != 0;
}

// Copies `bytes` (a multiple of 16, aligned to 16 on both sides) into shared memory, and counts
// them on the barrier.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, unsigned bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Puts what this thread did to shared memory, barriers included, before what bulk copies and wgmma
// do to it afterwards.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Warpgroups can hand registers to each other; all four warps execute it.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Products are gathered in groups, which complete in order; wgmma_wait<n> waits for all groups but
// the last n. Until then nobody may touch the accumulator, nor write the operands. A fence stands
// between such a touch and the next product with this accumulator.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The accumulator of products that are done. The compiler takes it for written where the products
// were issued; after this line, and not before wgmma_wait, it may work with it.
__device__ __forceinline__ void wgmma_done(float (&d)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// D = A B^T, or D += A B^T, for A [64, 16] and B [128, 16] in bf16, both in shared memory, and D
// [64, 128] in float32. The thread of lane l in warp w of the warpgroup holds
//   d[i]  D[16 w + l / 4 + 8 (i / 2 % 2)][8 (i / 4) + 2 (l % 4) + i % 2]
__device__ __forceinline__ void wgmma_bf16(float (&d)[64], uint64_t a, uint64_t b,
                                           bool accumulate) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 0;\n\t}"
#define ALS_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ALS_SIXTEEN(i) ALS_FOUR(i), ALS_FOUR(i + 4), ALS_FOUR(i + 8), ALS_FOUR(i + 12)
      : ALS_SIXTEEN(0), ALS_SIXTEEN(16), ALS_SIXTEEN(32), ALS_SIXTEEN(48)
#undef ALS_SIXTEEN
#undef ALS_FOUR
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))
      : "memory");
}

#endif

#ifdef ALS_HAS_WGMMA
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, unsigned parity) {
  while (!barrier_try_wait(barrier, parity)) {
  }
}
#endif

}  // namespace als
