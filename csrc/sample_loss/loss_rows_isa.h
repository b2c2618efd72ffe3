// The row loops of loss_rows_cpu.inl, compiled once an instruction set. Torch-free: the including
// file defines als::BFloat16, a 2-byte type that converts to float.
//
// Pragmas rather than compiler flags: a header's inline function compiled under a flag could
// replace the portable copy of another file.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "sample_loss/loss_job.h"

namespace als::baseline {
#include "sample_loss/loss_rows_cpu.inl"
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ALS_X86_VERSIONS
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
namespace als::avx2 {
#include "sample_loss/loss_rows_cpu.inl"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")
namespace als::avx512 {
#include "sample_loss/loss_rows_cpu.inl"
}
#pragma GCC pop_options
#endif

namespace als {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa best_isa() {
#ifdef ALS_X86_VERSIONS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

// Computes the rows [begin, end) of a job; it must not be given an instruction set above
// best_isa().
template <typename scalar_t, typename grad_t>
void loss_rows(const LossJob<scalar_t, grad_t>& job, int64_t begin, int64_t end,
               [[maybe_unused]] Isa isa) {
#ifdef ALS_X86_VERSIONS
  if (isa == Isa::kAvx512) return avx512::loss_rows(job, begin, end);
  if (isa == Isa::kAvx2) return avx2::loss_rows(job, begin, end);
#endif
  baseline::loss_rows(job, begin, end);
}

}  // namespace als
