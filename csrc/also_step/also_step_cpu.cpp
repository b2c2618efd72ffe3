#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "also_step/also_step.h"
#include "common/cpu_level.h"
#include "common/parallel.h"

// The element loop is one always-inlined body, compiled once an instruction set.
#define ALS_ALWAYS_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define ALS_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define ALS_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#endif

namespace als {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kChunk = 8192;  // elements a work item: 36 bytes each fit the second-level cache
constexpr int64_t kChunkGrain = 4;  // below 32768 elements a thread costs more than it brings
constexpr int64_t kBlock = 512;  // reduced precision is widened block by block in the first level

template <bool kAmsgrad, bool kHalf, typename S>
ALS_ALWAYS_INLINE void step_block(S* __restrict theta, const S* __restrict grad, S* __restrict base,
                                  S* __restrict m, S* __restrict v, S* __restrict v_max, int64_t n,
                                  const AlsoCoefficients<S>& c) {
  for (int64_t i = 0; i < n; ++i) {
    S unused = 0;
    also_element<kAmsgrad, kHalf>(theta[i], grad[i], kHalf ? base[i] : unused, m[i], v[i],
                                  kAmsgrad ? v_max[i] : unused, c);
  }
}

template <bool kAmsgrad, bool kHalf, typename P, typename S>
ALS_ALWAYS_INLINE void step_range_body(const AlsoPointers<P, S>& t, int64_t begin, int64_t end,
                                       const AlsoCoefficients<S>& coefficients) {
  const AlsoCoefficients<S> c = coefficients;  // a local copy cannot alias the arrays
  const auto at = [](S* pointer, int64_t i) { return pointer == nullptr ? nullptr : pointer + i; };
  if constexpr (std::is_same_v<P, S>) {
    step_block<kAmsgrad, kHalf, S>(t.param + begin, t.grad + begin, at(t.base, begin),
                                   t.exp_avg + begin, t.exp_avg_sq + begin,
                                   at(t.max_exp_avg_sq, begin), end - begin, c);
  } else {
    S theta[kBlock], grad[kBlock];
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t n = std::min(kBlock, end - first);
      for (int64_t i = 0; i < n; ++i) theta[i] = static_cast<S>(t.param[first + i]);
      for (int64_t i = 0; i < n; ++i) grad[i] = static_cast<S>(t.grad[first + i]);
      step_block<kAmsgrad, kHalf, S>(theta, grad, at(t.base, first), t.exp_avg + first,
                                     t.exp_avg_sq + first, at(t.max_exp_avg_sq, first), n, c);
      for (int64_t i = 0; i < n; ++i) t.param[first + i] = static_cast<P>(theta[i]);
    }
  }
}

template <typename P, typename S>
using StepRange = void (*)(const AlsoPointers<P, S>&, int64_t, int64_t, const AlsoCoefficients<S>&);

template <bool kAmsgrad, bool kHalf, typename P, typename S>
void step_range(const AlsoPointers<P, S>& t, int64_t begin, int64_t end,
                const AlsoCoefficients<S>& c) {
  step_range_body<kAmsgrad, kHalf, P, S>(t, begin, end, c);
}

#if defined(__x86_64__)
template <bool kAmsgrad, bool kHalf, typename P, typename S>
ALS_TARGET_AVX2 void step_range_avx2(const AlsoPointers<P, S>& t, int64_t begin, int64_t end,
                                     const AlsoCoefficients<S>& c) {
  step_range_body<kAmsgrad, kHalf, P, S>(t, begin, end, c);
}

template <bool kAmsgrad, bool kHalf, typename P, typename S>
ALS_TARGET_AVX512 void step_range_avx512(const AlsoPointers<P, S>& t, int64_t begin, int64_t end,
                                         const AlsoCoefficients<S>& c) {
  step_range_body<kAmsgrad, kHalf, P, S>(t, begin, end, c);
}
#endif

template <bool kAmsgrad, bool kHalf, typename P, typename S>
StepRange<P, S> choose_step_range() {
#if defined(__x86_64__)
  const CpuLevel level = cpu_level();
  if (level == CpuLevel::kAvx512) return step_range_avx512<kAmsgrad, kHalf, P, S>;
  if (level == CpuLevel::kAvx2) return step_range_avx2<kAmsgrad, kHalf, P, S>;
#endif
  return step_range<kAmsgrad, kHalf, P, S>;
}

template <typename P, typename S>
StepRange<P, S> choose_step_range(bool amsgrad, bool half) {
  if (amsgrad)
    return half ? choose_step_range<true, true, P, S>() : choose_step_range<true, false, P, S>();
  return half ? choose_step_range<false, true, P, S>() : choose_step_range<false, false, P, S>();
}

// Deterministic: chunks do not depend on the number of threads, and no element is shared.
template <typename P, typename S>
void step_lists(const AlsoLists& lists, const AlsoOptions& options, double lr, double grad_scale) {
  const size_t count = lists.params.size();
  const bool half = !lists.bases.empty();
  std::vector<AlsoPointers<P, S>> pointers;
  std::vector<AlsoCoefficients<S>> coefficients;
  std::vector<int64_t> chunk_end;  // of each tensor, in the flattened list of chunks
  int64_t chunks = 0;
  for (size_t i = 0; i < count; ++i) {
    pointers.push_back(also_pointers<P, S>(lists, i));
    coefficients.push_back(also_coefficients<S>(options, lr, grad_scale, *pointers[i].step));
    chunks += (pointers[i].numel + kChunk - 1) / kChunk;
    chunk_end.push_back(chunks);
  }
  const StepRange<P, S> run = choose_step_range<P, S>(!lists.max_exp_avg_sqs.empty(), half);
  parallel_for(chunks, kChunkGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(chunk_end.begin(), chunk_end.end(), begin) - chunk_end.begin();
    for (int64_t chunk = begin; chunk < end; ++i) {
      const int64_t first = chunk_end[i] - (pointers[i].numel + kChunk - 1) / kChunk;
      const int64_t last = std::min(end, chunk_end[i]);
      for (; chunk < last; ++chunk) {
        const int64_t from = (chunk - first) * kChunk;
        run(pointers[i], from, std::min(from + kChunk, pointers[i].numel), coefficients[i]);
      }
    }
  });
  for (const auto& t : pointers) *t.step += half ? 2 : 1;
}

void also_step_cpu(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                   const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                   const TensorList& bases, const TensorList& steps,
                   const std::optional<Tensor>& lr_tensor, double lr, double beta1, double beta2,
                   double eps, double weight_decay, bool decoupled_weight_decay, double alpha,
                   const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  if (params.empty()) return;
  const AlsoLists lists{params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, bases, steps};
  check_also_step(lists, lr_tensor, grad_scale, found_inf);
  const float* skip = scalar_pointer<float>(found_inf);
  if (skip != nullptr && *skip != 0.0f) return;
  const double* lr_pointer = scalar_pointer<double>(lr_tensor);
  const float* scale = scalar_pointer<float>(grad_scale);
  const AlsoOptions options{beta1, beta2, eps, weight_decay, alpha, decoupled_weight_decay};
  const double rate = lr_pointer == nullptr ? lr : *lr_pointer;
  const double divisor = scale == nullptr ? 1.0 : *scale;
  switch (params[0].scalar_type()) {
    case ScalarType::Float:
      return step_lists<float, float>(lists, options, rate, divisor);
    case ScalarType::Double:
      return step_lists<double, double>(lists, options, rate, divisor);
    case ScalarType::BFloat16:
      return step_lists<BFloat16, float>(lists, options, rate, divisor);
    case ScalarType::Half:
      return step_lists<Half, float>(lists, options, rate, divisor);
    default:
      ALS_CHECK(false, "params: expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CPU, m) { m.impl("also_step_", TORCH_BOX(&als::also_step_cpu)); }
