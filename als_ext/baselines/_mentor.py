"""The network of MentorNet, the curriculum of MentorNet PD, and how the one learns the other.

Jiang et al., ICML 2018, arXiv 1712.05055, and the code that its authors published with it
(github.com/google/mentornet), which fixes what the paper leaves open.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from als_ext.runtime import seeded

PERCENT = 100  # epochs are counted in percent of the run: 0, ..., 99
BURN_IN = 18  # percent of the run in which the predefined curriculum takes every sample
LINEAR = 90  # percent of the run from which on its weights fall linearly


class Mentor(nn.Module):
    r"""Weights v in (0, 1) from the loss of a sample, its excess over a percentile and the epoch.

    The loss pair goes through a bidirectional LSTM of one unit and one step, the epoch through an
    embedding of 5 numbers; a layer of 20 tanh units and a linear one give the logit of v.

    Note:
        From a state of zeros one step of an LSTM is c = sigmoid(i) tanh(g): the forget gate and the
        recurrent weights have nothing to act on, and the published code takes c, so that is what
        stands here. The epoch embedding is random and stays as it is, as there. There every label
        is 0, so its embedding is a constant, which the next layer's bias can be as well: it is left
        out.
    """

    epoch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(2, 4)  # input gate and candidate, forwards and backwards
        self.register_buffer("epoch", torch.randn(PERCENT, 5))
        self.hidden = nn.Linear(2 + 5, 20)
        self.output = nn.Linear(20, 1)
        for layer in (self.hidden, self.output):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)

    def forward(self, loss: Tensor, excess: Tensor, percent: Tensor | int) -> Tensor:
        """Logits of v [B] from losses [B], excesses [B] and percents, int64 [B] or one for all."""
        gate, candidate = self.cell(torch.stack([loss, excess], 1)).chunk(2, 1)
        epoch = self.epoch[percent].expand(len(loss), -1)
        features = torch.cat([gate.sigmoid() * candidate.tanh(), epoch], 1)
        logit: Tensor = self.output(self.hidden(features).tanh())
        return logit[:, 0]


def predefined_curriculum(excess: Tensor, percent: Tensor) -> Tensor:
    """The weights [B] that MentorNet PD learns, in closed form.

    1 in the first 18 percent of the run; then self-paced, [excess <= 0]; in the last 10 percent
    linear, 1 - excess clamped to [0, 1].
    """
    self_paced = (excess <= 0).float()
    linear = (1 - excess).clamp(0, 1)
    later = torch.where(percent < LINEAR, self_paced, linear)
    return torch.where(percent <= BURN_IN, torch.ones_like(excess), later)


def curriculum_grid() -> tuple[Tensor, Tensor, Tensor]:
    """Losses, excesses and percents at which it is learned, those of the published code."""
    loss = torch.cat([torch.arange(100) / 10, torch.arange(10.0, 30.0)])
    excess = torch.arange(-50, 50) / 10
    grid = torch.meshgrid(loss, excess, torch.arange(float(PERCENT)), indexing="ij")
    losses, excesses, percents = (part.flatten() for part in grid)
    return losses, excesses, percents.long()


def fit(
    mentor: Mentor,
    features: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    *,
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> None:
    """Teach weights ``target`` [m] for ``features`` (losses, excesses, percents), each [m].

    Cross entropy where all targets are 0 or 1, else squared error; Adam with the published learning
    rate of 0.1, here with a half cosine to 0 over fewer, larger steps. All of it is on the CPU.
    """
    binary = bool(((target == 0) | (target == 1)).all())
    optimizer = torch.optim.Adam(mentor.parameters(), lr=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(target), (batch,), generator=generator)
        logit = mentor(*(part[chosen] for part in features))
        if binary:
            loss = nn.functional.binary_cross_entropy_with_logits(logit, target[chosen])
        else:
            loss = nn.functional.mse_loss(logit.sigmoid(), target[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def new_mentor(seed: int) -> Mentor:
    """A network on the CPU with random weights; torch's global generators do not move."""
    with seeded(seed):
        return Mentor()


@functools.cache
def predefined_mentor() -> Mentor:
    """The network that learned :func:`predefined_curriculum`, once a process. Do not change it."""
    mentor = new_mentor(0)
    losses, excesses, percents = curriculum_grid()
    fit(
        mentor,
        (losses, excesses, percents),
        predefined_curriculum(excesses, percents),
        steps=1000,
        batch=1024,
        generator=torch.Generator().manual_seed(0),
    )
    return mentor
