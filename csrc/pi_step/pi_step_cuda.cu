#include <algorithm>

#include "common/cuda.h"
#include "pi_step/pi_step.h"
#include "pi_step/pi_step_lazy_kernels.cuh"

namespace als {
namespace {

int grid(int64_t blocks) {
  return static_cast<int>(std::min<int64_t>(std::max<int64_t>(blocks, 1), 65535));
}

// Lift, pass, combine; `p` comes with everything but the scratch.
void launch(PiStepParams p, const Tensor& u) {
  const CudaScope scope(u);
  const int64_t tiles = (p.n + kPiTile - 1) / kPiTile;
  p.tiles = (tiles + kPiMaxBlocks - 1) / kPiMaxBlocks;
  p.blocks = (tiles + p.tiles - 1) / p.tiles;
  const Tensor lifted = empty_on(u, {p.capacity}, ScalarType::Float);
  const Tensor partial = empty_on(
      u, {p.blocks * static_cast<int64_t>(sizeof(PiSums) / sizeof(double))}, ScalarType::Double);
  p.lifted = lifted.mutable_data_ptr<float>();
  p.partial = reinterpret_cast<PiSums*>(partial.mutable_data_ptr<double>());
  if (p.capacity > 0) {
    const int warps = kPiThreads / 32;
    pi_lift_kernel<<<grid((p.capacity + warps - 1) / warps), kPiThreads, 0, scope.stream()>>>(p);
    ALS_LAUNCH_CHECK();
  }
  const auto pass = p.log_prior != nullptr ? pi_pass_kernel<true> : pi_pass_kernel<false>;
  pass<<<grid(p.blocks), kPiThreads, 0, scope.stream()>>>(p);
  ALS_LAUNCH_CHECK();
  pi_combine_kernel<<<1, kPiCombineThreads, 0, scope.stream()>>>(p);
  ALS_LAUNCH_CHECK();
}

// The kernels of a pass look at the order of the step kernel, so that nothing waits for the device;
// where the sums served, which is nearly always, they return at once.
void launch_lazy(PiLazyParams p, const Tensor& u, bool advance) {
  const CudaScope scope(u);
  p.blocks = std::min(kPiLazyBlocks,
                      (p.n + kPiThreads * kPiLazyPerThread - 1) / (kPiThreads * kPiLazyPerThread));
  const auto doubles = [&](int64_t count) { return empty_on(u, {count}, ScalarType::Double); };
  const Tensor orders = doubles(kPiOrders);
  const Tensor lifted = doubles(p.capacity);
  const Tensor partial =
      doubles(p.blocks * static_cast<int64_t>(sizeof(PiNormalisers) / sizeof(double)));
  const Tensor moments = doubles(p.blocks * kPiMoments);
  p.orders = advance ? orders.mutable_data_ptr<double>() : nullptr;
  p.lifted = lifted.mutable_data_ptr<double>();
  p.partial = reinterpret_cast<PiNormalisers*>(partial.mutable_data_ptr<double>());
  p.moments = moments.mutable_data_ptr<double>();
  if (advance) {
    pi_lazy_step_kernel<<<1, kPiThreads, 0, scope.stream()>>>(p);
    ALS_LAUNCH_CHECK();
  }
  if (p.capacity > 0) {
    const int lift = grid((p.capacity + kPiThreads - 1) / kPiThreads);
    pi_lazy_lift_kernel<<<lift, kPiThreads, 0, scope.stream()>>>(p);
    ALS_LAUNCH_CHECK();
  }
  pi_lazy_pass_kernel<<<grid(p.blocks), kPiThreads, 0, scope.stream()>>>(p);
  ALS_LAUNCH_CHECK();
  pi_lazy_combine_kernel<<<1, kPiThreads, 0, scope.stream()>>>(p);
  ALS_LAUNCH_CHECK();
  pi_lazy_moments_kernel<<<grid(p.blocks), kPiThreads, 0, scope.stream()>>>(p);
  ALS_LAUNCH_CHECK();
  pi_lazy_sums_kernel<<<1, 64, 0, scope.stream()>>>(p);
  ALS_LAUNCH_CHECK();
}

// The part that steps and normalisations have in common; without a step the batch is only read.
PiStepParams dense_params(const Tensor& u, const Tensor& scalars, const Tensor& pending_index,
                          const Tensor& pending_grad, const std::optional<Tensor>& log_prior,
                          const PiRule& rule) {
  PiStepParams p{};
  p.u = u.mutable_data_ptr<float>();
  p.log_prior = log_prior ? log_prior->const_data_ptr<float>() : nullptr;
  p.scalars = scalars.mutable_data_ptr<double>();
  p.batch_index = const_cast<int64_t*>(pending_index.const_data_ptr<int64_t>());
  p.batch_grad = const_cast<double*>(pending_grad.const_data_ptr<double>());
  p.n = u.size(0);
  p.capacity = pending_index.size(0);
  p.rule = rule;
  return p;
}

PiLazyParams lazy_params(const Tensor& u, const Tensor& scalars, const Tensor& pending_index,
                         const Tensor& pending_grad, const std::optional<Tensor>& log_prior,
                         const Tensor& sums, const PiRule& rule) {
  PiLazyParams p{};
  p.u = u.mutable_data_ptr<double>();
  p.log_prior = log_prior ? log_prior->const_data_ptr<float>() : nullptr;
  p.scalars = scalars.mutable_data_ptr<double>();
  p.sums = sums.mutable_data_ptr<double>();
  p.batch_index = const_cast<int64_t*>(pending_index.const_data_ptr<int64_t>());
  p.batch_grad = const_cast<double*>(pending_grad.const_data_ptr<double>());
  p.n = u.size(0);
  p.capacity = pending_index.size(0);
  p.rule = rule;
  return p;
}

void pi_step_cuda(Tensor u, Tensor scalars, Tensor skipped, Tensor pending_index,
                  Tensor pending_grad, std::optional<Tensor> log_prior, std::optional<Tensor> sums,
                  Tensor index, std::optional<Tensor> order, Tensor loss,
                  std::optional<Tensor> found_inf, double rho, double step, double prior) {
  const PiRule rule =
      check_pi_state(u, scalars, pending_index, pending_grad, log_prior, sums, rho, step, prior);
  check_pi_batch(u, skipped, pending_index, index, loss, found_inf);
  ALS_CHECK(order.has_value(), "order: expected a tensor on CUDA, where index comes sorted");
  check_pi_tensor(*order, ScalarType::Long, u, "order");
  check_size(*order, 0, index.size(0), "order");
  const auto run = [&](auto p, const auto& launch) {
    p.skipped = skipped.mutable_data_ptr<int64_t>();
    p.batch_index = pending_index.mutable_data_ptr<int64_t>();
    p.batch_grad = pending_grad.mutable_data_ptr<double>();
    p.found_inf = found_inf ? found_inf->const_data_ptr<float>() : nullptr;
    p.index = index.const_data_ptr<int64_t>();
    p.order = order->const_data_ptr<int64_t>();
    p.loss = losses_of(loss);
    p.batch = index.size(0);
    launch(p);
  };
  if (sums) {
    run(lazy_params(u, scalars, pending_index, pending_grad, log_prior, *sums, rule),
        [&](const PiLazyParams& p) { launch_lazy(p, u, true); });
    return;
  }
  PiStepParams dense = dense_params(u, scalars, pending_index, pending_grad, log_prior, rule);
  dense.advance = true;
  run(dense, [&](const PiStepParams& p) { launch(p, u); });
}

void pi_normalize_cuda(Tensor u, Tensor scalars, Tensor pending_index, Tensor pending_grad,
                       std::optional<Tensor> log_prior, std::optional<Tensor> sums, double rho,
                       double step, double prior) {
  const PiRule rule =
      check_pi_state(u, scalars, pending_index, pending_grad, log_prior, sums, rho, step, prior);
  if (sums) {
    launch_lazy(lazy_params(u, scalars, pending_index, pending_grad, log_prior, *sums, rule), u,
                false);
  } else {
    launch(dense_params(u, scalars, pending_index, pending_grad, log_prior, rule), u);
  }
}

Tensor pi_weight_cuda(Tensor u, Tensor scalars, Tensor pending_index, Tensor pending_grad,
                      std::optional<Tensor> log_prior, std::optional<Tensor> sums,
                      std::optional<Tensor> index, double rho, double step, double prior, bool half,
                      bool log) {
  const PiRule rule =
      check_pi_state(u, scalars, pending_index, pending_grad, log_prior, sums, rho, step, prior);
  const CudaScope scope(u);
  const Tensor keys = check_pi_index(u, index);
  const int64_t size = keys.size(0);
  Tensor out = empty_on(u, {size}, ScalarType::Float);
  if (size == 0) return out;
  pi_weight_kernel<<<grid((size + kPiThreads - 1) / kPiThreads), kPiThreads, 0, scope.stream()>>>(
      view_of(u, scalars, pending_index, pending_grad, log_prior, rule),
      index ? keys.const_data_ptr<int64_t>() : nullptr, out.mutable_data_ptr<float>(), size, half,
      log);
  ALS_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CUDA, m) {
  m.impl("pi_step_", TORCH_BOX(&als::pi_step_cuda));
  m.impl("pi_normalize_", TORCH_BOX(&als::pi_normalize_cuda));
  m.impl("pi_weight", TORCH_BOX(&als::pi_weight_cuda));
}
