"""SampleWeights: a distribution over samples that follows their losses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from als_ext._library import require_device
from als_ext.distributed import all_rows
from als_ext.distributed.joint import JointBatch, joint_batch
from als_ext.ops._checks import check_choice, check_int, check_tensor
from als_ext.ops.pi_step import (
    NO_INDEX,
    PiRule,
    PiState,
    check_batch,
    check_index,
    pi_normalize_,
    pi_rule,
    pi_state,
    step_unchecked,
    weight_unchecked,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MODES = ("auto", "dense", "lazy")
# "auto": lazy from n = first + second * B on. On the CPU the batch's own work is in both modes, and
# a lazy step is the faster one from 8192 samples on (B = 256: the curves of docs/performance.md;
# B from 32 to 65536: by hand). No GPU was measured: there a dense pass goes at memory speed, while
# one block makes a lazy step.
LAZY_FROM = {"cpu": (8192, 0), "cuda": (2**24, 4096)}
SETTINGS = ("n", "lr", "decay", "temperature", "direction")
CDF_SCALE = 2.0**61  # probabilities in fixed point: an integer sum is exact in any order


class SampleWeights:
    r"""A distribution π over n samples, stepped by the losses that samples show.

    .. math:: \log\pi_i \leftarrow \frac{\log\pi_i + \lambda\gamma\log\hat\pi_i \pm \gamma g_i}
              {1 + \lambda\gamma}, \quad \text{then softmax}(\cdot / T), \qquad
              g_i = \sum_{b:\,\text{index}_b = i} \text{loss}_b

    The π step of ALSO (arXiv 2508.16734) for max over π of :math:`\sum_i \pi_i f_i - \lambda\,
    \mathrm{KL}[\pi\,\|\,\hat\pi]`, without the epsilon that the reference implementation adds
    inside the logarithm. "max" raises the weight of samples with a high loss, which finds
    suspects (and, on noisy labels, also speeds up memorising them); "min" lowers it
    (KL-regularised self-paced weighting).

    A weight may be shared: let n be the number of groups and pass group ids as ``index``.

    Args:
        n: number of samples (or groups), >= 1.
        lr: γ, the step size, >= 0.
        decay: λ, the coefficient of the KL divergence to the prior, >= 0. Without further losses a
            log-ratio to the prior halves every ln 2 / (λγ) steps.
        prior: π̂, [n] floating point, positive and finite, normalised here; None is uniform.
        temperature: T, above 1 / (1 + λγ); 1 is always allowed.
        direction: "max" or "min".
        mode: "dense": a step reads 4 bytes a sample. "lazy": its cost does not depend on n; a
            bound on the error of the normaliser is computed each step, and where it exceeds 1e-8,
            the step makes an exact pass by itself. "auto": lazy from 8192 samples on on the CPU,
            on CUDA from 2**24 + 4096 B with the largest batch B so far, else dense.
        device: where the state lives; by default the prior's device, or torch's default.
        group: processes that share π. Each has all of it and gives :meth:`update_` and
            :meth:`reset_` its own part; all of them have to make these calls, that of
            :meth:`batch_share` and this one.
        batch_size: with a group: the most samples that a process has in a step, >= 1. In a single
            process it changes nothing: ``group=dist.group.WORLD`` is None there, if
            torch.distributed was not initialised, and one script serves one process and several.
        repeats: with a group: "once": an index counts once a step, where the padding of a
            ``DistributedSampler`` repeats a sample of the same step; "add": losses of equal indices
            add up (groups of samples that share a weight).

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument out of its range.

    Note:
        No gradient flows through weights or losses. :meth:`update_` and :meth:`weight` never wait
        for the device, work in ``torch.compile`` with fullgraph and in CUDA graphs (after one
        update with the largest batch), are untouched by autocast, and give the same bits from run
        to run, whatever the number of threads. Memory: 4 bytes a sample (8 if lazy), 4 more with a
        prior. All settings are fixed at construction.

    Example:
        >>> import torch, als_ext
        >>> weights = als_ext.SampleWeights(4, lr=1.0)
        >>> weights.update_(torch.tensor([0, 2]), torch.tensor([0.1, 2.0]))
        >>> [round(w, 3) for w in weights.weight(torch.tensor([0, 1, 2, 3])).tolist()]
        [0.427, 0.387, 2.8, 0.387]
        >>> weights.top(1).tolist()
        [2]
    """

    def __init__(
        self,
        n: int,
        *,
        lr: float = 1e-3,
        decay: float = 1e-2,
        prior: Tensor | None = None,
        temperature: float = 1.0,
        direction: str = "max",
        mode: str = "auto",
        device: torch.device | str | None = None,
        group: ProcessGroup | None = None,
        batch_size: int | None = None,
        repeats: str = "once",
    ) -> None:
        check_int("n", n, low=1)
        check_choice("mode", mode, MODES)
        self._rule = pi_rule(lr, decay, temperature, direction)
        self._settings: dict[str, Any] = dict(
            zip(SETTINGS, (n, float(lr), float(decay), float(temperature), direction), strict=True)
        )
        log_prior = None if prior is None else _log_prior(prior, n)
        if device is None:
            device = torch.get_default_device() if log_prior is None else log_prior.device
        device = _usable(device)
        self._mode = mode
        lazy = mode == "lazy" or (mode == "auto" and _lazy_pays(n, 0, device))
        self._state = pi_state(n, self._rule, log_prior=log_prior, lazy=lazy, device=device)
        self._joint = joint_batch(group, batch_size, repeats, self._settings)

    @property
    def joint(self) -> JointBatch | None:
        """How the batches of a group become one; None without a group."""
        return self._joint

    @property
    def n(self) -> int:
        """Number of samples (or groups)."""
        return self._state.u.shape[0]

    @property
    def settings(self) -> dict[str, Any]:
        """A copy of n, lr, decay, temperature and direction, as given."""
        return dict(self._settings)

    @property
    def mode(self) -> str:
        """How a step is computed, "dense" or "lazy". With "auto" it may turn from lazy to dense
        when a larger batch comes."""
        return "dense" if self._state.sums is None else "lazy"

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._state.u.device

    @property
    def skipped(self) -> Tensor:
        """How many losses were left out so far because they were not finite, 0-dim int64."""
        return self._state.skipped

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self._settings.items())
        prior = "uniform" if self._state.log_prior is None else "given"
        return f"SampleWeights({settings}, prior={prior!r}, device={str(self.device)!r})"

    # ---- the training step -------------------------------------------------------------------

    def weight(self, index: Tensor) -> Tensor:
        """Weights n π_i of a batch.

        Args:
            index: [B] int64 in [0, n).

        Returns:
            [B] float32, non-negative; 1 under uniform π.

        Raises:
            TypeError: index is not an int64 tensor.
            ValueError: another shape or device; on the CPU an index outside [0, n). On CUDA, where
                looking would wait for the device, such an index gives NaN.
        """
        check_index(self._state.u, index)
        return weight_unchecked(self._state, self._rule, index, half=False, log=False)

    def half_weight(self, index: Tensor) -> Tensor:
        """Weights n π½_i of the optimistic half point.

        π½ is π after one more step with the losses of the last :meth:`update_`; before the first
        update it is π itself.

        Args:
            index: [B] int64 in [0, n).

        Returns:
            [B] float32, non-negative.

        Raises:
            TypeError: as :meth:`weight`.
            ValueError: as :meth:`weight`.
        """
        check_index(self._state.u, index)
        return weight_unchecked(self._state, self._rule, index, half=True, log=False)

    def batch_share(self, index: Tensor) -> Tensor:
        """What each sample of a batch adds to a mean: 1 / B.

        With a group: (number of processes) / (samples of the joint batch that count), 0 for a
        repeat: of gradients of such sums, the average that DistributedDataParallel takes is the
        gradient of the mean over the joint batch.

        Args:
            index: [B] int64 in [0, n).

        Returns:
            [B] float32.

        Raises:
            TypeError: as :meth:`weight`.
            ValueError: as :meth:`weight`, and with a group more than ``batch_size`` entries.

        Example:
            >>> import torch, als_ext
            >>> als_ext.SampleWeights(9).batch_share(torch.tensor([3, 5])).tolist()
            [0.5, 0.5]
        """
        check_index(self._state.u, index)
        if self._joint is None:
            return torch.full_like(index, 1 / max(index.shape[0], 1), dtype=torch.float32)
        counted, total = self._joint.count(index)
        return (counted * self._joint.size / total).float()

    def update_(self, index: Tensor, loss: Tensor, *, found_inf: Tensor | None = None) -> None:
        """Step π by the losses of a batch.

        Args:
            index: [B] int64 in [0, n); losses of equal indices add up.
            loss: [B] float32, bfloat16, float16 or float64, per-sample losses; taken as constants.
                A loss that is not finite (as a float32) is left out and counted in
                :attr:`skipped`.
            found_inf: optional float32 tensor of one element on the device; when it is not 0 the
                step is skipped as a whole (``torch.amp.GradScaler``'s convention).

        Raises:
            TypeError: an argument of another type or dtype.
            ValueError: shapes or devices that do not fit; on the CPU an index outside [0, n). On
                CUDA, where looking would wait for the device, such an index is left out.
        """
        size = check_batch(self._state.u, index, loss, found_inf)
        if self._joint is not None:
            index, loss, found_inf = self._joint.gather(index, loss, found_inf)
            size = index.shape[0]
        if size > self._state.pending_index.shape[0]:
            self._reserve(size)
        step_unchecked(self._state, self._rule, index, loss, found_inf)

    def _reserve(self, size: int) -> None:
        """Make room for the half step of a larger batch; what is pending stays (a skipped step
        keeps it)."""
        if self._mode == "auto" and not _lazy_pays(self.n, size, self.device):
            self._make_dense()
        old = self._state
        more = size - old.pending_index.shape[0]
        self._state = old._replace(
            pending_index=torch.cat(
                [old.pending_index, old.pending_index.new_full((more,), NO_INDEX)]
            ),
            pending_grad=torch.cat([old.pending_grad, old.pending_grad.new_zeros(more)]),
        )

    def _make_dense(self) -> None:
        if self._state.sums is not None:
            self._state = _dense(self._state, self._rule)

    # ---- reading the distribution ------------------------------------------------------------

    def pi(self) -> Tensor:
        """All probabilities: [n] float32, non-negative, sum 1."""
        return weight_unchecked(self._state, self._rule, None, half=False, log=False) / self.n

    def log_pi(self, index: Tensor | None = None) -> Tensor:
        """Natural logarithms of the probabilities, which do not underflow.

        Args:
            index: [B] int64 in [0, n), or None for all samples.

        Returns:
            [B] or [n] float32, nats.

        Raises:
            TypeError: as :meth:`weight`.
            ValueError: as :meth:`weight`.
        """
        if index is not None:
            check_index(self._state.u, index)
        log_weight = weight_unchecked(self._state, self._rule, index, half=False, log=True)
        return log_weight - math.log(self.n)

    def scores(self) -> Tensor:
        """How suspect each label is, for ``scores=`` of a correction: log π where a high loss
        raises a weight (``direction="max"``), -log π where it lowers it.

        Returns:
            [n] float32, nats; the higher, the more suspect.

        Example:
            >>> import torch, als_ext
            >>> weights = als_ext.SampleWeights(4, direction="min")
            >>> weights.update_(torch.tensor([2]), torch.tensor([9.0]))
            >>> int(weights.scores().argmax())
            2
        """
        high = self.settings["direction"] == "max"
        return self.log_pi() if high else -self.log_pi()

    def top(self, m: int) -> Tensor:
        """The m samples of highest probability, highest first.

        Args:
            m: how many, in [0, n].

        Returns:
            [m] int64, descending by :meth:`log_pi`, ties by lower index. Under "max" these are the
            suspects.

        Raises:
            TypeError: m is not an int.
            ValueError: m out of range.

        Note:
            O(n + m log m); waits for the device.
        """
        check_int("m", m, low=0, high=self.n)
        if m == 0:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        score = self.log_pi()
        threshold = score.topk(m, sorted=False).values.amin()
        above = (score > threshold).nonzero().squeeze(1)
        level = (score == threshold).nonzero().squeeze(1)  # ascending: the lower indices first
        chosen = torch.cat([above, level[: m - above.shape[0]]])
        return chosen[score[chosen].argsort(descending=True, stable=True)]

    def entropy(self) -> Tensor:
        """−Σ π log π: 0-dim float64, nats, in [0, log n]."""
        weight, log_weight = self._weights()
        below = (weight * log_weight).mean(dtype=torch.float64)
        return (math.log(self.n) - below).clamp_min(0.0)

    def effective_size(self) -> Tensor:
        """1 / Σ π²: 0-dim float64, in [1, n]; n under uniform π."""
        weight, _ = self._weights()
        return self.n / (weight.double() * weight).mean()

    def kl(self) -> Tensor:
        """KL[π ‖ π̂], the divergence from the prior: 0-dim float64, nats, >= 0."""
        weight, log_ratio = self._weights()
        if self._state.log_prior is not None:
            log_ratio = log_ratio - self._state.log_prior
        return (weight * log_ratio).mean(dtype=torch.float64).clamp_min(0.0)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """All n π_i and their logarithms, [n] float32."""
        log_weight = weight_unchecked(self._state, self._rule, None, half=False, log=True)
        return log_weight.exp(), log_weight

    def sample(
        self, m: int, replacement: bool = True, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw samples by π.

        Args:
            m: how many, >= 0; at most n without replacement.
            replacement: whether a sample can be drawn more than once.
            generator: source of randomness on the weights' device; torch's default otherwise.

        Returns:
            [m] int64, in the order of the draws.

        Raises:
            TypeError: m is not an int.
            ValueError: m out of range, or a generator of another device.

        Note:
            Right for any n: ``torch.multinomial`` ends at 2^24 categories. With replacement the
            cumulative distribution is inverted in 64-bit fixed point (exact sums, so the draws do
            not depend on threads); without, the m largest of log π + Gumbel noise in float64 are
            taken. O(n); memory about 28 bytes a sample while it runs.
        """
        check_int("m", m, low=0, high=None if replacement else self.n)
        if generator is not None and generator.device.type != self.device.type:
            raise ValueError(
                f"generator: expected device '{self.device}', got '{generator.device}'"
            )
        if replacement:
            probability = self.pi().double()
            edges = probability.mul_(CDF_SCALE).round_().to(torch.int64).cumsum(0)
            uniform = torch.rand(m, dtype=torch.float64, device=self.device, generator=generator)
            mark = (uniform * edges[-1]).to(torch.int64).clamp_max(edges[-1] - 1)
            return torch.searchsorted(edges, mark, right=True)
        score = self.log_pi().double()
        noise = torch.empty_like(score).exponential_(generator=generator)
        return (score - noise.log_()).topk(m).indices

    # ---- changing and keeping the state ------------------------------------------------------

    def reset_(self, index: Tensor) -> None:
        """Forget the losses of some samples: their probability becomes the prior's.

        The other samples keep their ratios, and the losses of the last update that belong to the
        reset samples leave the pending half step. Meant for samples whose label was changed: their
        history belongs to the old label.

        Args:
            index: [B] int64 in [0, n); repeats are harmless. With a group: of any length; what all
                processes name is reset.

        Raises:
            TypeError: index is not an int64 tensor.
            ValueError: another shape or device, an index outside [0, n).

        Note:
            Two exact passes over the samples; waits for the device to check the range.
        """
        check_index(self._state.u, index)
        if self._joint is not None:
            index = all_rows(index, self._joint.processes.group)
        check_index(self._state.u, index, wait=True)
        if index.shape[0] == 0:
            return
        u, scalars, _, pending_index, pending_grad, log_prior, _ = self._state
        u[index] = -math.inf  # adds nothing to the normaliser
        others = u != -math.inf
        gone = (pending_index < self.n) & (pending_index >= 0)
        gone &= ~others[pending_index.clamp(0, self.n - 1)]
        pending_grad.masked_fill_(gone, 0.0)
        pi_normalize_(self._state, self._rule)
        # With the others' share of the prior, Z (1 - share) + Z_others = Z gives Z.
        share = others.double() if log_prior is None else others * log_prior.double().exp()
        share = share.mean()
        level = torch.where(share > 0, scalars[1] - share.log(), 0.0)
        r = level if log_prior is None else level + (1.0 - self._rule.prior) * log_prior[index]
        u[index] = (r / scalars[0]).to(u.dtype)
        pi_normalize_(self._state, self._rule)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything: settings, state, prior and the pending half step.

        Returns:
            dict of numbers, strings and tensors; ``torch.save`` and ``torch.load`` with
            ``weights_only=True`` take it.
        """
        tensors = self._state._asdict().items()
        return self.settings | {k: None if t is None else t.clone() for k, t in tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, bit for bit, on this object's device.

        Args:
            state_dict: from an object with the same n, settings and prior. "auto" takes over
                whether it was lazy; between "dense" and "lazy" it is converted.

        Raises:
            ValueError: a key is missing, or n, a setting, the prior or a tensor differs; nothing
                is changed then.
        """
        expected = [*SETTINGS, *PiState._fields]
        missing = [key for key in expected if key not in state_dict]
        if missing:
            raise ValueError(f"state_dict: expected the keys {expected}, got none for {missing}")
        for key, value in self._settings.items():
            if state_dict[key] != value:
                raise ValueError(
                    f"state_dict[{key!r}]: expected {value!r}, got {state_dict[key]!r}"
                )
        loaded = PiState(*(state_dict[key] for key in PiState._fields))
        self._check_loaded(loaded)
        if self._mode == "dense" and loaded.sums is not None:
            loaded = PiState._make(None if t is None else t.to(self.device) for t in loaded)
            loaded = _dense(loaded, self._rule)
        if loaded.pending_index.shape != self._state.pending_index.shape:
            self._state = self._state._replace(
                pending_index=torch.empty_like(loaded.pending_index, device=self.device),
                pending_grad=torch.empty_like(loaded.pending_grad, device=self.device),
            )
        if self._mode == "auto" and (self._state.sums is None) != (loaded.sums is None):
            self._state = self._state._replace(
                u=self._state.u.to(loaded.u.dtype),
                sums=None if loaded.sums is None else loaded.sums.clone().to(self.device),
            )
        for target, source in zip(self._state, loaded, strict=True):
            if target is not None and source is not None:
                target.copy_(source)
        if self._state.sums is not None and loaded.sums is None:
            pi_normalize_(self._state, self._rule)

    def _check_loaded(self, loaded: PiState) -> None:
        for name, own, other in zip(PiState._fields, self._state, loaded, strict=True):
            key = f"state_dict[{name!r}]"
            if own is None or other is None:
                if own is not other and name != "sums":
                    want, got = ("None" if t is None else "a tensor" for t in (own, other))
                    raise ValueError(f"{key}: expected {want}, got {got}")
                continue
            free = name.startswith("pending")
            shape = (loaded.pending_index.shape[0],) if free else tuple(own.shape)
            try:
                dtype = own.dtype
                if name == "u":
                    dtype = torch.float32 if loaded.sums is None else torch.float64
                check_tensor(key, other, shape=shape, dtypes=[dtype])
            except TypeError as error:
                raise ValueError(str(error)) from None
        prior = self._state.log_prior
        given = loaded.log_prior
        if prior is not None and not (given is not None and torch.equal(prior, given.to(prior))):
            raise ValueError("state_dict['log_prior']: expected this object's prior, got another")

    def to(self, device: torch.device | str) -> SampleWeights:
        """Move the state to a device, in place.

        Args:
            device: "cpu", "cuda", "cuda:1", ...

        Returns:
            self.

        Raises:
            ValueError: als_ext has no kernels for the device.
        """
        device = _usable(device)
        self._state = PiState._make(None if t is None else t.to(device) for t in self._state)
        return self


def _lazy_pays(n: int, batch: int, device: torch.device) -> bool:
    least, per_batch = LAZY_FROM[device.type]
    return n >= least + per_batch * batch


def _dense(state: PiState, rule: PiRule) -> PiState:
    """The dense form of a lazy state; float32 does not reach as far as its u, but r does."""
    scalars = state.scalars.clone()
    u = (scalars[0] * state.u - scalars[1]).float()  # r, centred: only differences matter
    scalars[0] = 1.0
    dense = state._replace(u=u, scalars=scalars, sums=None)
    pi_normalize_(dense, rule)
    return dense


def _usable(device: torch.device | str) -> torch.device:
    """The device, if als_ext has kernels for it."""
    device = torch.device(device)
    if device.type not in {"cpu", "cuda"}:
        raise ValueError(f"device: expected cpu or cuda, got '{device}'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu, as no CUDA device is available, got '{device}'")
    require_device(torch.empty(0, device=device), "device")
    return device


def _log_prior(prior: Tensor, n: int) -> Tensor:
    """log(n π̂) [n] float32 of an unnormalised prior."""
    check_tensor(
        "prior",
        prior,
        shape=(n,),
        dtypes=[torch.float32, torch.float64, torch.float16, torch.bfloat16],
    )
    prior = prior.detach().double()
    wrong = ~(prior.isfinite() & (prior > 0))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"prior: expected positive finite values, got {float(prior[at])} at position {at}"
        )
    log_ratio = (prior / prior.max()).log()
    # The operator's own sum has the same bits for any number of threads.
    rule = PiRule(rho=1.0, step=0.0, prior=0.0)
    state = pi_state(n, rule, device=prior.device)._replace(u=log_ratio.float())
    pi_normalize_(state, rule)
    return (log_ratio - state.scalars[1]).float()
