#include "sample_loss/loss_launch.h"
#include "weighted_loss/weighted_loss.h"
#include "weighted_loss/weighted_loss_kernels.cuh"

namespace als {
namespace {

struct CudaWeightedLosses : CudaLosses {
  using CudaLosses::CudaLosses;

  template <typename T>
  void sum(const T* weight, const T* losses, T* total, int64_t totals, int64_t rows) const {
    const auto grid = static_cast<unsigned>(std::min<int64_t>(totals, 1 << 20));
    weighted_total<<<grid, kTotalThreads, 0, stream()>>>(weight, losses, total, totals, rows);
    ALS_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CUDA, m) {
  m.impl("weighted_loss", TORCH_BOX(&als::weighted_loss<als::CudaWeightedLosses>));
}
