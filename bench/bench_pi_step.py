"""A step of the sample weights and the batch's new weights, as in a training step.

Peers: the published formula in eager and compiled torch (dense gradient, logarithms with an
epsilon, softmax), and the same mathematics as ours in the log domain. Ceiling of a dense step: a
copy that moves the 4 bytes an entry (8 with a prior) that it reads. Ceiling of a lazy one: a gather
and a scatter of the batch.
"""

import itertools
from functools import partial

import torch

from als_ext import SampleWeights
from bench.curve import Curve
from bench.inputs import COPY, copy_of
from bench.race import NOT_COMPILED, Counts, Lineup, Race, Unavailable, compile_peer

LR, DECAY = 1e-3, 1e-2
BATCHES = 64  # more than a race calls
STEPS = 5  # before the gate looks
GATE = 2e-6
GPU_TARGETS = {"reference, torch eager": 4.0, "reference, torch.compile": 1.5, COPY: 0.85}
FLAT = "time_over_that_of_few_samples"
REFERENCE_UP_TO = {"cpu": 10_000_000, "cuda": 100_000_000}


def published(pi, prior, index, loss):
    """The reference implementation's step, and the batch's weights."""
    gradient = torch.zeros_like(pi).index_add_(0, index, loss)
    logits = (pi + 1e-10).log() + DECAY * LR * (prior + 1e-10).log() + LR * gradient
    logits = logits / (1 + DECAY * LR)
    pi.copy_((logits - logits.max()).exp())
    pi.div_(pi.sum())
    return pi[index] * pi.shape[0]


def log_domain(r, log_prior, index, loss):
    """Only r is kept: two normalisers, of pi and of the half step, whose weights are returned."""
    rho = 1 / (1 + DECAY * LR)
    r.index_add_(0, index, LR * loss).mul_(rho)
    half = r.index_add(0, index, LR * loss).mul_(rho)
    (log_prior + r).logsumexp(0)
    total = (log_prior + half).logsumexp(0)
    return (log_prior[index] + half[index] - total).exp()


def make_weights(n, mode, prior, device):
    try:
        weights = SampleWeights(n, lr=LR, decay=DECAY, prior=prior, mode=mode, device=device)
    except ValueError as error:
        raise Unavailable(str(error)) from None
    weights.load_state_dict(weights.state_dict())  # its pages are written, as after an epoch
    return weights


def batches(n, size, device):
    """Batches for ever, BATCHES different ones: a step meets entries that no cache holds."""
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, n, (BATCHES, size), generator=g).to(device)
    loss = torch.rand(BATCHES, size, generator=g).to(device)
    return itertools.cycle(list(zip(index, loss, strict=True)))


def step(weights, turn):
    index, loss = next(turn)
    weights.update_(index, loss)
    return weights.half_weight(index)


def exact_weights(n, prior, index, loss, asked):
    """n pi of the entries ``asked`` after STEPS equal steps, float64; only a batch has moved."""
    rho = 1 / (1 + DECAY * LR)
    touched, place = index.unique(return_inverse=True)
    gradient = torch.zeros(touched.shape[0], dtype=torch.float64, device=index.device)
    gradient.index_add_(0, place, loss.double())
    r = sum(rho**k for k in range(1, STEPS + 1)) * LR * gradient
    uniform = prior is None
    share = torch.full_like(r, 1 / n) if uniform else prior[touched].double()
    total = 1 + (share * r.expm1()).sum()
    values = torch.full(asked.shape, 1 / n, dtype=torch.float64, device=index.device)
    if not uniform:
        values = prior[asked].double()
    at = torch.searchsorted(touched, asked).clamp_max(touched.shape[0] - 1)
    grown = torch.where(touched[at] == asked, r[at], 0.0).exp()
    return n * values * grown / total


def setup(n, size, mode, with_prior, quick, device):
    g = torch.Generator().manual_seed(0)
    prior = None
    if with_prior:
        prior = torch.rand(n, generator=g, dtype=torch.float64).add(0.5).to(device)
        prior /= prior.sum()
    weights = make_weights(n, mode, prior, device)
    index, loss = next(batches(n, size, device))

    def error():
        for _ in range(STEPS):
            weights.update_(index, loss)
        asked = torch.cat([index, torch.arange(min(n, 1000), device=device)])
        want = exact_weights(n, prior, index, loss, asked)
        return ((weights.weight(asked) - want).abs() / want).max().item()

    lineup = Lineup("weights, relative, against float64", GATE)
    lineup.ours(partial(step, weights, batches(n, size, device)), error)
    if mode == "lazy":
        dense = make_weights(n, "dense", prior, device)
        lineup.variant("dense", partial(step, dense, batches(n, size, device)))
    if n > REFERENCE_UP_TO[device.type]:
        reason = f"seconds a step; see n = {REFERENCE_UP_TO[device.type]:.0e}"
        for name in ("reference, torch eager", "reference, torch.compile", "log domain, torch"):
            lineup.skip(name, reason)
    else:
        _torch_peers(lineup, n, prior, index, loss, quick)
    if mode == "lazy":
        row, picked = torch.zeros(n, device=device), torch.zeros(size, device=device)
        lineup.ceiling(
            "gather and scatter of the batch",
            lambda: row.index_copy_(0, index, picked.add_(row.index_select(0, index))),
        )
    else:
        lineup.ceiling(COPY, copy_of((8 if with_prior else 4) * n, device))
        if n == 10_000_000:
            lineup.at_least = {"reference, torch eager": 20.0, COPY: 0.6}
    return lineup


def setup_flat(many, few, size, quick, device):
    """A lazy step of many samples against one of few."""
    lineup = setup(many, size, "lazy", False, quick, device)
    weights = make_weights(few, "lazy", None, device)
    lineup.part("few samples", partial(step, weights, batches(few, size, device)))
    lineup.derive = lambda median: {FLAT: median["ours"] / median["few samples"]}
    return lineup


def _torch_peers(lineup, n, prior, index, loss, quick):
    uniform = torch.full((n,), 1 / n, device=index.device)
    start = uniform if prior is None else prior.float()
    lineup.peer("reference, torch eager", partial(published, start.clone(), start, index, loss))
    compiled = compile_peer(published, quick)
    if compiled is None:
        lineup.skip("reference, torch.compile", NOT_COMPILED)
    else:
        call = partial(compiled, start.clone(), start, index, loss)
        lineup.peer("reference, torch.compile", call, compiled=True)
    r = torch.zeros_like(start)
    lineup.peer("log domain, torch", partial(log_domain, r, start.log(), index, loss))


def counts(n, size, mode, with_prior):
    """A dense step reads an entry (and its prior); a lazy one reads and writes those of the batch.
    Index and loss come, a weight goes; an exponential and two additions an entry."""
    entries = (8 if with_prior else 4) * n if mode == "dense" else 2 * 8 * size
    return Counts(entries + size * (8 + 4 + 4), 3.0 * (n if mode == "dense" else size))


def races(quick):
    dense = [(60_000, 128, False), (1_000_000, 1024, False), (10_000_000, 1024, False)]
    dense += [(10_000_000, 1024, True), (100_000_000, 1024, False)]
    lazy = [10**5, 10**6, 10**7, 10**8]
    if quick:
        dense, lazy = [(3000, 64, False), (3000, 64, True)], [3000]
    for n, size, with_prior in dense:
        yield Race(
            "pi_step",
            f"dense, n = {n:.0e}, B = {size}" + (", prior" if with_prior else ""),
            partial(setup, n, size, "dense", with_prior, quick),
            gpu_only=n > 10**7,
            counts=counts(n, size, "dense", with_prior),
            gpu_at_least=GPU_TARGETS if n >= 10**8 else {},
        )
    for n in lazy:
        yield Race(
            "pi_step",
            f"lazy, n = {n:.0e}, B = 256",
            partial(setup, n, 256, "lazy", False, quick),
            counts=counts(n, 256, "lazy", False),
        )
    many, few = (3000, 1000) if quick else (10**9, 10**6)
    yield Race(
        "pi_step",
        f"lazy, n = {many:.0e} against {few:.0e}, B = 256",
        partial(setup_flat, many, few, 256, quick),
        gpu_only=not quick,
        counts=counts(many, 256, "lazy", False),
        gpu_at_most={FLAT: 1.2},
    )


def curves(quick):
    sizes = [1000, 3000] if quick else [int(10**e) for e in (4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8)]
    device = torch.device("cpu")

    def ours(mode, n):
        return partial(step, make_weights(n, mode, None, device), batches(n, 256, device))

    def reference(n):
        pi = torch.full((n,), 1 / n)
        return partial(published, pi, pi.clone(), *next(batches(n, 256, device)))

    yield Curve(
        "pi_step",
        "samples n (a step and the batch's weights, B = 256)",
        {
            "ours, dense": {n: partial(ours, "dense", n) for n in sizes},
            "ours, lazy": {n: partial(ours, "lazy", n) for n in sizes},
            "reference, torch eager": {n: partial(reference, n) for n in sizes if n <= 10**7},
        },
        fit_from=0 if quick else 10**6,
        reference=1000 if quick else 10**5,
        at_most={"ours, lazy": 1.2},
        alone=frozenset({"ours, lazy"}),
    )
