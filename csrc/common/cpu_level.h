// Which instruction set the CPU kernels use: the best one of this processor, or one forced by a
// test through als_ext._C.set_cpu_level.
#pragma once

#include <atomic>
#include <cstdint>

namespace als {

// kAvx512Bf16 can only be forced; kernels ask cpu_has_bf16().
enum class CpuLevel : int { kAuto = -1, kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

inline CpuLevel best_cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? CpuLevel::kAvx512 : avx2 ? CpuLevel::kAvx2 : CpuLevel::kBaseline;
#else
  return CpuLevel::kBaseline;
#endif
}

inline std::atomic<CpuLevel>& forced_cpu_level() {
  static std::atomic<CpuLevel> level{CpuLevel::kAuto};
  return level;
}

// The level of the next kernel; never above what the processor has.
inline CpuLevel cpu_level() {
  static const CpuLevel best = best_cpu_level();
  const CpuLevel forced = forced_cpu_level().load(std::memory_order_relaxed);
  return forced == CpuLevel::kAuto || forced > best ? best : forced;
}

// Whether the next kernel may use the bf16 dot products of AVX-512, a capability on top of kAvx512.
inline bool cpu_has_bf16() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16") != 0;
  const CpuLevel forced = forced_cpu_level().load(std::memory_order_relaxed);
  return has && cpu_level() == CpuLevel::kAvx512 &&
         (forced == CpuLevel::kAuto || forced == CpuLevel::kAvx512Bf16);
#else
  return false;
#endif
}

// Tasks that began in bf16 and went on in float32, where bf16 could not tell enough apart.
inline std::atomic<int64_t>& bf16_given_up() {
  static std::atomic<int64_t> tasks{0};
  return tasks;
}

}  // namespace als
