"""The training-free floor: principal components of the inputs, exact neighbours, a vote."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import one_hot

from als_ext import ops
from als_ext.baselines._neighbours import check_k, choose_k
from als_ext.embedding import principal_axes, project
from als_ext.methods import ERM, Task
from als_ext.ops._checks import check_int


@dataclass(frozen=True)
class KnnFloorSettings:
    """Settings of :class:`KnnFloor`.

    Args:
        k: neighbours that vote, in [1, n], or "auto": of 10 to 500 the number whose vote agrees
            most often with the given labels, each left out of its own vote.
        components: principal components of the flattened inputs, >= 1; all D where D is less.
    """

    k: int | str = "auto"
    components: int = 50

    def __post_init__(self) -> None:
        check_k(self.k)
        check_int("components", self.components, low=1)


class KnnFloor(ERM, name="knn-floor"):
    """The plurality of the given labels of a test sample's k nearest training samples.

    Euclidean distance between projections on the first principal components of the training inputs,
    which are taken as they come: standardise them. The network is neither trained nor asked; there
    is one epoch, without steps. A method that stays below this gains nothing from its network.
    """

    Settings = KnnFloorSettings
    trains = False

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        check_k(self.settings.k, len(task.labels))
        self._space: tuple[Tensor, Tensor, Tensor, int] | None = None

    def epochs(self) -> int:
        """One, for its record."""
        return 1

    def predict(self, x: Tensor) -> Tensor:
        """1 for the class with the most votes, 0 for the others [B, C]."""
        if self._space is None:
            self._space = self._fit()
        mean, axes, database, k = self._space
        task = self.task
        distance, index = ops.knn(project(x, mean, axes), database, k)
        winner, _, _ = ops.knn_vote(distance, index, task.labels.to(x.device), task.num_classes)
        return one_hot(winner, task.num_classes).float()

    def _fit(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Mean [D] and axes [D, P] in float64, projected training inputs [n, P], k."""
        task = self.task
        x = task.collect(lambda batch: batch.flatten(1))
        mean, axes = principal_axes(x, self.settings.components)
        database = project(x, mean, axes)
        label = task.labels.to(x.device)
        k = choose_k(database, label, task.num_classes, self.settings.k, "l2")
        return mean, axes, database, k
