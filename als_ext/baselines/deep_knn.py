"""Deep k-NN filtering (Bahri, Jiang, Gupta, ICML 2020, arXiv 2004.12289)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from als_ext.baselines._kept import Retrained
from als_ext.baselines._neighbours import check_k, plurality
from als_ext.data.splits import stratified_split
from als_ext.methods import ERM, Task
from als_ext.runtime import derived_seed

_HELD_OUT = 0.3  # the source splits the clean set 70/30
_BLOCK = 256  # clean samples of a forward pass without gradients


@dataclass(frozen=True)
class DeepKnnSettings:
    """Settings of :class:`DeepKnn`.

    Args:
        k: neighbours that vote, in [1, n - 1], or "auto": of 10 to 500 the number whose vote agrees
            most often with the given labels. The source fixes k and finds that the result depends
            little on it.
    """

    k: int | str = "auto"

    def __post_init__(self) -> None:
        check_k(self.k)


class DeepKnn(Retrained, name="deep-knn"):
    """Train M, drop the samples whose label is not their neighbours' at M's logits, train again.

    Algorithm 1 of the source: k nearest by the Euclidean distance of the logits among all samples,
    the sample itself left out, plurality of their labels; the last training starts from the same
    first weights as M.

    With a clean set M is one of two models, trained side by side: on the noisy samples and 70 % of
    the clean ones, or on those 70 % alone; the one that is right more often on the other 30 % (the
    first if equal) gives the logits. All clean samples vote with their right labels and take part
    in the last training; where their positions are known, they leave the noisy set. A batch of B of
    all n samples brings some of the m clean ones, drawn at random, with B m / n in weight: m in an
    epoch, as in one over the union. The model of the clean samples alone makes as many steps as the
    other, where the source gives no number.
    """

    Settings = DeepKnnSettings
    takes_clean = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        check_k(self.settings.k, len(task.labels) - 1)
        self._rival: ERM | None = None
        if task.clean is None:
            return
        if len(task.clean[1]) < 2:
            raise ValueError(
                f"clean: expected at least 2 samples for deep-knn, got {len(task.clean[1])}"
            )
        seed = derived_seed(task.config.seed, "held out")
        seen, held = stratified_split(task.clean[1].cpu().numpy(), _HELD_OUT, seed)
        self._seen, self._held = (torch.from_numpy(at).to(task.device) for at in (seen, held))
        alone = replace(task.config, settings={})
        self._rival = ERM(replace(task, model=copy.deepcopy(task.model), config=alone))
        if task.clean_index is not None:
            self.pool[task.clean_index] = False
            self.keep = self.pool.clone()
        if not self.pool.any():
            raise ValueError("clean positions: expected some other samples as well, got all")

    def batch(self, x: Tensor, label: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The kept samples of the batch and, if there are any, some clean ones."""
        x, label, weight = super().batch(x, label, index)
        if self.task.clean is None:
            return x, label, weight
        count = len(self._seen) if self.stage == 0 else len(self.task.clean[1])
        share = count * len(index) / len(self.task.labels)
        clean_x, clean_label = self._draw(math.ceil(share))
        clean_weight = weight.new_full((len(clean_label),), share / len(clean_label))
        return (
            torch.cat([x, clean_x]),
            torch.cat([label, clean_label]),
            torch.cat([weight, clean_weight]),
        )

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Random clean samples, with replacement: of the 70 % in the first stage, then of all."""
        assert self.task.clean is not None
        x, label = self.task.clean
        rows = len(self._seen) if self.stage == 0 else len(label)
        at = torch.randint(rows, (count,), device=self.task.device)
        if self.stage == 0:
            at = self._seen[at]
        return self.inputs(x[at]), label[at]

    def step(self, x: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """A step of M, and one of its rival."""
        if self._rival is not None:
            for group, own in zip(
                self._rival.optimizer.param_groups, self.optimizer.param_groups, strict=True
            ):
                group["lr"] = own["lr"]
            clean_x, clean_label = self._draw(min(len(index), len(self._seen)))
            self._rival.step(clean_x, clean_label, clean_label)  # ERM does not look at the indices
        return super().step(x, label, index)

    def select(self) -> Tensor:
        """Samples whose label is that of their neighbours at the logits of the better model."""
        task, clean = self.task, self.task.clean
        model = task.model
        if clean is not None and self._rival is not None:
            rival = self._rival.task.model
            if self._right(rival) > self._right(model):
                model = rival
        rows = self.pool.nonzero()[:, 0]
        logits = task.collect(lambda x: model(x).float())[rows]
        label = task.labels.to(logits.device)[rows]
        if clean is not None:
            logits = torch.cat([logits, self._logits(model, clean[0])])
            label = torch.cat([label, clean[1]])
        vote = plurality(logits, label, task.num_classes, self.settings.k, "l2")
        keep = torch.zeros_like(self.pool)
        keep[rows] = (vote.winner == label)[: len(rows)]
        return keep

    def _right(self, model: nn.Module) -> int:
        """How many of the held-out clean samples a model gets right."""
        assert self.task.clean is not None
        x, label = (part[self._held] for part in self.task.clean)
        return int((self._logits(model, x).argmax(1) == label).sum())

    @torch.no_grad()
    def _logits(self, model: nn.Module, x: Tensor) -> Tensor:
        with self.amp.autocast():
            return torch.cat([model(part).float() for part in torch.split(x, _BLOCK)])

    def train_mode(self) -> None:
        """The rival trains in the first stage; then it is done."""
        super().train_mode()
        if self.stage:
            self._rival = None
        if self._rival is not None:
            self._rival.train_mode()

    def eval_mode(self) -> None:
        """Both models."""
        super().eval_mode()
        if self._rival is not None:
            self._rival.eval_mode()

    def state_dict(self) -> dict[str, Any]:
        """What every training in stages keeps, and the rival."""
        rival = None
        if self._rival is not None:
            rival = {
                "model": self._rival.task.model.state_dict(),
                "method": self._rival.state_dict(),
            }
        return {**super().state_dict(), "rival": rival}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it."""
        super().load_state_dict(state)
        if state["rival"] is None:
            self._rival = None
        elif self._rival is not None:
            self._rival.task.model.load_state_dict(state["rival"]["model"])
            self._rival.load_state_dict(state["rival"]["method"])
