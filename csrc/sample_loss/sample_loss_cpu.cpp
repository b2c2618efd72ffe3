#include "sample_loss/loss_rows_cpu.h"
#include "sample_loss/sample_loss.h"

namespace als {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

std::tuple<Tensor, Tensor> sample_loss_cpu(const Tensor& logits, const Tensor& target,
                                           const std::optional<Tensor>& class_weight, int64_t loss,
                                           std::vector<double> parameters, double label_smoothing,
                                           int64_t ignore_index) {
  LossArguments a{logits,          target,      class_weight, loss, std::move(parameters),
                  label_smoothing, ignore_index};
  check_loss_arguments(a);
  check_classes(a);
  const int64_t rows = a.logits.size(0);
  const ScalarType dtype = accumulation_dtype(a.logits);
  const Tensor losses = empty_on(a.logits, {rows}, dtype);
  const Tensor state = empty_on(a.logits, {has_state(a) ? rows : 0, 3}, dtype);
  dispatch_logits<BFloat16, Half>(a.logits, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using T = accumulate_t<scalar_t>;
    auto job = loss_job<scalar_t>(a);
    job.losses = losses.mutable_data_ptr<T>();
    if (has_state(a)) job.state_out = state.mutable_data_ptr<T>();
    run_loss_job(job);
  });
  return {losses, state};
}

Tensor sample_loss_backward_cpu(const Tensor& grad_losses, const Tensor& logits,
                                const Tensor& target, const std::optional<Tensor>& class_weight,
                                const Tensor& state, int64_t loss, std::vector<double> parameters,
                                double label_smoothing, int64_t ignore_index) {
  LossArguments a{logits,          target,      class_weight, loss, std::move(parameters),
                  label_smoothing, ignore_index};
  check_loss_arguments(a);
  const Tensor scale = check_row_values(grad_losses, a, "grad_losses");
  const Tensor sums = has_state(a) ? check_row_values(state, a, "state") : state;
  const Tensor grad =
      empty_on(a.logits, {a.logits.size(0), a.logits.size(1)}, a.logits.scalar_type());
  dispatch_logits<BFloat16, Half>(a.logits, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using T = accumulate_t<scalar_t>;
    auto job = loss_job<scalar_t>(a);
    job.scale = scale.const_data_ptr<T>();
    if (has_state(a)) job.state_in = sums.const_data_ptr<T>();
    job.grad = static_cast<scalar_t*>(grad.mutable_data_ptr());
    run_loss_job(job);
  });
  return grad;
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CPU, m) {
  m.impl("sample_loss", TORCH_BOX(&als::sample_loss_cpu));
  m.impl("sample_loss_backward", TORCH_BOX(&als::sample_loss_backward_cpu));
}
