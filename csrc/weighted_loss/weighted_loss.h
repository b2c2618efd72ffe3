// total = sum over the rows of weight * loss, with the gradient written in the same pass.
//
// One reading of the logits writes losses and weight * dL/dlogits, which backward only multiplies
// by the incoming gradient of total; the gradient for weight is losses. Equations: loss_math.h.
#pragma once

#include "sample_loss/sample_loss.h"

namespace als {

// float16 would lose small gradients before a GradScaler's factor arrives with backward, so they
// are kept in float32; backward rounds them once.
template <typename scalar_t, class Device>
using kept_gradient_t =
    std::conditional_t<std::is_same_v<scalar_t, typename Device::Half>, float, scalar_t>;

inline ScalarType kept_gradient_dtype(const Tensor& logits) {
  const ScalarType dtype = logits.scalar_type();
  return dtype == ScalarType::Half ? ScalarType::Float : dtype;
}

// The operator, for a Device of sample_loss.h with run(job, total, totals, rows of each) for the
// job and its totals. batch: the shape of total, each the sum over B / prod(batch) consecutive
// rows. Without need_grad the gradient is [0, C].
template <class Device>
std::tuple<Tensor, Tensor, Tensor> weighted_loss(const Tensor& logits, const Tensor& target,
                                                 const Tensor& weight,
                                                 const std::optional<Tensor>& class_weight,
                                                 int64_t loss, std::vector<double> parameters,
                                                 double label_smoothing, int64_t ignore_index,
                                                 std::vector<int64_t> batch, bool need_grad) {
  LossArguments a{logits,          target,      class_weight, loss, std::move(parameters),
                  label_smoothing, ignore_index};
  check_loss_arguments(a);
  const Device device(a);
  const Tensor w = check_row_values(weight, a, {}, "weight");
  const int64_t rows = a.logits.size(0);
  int64_t totals = 1;
  for (const int64_t size : batch) totals *= size;
  ALS_CHECK(totals > 0 ? rows % totals == 0 : rows == 0, "batch: expected sizes that divide ", rows,
            " rows");
  const ScalarType dtype = accumulation_dtype(a.logits);
  const Tensor total = empty_on(a.logits, batch, dtype);
  const Tensor losses = empty_on(a.logits, {rows}, dtype);
  const Tensor grad =
      empty_on(a.logits, {need_grad ? rows : 0, a.logits.size(1)}, kept_gradient_dtype(a.logits));
  dispatch_logits<typename Device::BFloat16, typename Device::Half>(a.logits, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using grad_t = kept_gradient_t<scalar_t, Device>;
    using T = accumulate_t<scalar_t>;
    auto job = loss_job<scalar_t, grad_t>(a);
    job.scale = w.const_data_ptr<T>();
    job.losses = losses.mutable_data_ptr<T>();
    if (need_grad) job.grad = static_cast<grad_t*>(grad.mutable_data_ptr());
    device.run(job, total.mutable_data_ptr<T>(), totals, totals > 0 ? rows / totals : 0);
  });
  return {total, losses, grad};
}

// weighted_loss_scale_: the kept gradient and the incoming one of total.
inline void check_scale(const Tensor& grad, const Tensor& factor) {
  ALS_CHECK(grad.is_contiguous(), "grad_logits: expected a contiguous tensor");
  check_dtype(factor, accumulation_dtype(grad), "factor");
  check_same_device(factor, grad, "factor");
  check_dim(factor, 0, "factor");
}

}  // namespace als
