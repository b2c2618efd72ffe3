"""Folders of runs that nobody trained, for the tests of the report.

``python tests/report_run.py DIR [RELABELS]`` writes reports about one, DIR/report-*.html, and says
how large they are and how long that took.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from als_ext.report import write_report
from als_ext.report.samples import RunSamples, write_samples

SETTINGS = {"method": ["erm", "als-lc"], "data_dir": None}


def images(n, classes, side=8, channels=1, seed=0):
    """uint8 images that show their class by a bright column, and the classes."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.integers(0, 60, (n, channels, side, side), dtype=np.uint8)
    x[np.arange(n), 0, :, y % side] = 255
    return x, y


def make_run(folder, x, y, relabels, names=None, *, neighbours=True, known=True, seed=0):
    """Run folder about ``x`` [n, ...] with true classes ``y`` [n], of which ``relabels`` changed.

    The first relabels are right, every tenth is wrong. The data is in ``folder/../data.npz``.
    """
    rng = np.random.default_rng(seed)
    n, classes = len(y), len(names) if names else int(y.max()) + 1
    names = tuple(names or map(str, range(classes)))
    at = np.sort(rng.permutation(n)[:relabels])
    given, label = y.copy(), y.copy()
    given[at] = (y[at] + rng.integers(1, classes, relabels)) % classes
    label[at[9::10]] = (given[at[9::10]] + 1) % classes
    suspect = given != label
    share = rng.random(n).astype(np.float32)
    data = folder.parent / "data.npz"
    true = y if known else given
    np.savez(data, x_train=x, y_train=true, class_names=np.array(names))
    folder.mkdir(parents=True)
    settings = {"version": "0", "settings": {**SETTINGS, "dataset": f"npz:{data}"}}
    (folder / "run.json").write_text(json.dumps(settings))
    figures = {
        "test_accuracy": 0.5,
        "label_accuracy_before": 1 - relabels / n,
        "label_accuracy_after": 1.0,
        "relabel_precision": None,
        "relabel_recall": 0.25,
        "seconds": 1.0,
    }
    result = {"dataset": f"npz:{data}", "samples": n, "noise": "none"}
    result["erm"] = {**figures, "relabelled": 0}
    result["als-lc"] = {**figures, "relabelled": int(suspect.sum())}
    (folder / "result.json").write_text(json.dumps(result))
    for name in ("erm", "als-lc"):
        (folder / name).mkdir()
        records = [
            {
                "epoch": epoch,
                "lr": 0.001,
                "train_loss": 1 / epoch,
                "test_accuracy": 1 - 0.5 / epoch,
                "label_accuracy": None,
                "changed": 0,
                "suspects": None,
                "seconds": float(epoch),
            }
            for epoch in (1, 2, 3)
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / name / "metrics.jsonl").write_text(lines)
    samples = RunSamples(
        index=np.arange(n),
        given=given,
        label=label,
        true=y if known else None,
        loss=rng.random(n).astype(np.float32),
        log_pi=np.log(rng.random(n).astype(np.float32) + 1e-3),
        suspect=suspect,
        share=share,
        margin=2 * share - 1,
        neighbours=rng.integers(0, n, (int(suspect.sum()), 8)) if neighbours else None,
        class_names=names,
    )
    write_samples(folder / "als-lc" / "samples.npz", samples)
    plain = {"label": given, "suspect": None, "share": None, "margin": None, "neighbours": None}
    fields = {name: getattr(samples, name) for name in RunSamples.__dataclass_fields__}
    write_samples(folder / "erm" / "samples.npz", RunSamples(**{**fields, **plain}))
    return samples


def main(folder, relabels=100_000):
    x, y = images(5 * relabels // 2, 10, side=28)
    make_run(folder / "run", x, y, relabels)
    for pictures in (0, 1000):
        start = time.monotonic()
        out = folder / f"report-{pictures}.html"
        written = write_report(folder / "run", out, pictures=pictures)
        seconds = time.monotonic() - start
        size = written.size / 1e6
        print(f"{relabels} relabels, {pictures} pictured: {size:.1f} MB, {seconds:.1f} s")
    size = (folder / "run" / "als-lc" / "samples.npz").stat().st_size
    print(f"samples.npz of {len(y)} samples: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
