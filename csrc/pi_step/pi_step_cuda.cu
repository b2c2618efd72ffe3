#include <algorithm>

#include "common/cuda.h"
#include "pi_step/pi_step.h"
#include "pi_step/pi_step_kernels.cuh"

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

void pi_step_cuda(Tensor u, Tensor scalars, Tensor skipped, Tensor pending_index,
                  Tensor pending_grad, std::optional<Tensor> log_prior, Tensor index, Tensor order,
                  Tensor loss, std::optional<Tensor> found_inf, double rho, double step,
                  double prior) {
  PiStepParams p{};
  p.rule = check_pi_state(u, scalars, pending_index, pending_grad, log_prior, rho, step, prior);
  check_pi_batch(u, skipped, pending_index, index, order, loss, found_inf);
  p.u = u.mutable_data_ptr<float>();
  p.log_prior = log_prior ? log_prior->const_data_ptr<float>() : nullptr;
  p.scalars = scalars.mutable_data_ptr<double>();
  p.skipped = skipped.mutable_data_ptr<int64_t>();
  p.batch_index = pending_index.mutable_data_ptr<int64_t>();
  p.batch_grad = pending_grad.mutable_data_ptr<double>();
  p.found_inf = found_inf ? found_inf->const_data_ptr<float>() : nullptr;
  p.index = index.const_data_ptr<int64_t>();
  p.order = order.const_data_ptr<int64_t>();
  p.loss = loss.const_data_ptr<double>();
  p.n = u.size(0);
  p.capacity = pending_index.size(0);
  p.batch = index.size(0);
  p.advance = true;
  launch(p, u);
}

void pi_normalize_cuda(Tensor u, Tensor scalars, Tensor pending_index, Tensor pending_grad,
                       std::optional<Tensor> log_prior, double rho, double step, double prior) {
  PiStepParams p{};
  p.rule = check_pi_state(u, scalars, pending_index, pending_grad, log_prior, rho, step, prior);
  p.u = u.mutable_data_ptr<float>();
  p.log_prior = log_prior ? log_prior->const_data_ptr<float>() : nullptr;
  p.scalars = scalars.mutable_data_ptr<double>();
  // Read only, as p.advance is false.
  p.batch_index = const_cast<int64_t*>(pending_index.const_data_ptr<int64_t>());
  p.batch_grad = const_cast<double*>(pending_grad.const_data_ptr<double>());
  p.n = u.size(0);
  p.capacity = pending_index.size(0);
  launch(p, u);
}

Tensor pi_weight_cuda(Tensor u, Tensor scalars, Tensor pending_index, Tensor pending_grad,
                      std::optional<Tensor> log_prior, std::optional<Tensor> index, double rho,
                      double step, double prior, bool half, bool log) {
  const PiRule rule =
      check_pi_state(u, scalars, pending_index, pending_grad, log_prior, rho, step, prior);
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
