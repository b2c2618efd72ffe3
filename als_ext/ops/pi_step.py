"""pi_step: one step of the sample weights' distribution, with its normalisers, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from als_ext._library import _C
from als_ext.ops._checks import check_choice, check_float, check_tensor, values_readable

LOSS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SUMS = 90  # kPiSumsSize of pi_step_lazy_math.h
NO_INDEX = 2**63 - 1  # pads pending_index: sorts last and is never looked up


class PiState(NamedTuple):
    """The tensors of a distribution over n entries; r_i = scalars[0] * u_i."""

    u: Tensor  # [n] float32, float64 where there are sums
    scalars: Tensor  # [4] float64: A, log mean exp, the same of the half step, has a half step
    skipped: Tensor  # [] int64, losses left out because they were not finite
    pending_index: Tensor  # [capacity] int64 ascending, the last batch
    pending_grad: Tensor  # [capacity] float64, its summed losses at the first of equal indices
    log_prior: Tensor | None  # [n] float32, log(n prior_i); None is uniform
    sums: Tensor | None  # [SUMS] float64, power sums: the state is lazy


class PiRule(NamedTuple):
    """The constants of a step: r <- rho (r + step g), pi_i ~ exp(prior log_prior_i + r_i)."""

    rho: float
    step: float
    prior: float


def pi_rule(lr: float, decay: float, temperature: float, direction: str) -> PiRule:
    r"""Constants of the step from its settings.

    .. math:: \kappa = \frac{1}{1 + \lambda\gamma}, \qquad \rho = \frac{\kappa}{T}, \qquad
              c = \frac{\kappa\lambda\gamma}{T - \kappa}

    with :math:`\gamma` = lr and :math:`\lambda` = decay; c = 1 at T = 1.

    Args:
        lr: step size, >= 0.
        decay: coefficient of the KL divergence to the prior, >= 0.
        temperature: T, above :math:`\kappa` (1 is allowed when :math:`\kappa` is 1): below it a
            step would expand what it should contract.
        direction: "max" (a loss raises its sample's weight) or "min".

    Returns:
        PiRule of rho in (0, 1], step, which is lr or -lr, and prior, which is c.

    Raises:
        TypeError: a setting is not a number.
        ValueError: a setting out of its range.

    Example:
        >>> from als_ext.ops.pi_step import pi_rule
        >>> pi_rule(lr=0.5, decay=2.0, temperature=1.0, direction="min")
        PiRule(rho=0.5, step=-0.5, prior=1.0)
    """
    check_float("lr", lr, low=0.0, high=1e6)
    check_float("decay", decay, low=0.0, high=1e6)
    check_float("temperature", temperature, low=0.0, high=1e6, open_low=True)
    check_choice("direction", direction, ("max", "min"))
    kappa = 1.0 / (1.0 + decay * lr)
    shrink = kappa * decay * lr  # 1 - kappa, without the cancellation
    gap = (temperature - 1.0) + shrink  # T - kappa
    if gap < 0 or (gap == 0 and temperature != 1.0):
        raise ValueError(
            f"temperature: expected more than 1 / (1 + decay * lr) = {kappa:.9g}, got {temperature}"
        )
    prior = 1.0 if temperature == 1.0 else shrink / gap
    return PiRule(kappa / temperature, lr if direction == "max" else -lr, prior)


def pi_step_(
    state: PiState, rule: PiRule, index: Tensor, loss: Tensor, found_inf: Tensor | None = None
) -> None:
    r"""Step the distribution in place and compute its normaliser and the next half step's.

    .. math:: r_i \leftarrow \rho\,(r_i + \gamma' g_i), \qquad
              \pi_i = \frac{\exp(c\log\hat\pi_i + r_i)}{\sum_j \exp(c\log\hat\pi_j + r_j)},
              \qquad g_i = \sum_{b:\,\text{index}_b = i} \text{loss}_b

    The KL-regularised ascent step of ALSO (arXiv 2508.16734) in the log domain, with
    :math:`\gamma'` = ``rule.step``. The half step of the optimistic method is the same formula
    applied once more with the same g; its normaliser comes from the same pass over ``u``. A lazy
    state makes no pass: both normalisers come from power sums that a step mends in O(B), with a
    bound on their error; where the bound exceeds 1e-8 the step makes a pass by itself.

    :class:`als_ext.SampleWeights` is the convenient form.

    Args:
        state: the distribution; all but log_prior changes.
            ``pending_index`` holds at least B entries.
        rule: constants, from :func:`pi_rule`.
        index: [B] int64 in [0, n); equal indices add up.
        loss: [B] float32, bfloat16, float16 or float64; taken as a constant. One that is not finite
            (as a float32) is left out and counted in ``state.skipped``.
        found_inf: optional float32 tensor of one element on the device; when it is not 0 nothing
            changes (the convention of ``torch.amp.GradScaler``).

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes or devices that do not fit, a tensor of the state that requires grad, on
            the CPU an index outside [0, n). On CUDA, where looking would wait for the device, such
            an index is left out.

    Note:
        No gradient. Works in ``torch.compile`` with fullgraph and in CUDA graphs; autocast does not
        touch it. The same bits from run to run and for any number of threads or multiprocessors:
        fixed chunks, sums in float64 across them in a fixed order, losses of equal indices added in
        batch order (CPU) or in a fixed tree (CUDA). Traffic: 4 bytes an entry (8 with a prior), 8
        more in the rare pass that rescales u; a lazy state: O(B). Memory beyond the arguments
        O(B + n / 128).

    Example:
        >>> import torch
        >>> from als_ext.ops.pi_step import pi_rule, pi_state, pi_step_, pi_weight
        >>> rule = pi_rule(lr=1.0, decay=0.0, temperature=1.0, direction="max")
        >>> state = pi_state(4, rule, capacity=2)
        >>> pi_step_(state, rule, torch.tensor([2, 2]), torch.tensor([0.5, 0.5]))
        >>> [round(w, 3) for w in pi_weight(state, rule).tolist()]
        [0.7, 0.7, 1.901, 0.7]
    """
    check_state(state)
    size = check_batch(state.u, index, loss, found_inf)
    if state.pending_index.shape[0] < size:
        raise ValueError(
            f"state.pending_index: expected at least {size} entries (one for each of index), got "
            f"{state.pending_index.shape[0]}"
        )
    step_unchecked(state, rule, index, loss, found_inf)


def pi_state(
    n: int,
    rule: PiRule,
    *,
    log_prior: Tensor | None = None,
    capacity: int = 0,
    lazy: bool = False,
    device: torch.device | str | None = None,
) -> PiState:
    """Start a distribution at its prior.

    Args:
        n: number of entries, >= 1.
        rule: constants, from :func:`pi_rule`.
        log_prior: [n] float32, log(n prior_i), finite; None is uniform.
        capacity: largest batch of :func:`pi_step_`.
        lazy: steps in O(B), u in float64.
        device: where; that of ``log_prior`` by default.

    Returns:
        PiState of r_i = (1 - rule.prior) log_prior_i, so that pi is the prior.

    Example:
        >>> from als_ext.ops.pi_step import pi_rule, pi_state, pi_weight
        >>> rule = pi_rule(lr=1e-3, decay=1e-2, temperature=1.0, direction="max")
        >>> pi_weight(pi_state(3, rule), rule).tolist()
        [1.0, 1.0, 1.0]
    """
    if log_prior is not None and device is None:
        device = log_prior.device
    u = torch.empty(n, dtype=torch.float64 if lazy else torch.float32, device=device)
    if values_readable(u):  # a batch reads entries from all over u: fewer pages, fewer TLB misses
        _C.advise_huge_pages(u.data_ptr(), u.nbytes)
    if log_prior is None:
        u.zero_()
    else:
        log_prior = log_prior.to(device)
        u.copy_(log_prior).mul_(1.0 - rule.prior)
    state = PiState(
        u=u,
        scalars=torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64, device=u.device),
        skipped=torch.zeros((), dtype=torch.int64, device=u.device),
        pending_index=torch.full((capacity,), NO_INDEX, dtype=torch.int64, device=u.device),
        pending_grad=torch.zeros(capacity, dtype=torch.float64, device=u.device),
        log_prior=log_prior,
        sums=torch.zeros(SUMS, dtype=torch.float64, device=u.device) if lazy else None,
    )
    if lazy or log_prior is not None:
        pi_normalize_(state, rule)
    return state


def pi_normalize_(state: PiState, rule: PiRule) -> None:
    """Recompute both normalisers exactly, in one pass, after ``state.u`` was written by hand.

    Args:
        state: the distribution; only ``scalars`` and ``sums`` change.
        rule: constants, from :func:`pi_rule`.

    Raises:
        TypeError: a tensor of the state of another dtype.
        ValueError: shapes or devices that do not fit, a tensor that requires grad.

    Note:
        As :func:`pi_step_`.

    Example:
        >>> from als_ext.ops.pi_step import pi_normalize_, pi_rule, pi_state, pi_weight
        >>> rule = pi_rule(lr=1e-3, decay=1e-2, temperature=1.0, direction="max")
        >>> state = pi_state(2, rule)
        >>> _ = state.u.copy_(torch.tensor([3.0, 1.0]).log())
        >>> pi_normalize_(state, rule)
        >>> [round(w, 6) for w in pi_weight(state, rule).tolist()]
        [1.5, 0.5]
    """
    check_state(state)
    torch.ops.als_ext.pi_normalize_.default(*readable(state), *rule)
    _bump(state.u, state.scalars, *_optional(state.sums))


def pi_weight(
    state: PiState,
    rule: PiRule,
    index: Tensor | None = None,
    *,
    half: bool = False,
    log: bool = False,
) -> Tensor:
    """Read weights n pi_i, in O(B).

    Args:
        state: the distribution.
        rule: constants, from :func:`pi_rule`.
        index: [B] int64 in [0, n), or None for all entries.
        half: of the half step after the last :func:`pi_step_` (of pi itself before the first).
        log: log(n pi_i), which does not underflow.

    Returns:
        [B] or [n] float32, mean 1 over all entries.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes or devices that do not fit; on the CPU an index outside [0, n). On CUDA
            such an index gives NaN.

    Note:
        No gradient. Works in ``torch.compile`` with fullgraph and in CUDA graphs. Computed in
        float64, rounded once.

    Example:
        >>> from als_ext.ops.pi_step import pi_rule, pi_state, pi_weight
        >>> rule = pi_rule(lr=1e-3, decay=1e-2, temperature=1.0, direction="max")
        >>> pi_weight(pi_state(3, rule), rule, torch.tensor([2, 0]), log=True).tolist()
        [0.0, 0.0]
    """
    check_state(state)
    if index is not None:
        check_index(state.u, index)
    return weight_unchecked(state, rule, index, half=half, log=log)


def step_unchecked(
    state: PiState, rule: PiRule, index: Tensor, loss: Tensor, found_inf: Tensor | None
) -> None:
    """:func:`pi_step_` without its checks, but for the range of index on the CPU."""
    order = None
    loss = loss.detach().contiguous()
    if loss.dtype not in (torch.float32, torch.float64):
        loss = loss.float()
    given = index = index.contiguous()
    if index.device.type != "cpu":
        index, order = torch.sort(index, stable=True)
    try:
        torch.ops.als_ext.pi_step_.default(*state, index, order, loss, found_inf, *rule)
    except RuntimeError:
        if values_readable(given):
            _check_range(given, state.u.shape[0])
        raise
    _bump(*state[:5], *_optional(state.sums))


def weight_unchecked(
    state: PiState, rule: PiRule, index: Tensor | None, *, half: bool, log: bool
) -> Tensor:
    """:func:`pi_weight` without its checks, but for the range of index on the CPU."""
    weight: Tensor
    try:
        weight = torch.ops.als_ext.pi_weight.default(*readable(state), index, *rule, half, log)
    except RuntimeError:
        if index is not None and values_readable(index):
            _check_range(index, state.u.shape[0])
        raise
    return weight


def readable(state: PiState) -> tuple[Tensor | None, ...]:
    """What the operators that do not count skipped losses take."""
    return state.u, state.scalars, *state[3:]


def check_state(state: PiState) -> None:
    """Check every tensor of a state."""
    u = state.u
    dtype = torch.float32 if state.sums is None else torch.float64
    check_tensor("state.u", u, shape=("n",), dtypes=[dtype])
    if u.shape[0] < 1:
        raise ValueError("state.u: expected at least one entry, got shape [0]")
    f64, i64 = [torch.float64], [torch.int64]
    check_tensor("state.scalars", state.scalars, shape=(4,), dtypes=f64, like=u)
    check_tensor("state.skipped", state.skipped, shape=(), dtypes=i64, like=u)
    check_tensor("state.pending_index", state.pending_index, shape=("B",), dtypes=i64, like=u)
    pending = tuple(state.pending_index.shape)
    check_tensor("state.pending_grad", state.pending_grad, shape=pending, dtypes=f64, like=u)
    if state.log_prior is not None:
        shape, f32 = tuple(u.shape), [torch.float32]
        check_tensor("state.log_prior", state.log_prior, shape=shape, dtypes=f32, like=u)
    if state.sums is not None:
        check_tensor("state.sums", state.sums, shape=(SUMS,), dtypes=f64, like=u)
    for name, tensor in state._asdict().items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"state.{name}: expected a tensor that does not require grad, got one that does"
            )
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"state.{name}: expected a contiguous tensor, got strides {list(tensor.stride())}"
            )


def check_index(u: Tensor, index: Tensor, *, wait: bool = False) -> None:
    """Check indices into u; their range only if ``wait``: on CUDA that waits, and on the CPU the
    operators look by themselves."""
    check_tensor("index", index, shape=("B",), dtypes=[torch.int64], like=u)
    if wait and not torch.compiler.is_compiling():
        _check_range(index, u.shape[0])


def check_batch(u: Tensor, index: Tensor, loss: Tensor, found_inf: Tensor | None) -> int:
    """Check the arguments of a step (but for the range of index) and return B."""
    check_tensor("index", index, shape=("B",), dtypes=[torch.int64], like=u)
    check_tensor("loss", loss, shape=tuple(index.shape), dtypes=LOSS_DTYPES, like=u)
    if found_inf is not None:
        shape = (1,) if isinstance(found_inf, Tensor) and found_inf.dim() == 1 else ()
        check_tensor("found_inf", found_inf, shape=shape, dtypes=[torch.float32], like=u)
    return index.shape[0]


def _check_range(index: Tensor, n: int) -> None:
    wrong = (index < 0) | (index >= n)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"index: expected values in [0, {n}), got {int(index[at])} at position {at}"
        )


def _optional(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)


def _bump(*tensors: Tensor) -> None:
    # A compiled graph sees the writes through the schema.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


@torch.library.register_fake("als_ext::pi_step_")
def _fake_step(
    u: Tensor,
    scalars: Tensor,
    skipped: Tensor,
    pending_index: Tensor,
    pending_grad: Tensor,
    log_prior: Tensor | None,
    sums: Tensor | None,
    index: Tensor,
    order: Tensor | None,
    loss: Tensor,
    found_inf: Tensor | None,
    rho: float,
    step: float,
    prior: float,
) -> None:
    return None


@torch.library.register_fake("als_ext::pi_normalize_")
def _fake_normalize(
    u: Tensor,
    scalars: Tensor,
    pending_index: Tensor,
    pending_grad: Tensor,
    log_prior: Tensor | None,
    sums: Tensor | None,
    rho: float,
    step: float,
    prior: float,
) -> None:
    return None


@torch.library.register_fake("als_ext::pi_weight")
def _fake_weight(
    u: Tensor,
    scalars: Tensor,
    pending_index: Tensor,
    pending_grad: Tensor,
    log_prior: Tensor | None,
    sums: Tensor | None,
    index: Tensor | None,
    rho: float,
    step: float,
    prior: float,
    half: bool,
    log: bool,
) -> Tensor:
    return u.new_empty(u.shape if index is None else index.shape, dtype=torch.float32)
