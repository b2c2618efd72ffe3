"""Samples that carry their index, with labels that can be replaced while training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from als_ext.data.labels import as_labels, as_positions

__all__ = ["IndexedDataset", "TensorBatches"]


def _existing_labels(source: Dataset[Any]) -> Tensor:
    if isinstance(source, TensorDataset) and len(source.tensors) == 2:
        return source.tensors[1]
    # torchvision's data sets keep their labels in .targets, as a list or a tensor.
    targets = getattr(source, "targets", None)
    if targets is None:
        raise ValueError(
            f"labels: expected integer labels [n] for {type(source).__name__}, "
            f"which has no .targets, got None"
        )
    return torch.as_tensor(targets)


class IndexedDataset(Dataset[tuple[Any, Tensor, int]]):
    """A map-style data set of ``(x, label, index)`` with labels that can be replaced.

    The index is what :class:`als_ext.SampleWeights` and :class:`als_ext.ALSO` need to know which
    samples a batch holds. The labels lie in shared memory, so the workers of a ``DataLoader`` see a
    replacement too (batches that a worker had already fetched keep the old labels).

    Args:
        source: inputs as a tensor ``[n, ...]``, or a map-style data set whose items are ``x`` or
            tuples that start with x.
        labels: integer ``[n]``, at least 0. ``None`` takes the second tensor of a ``TensorDataset``
            or the ``.targets`` of the source.

    Raises:
        TypeError: labels that are not integers, a source that has no length.
        ValueError: no labels to be found, wrong length, negative label.

    Example:
        >>> import torch
        >>> from als_ext.data import IndexedDataset
        >>> data = IndexedDataset(torch.rand(3, 4), labels=torch.tensor([0, 1, 1]))
        >>> data.set_labels(torch.tensor([2]), index=torch.tensor([1]))
        >>> x, label, index = data[1]
        >>> x.shape, label, index
        (torch.Size([4]), tensor(2), 1)
    """

    def __init__(
        self,
        source: Tensor | Dataset[Any],
        labels: Tensor | npt.NDArray[np.integer] | None = None,
    ) -> None:
        if not hasattr(source, "__len__"):
            raise TypeError(
                f"source: expected a tensor or a map-style data set, got {type(source).__name__}"
            )
        if labels is None:
            if isinstance(source, Tensor):
                raise ValueError("labels: expected integer labels [n] for a tensor, got None")
            labels = _existing_labels(source)
        self.source = source
        self._labels = as_labels(labels, n=len(source))
        self._labels.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def labels(self) -> Tensor:
        """The labels in use, ``int64 [n]``: the live tensor, not a copy."""
        return self._labels

    def set_labels(
        self,
        labels: Tensor | npt.NDArray[np.integer],
        index: Tensor | npt.NDArray[np.integer] | None = None,
    ) -> None:
        """Replace all labels, or those at ``index``, in place.

        Args:
            labels: integer, at least 0; ``[n]``, or the shape of ``index``.
            index: integer ``[m]`` sample indices in [0, n), distinct; ``None`` replaces all.

        Raises:
            TypeError: labels or an index that are not integers.
            ValueError: wrong length, negative label, index out of range or given twice. Nothing is
                changed then.
        """
        if index is None:
            self._labels.copy_(as_labels(labels, n=len(self)))
            return
        at = as_positions(index, len(self))
        if at.numel() or len(labels):
            self._labels[at] = as_labels(labels, n=at.numel())

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, Tensor, int]:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected at most {len(self) - 1}, got {index}")
        index %= len(self)
        item = self.source[index]
        x = item[0] if isinstance(item, (tuple, list)) else item
        # A copy: a view of shared memory in a fetched batch would change under the reader.
        return x, self._labels[index].clone(), index


class TensorBatches:
    """Seeded batches ``(x, labels, index)`` of in-memory tensors, resumable inside an epoch.

    One indexing operation a batch instead of one Python call a sample, which is what makes a
    ``DataLoader`` slow on small images. The order of epoch e depends only on (seed, e, n), never on
    the global random state, so the position (epoch, batch) is the whole state and a resumed run
    sees bitwise the same batches.

    Iterating yields the REST of the current epoch and then moves on to the next one: after an
    interrupted loop, or after :meth:`load_state_dict`, the next loop goes on where the last one
    stopped. A batch counts as done as soon as it is handed out; after the last one the rest of the
    epoch is empty, so a resumed run still does the work that follows an epoch. :meth:`set_epoch`
    starts an epoch afresh. One iterator at a time.

    Args:
        x: inputs ``[n, ...]`` on any device; batches stay on that device.
        labels: ``int64 [n]``, the live tensor: labels replaced in place show in later batches. If
            it is on another device than x (as those of :class:`IndexedDataset` are), each batch of
            labels is copied over.
        batch_size: samples a batch, at least 1; the last batch of an epoch holds the rest.
        shuffle: a new order every epoch; ``False`` keeps 0..n-1.
        seed: seed of the order, at least 0.
        drop_last: leave out a last batch smaller than ``batch_size``.

    Raises:
        TypeError: labels that are not ``int64``.
        ValueError: wrong length of labels, no samples, bad batch size or seed, no batch left by
            ``drop_last``.

    Note:
        The order is drawn on the CPU, so CPU and CUDA runs see the same batches; 8 bytes a sample
        an epoch are copied.

    Example:
        >>> import torch
        >>> from als_ext.data import TensorBatches
        >>> labels = torch.tensor([0, 1, 0, 1, 0])
        >>> batches = TensorBatches(torch.rand(5, 2), labels, batch_size=2, seed=1)
        >>> [len(index) for x, labels, index in batches]
        [2, 2, 1]
    """

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if labels.dtype != torch.int64:
            raise TypeError(f"labels: expected int64, got {labels.dtype}")
        if x.ndim < 1 or len(x) == 0:
            raise ValueError(f"x: expected at least one sample, got shape {list(x.shape)}")
        if labels.shape != (len(x),):
            raise ValueError(f"labels: expected shape [{len(x)}], got {list(labels.shape)}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        if drop_last and batch_size > len(x):
            raise ValueError(
                f"batch_size: expected at most {len(x)} with drop_last, got {batch_size}"
            )
        self.x = x
        self.labels = labels
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self._epoch = 0
        self._position = 0

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        return self._epoch

    @property
    def position(self) -> int:
        """Batches of this epoch that were handed out."""
        return self._position

    def set_epoch(self, epoch: int) -> None:
        """Start ``epoch`` (at least 0) at its first batch."""
        if epoch < 0:
            raise ValueError(f"epoch: expected at least 0, got {epoch}")
        self._epoch = epoch
        self._position = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.x), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def _order(self) -> Tensor:
        n = len(self.x)
        if not self.shuffle:
            return torch.arange(n, device=self.x.device)
        # SeedSequence mixes (seed, epoch), so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        mixed = np.random.SeedSequence((self.seed, self._epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        return torch.randperm(n, generator=generator).to(self.x.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = self._order()
        while self._position < len(self):
            start = self._position * self.batch_size
            index = order[start : start + self.batch_size]
            # Counted before it is handed out: a checkpoint taken while this batch is in use does
            # not repeat it.
            self._position += 1
            label_index = index.to(self.labels.device)
            labels = self.labels.index_select(0, label_index).to(self.x.device)
            yield self.x.index_select(0, index), labels, index
        self.set_epoch(self._epoch + 1)

    def _configuration(self) -> dict[str, int | bool]:
        return {
            "n": len(self.x),
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }

    def state_dict(self) -> dict[str, int | bool]:
        """Epoch, position and the configuration they belong to: plain integers and booleans."""
        return {"epoch": self._epoch, "position": self._position, **self._configuration()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken.

        Args:
            state: what :meth:`state_dict` returned, for the same n, batch size, seed, shuffle and
                drop_last.

        Raises:
            ValueError: a missing entry, another configuration, a position outside the epoch.
                Nothing is changed then.
        """
        expected: dict[str, Any] = self._configuration()
        for key in ("epoch", "position", *expected):
            if key not in state:
                raise ValueError(f"state: expected an entry {key!r}, got {sorted(state)}")
        for key, value in expected.items():
            if state[key] != value:
                raise ValueError(f"state: expected {key} = {value}, got {state[key]}")
        epoch, position = cast(int, state["epoch"]), cast(int, state["position"])
        if epoch < 0 or not 0 <= position <= len(self):
            raise ValueError(
                f"state: expected epoch at least 0 and position in [0, {len(self)}], "
                f"got epoch {epoch} and position {position}"
            )
        self._epoch = epoch
        self._position = position
