#include "weighted_loss/weighted_loss.h"

STABLE_TORCH_LIBRARY_FRAGMENT(als_ext, m) {
  // batch: the shape of total ([] for the usual scalar; vmap rules flatten their dimension into the
  // rows). grad_logits is [0, C] without need_grad, and float32 for float16 logits.
  m.def(
      "weighted_loss(Tensor logits, Tensor target, Tensor weight, Tensor? class_weight, int loss, "
      "float[] parameters, float label_smoothing, int ignore_index, int[] batch, bool need_grad) "
      "-> (Tensor total, Tensor losses, Tensor grad_logits)");
  // grad_logits *= factor, for backward; a factor of 1 costs no pass. The factor has the dtype of
  // losses.
  m.def("weighted_loss_scale_(Tensor(a!) grad_logits, Tensor factor) -> ()");
}
