#include "sample_loss/loss_launch.h"
#include "weighted_loss/weighted_loss.h"
#include "weighted_loss/weighted_loss_kernels.cuh"

namespace als {
namespace {

struct CudaWeightedLosses : CudaLosses {
  using CudaLosses::CudaLosses;

  template <typename scalar_t, typename grad_t, typename T>
  void run(const LossJob<scalar_t, grad_t>& job, T* total, int64_t totals, int64_t rows) const {
    if (launch_loss_job(job, totals == 1 ? total : nullptr, stream()) || totals == 0) return;
    const auto grid = static_cast<unsigned>(std::min<int64_t>(totals, 1 << 20));
    weighted_total<<<grid, kTotalThreads, 0, stream()>>>(job.scale, job.losses, total, totals,
                                                         rows);
    ALS_LAUNCH_CHECK();
  }
};

void weighted_loss_scale_cuda(Tensor grad, Tensor factor) {
  check_scale(grad, factor);
  const int64_t count = grad.numel();
  if (count == 0) return;
  const CudaScope scope(grad);
  dispatch_logits<__nv_bfloat16, __half>(grad, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kBlockElements = kScaleThreads * 16 / sizeof(scalar_t);
    const auto grid = std::min(kScaleBlocks, (count + kBlockElements - 1) / kBlockElements);
    scale_gradient<<<static_cast<unsigned>(grid), kScaleThreads, 0, scope.stream()>>>(
        static_cast<scalar_t*>(grad.mutable_data_ptr()),
        factor.const_data_ptr<accumulate_t<scalar_t>>(), count);
    ALS_LAUNCH_CHECK();
  });
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CUDA, m) {
  m.impl("weighted_loss", TORCH_BOX(&als::weighted_loss<als::CudaWeightedLosses>));
  m.impl("weighted_loss_scale_", TORCH_BOX(&als::weighted_loss_scale_cuda));
}
