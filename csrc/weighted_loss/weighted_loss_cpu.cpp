#include <array>

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

bool is_one(const Tensor& factor) {
  return factor.scalar_type() == ScalarType::Double ? *factor.const_data_ptr<double>() == 1
                                                    : *factor.const_data_ptr<float>() == 1;
}

// ATen has this loop for every instruction set, and takes a factor without dimensions as it is:
// not rounded to the dtype of the gradient.
void weighted_loss_scale_cpu(Tensor grad, Tensor factor) {
  check_scale(grad, factor);
  if (is_one(factor)) return;
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(grad), from(factor)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owned by the caller
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CPU, m) {
  m.impl("weighted_loss", TORCH_BOX(&als::weighted_loss<als::CpuWeightedLosses>));
  m.impl("weighted_loss_scale_", TORCH_BOX(&als::weighted_loss_scale_cpu));
}
