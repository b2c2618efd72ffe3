#include "common/parallel.h"
#include "sample_loss/loss_rows_cpu.h"
#include "weighted_loss/weighted_loss.h"
#include "weighted_loss/weighted_loss_math.h"

namespace als {
namespace {

struct CpuWeightedLosses : CpuLosses {
  using CpuLosses::CpuLosses;

  template <typename scalar_t, typename grad_t, typename T>
  void run(const LossJob<scalar_t, grad_t>& job, T* total, int64_t totals, int64_t rows) const {
    CpuLosses::run(job);
    for (int64_t i = 0; i < totals; ++i) {
      WeightedTotal all;
      all.add_all(job.scale + i * rows, job.losses + i * rows, rows);
      total[i] = static_cast<T>(all.sum());
    }
  }
};

void weighted_loss_scale_cpu(Tensor grad, Tensor factor) {
  check_scale(grad, factor);
  dispatch_logits<CpuLosses::BFloat16, CpuLosses::Half>(grad, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using T = accumulate_t<scalar_t>;
    const T f = *factor.const_data_ptr<T>();
    if (f == 1) return;
    auto* values = static_cast<scalar_t*>(grad.mutable_data_ptr());
    parallel_for(grad.numel(), 1 << 15, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        values[i] = static_cast<scalar_t>(static_cast<T>(values[i]) * f);
      }
    });
  });
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CPU, m) {
  m.impl("weighted_loss", TORCH_BOX(&als::weighted_loss<als::CpuWeightedLosses>));
  m.impl("weighted_loss_scale_", TORCH_BOX(&als::weighted_loss_scale_cpu));
}
