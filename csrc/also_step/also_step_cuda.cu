#include <algorithm>

#include "also_step/also_step.h"
#include "also_step/also_step_kernels.cuh"
#include "common/cuda.h"

namespace als {
namespace {

template <bool kAmsgrad, bool kHalf, typename P, typename S>
void launch_batch(const AlsoBatch<P, S>& batch, cudaStream_t stream) {
  const int64_t chunks = batch.chunk_end[batch.count - 1];
  ALS_CHECK(chunks <= INT32_MAX, "params: expected at most 2^31 - 1 chunks of ", kAlsoChunk,
            " elements a launch, got ", chunks);
  if (chunks > 0) {
    also_step_kernel<kAmsgrad, kHalf>
        <<<static_cast<unsigned>(chunks), kAlsoThreads, 0, stream>>>(batch);
    ALS_LAUNCH_CHECK();
  }
  also_advance_kernel<<<1, kAlsoBatch, 0, stream>>>(batch, int64_t{kHalf ? 2 : 1});
  ALS_LAUNCH_CHECK();
}

template <typename P, typename S>
void step_lists(const AlsoLists& lists, AlsoBatch<P, S> batch, cudaStream_t stream) {
  const bool amsgrad = !lists.max_exp_avg_sqs.empty();
  const bool half = !lists.bases.empty();
  const size_t count = lists.params.size();
  for (size_t first = 0; first < count; first += kAlsoBatch) {
    batch.count = static_cast<int>(std::min<size_t>(kAlsoBatch, count - first));
    int64_t chunks = 0;
    for (int i = 0; i < batch.count; ++i) {
      batch.tensors[i] = also_pointers<P, S>(lists, first + i);
      chunks += (batch.tensors[i].numel + kAlsoChunk - 1) / kAlsoChunk;
      batch.chunk_end[i] = chunks;
    }
    if (amsgrad) {
      half ? launch_batch<true, true>(batch, stream) : launch_batch<true, false>(batch, stream);
    } else {
      half ? launch_batch<false, true>(batch, stream) : launch_batch<false, false>(batch, stream);
    }
  }
}

void also_step_cuda(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                    const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                    const TensorList& bases, const TensorList& steps,
                    const std::optional<Tensor>& lr_tensor, double lr, double beta1, double beta2,
                    double eps, double weight_decay, bool decoupled_weight_decay, double alpha,
                    const std::optional<Tensor>& grad_scale,
                    const std::optional<Tensor>& found_inf) {
  if (params.empty()) return;
  const AlsoLists lists{params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, bases, steps};
  check_also_step(lists, lr_tensor, grad_scale, found_inf);
  const CudaScope scope(params[0]);
  const auto run = [&](auto param, auto state) {
    AlsoBatch<decltype(param), decltype(state)> batch{};
    batch.options = {beta1, beta2, eps, weight_decay, alpha, decoupled_weight_decay};
    batch.lr = lr;
    batch.lr_tensor = scalar_pointer<double>(lr_tensor);
    batch.grad_scale = scalar_pointer<float>(grad_scale);
    batch.found_inf = scalar_pointer<float>(found_inf);
    step_lists(lists, batch, scope.stream());
  };
  switch (params[0].scalar_type()) {
    case ScalarType::Float:
      return run(float{}, float{});
    case ScalarType::Double:
      return run(double{}, double{});
    case ScalarType::BFloat16:
      return run(__nv_bfloat16{}, float{});
    case ScalarType::Half:
      return run(__half{}, float{});
    default:
      ALS_CHECK(false, "params: expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CUDA, m) {
  m.impl("also_step_", TORCH_BOX(&als::also_step_cuda));
}
