"""Every variant of the ablation trains, and otherwise than the whole."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F

from als_ext import TrainConfig, Trainer, als_lc
from als_ext.correction import disputes
from als_ext.correction.clusters import named_clusters
from als_ext.data import load_dataset
from als_ext.methods import METHODS
from als_ext.models import SmallCNN

ROOT = Path(__file__).resolve().parents[1]


def test_each_variant_trains_otherwise_than_the_whole(tmp_path):
    data = load_dataset("digits")
    x = F.interpolate(data.x_train.view(-1, 1, 8, 8), size=(16, 16), mode="bilinear")
    np.savez(tmp_path / "set.npz", x=x[:1300].numpy(), y=data.y_train[:1300].numpy())
    words = ["--out", "out", "--dataset", "npz:set.npz", "--noise", "hard:0.6", "--quiet"]
    words += ["--epochs", "3", "--warmup", "1", "--period", "1", "--batch-size", "64"]
    words += ["--device", "cpu", "--jobs", "2", "--threads", "1", "--model", "cnn"]
    command = [sys.executable, str(ROOT / "bench" / "ablation.py"), *words]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    cells = list(map(json.loads, (tmp_path / "out/cells.jsonl").read_text().splitlines()))
    assert [cell["status"] for cell in cells] == ["done"] * 10
    metrics = {}
    for folder in (tmp_path / "out" / "cells").iterdir():
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        metrics[folder.name.rsplit("_", 2)[-2]] = list(map(json.loads, lines))
    whole = metrics.pop("als-lc")
    assert [epoch["evidence"] for epoch in whole[2:]] == [1] * 4
    losses = {name: [epoch["train_loss"] for epoch in epochs] for name, epochs in metrics.items()}
    of_whole = [epoch["train_loss"] for epoch in whole]
    # labels are evidence here, so the parts for where they are not have nothing to say
    assert {n for n, found in losses.items() if found == of_whole} == {
        *("without-question", "without-names")
    }
    assert len(losses.pop("without-pretraining")) == 3
    assert all(found[:3] == of_whole[:3] for found in losses.values())
    assert len(losses) == 8


@pytest.fixture
def variants():
    """The variants' classes; they are registered no longer than a test is running."""
    before = dict(METHODS)
    yield importlib.import_module("bench.ablation")
    METHODS.clear()
    METHODS.update(before)
    del sys.modules["bench.ablation"]


def test_parts_for_where_labels_are_no_evidence_can_be_left_out(monkeypatch, variants):
    asked = []

    def named(*arguments):
        asked.append(arguments)
        return named_clusters(*arguments)

    monkeypatch.setattr(disputes, "named_clusters", named)
    monkeypatch.setattr(als_lc, "labels_are_evidence", lambda *arguments: False)
    data = load_dataset("digits")
    x = F.interpolate(data.x_train[:300].view(-1, 1, 8, 8), size=(16, 16), mode="bilinear")
    seen = {}
    for name in ("als-lc", "without-names", "without-question"):
        config = TrainConfig(method=name, epochs=2, warmup=1, period=1, device="cpu")
        trainer = Trainer(SmallCNN((1, 16, 16), 10), config, num_classes=10, progress=False)
        history = trainer.fit(x, data.y_train[:300]).history
        seen[name] = (history[2]["evidence"], len(asked))
        asked.clear()
    assert seen == {"als-lc": (0, 1), "without-names": (0, 0), "without-question": (1, 0)}
