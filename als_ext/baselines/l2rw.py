"""Learning to reweight examples (Ren, Zeng, Yang, Urtasun, ICML 2018, arXiv 1803.09050)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from als_ext.methods import ERM
from als_ext.ops import sample_loss, weighted_loss
from als_ext.ops._checks import check_int


@dataclass(frozen=True)
class L2rwSettings:
    """Settings of :class:`L2RW`.

    Args:
        clean_batch: clean samples a step, >= 1; all of them where there are fewer. 100 is that of
            the source's code.
    """

    clean_batch: int = 100

    def __post_init__(self) -> None:
        check_int("clean_batch", self.clean_batch, low=1)


class L2RW(ERM, name="l2rw"):
    r"""Weights that make a step on the batch also a step down on clean samples.

    Algorithm 1 of the source, with the loss f_i of a sample and g the mean loss of a clean batch:

    .. math:: \hat\theta(\epsilon) = \theta - \alpha \nabla_\theta \sum_i \epsilon_i f_i(\theta),
              \qquad u_i = -\frac{\partial}{\partial\epsilon_i} g(\hat\theta(\epsilon))
              |_{\epsilon = 0}, \qquad
              w_i = \frac{\max(u_i, 0)}{\sum_j \max(u_j, 0) + [\sum_j \max(u_j, 0) = 0]}

    and a step on :math:`\sum_i w_i f_i`.

    Note:
        At epsilon = 0 the virtual step goes nowhere, so that :math:`u_i = \alpha \langle \nabla
        f_i(\theta), \nabla g(\theta) \rangle` exactly: the derivative of f_i in the direction of
        the clean gradient. One forward-mode pass gives it for all samples, beside the losses, so a
        step is a forward and a backward pass of the clean batch and, of the batch, a forward pass
        with tangents and a backward pass; alpha cancels in w. The operations of the model need
        derivatives in forward mode, and the tangents about double the memory of the activations.
        Batch normalisation takes the statistics of the batch in both passes, as in the source;
        its running statistics see the training batches only. The clean pass is float32 under amp
        too: no gradient scaler looks after its gradient.
    """

    Settings = L2rwSettings
    needs_clean = True

    def weights(self, logits: Tensor, tangent: Tensor, label: Tensor) -> Tensor:
        """The w [B] from logits [B, C] and their derivatives in the direction of the gradient."""
        logits, tangent = logits.detach().float(), tangent.detach().float()
        # df_i = <softmax(z_i) - onehot(y_i), dz_i>
        change = (logits.softmax(1) * tangent).sum(1) - tangent.gather(1, label[:, None])[:, 0]
        weight = change.clamp_min(0)
        total = weight.sum()
        return weight / (total + (total == 0))

    def clean_gradient(self) -> dict[str, Tensor]:
        """Gradient of the mean loss of a random clean batch, by the name of the parameter."""
        model, clean = self.task.model, self.task.clean
        assert clean is not None  # the Trainer has seen to it
        x, label = clean
        chosen = torch.randperm(len(label), device=label.device)[: self.settings.clean_batch]
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        logits = functional_call(model, {**parameters, **buffers}, (x[chosen],))
        loss = sample_loss(logits, label[chosen]).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        return dict(zip(parameters, gradients, strict=True))

    def step(self, x: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """One step on the weighted sum of the losses."""
        gradient = self.clean_gradient()
        with forward_ad.dual_level():
            dual = {
                name: forward_ad.make_dual(parameter, gradient[name])  # type: ignore[no-untyped-call]
                for name, parameter in self.task.model.named_parameters()
                if name in gradient
            }
            with self.amp.autocast():
                output = functional_call(self.task.model, dual, (x,))
            logits, tangent = forward_ad.unpack_dual(output)  # type: ignore[no-untyped-call]
        weight = self.weights(logits, tangent, label)
        total, losses = weighted_loss(logits, label, weight)
        self.optimizer.zero_grad()
        self.amp.backward_and_step(total, self.optimizer)
        return losses.detach()
