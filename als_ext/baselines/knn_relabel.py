"""Relabel everyone by the neighbours' vote: als-lc without suspects and without pi."""

from __future__ import annotations

from dataclasses import dataclass

from als_ext.baselines._neighbours import check_k, plurality
from als_ext.methods import ERM, Correcting, Relabels, Task


@dataclass(frozen=True)
class KnnRelabelSettings:
    """Settings of :class:`KnnRelabel`.

    Args:
        k: neighbours that vote, in [1, n - 1], or "auto": of 10 to 500 the number whose vote agrees
            most often with the given labels; chosen anew for each correction.
    """

    k: int | str = "auto"

    def __post_init__(self) -> None:
        check_k(self.k)


class KnnRelabel(Correcting, ERM, name="knn-relabel"):
    """Plain training; at als-lc's epochs EVERY sample gets the plurality label of its k neighbours.

    The neighbours are those of the penultimate embedding, by the metric of ``config.correction``,
    and vote with the given labels. The ablation of the project's method: no suspects, no inference
    from the votes, no pi.
    """

    Settings = KnnRelabelSettings

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        check_k(self.settings.k, len(task.labels) - 1)
        self._given = task.labels.clone()

    def relabels(self, epoch: int) -> Relabels:
        """The vote of all about all."""
        task, x = self.task, self.task.embeddings()
        given = self._given.to(x.device)
        metric = task.config.correction.metric
        vote = plurality(x, given, task.num_classes, self.settings.k, metric)
        return Relabels(vote.winner, vote.winner != given, vote.share, vote.margin)
