"""Items that are dicts, with their index and labels that can be replaced."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from als_ext.data import IndexedDataset

Item = dict[str, Any]


class IndexedItems(IndexedDataset):
    """Items as the Trainer wants them, dicts, with two more entries: ``labels`` and ``index``.

    Args:
        source: map-style data set of dicts: a ``datasets.Dataset``, a list, a Dataset of torch.
        label: the entry that holds the label; it is replaced by ``labels``.
        labels: integer [n]; None reads them from the source, item by item unless it has columns.

    Raises:
        TypeError: labels that are not integers, a source that has no length.
        ValueError: wrong length, negative label, an item without a label.

    Example:
        >>> data = IndexedItems([{"input_ids": [5, 6], "label": 1}, {"input_ids": [7], "label": 0}])
        >>> data[1]
        {'input_ids': [7], 'labels': 0, 'index': 1}
    """

    def __init__(self, source: Any, label: str = "label", labels: Any = None) -> None:
        self.label = label
        super().__init__(source, _column(source, label) if labels is None else labels)

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected at most {len(self) - 1}, got {index}")
        index %= len(self)
        item: Item = dict(self.source[index])
        item.pop(self.label, None)
        return {**item, "labels": int(self.labels[index]), "index": index}


def _column(source: Any, label: str) -> NDArray[Any]:
    columns = getattr(source, "column_names", None)
    if columns is not None:
        if label not in columns:
            raise ValueError(f"label: expected one of the columns {columns}, got {label!r}")
        return np.asarray(source[label][:])
    for index, item in enumerate(source):
        if label not in item:
            raise ValueError(
                f"label: expected an entry {label!r} in item {index}, got {list(item)}"
            )
    values = [item[label] for item in source]
    return np.asarray([v.item() if isinstance(v, Tensor) else v for v in values])
