import pytest
import torch

from als_ext.ops.pi_step import pi_rule, pi_state, step_unchecked, weight_unchecked

LR, DECAY = 1e-3, 1e-2


def published(pi, prior, index, loss):
    """The reference implementation's step: dense gradient, logarithms with eps, softmax."""
    gradient = torch.zeros_like(pi).index_add_(0, index, loss)
    logits = (pi + 1e-10).log() + DECAY * LR * (prior + 1e-10).log() + LR * gradient
    logits = logits / (1 + DECAY * LR)
    pi.copy_((logits - logits.max()).exp())
    return pi.div_(pi.sum())


def log_domain(r, log_prior, index, loss):
    """The same mathematics as ours in PyTorch: two normalisers, nothing but r kept."""
    rho = 1 / (1 + DECAY * LR)
    r.index_add_(0, index, LR * loss).mul_(rho)
    half = (r.index_add(0, index, LR * loss)).mul_(rho)
    return (log_prior + r).logsumexp(0), (log_prior + half).logsumexp(0)


@pytest.mark.parametrize("with_prior", [False, True], ids=["uniform", "prior"])
@pytest.mark.parametrize(("n", "batch"), [(60_000, 128), (10_000_000, 1024)])
def test_pi_step(race, device, n, batch, with_prior):
    n = race.size(n, 3000)
    batch = race.size(batch, 64)
    g = torch.Generator().manual_seed(0)
    prior = torch.rand(n, generator=g).add(0.5).to(device)
    prior = prior / prior.sum() if with_prior else torch.full_like(prior, 1 / n)
    index = torch.randint(0, n, (batch,), generator=g).to(device)
    loss = torch.rand(batch, generator=g).to(device)
    rule = pi_rule(LR, DECAY, 1.0, "max")
    log_prior = (prior * n).log() if with_prior else None
    state = pi_state(n, rule, log_prior=log_prior, capacity=batch, device=device)
    pi, r = prior.clone(), torch.zeros(n, device=device)
    eager_log_prior = prior.log()

    for _ in range(5):
        step_unchecked(state, rule, index, loss, None)
    gradient = torch.zeros(n, dtype=torch.float64, device=device)
    gradient.index_add_(0, index, loss.double())
    want = prior.double().log() + sum(rule.rho**k for k in range(1, 6)) * LR * gradient
    want = (n * want.softmax(0)).float()
    got = weight_unchecked(state, rule, None, half=False, log=False)
    error = ((got - want).abs() / want).max().item()

    compiled = published if race.smoke else torch.compile(published)
    target = torch.empty_like(r)
    contenders = {
        "ours": lambda: step_unchecked(state, rule, index, loss, None),
        "reference, torch eager": lambda: published(pi, prior, index, loss),
        "reference, torch.compile": lambda: compiled(pi, prior, index, loss),
        "log domain, torch eager": lambda: log_domain(r, eager_log_prior, index, loss),
        "copy of n floats (ceiling)": lambda: target.copy_(r),
    }
    race(contenders, error=error, limit=2e-6)
