"""What a person decided about relabels: the file that the report exports, read and applied."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "als_ext decisions"
VERSION = 1
_WORDS = {"accept": True, "reject": False}


def labels_digest(labels: Tensor) -> str:
    """SHA-256 of labels as int64, little-endian: by it a file knows which labels it belongs to.

    Example:
        >>> import torch
        >>> labels_digest(torch.tensor([0, 1]))[:8]
        '9d34149f'
    """
    array = labels.detach().cpu().numpy().astype("<i8")
    return hashlib.sha256(array.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False, repr=False)
class Decisions:
    """Accepted and rejected relabels of n samples; all tensors [m], on the CPU.

    Attributes:
        samples: n, the number of samples that the labels belong to.
        num_classes: number of classes.
        digest: :func:`labels_digest` of the labels as they were given.
        row: int64, positions in [0, n), each once.
        old: int64, the given label.
        new: int64, the label that was proposed; never ``old``.
        accepted: bool, true for the new label, false for the old one.
        method: whose relabels they are; None where the file does not say.
    """

    samples: int
    num_classes: int
    digest: str
    row: Tensor
    old: Tensor
    new: Tensor
    accepted: Tensor
    method: str | None = None

    def __len__(self) -> int:
        return int(self.row.shape[0])

    def __repr__(self) -> str:
        yes = int(self.accepted.sum())
        return f"Decisions({yes} accepted, {len(self) - yes} rejected of {self.samples} samples)"

    @property
    def label(self) -> Tensor:
        """int64 [m], the label that was decided for."""
        return torch.where(self.accepted, self.new, self.old)

    def check(self, given: Tensor, num_classes: int) -> None:
        """Refuse other labels than those that were judged.

        Args:
            given: int64 [n], labels as given, before any correction.
            num_classes: number of classes.

        Raises:
            ValueError: another number of labels or classes, other labels, or an old label that is
                not the given one of its row.
        """
        asked, own = (len(given), num_classes), (self.samples, self.num_classes)
        if asked != own:
            raise ValueError(
                f"decisions: expected those about {asked[0]} samples of {asked[1]} classes, got "
                f"some about {own[0]} of {own[1]}"
            )
        if labels_digest(given) != self.digest:
            raise ValueError(
                "decisions: expected those about these labels, got some about other given labels "
                "(another noise, seed or data set?)"
            )
        own_label = given.cpu()[self.row]
        wrong = (own_label != self.old).nonzero()[:, 0]
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"decisions: expected {int(own_label[at])}, the given label, as old label of row "
                f"{int(self.row[at])}, got {int(self.old[at])}"
            )

    def apply(self, given: Tensor, num_classes: int, base: Tensor | None = None) -> Tensor:
        """Labels in which every decision holds.

        Args:
            given: int64 [n], the labels as given.
            num_classes: number of classes.
            base: int64 [n], labels of the samples that nobody decided about; None: as given.

        Returns:
            int64 [n], a copy, on the device of ``given``.

        Raises:
            ValueError: the decisions belong to other labels.
        """
        self.check(given, num_classes)
        labels = (given if base is None else base).clone()
        labels[self.row.to(labels.device)] = self.label.to(labels.device)
        return labels


def read_decisions(path: str | os.PathLike[str]) -> Decisions:
    """Read a file of decisions, as ``als-ext report`` pages export it. Format: docs/report.md.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, another format or version, an entry that is missing or out of range, a
            row that is decided twice; the message names the entry.

    Example:
        >>> import json, pathlib, tempfile, torch
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "decisions.json"
        >>> given = torch.tensor([0, 1, 1])
        >>> _ = path.write_text(json.dumps({
        ...     "format": "als_ext decisions", "version": 1, "samples": 3, "num_classes": 2,
        ...     "labels_sha256": labels_digest(given),
        ...     "decisions": [{"row": 2, "old": 1, "new": 0, "decision": "accept"}]}))
        >>> read_decisions(path).apply(given, num_classes=2)
        tensor([0, 1, 0])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"decisions: expected a file, got none at {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"decisions: {path} is not a JSON file ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'decisions: expected "format": "{FORMAT}", got another file at {path}')
    if content.get("version") != VERSION:
        raise ValueError(
            f"decisions: expected version {VERSION}, got {content.get('version')!r} in {path}"
        )
    n = _integer(content, "samples", 1, None, str(path))
    classes = _integer(content, "num_classes", 2, None, str(path))
    digest, method = content.get("labels_sha256"), content.get("method")
    entries = content.get("decisions")
    if not isinstance(digest, str):
        raise ValueError(f"decisions: {path}: expected labels_sha256, a text, got {digest!r}")
    if method is not None and not isinstance(method, str):
        raise ValueError(f"decisions: {path}: expected method, a text, got {method!r}")
    if not isinstance(entries, list):
        raise ValueError(f"decisions: {path}: expected a list of decisions, got {entries!r}")
    rows: dict[int, tuple[int, int, bool]] = {}
    for at, entry in enumerate(entries):
        where = f"{path}: entry {at}"
        if not isinstance(entry, dict):
            raise ValueError(f"decisions: {where}: expected an object, got {entry!r}")
        row = _integer(entry, "row", 0, n, where)
        old, new = (_integer(entry, name, 0, classes, where) for name in ("old", "new"))
        word = entry.get("decision")
        if not isinstance(word, str) or word not in _WORDS:
            raise ValueError(f"decisions: {where}: expected accept or reject, got {word!r}")
        if old == new:
            raise ValueError(f"decisions: {where}: expected another label than {old}, got {new}")
        if row in rows:
            raise ValueError(f"decisions: {where}: row {row} is decided twice")
        rows[row] = old, new, _WORDS[word]
    table = torch.tensor(list(rows.values()), dtype=torch.int64).reshape(-1, 3)
    return Decisions(
        samples=n,
        num_classes=classes,
        digest=digest,
        row=torch.tensor(list(rows), dtype=torch.int64),
        old=table[:, 0],
        new=table[:, 1],
        accepted=table[:, 2].bool(),
        method=method,
    )


def _integer(entry: dict[str, Any], name: str, low: int, high: int | None, where: str) -> int:
    value = entry.get(name)
    limit = 2**63 if high is None else high
    if type(value) is not int or not low <= value < limit:  # true is no number
        span = f">= {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"decisions: {where}: expected {name}, an integer {span}, got {value!r}")
    return value
