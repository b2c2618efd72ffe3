// Tensor cores and asynchronous copies: every function here is one instruction and nothing else.
// Torch-free. The C++ tests put plain code in their place (tests/cpp/emulate_mma.h), so that the
// kernels that call them run on the CPU too. For compute capability 8.0 and up.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace als {

// The nearest bf16 number, ties to even, as a float32; a subnormal becomes 0, so that nothing
// depends on how an instruction treats it. For |x| below 2^127.
ALS_HOST_DEVICE float round_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u;
  if ((bits & 0x7F800000u) == 0) bits = 0;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Two bf16 numbers as an instruction takes them: the first in the lower half.
ALS_HOST_DEVICE uint32_t pack_bf16(float first, float second) {
  uint32_t a, b;
  memcpy(&a, &first, sizeof a);
  memcpy(&b, &second, sizeof b);
  return a >> 16 | (b & 0xFFFF0000u);
}

#ifdef __CUDACC__

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes, aligned on both sides, into shared memory. Copies are gathered in groups;
// wait_copies<n> waits for all groups of this thread but the last n.
__device__ __forceinline__ void copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers. Lane l names row l % 8 of matrix l / 8 (16 bytes of shared
// memory) and gets of matrix i: row l / 4, columns 2 (l % 4) and the next, in m[i].
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// D += A B for A [16, 16], B [16, 8] in bf16 and D [16, 8] in float32. With g = lane / 4 and
// t = 2 (lane % 4), a lane holds
//   a[0..3]  A[g][t, t+1]  A[g+8][t, t+1]  A[g][t+8, t+9]  A[g+8][t+8, t+9]
//   b0, b1   B[t, t+1][g]  B[t+8, t+9][g]
//   d[0..3]  D[g][t]  D[g][t+1]  D[g+8][t]  D[g+8][t+1]
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace als
