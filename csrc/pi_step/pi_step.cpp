#include "pi_step/pi_step.h"

// On CUDA index comes sorted and order says where each of its entries stood in the batch; on the
// CPU the kernel sorts and order is None. pending_index and pending_grad take the batch's summed
// gradient, padded with INT64_MAX. With sums (a lazy state) u is float64, otherwise float32.
STABLE_TORCH_LIBRARY_FRAGMENT(als_ext, m) {
  m.def(
      "pi_step_(Tensor(a!) u, Tensor(b!) scalars, Tensor(c!) skipped, Tensor(d!) pending_index, "
      "Tensor(e!) pending_grad, Tensor? log_prior, Tensor(f!)? sums, Tensor index, Tensor? order, "
      "Tensor loss, Tensor? found_inf, float rho, float step, float prior) -> ()");
  m.def(
      "pi_normalize_(Tensor(a!) u, Tensor(b!) scalars, Tensor pending_index, Tensor pending_grad, "
      "Tensor? log_prior, Tensor(c!)? sums, float rho, float step, float prior) -> ()");
  m.def(
      "pi_weight(Tensor u, Tensor scalars, Tensor pending_index, Tensor pending_grad, "
      "Tensor? log_prior, Tensor? sums, Tensor? index, float rho, float step, float prior, bool "
      "half, "
      "bool log) "
      "-> Tensor");
}
