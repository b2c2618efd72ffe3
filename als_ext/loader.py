"""Batches of a generic data set through a DataLoader, resumable inside an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from als_ext.data import IndexedDataset, TensorBatches


class LoaderBatches:
    """The interface of :class:`als_ext.data.TensorBatches` over a map-style data set.

    Args:
        dataset: items (x, label, index); its ``labels`` are the live ones.
        batch_size: samples a batch.
        seed: seed of the order, which is that of ``TensorBatches``.
        device: where batches go; pinned memory is used for CUDA.
        num_workers: worker processes of the DataLoader.

    Note:
        Resuming skips the indices of the batches that were done; it does not load them. Resumed
        batches are the same bits if the items are deterministic, or random by torch's, numpy's or
        python's global generator with ``num_workers=0``.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        batch_size: int,
        *,
        seed: int,
        device: torch.device,
        num_workers: int = 0,
    ) -> None:
        self._dataset = dataset
        self._order = TensorBatches(
            torch.arange(len(dataset)), dataset.labels, batch_size, seed=seed
        )
        self._seed = seed
        self._device = device
        self._num_workers = num_workers

    @property
    def labels(self) -> Tensor:
        """The live labels, int64 [n] on the CPU."""
        return self._dataset.labels

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        return self._order.epoch

    @property
    def position(self) -> int:
        """Batches of this epoch that were handed out."""
        return self._order.position

    def set_epoch(self, epoch: int) -> None:
        """Start ``epoch`` (at least 0) at its first batch."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        at = self._order.state_dict()
        rest = [index.tolist() for *_, index in self._order]  # runs the order to the epoch's end
        following = self._order.state_dict()
        for position, batch in enumerate(self._load(rest, at["epoch"]), at["position"] + 1):
            self._order.load_state_dict({**at, "position": position})
            x, labels, index = (part.to(self._device, non_blocking=True) for part in batch)
            yield x, labels, index
        self._order.load_state_dict(following)

    def _load(self, batches: list[list[int]], epoch: int) -> DataLoader[Any]:
        # A generator of its own: the DataLoader seeds its workers from it, and the global one,
        # which random items may use, does not move.
        mixed = np.random.SeedSequence((self._seed, epoch)).generate_state(1, np.uint64)
        return DataLoader(
            self._dataset,
            batch_sampler=batches,
            num_workers=self._num_workers,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator().manual_seed(int(mixed[0])),
        )

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position in it, and the configuration they belong to."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken."""
        self._order.load_state_dict(state)
