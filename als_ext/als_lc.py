"""Label correction by weights and embeddings: the method that this project is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from als_ext.augment import RandomAffine
from als_ext.contrast import EPOCHS, Contrast
from als_ext.correction import CorrectionResult, LabelCorrector
from als_ext.correction.disputes import labels_are_evidence, propagated_labels
from als_ext.embedding import make_embedder, principal_axes, project
from als_ext.forward import LocalChannel
from als_ext.methods import Also, Correcting, Relabels, Task
from als_ext.metrics import Record
from als_ext.ops import sample_loss, weighted_loss
from als_ext.ops._checks import check_int
from als_ext.runtime import half_cosine
from als_ext.settled import SettledLabels

# The pixels know what the views were made to differ in, which tells a coat from a dress.
_PIXELS = 0.35  # their share
_COMPONENTS = 50  # principal ones
_SIDE = 32
_LOST = 0.25  # a class is lost where less of it than this share is found again
_MOVE = RandomAffine()  # makes views of what is not settled


def _few_pixels(images: Tensor) -> Tensor:
    """Images [B, C, H, W], made no larger than 32 x 32: the axes are found from D x D numbers."""
    height, width = (min(side, _SIDE) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images.float(), (height, width)).flatten(1)


@dataclass(frozen=True)
class AlsLcSettings:
    """Settings of als-lc alone.

    Args:
        pretrain: epochs in which the embedding is learned without labels
            (:class:`als_ext.contrast.Contrast`), before all others and beside ``config.epochs``,
            >= 0; None takes 3 where the samples are images, floating and of 12 x 12 and more, in a
            tensor or a Dataset, else 0.
    """

    pretrain: int | None = None

    def __post_init__(self) -> None:
        if self.pretrain is not None:
            check_int("pretrain", self.pretrain, low=0)


class AlsLc(Correcting, Also, name="als-lc"):
    """ALSO and label correction: pi scores the samples, neighbours in the embedding space vote.

    Where the samples are images the embedding is first learned without labels, so wrong ones cannot
    bend it, and a first correction comes before the first step on labels. From then on the *given*
    labels are trained on through the noise channel that the last correction found
    (:mod:`als_ext.forward`): what neighbours in an embedding without labels get wrong they get
    wrong for whole regions, and a network would learn that. After ``warmup`` epochs neighbours in
    the network's own embedding vote, and what all of them agree on is trained on as well, with the
    weight of the share of labels that are wrong: the less given labels say, the more. There is a
    last vote after the last epoch; it and the first one start from the network's predictions.
    Where the samples are no images there is no channel: corrected labels are trained on. Scores of
    later corrections are log pi; pi of relabelled samples starts again, since its history belongs
    to the old label.

    Where the first correction finds that given labels are no evidence about samples that neighbours
    dispute (:mod:`als_ext.correction.disputes`) there is no channel either. Labels then spread over
    neighbourhoods or, where most are wrong, are those of clusters
    (:mod:`als_ext.correction.clusters`). The network trains on those that are settled and on views
    of all samples (:mod:`als_ext.settled`); later corrections start from its predictions and hear
    votes alone, no scores: pi then follows the losses on settled labels and views.
    """

    Settings = AlsLcSettings
    augments = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.corrector = LabelCorrector(task.labels, task.num_classes, task.config.correction)
        if task.kept is not None:  # a later correction takes them for labels that were given
            self.corrector.undo(task.kept, pin=True)
        wanted: int | None = self.settings.pretrain
        if wanted and not task.images:
            raise ValueError(
                "pretrain: expected 0 for samples that are no floating images [C, H, W], "
                f"H and W >= 12, got {wanted}"
            )
        self._pretrain = (EPOCHS if task.images else 0) if wanted is None else wanted
        suspects = task.config.correction.suspects
        if self._pretrain and suspects != "auto":
            raise ValueError(
                f"pretrain: expected 0 with correction.suspects={suspects!r}, since a correction "
                f"before the first labels has no scores, got {self._pretrain}"
            )
        self._finished = 0  # epochs
        # One of the two is there after epochs without labels.
        self._channel: LocalChannel | None = None
        self._settled: SettledLabels | None = None
        embed = make_embedder(task.model, task.config.embedding)
        self._contrast = Contrast(task.model.parameters(), embed, task.device, self.amp)

    def epochs(self) -> int:
        """Those without labels and those with."""
        return self._pretrain + self.task.config.epochs

    def learns_labels(self, epoch: int) -> bool:
        """From the epochs without labels on."""
        return epoch > self._pretrain

    def _on_labels(self) -> bool:
        return self.learns_labels(self._finished + 1)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """A half cosine without labels, and after these, unless the rate is to be constant, one
        for the warm-up and one for the rest. Else the schedule of the config."""
        config = self.task.config
        before, warmup = self._pretrain * steps_per_epoch, config.warmup * steps_per_epoch
        if step < before:
            return half_cosine(config.lr, step, before)
        step -= before
        if not before or config.lr_schedule == "constant":
            return super().lr_at(step, steps_per_epoch)
        if step < warmup:
            return half_cosine(config.lr, step, warmup)
        return half_cosine(config.lr, step - warmup, config.epochs * steps_per_epoch - warmup)

    def inputs(self, x: Tensor) -> Tensor:
        """Views in the first half of the epochs after the warm-up; without pre-training, in all.

        Pre-training makes views by itself. In the warm-up they would slow down a network that has
        few epochs. In the second half it gets used to images as it will be asked about.
        """
        if not self._pretrain:
            return super().inputs(x)
        first = self._pretrain + self.task.config.warmup
        viewed = range(first, first + (self.epochs() - first) // 2)
        return super().inputs(x) if self._finished in viewed else x

    def step(self, x: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """A step of contrastive learning, or of ALSO."""
        if not self._on_labels():
            return self._contrast.step(x, self.optimizer.param_groups[0]["lr"])
        if self._channel is not None:
            return self._step_through(self._channel, x, index)
        if self._settled is not None:
            return self._step_settled(self._settled, x, label, index)
        return super().step(x, label, index)

    def _step_through(self, channel: LocalChannel, x: Tensor, index: Tensor) -> Tensor:
        """A step of ALSO on the given labels through the noise channel."""
        with self.amp.autocast():
            logits: Tensor = self.task.model(x)
        losses, target = channel.losses(logits.detach(), index)
        total, _ = weighted_loss(logits, target, self.optimizer.loss_weight(index))
        self.optimizer.zero_grad()
        self.amp.backward_and_step(total, self.optimizer, index=index, losses=losses)
        return losses

    def _step_settled(
        self, settled: SettledLabels, x: Tensor, label: Tensor, index: Tensor
    ) -> Tensor:
        """A step of ALSO on what is settled, and on views; the losses against the labels now."""
        with self.amp.autocast():
            logits: Tensor = self.task.model(x)
            of_views: Tensor = self.task.model(_MOVE(x))
        target, plain, moved = settled.targets(logits, index)
        weight = self.optimizer.loss_weight(index)
        first, losses = weighted_loss(logits, target, weight * plain)
        second, losses_of_views = weighted_loss(of_views, target, weight * moved)
        losses = (losses * plain + losses_of_views * moved).detach()
        self.optimizer.zero_grad()
        self.amp.backward_and_step(first + second, self.optimizer, index=index, losses=losses)
        return sample_loss(logits.detach(), label)

    def after_epoch(self, epoch: int, losses: Tensor) -> Record:
        """Correct the labels if it is time."""
        self._finished = epoch
        if epoch == self._pretrain:
            self._contrast.clear()
        record = super().after_epoch(epoch, losses)
        if "suspects" in record:
            record["evidence"] = int(self._settled is None)
        if epoch == self.epochs():
            self._channel = self._settled = None
        return record

    def due(self, epoch: int) -> bool:
        """Without epochs without labels as ever. Else right after these, and after the last epoch
        as well: no network has to learn from that one, so its labels are only for who asked."""
        if not self._pretrain:
            return super().due(epoch)
        return epoch in (self._pretrain, self.epochs()) or super().due(epoch - self._pretrain)

    def relabels(self, epoch: int) -> Relabels:
        """A step of the corrector; before the first step on labels pi has nothing to say."""
        if not self.learns_labels(epoch):
            result = self._correct_without_labels(epoch)
        elif self._settled is not None:
            result = self._correct_settled(self._settled, epoch)
        elif self._channel is None:
            result = self.corrector.step(self.task.embeddings(), self.scores(), epoch)
        else:
            result = self._correct_through(self._channel, epoch)
            if epoch < self.epochs():
                wrong = 1.0 - result.channel.diagonal()[result.winner]
                self._open(result, wrong.masked_fill(result.share < 1.0, 0.0))
        return Relabels(
            result.new_label, result.suspect, result.share, result.margin, result.neighbours
        )

    def _correct_without_labels(self, epoch: int) -> CorrectionResult[Tensor]:
        """The first correction, and how to train after it."""
        given = self.corrector.original.to(self.task.device)
        classes, config = self.task.num_classes, self.task.config.correction
        x = self._without_labels()
        result = self.corrector.step(x, None, epoch)
        assert result.guess is not None  # there are no given suspects
        guess, _ = self._with_kept(result.guess, result.share)
        if not labels_are_evidence(x, given, guess, result.winner, classes):
            spread = propagated_labels(x, given, guess, classes, config)
            self.corrector.undo()
            alone = self.corrector.step(x, None, epoch, spread.label, votes_only=True)
            if not self._loses(spread.origin, alone.winner):
                self._settle(alone)
                return alone
            self.corrector.undo()  # a small class has gone under: better hear the given labels
            result = self.corrector.step(x, None, epoch)
        self._open(result, torch.zeros_like(result.share))
        return result

    def _correct_settled(self, settled: SettledLabels, epoch: int) -> CorrectionResult[Tensor]:
        """A later correction where given labels are no evidence."""
        embeddings, guess = self.task.embeddings(), self._predictions(settled.label)
        result = self.corrector.step(embeddings, None, epoch, guess, votes_only=True)
        if self._loses(settled.label, result.winner):
            self.corrector.undo()
            result = self.corrector.step(embeddings, None, epoch, settled.label, votes_only=True)
        if epoch < self.epochs():
            self._settle(result)
        return result

    def _settle(self, result: CorrectionResult[Tensor]) -> None:
        """Train on what all neighbours agree on in this correction."""
        self._settled = SettledLabels(*self._with_kept(result.winner, result.share == 1.0))

    def _open(self, result: CorrectionResult[Tensor], trust: Tensor) -> None:
        """Train through the channel of this correction, trusted by float32 [n]."""
        given = self.corrector.original.to(self.task.device)
        self._channel = LocalChannel(result, given, *self._with_kept(result.winner, trust))

    def _with_kept(self, label: Tensor, trust: Tensor) -> tuple[Tensor, Tensor]:
        """Classes [n] and how far they are trusted [n]; wholly where a person has decided."""
        if self.task.kept is None:
            return label, trust
        kept = self.task.kept.to(self.task.device)
        given = self.corrector.original.to(self.task.device)
        return label.index_copy(0, kept, given[kept]), trust.index_fill(0, kept, 1)

    def _correct_through(self, channel: LocalChannel, epoch: int) -> CorrectionResult[Tensor]:
        """From the predictions of an annealed network. In between it has just learned what
        neighbours agreed on, at a high rate: a correction starts afresh, if that loses no class."""
        embeddings, scores = self.task.embeddings(), self.scores()
        if epoch not in (self._pretrain + self.task.config.warmup, self.epochs()):
            result = self.corrector.step(embeddings, scores, epoch)
            if not self._loses(channel.winner, result.winner):
                return result
            self.corrector.undo()
        guess = self._predictions(channel.winner)
        return self.corrector.step(embeddings, scores, epoch, guess)

    def _predictions(self, before: Tensor) -> Tensor:
        """The network's opinion of all samples, or the labels before if it has lost a class.

        One may get lost on the way through a channel, which explains labels by others too.
        """
        guess = self.task.collect(lambda x: self.predict(x).argmax(1))
        return before if self._loses(before, guess) else guess

    def _loses(self, before: Tensor, now: Tensor) -> bool:
        """Whether of a class before too few are of it now."""
        size = torch.bincount(before, minlength=self.task.num_classes)
        found = torch.bincount(before[now == before], minlength=self.task.num_classes)
        return bool((found < _LOST * size).any())

    def _without_labels(self) -> Tensor:
        """What was learned beside the pixels: cosines of this are a weighted mean of both's."""
        learned = F.normalize(self.task.embeddings(), dim=1)
        pixels = self.task.collect(_few_pixels)
        pixels = F.normalize(project(pixels, *principal_axes(pixels, _COMPONENTS)), dim=1)
        return torch.cat([_PIXELS**0.5 * pixels, (1.0 - _PIXELS) ** 0.5 * learned], dim=1)

    def relabelled(self, index: Tensor) -> None:
        """pi of these samples starts again."""
        self.optimizer.weights.reset_(index)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and pi, the corrector, the last report, the learning without labels."""
        return {
            **super().state_dict(),
            "corrector": self.corrector.state_dict(),
            "finished": self._finished,
            "contrast": self._contrast.state_dict(),
            "channel": None if self._channel is None else self._channel.state_dict(),
            "settled": None if self._settled is None else self._settled.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all of it."""
        super().load_state_dict(state)
        self.corrector.load_state_dict(state["corrector"])
        self._finished = state["finished"]
        self._contrast.load_state_dict(state["contrast"])
        if state["channel"] is not None:
            self._channel = LocalChannel.from_state_dict(state["channel"], self.task.device)
        if state.get("settled") is not None:  # earlier checkpoints have none
            self._settled = SettledLabels.from_state_dict(state["settled"], self.task.device)
