#include "also_step/also_step.h"

STABLE_TORCH_LIBRARY_FRAGMENT(als_ext, m) {
  m.def(
      "also_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] bases, "
      "Tensor(f!)[] steps, Tensor? lr_tensor, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled_weight_decay, float alpha, Tensor? grad_scale, "
      "Tensor? found_inf) -> ()");
}
