// The row loops of loss_rows_cpu.inl, compiled once an instruction set. Torch-free: the including
// file defines als::BFloat16, a 2-byte type that converts to float.
//
// Pragmas rather than compiler flags: a header's inline function compiled under a flag could
// replace the portable copy of another file.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/cpu_level.h"
#include "sample_loss/loss_job.h"

namespace als::baseline {
constexpr int kVectorBytes = 16;
#include "sample_loss/loss_rows_cpu.inl"
}  // namespace als::baseline
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ALS_X86_VERSIONS
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
namespace als::avx2 {
constexpr int kVectorBytes = 32;
#include "sample_loss/loss_rows_cpu.inl"
}  // namespace als::avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=512")
namespace als::avx512 {
constexpr int kVectorBytes = 64;
#include "sample_loss/loss_rows_cpu.inl"
}  // namespace als::avx512
#pragma GCC pop_options
#endif

namespace als {

// Computes the rows [begin, end) of a job; the processor must have the level.
template <typename scalar_t, typename grad_t>
void loss_rows(const LossJob<scalar_t, grad_t>& job, int64_t begin, int64_t end,
               [[maybe_unused]] CpuLevel level) {
#ifdef ALS_X86_VERSIONS
  if (level == CpuLevel::kAvx512) return avx512::loss_rows(job, begin, end);
  if (level == CpuLevel::kAvx2) return avx2::loss_rows(job, begin, end);
#endif
  baseline::loss_rows(job, begin, end);
}

}  // namespace als
