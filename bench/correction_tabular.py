"""Corrected labels of tables: scikit-learn's bundled sets, standardised features as embeddings.

    python bench/correction_tabular.py > bench/results/correction-tabular.jsonl

A line a set, noise and method, mean over ten seeds: the share of right labels before and after,
precision and recall of the relabels. "plain vote" gives every sample the label that most of its k
nearest neighbours have; its k, of 5, 10, 20 and 50, is the best by the true labels, which nobody
has. ``correct_labels`` runs with its defaults and is not told them.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from als_ext import correct_labels, ops
from als_ext.data import apply_noise, parse_noise
from als_ext.metrics import label_metrics

SETS: dict[str, Callable[[], object]] = {
    "wine": load_wine,
    "breast cancer": load_breast_cancer,
    "iris": load_iris,
    "digits (64 pixels)": load_digits,
}
NOISES = ("none", "symmetric:0.2", "symmetric:0.4", "pair:0.3")
SEEDS = range(10)
NEIGHBOURS = (5, 10, 20, 50)


def table(name: str) -> tuple[Tensor, Tensor]:
    """Standardised features float32 [n, D] and classes int64 [n]."""
    data = SETS[name]()
    x = torch.from_numpy(data.data).float()
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    return x, torch.from_numpy(data.target).long()


def votes(x: Tensor, given: Tensor, classes: int) -> Iterator[tuple[str, Tensor]]:
    """What plain votes and ours make of the given labels."""
    distance, near = ops.knn(x, x, max(NEIGHBOURS), exclude_self=True)
    for k in NEIGHBOURS:
        winner, _, _ = ops.knn_vote(distance[:, :k], near[:, :k], given, classes)
        yield f"plain vote, k = {k}", winner
    yield "correct_labels", correct_labels(x, given, num_classes=classes).new_label


def main() -> None:
    """Print a line a set, noise and method."""
    for name in SETS:
        x, true = table(name)
        classes = int(true.max()) + 1
        for noise in NOISES:
            found: dict[str, list[dict[str, float | int | None]]] = {}
            for seed in SEEDS:
                given = apply_noise(true, parse_noise(noise), num_classes=classes, seed=seed).labels
                for method, label in votes(x, given, classes):
                    found.setdefault(method, []).append(label_metrics(given, label, true))
            for method, figures in found.items():
                line = {"set": name, "samples": len(x), "noise": noise, "method": method}
                for figure in figures[0]:
                    values = [f[figure] for f in figures if f[figure] is not None]
                    line[figure] = round(statistics.fmean(values), 4) if values else None
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
