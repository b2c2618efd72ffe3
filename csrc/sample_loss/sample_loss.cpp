#include "sample_loss/sample_loss.h"

STABLE_TORCH_LIBRARY_FRAGMENT(als_ext, m) {
  // target: [B] int64 class indices, or [B, C] float32 (float64 for float64 logits). losses and
  // state have that dtype too; state [B, 3] ([0, 3] for squared_error) spares backward the sums.
  m.def(
      "sample_loss(Tensor logits, Tensor target, Tensor? class_weight, int loss, "
      "float[] parameters, float label_smoothing, int ignore_index) -> (Tensor losses, Tensor "
      "state)");
  m.def(
      "sample_loss_backward(Tensor grad_losses, Tensor logits, Tensor target, Tensor? "
      "class_weight, Tensor state, int loss, float[] parameters, float label_smoothing, "
      "int ignore_index) -> Tensor grad_logits");
}
