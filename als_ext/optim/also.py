"""ALSO as a torch.optim.Optimizer: the model and the sample weights move in one step call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from als_ext.ops._checks import check_choice, check_float
from als_ext.ops.also_step import also_step_
from als_ext.weights import SampleWeights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MODES = ("optimistic", "descent-ascent")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

StateDict: TypeAlias = dict[str, Any]
Closure: TypeAlias = Callable[[], tuple[Tensor, Tensor]]
F = TypeVar("F", bound=Callable[..., Any])

USE = """
    loss, losses = als_ext.ops.weighted_loss(model(x), y, optimizer.loss_weight(index))
    loss.backward()
    optimizer.step(index=index, losses=losses)
or, with a closure that zeroes the gradients, makes the first two lines and returns (loss, losses),
    optimizer.step(closure, index=index)"""


def _untraced(function: F) -> F:
    """torch.compile breaks its graph here (torch.compiler.disable, with the type kept)."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


@dataclass
class _Lists:
    """Arguments of one call of the kernel: parameters of one group, device and dtype."""

    group: dict[str, Any]
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    write_back: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _same_memory_order(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _check_options(options: dict[str, Any]) -> None:
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(f"lr: expected a number or a [] float tensor, got {lr!r}")
    else:
        check_float("lr", lr, low=0.0)
    if not (
        isinstance(betas, (tuple, list))
        and len(betas) == 2
        and all(isinstance(b, (int, float)) and 0.0 <= b < 1.0 for b in betas)
    ):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    check_float("eps", options["eps"], low=0.0)
    check_float("weight_decay", options["weight_decay"], low=0.0)
    check_float("alpha", options["alpha"], low=0.0)


class ALSO(Optimizer):
    r"""Adam on the model and exponentiated ascent on the sample weights, together.

    .. math:: \max_{\pi \in \Delta}\,\min_\theta\; \sum_i \pi_i f_i(\theta)
              + \tfrac\tau2 \lVert\theta\rVert^2 - \tau\,\mathrm{KL}[\pi \,\Vert\, \hat\pi]

    ALSO, arXiv 2508.16734. ``descent-ascent`` takes the gradient at :math:`(\theta, \pi)` and makes
    one step of each. ``optimistic`` first goes half a step with the previous gradient, takes the
    gradient there and makes the step from where it stood; both steps advance Adam's moments:

    .. math:: \theta_{1/2} = \theta + \mathrm{AdamStep}(\alpha g'), \quad
              \pi_{1/2} = \mathrm{PiStep}(\pi, g'_\pi), \qquad
              \theta \leftarrow \theta + \mathrm{AdamStep}(g(\theta_{1/2}, \pi_{1/2})), \quad
              \pi \leftarrow \mathrm{PiStep}(\pi, f(\theta_{1/2}))

    While training the model holds :math:`\theta_{1/2}`; :meth:`eval` puts :math:`\theta` into it
    and :meth:`train` goes back, as with schedule-free optimizers. docs/also.md has the details.

    Args:
        params: parameters or parameter groups, as for any torch optimizer; float32, float64,
            bfloat16 or float16, real. A group may set lr, betas, eps, weight_decay,
            decoupled_weight_decay, amsgrad and alpha for itself.
        n: number of samples (or of groups of samples, if ``index`` holds group numbers), >= 1.
        lr: step size of the model, >= 0; a number or a [] tensor. Schedulers may change it.
        betas: decay of Adam's moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: :math:`\tau` of the model, >= 0; inside the gradient (L2).
        decoupled_weight_decay: AdamW's form of weight decay instead.
        amsgrad: use the largest second moment so far.
        mode: "optimistic" or "descent-ascent".
        alpha: factor of the previous gradient in the model's half step, >= 0.
        pi_lr: :math:`\gamma`, step size of the weights, in [0, 1e6].
        pi_decay: :math:`\lambda`, strength of the pull towards ``prior``, in [0, 1e6].
        prior: [n] :math:`\hat\pi` up to a factor, > 0, or None for uniform.
        temperature: T of the softmax that the weights go through at each step, above
            :math:`1 / (1 + \lambda\gamma)`; 1 is always allowed.
        direction: "max": samples of high loss gain weight; "min": they lose weight.
        loss_scale: factor of :math:`\pi_i` in the loss, > 0; None for n / batch size, with which
            uniform weights give the mean loss.
        weights_mode: ``mode`` of :class:`als_ext.SampleWeights`.
        group: processes that split each batch and average their gradients, as
            DistributedDataParallel does; all of them call :meth:`loss_weight` and :meth:`step` with
            their own parts. Parameters and weights are then those of one process with the joint
            batch.
        batch_size: with a group: the most samples that a process has in a step, >= 1. In a single
            process it changes nothing: ``group=dist.group.WORLD`` is None there, if
            torch.distributed was not initialised, and one script serves one process and several.
        repeats: with a group: "once" or "add", see :class:`als_ext.SampleWeights`.

    Raises:
        TypeError: an argument, a parameter or a gradient of another type or dtype.
        ValueError: a value out of range; a sparse gradient; a state_dict that does not fit.
        RuntimeError: :meth:`step` while the model holds :math:`\theta` (after :meth:`eval`).

    Note:
        No host synchronisation in a step. Works with torch.amp.GradScaler (a step with infinite
        gradients changes nothing, the weights included), with torch's schedulers, hooks, deepcopy
        and pickle; may be captured in a CUDA graph after the first step, with a tensor as ``lr``.
        ``step`` breaks a torch.compile graph. Deterministic. State, bytes a parameter: 12
        (8 in descent-ascent mode; 4 more with amsgrad; twice that for float64), whatever its
        dtype; while in eval state one more copy of the parameter. Weights: see SampleWeights.

    Example:
        >>> import als_ext, torch
        >>> x, y = torch.randn(100, 5), torch.randint(0, 3, (100,))
        >>> model = torch.nn.Linear(5, 3)
        >>> optimizer = als_ext.ALSO(model.parameters(), n=100)
        >>> for index in torch.randperm(100).split(25):
        ...     loss, losses = als_ext.ops.weighted_loss(
        ...         model(x[index]), y[index], optimizer.loss_weight(index))
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step(index=index, losses=losses)
        >>> optimizer.weights.top(3).shape
        torch.Size([3])
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf, the kernel reads

    def __init__(
        self,
        params: Any,
        n: int,
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-3,
        decoupled_weight_decay: bool = False,
        amsgrad: bool = False,
        mode: str = "optimistic",
        alpha: float = 1.0,
        pi_lr: float = 1e-3,
        pi_decay: float = 1e-2,
        prior: Tensor | None = None,
        temperature: float = 1.0,
        direction: str = "max",
        loss_scale: float | None = None,
        weights_mode: str = "auto",
        group: ProcessGroup | None = None,
        batch_size: int | None = None,
        repeats: str = "once",
    ) -> None:
        check_choice("mode", mode, MODES)
        if loss_scale is not None:
            check_float("loss_scale", loss_scale, low=0.0, open_low=True)
        # SampleWeights would name them lr, which is another one here, and decay.
        check_float("pi_lr", pi_lr, low=0.0, high=1e6)
        check_float("pi_decay", pi_decay, low=0.0, high=1e6)
        self.mode = mode
        self.loss_scale = loss_scale
        self.training = True
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "amsgrad": amsgrad,
            "alpha": alpha,
        }
        super().__init__(params, defaults)
        self.weights = SampleWeights(
            n,
            lr=pi_lr,
            decay=pi_decay,
            prior=prior,
            temperature=temperature,
            direction=direction,
            mode=weights_mode,
            device=next((p.device for p in self._parameters()), None),
            group=group,
            batch_size=batch_size,
            repeats=repeats,
        )

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; they start without any history."""
        super().add_param_group(param_group)
        try:
            _check_options(self.param_groups[-1])
            for p in self.param_groups[-1]["params"]:
                if p.dtype not in DTYPES:
                    names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
                    got = str(p.dtype).removeprefix("torch.")
                    raise TypeError(f"params: expected dtype {names}, got {got}")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def loss_weight(self, index: Tensor) -> Tensor:
        r"""Weights of a batch for its loss: loss_scale times :math:`\pi_i` at the half point.

        Args:
            index: [B] int64, sample (or group) numbers in [0, n).

        Returns:
            [B] float32, without gradient. With ``loss_scale=None`` uniform weights give 1 / B each,
            so that the weighted sum of losses is their mean. With a group B is the size of the
            joint batch, repeats have weight 0, and all is times the number of processes, by which
            the average of their gradients is divided.
        """
        half = self.mode == "optimistic"
        weight = self.weights.half_weight(index) if half else self.weights.weight(index)
        if self.weights.joint is not None:
            counted, total = self.weights.joint.count(index)
            scale = self.loss_scale
            factor = 1 / total if scale is None else scale / self.weights.n
            return (weight * (counted * self.weights.joint.size * factor)).float()
        if self.loss_scale is None:
            return weight / max(index.numel(), 1)
        return weight * (self.loss_scale / self.weights.n)

    @_untraced
    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | None = None,
        *,
        index: Tensor | None = None,
        losses: Tensor | None = None,
    ) -> Tensor | None:
        """Move model and weights with the gradients of the last backward and the batch's losses.

        Args:
            closure: zeroes the gradients, computes and backwards the loss, returns (loss, losses).
            index: [B] int64, the batch's sample (or group) numbers; equal ones add up.
            losses: [B] the batch's losses, unweighted and unscaled; left out with a closure.

        Returns:
            The closure's loss, or None.
        """
        if not self.training:
            raise RuntimeError(
                "ALSO.step: the model holds its evaluation point (after optimizer.eval()); "
                "call optimizer.train() before the forward pass of a training step"
            )
        loss = None
        if closure is not None:
            if losses is not None:
                raise TypeError("losses: expected None with a closure, which returns them")
            with torch.enable_grad():
                result = closure()
            if not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError(
                    f"closure: expected it to return (loss, losses), got {type(result).__name__}"
                )
            loss, losses = result
        if index is None or losses is None:
            missing = "index" if index is None else "losses"
            raise TypeError(f"ALSO.step: {missing} is missing. A training step is:{USE}")
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # set by GradScaler
        if found_inf is not None:
            found_inf = found_inf.to(self.weights.device, non_blocking=True)
        calls = self._collect()  # what can be wrong is found before anything has moved
        self.weights.update_(index, losses.detach(), found_inf=found_inf)
        for lists in calls:
            group = lists.group
            also_step_(
                lists.params,
                lists.grads,
                lists.exp_avgs,
                lists.exp_avg_sqs,
                lists.max_exp_avg_sqs,
                lists.bases,
                lists.steps,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled_weight_decay=group["decoupled_weight_decay"],
                alpha=group["alpha"],
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=found_inf,
            )
            for param, work in lists.write_back:
                param.copy_(work)
        return loss

    def _collect(self) -> list[_Lists]:
        """The kernel's arguments for every parameter that has a gradient."""
        calls = []
        for group in self.param_groups:
            by_kind: dict[tuple[torch.device, torch.dtype], _Lists] = {}
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise ValueError(f"params: expected dense gradients, got layout {grad.layout}")
                if grad.dtype != param.dtype:
                    raise TypeError(
                        f"params: expected gradients of their dtype {param.dtype}, got {grad.dtype}"
                    )
                state = self._state_of(param, group["amsgrad"])
                order = state["exp_avg"]
                kind = (param.device, param.dtype)
                lists = by_kind.get(kind)
                if lists is None:
                    lists = by_kind[kind] = _Lists(group)
                    calls.append(lists)
                if not _same_memory_order(grad, order):
                    grad = torch.empty_like(order, dtype=grad.dtype).copy_(grad)
                if not _same_memory_order(param, order):
                    work = torch.empty_like(order, dtype=param.dtype).copy_(param)
                    lists.write_back.append((param, work))
                    param = work
                lists.params.append(param)
                lists.grads.append(grad)
                lists.exp_avgs.append(order)
                lists.exp_avg_sqs.append(state["exp_avg_sq"])
                if group["amsgrad"]:
                    lists.max_exp_avg_sqs.append(state["max_exp_avg_sq"])
                if self.mode == "optimistic":
                    lists.bases.append(state["base"])
                lists.steps.append(state["step"])
        return calls

    def _state_of(self, param: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        """State of one parameter, made at its first gradient: dense, in the parameter's order."""
        state: dict[str, Tensor] = self.state[param]
        dtype = _state_dtype(param)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int64, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
            if self.mode == "optimistic":  # no previous gradient yet: the half point is the point
                state["base"] = torch.empty_like(param, dtype=dtype).copy_(param)
        if amsgrad and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
        return state

    @torch.no_grad()
    def eval(self) -> None:
        r"""Put :math:`\theta`, the point to evaluate, save or deploy, into the model."""
        if not self.training:
            return
        for param in self._parameters():
            state = self.state.get(param, {})
            if "base" in state:
                state["half"] = param.detach().clone()
                param.copy_(state["base"])
        self.training = False

    @torch.no_grad()
    def train(self) -> None:
        r"""Put :math:`\theta_{1/2}`, the point to train at, back into the model."""
        if self.training:
            return
        for param in self._parameters():
            state = self.state.get(param, {})
            if "half" in state:
                param.copy_(state.pop("half"))
        self.training = True

    def state_dict(self) -> StateDict:
        """Everything that a later run needs; save the model in the same (train or eval) state."""
        state_dict = super().state_dict()
        state_dict["also"] = {
            "mode": self.mode,
            "training": self.training,
            "loss_scale": self.loss_scale,
            "weights": self.weights.state_dict(),
        }
        return state_dict

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take over a state_dict, its train or eval state included; it is copied.

        Load the model's state_dict of the same moment as well: the parameters are not touched.
        """
        loaded: StateDict = {}

        def check(_: Optimizer, final: StateDict) -> None:  # after the user's own hooks
            self._check_state_dict(final)
            loaded.update(final)

        def restore(_: Optimizer) -> None:
            # The base class has cast all state to the parameters' dtype and shares its memory.
            for saved, param in self._pairs(loaded):
                for key, value in loaded["state"].get(saved, {}).items():
                    if key == "step":
                        value = value.to(param.device, torch.int64, copy=True)
                    else:
                        dtype = param.dtype if key == "half" else _state_dtype(param)
                        value = torch.empty_like(param, dtype=dtype).copy_(value)
                    self.state[param][key] = value.detach()
            self.training = loaded["also"]["training"]
            self.loss_scale = loaded["also"]["loss_scale"]
            self.weights.load_state_dict(loaded["also"]["weights"])

        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _pairs(self, state_dict: StateDict) -> Iterator[tuple[int, Tensor]]:
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        return zip(saved, self._parameters(), strict=False)  # lengths: the base class checks

    def _check_state_dict(self, state_dict: StateDict) -> None:
        missing = {"state", "param_groups", "also"} - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict: expected one of ALSO, missing: {', '.join(missing)}")
        also = state_dict["also"]
        if also["mode"] != self.mode:
            raise ValueError(f"state_dict: expected mode {self.mode!r}, got {also['mode']!r}")
        for saved, param in self._pairs(state_dict):
            for key, value in state_dict["state"].get(saved, {}).items():
                if key != "step" and value.shape != param.shape:
                    raise ValueError(
                        f"state_dict: expected {key} of shape {list(param.shape)} for parameter "
                        f"{saved}, got {list(value.shape)}"
                    )
        copy.deepcopy(self.weights).load_state_dict(also["weights"])

    def __getstate__(self) -> dict[str, Any]:
        own = ("mode", "loss_scale", "training", "weights")
        return super().__getstate__() | {name: getattr(self, name) for name in own}
