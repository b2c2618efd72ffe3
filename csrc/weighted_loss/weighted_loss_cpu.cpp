#include "sample_loss/loss_rows_cpu.h"
#include "weighted_loss/weighted_loss.h"
#include "weighted_loss/weighted_loss_math.h"

namespace als {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

std::tuple<Tensor, Tensor, Tensor> weighted_loss_cpu(const Tensor& logits, const Tensor& target,
                                                     const Tensor& weight,
                                                     const std::optional<Tensor>& class_weight,
                                                     int64_t loss, std::vector<double> parameters,
                                                     double label_smoothing, int64_t ignore_index,
                                                     std::vector<int64_t> batch, bool need_grad) {
  LossArguments a{logits,          target,      class_weight, loss, std::move(parameters),
                  label_smoothing, ignore_index};
  check_loss_arguments(a);
  check_classes(a);
  const Tensor w = check_row_values(weight, a, "weight");
  const WeightedOutputs out = weighted_outputs(a, batch, need_grad);
  dispatch_logits<BFloat16, Half>(a.logits, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using grad_t = std::conditional_t<std::is_same_v<scalar_t, Half>, float, scalar_t>;
    using T = accumulate_t<scalar_t>;
    auto job = loss_job<scalar_t, grad_t>(a);
    job.scale = w.const_data_ptr<T>();
    job.losses = out.losses.mutable_data_ptr<T>();
    if (need_grad) job.grad = static_cast<grad_t*>(out.grad.mutable_data_ptr());
    run_loss_job(job);
    T* total = out.total.mutable_data_ptr<T>();
    const int64_t totals = number_of_totals(batch);
    const int64_t rows = totals > 0 ? job.rows / totals : 0;  // of one total
    for (int64_t i = 0; i < totals; ++i) {
      WeightedTotal sum;
      sum.add_all(job.scale + i * rows, job.losses + i * rows, rows);
      total[i] = static_cast<T>(sum.sum());
    }
  });
  return {out.total, out.losses, out.grad};
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CPU, m) {
  m.impl("weighted_loss", TORCH_BOX(&als::weighted_loss_cpu));
}
