"""als-ext compare: figures, tables, plots, going on after anything, one line for bad input."""

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from sklearn.datasets import load_digits

from als_ext.cli import main
from als_ext.compare.figures import cell_figures
from als_ext.compare.grid import Cell, Variant, make_grid
from als_ext.compare.store import Store, locked, read_grid, read_results
from als_ext.methods import ERM
from als_ext.methods import METHODS as REGISTRY
from als_ext.metrics import detection_metrics
from als_ext.progress import ProgressBar
from als_ext.trainer import TrainResult

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS, NOISES, SEEDS = ("erm", "als-lc"), ("symmetric:0.4", "pair:0.45"), (0, 1)
QUICK = ["--threads", "1", "--epochs", "2"]
GRID = ["--method", ",".join(METHODS), "--noise", ",".join(NOISES), "--seeds", "0-1", *QUICK]
AXES = ("dataset", "noise", "method", "seed")


def run(*words, command="compare"):
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([command, *(str(word) for word in words)])
    return code, out.getvalue(), err.getvalue()


def done(*words):
    """The JSON object, and what was said on stderr."""
    code, out, err = run("--json", *words)
    assert code == 0, err
    return json.loads(out), err


def refused(*words):
    code, out, err = run(*words)
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("als-ext: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("als-ext: error: ").strip()


def lines(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def key(line):
    return tuple(line[name] for name in AXES)


def without_time(line):
    return {k: v for k, v in line.items() if k != "seconds"}


def files_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def trained(err):
    """The cells that a call trained, by its lines on stderr."""
    return re.findall(r"^\[\d+/\d+\] (.+?): ", err, re.M)


@pytest.fixture
def no_plots(monkeypatch):
    """They take longer than the cells of these tests."""
    monkeypatch.setattr("als_ext.cli.compare.draw", lambda *_arguments: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole comparison, as a user makes one."""
    out = tmp_path_factory.mktemp("compare") / "new" / "out"
    result, err = done("--out", out, *GRID)
    assert len(trained(err)) == 8
    return out, result


@pytest.fixture
def copied(finished, tmp_path):
    """A copy to go on with."""
    shutil.copytree(finished[0], tmp_path / "out")
    return tmp_path / "out"


def test_one_line_a_cell_in_the_order_of_the_grid(finished):
    out, _ = finished
    want = [("digits", n, m, s) for s in SEEDS for n in NOISES for m in METHODS]
    assert [key(line) for line in lines(out)] == want
    assert {line["status"] for line in lines(out)} == {"done"}


def test_the_lines_name_no_folder_and_no_machine(finished):
    out, _ = finished
    text = (out / "cells.jsonl").read_text()
    assert str(out) not in text
    assert "/" not in text
    assert socket.gethostname() not in text


def test_a_cell_is_the_run_of_the_same_settings(finished):
    out, _ = finished
    words = ["--noise", "pair:0.45", "--seed", "1", "--method", "als-lc", "--json", *QUICK]
    code, text, _ = run(*words, command="run")
    assert code == 0
    figures = json.loads(text)["als-lc"]
    cell = next(line for line in lines(out) if key(line)[1:] == ("pair:0.45", "als-lc", 1))
    del figures["seconds"]
    assert {name: cell[name] for name in figures} == figures


def cell_folder(out, line):
    names = (line["dataset"], line["noise"].replace(":", "-"), line["method"], str(line["seed"]))
    return out / "cells" / "_".join(names)


def test_figures_are_those_of_the_epochs_and_the_samples(finished):
    out, _ = finished
    for line in lines(out):
        folder = cell_folder(out, line)
        epochs = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        accuracy = [epoch["test_accuracy"] for epoch in epochs]
        assert line["epochs"] == len(epochs) == 2
        assert line["test_accuracy"] == accuracy[-1]
        assert line["test_accuracy_best"] == max(accuracy) == accuracy[line["best_epoch"] - 1]
        assert line["test_accuracy_last10"] is None
        samples = np.load(folder / "samples.npz", allow_pickle=False)
        wrong = samples["given"] != samples["true"]
        assert line["noise_rate"] == wrong.mean() > 0
        assert line["label_accuracy_after"] == (samples["labels"] == samples["true"]).mean()
        assert np.isfinite(samples["loss"]).all()
        if line["method"] == "erm":
            assert {"log_pi", "detected"}.isdisjoint(samples.files)
            assert line["detection_f1"] is line["detected"] is None
            continue
        assert np.exp(samples["log_pi"].astype(np.float64)).sum() == pytest.approx(1)
        found = samples["detected"]
        assert (found >= (samples["labels"] != samples["given"])).all()
        assert line["detected"] == found.sum() > 0
        precision, recall = wrong[found].mean(), found[wrong].mean()
        assert line["detection_precision"] == pytest.approx(precision)
        assert line["detection_recall"] == pytest.approx(recall)
        want = 2 * precision * recall / (precision + recall)
        assert line["detection_f1"] == pytest.approx(want)


@pytest.mark.usefixtures("no_plots")
def test_ten_epochs_give_the_mean_of_the_last_ten(tmp_path):
    done("--out", tmp_path, "--method", "erm", "--threads", "1", "--epochs", "11")
    (line,) = lines(tmp_path)
    text = (cell_folder(tmp_path, line) / "metrics.jsonl").read_text()
    accuracy = [json.loads(epoch)["test_accuracy"] for epoch in text.splitlines()]
    assert line["test_accuracy_last10"] == pytest.approx(np.mean(accuracy[1:]))


def test_a_method_that_trains_twice_is_measured_in_its_last_training():
    accuracy = [0.9] * 10 + [k / 100 for k in range(10)]
    label = torch.zeros(4, dtype=torch.int64)
    done = TrainResult(
        labels=label,
        given_labels=label,
        history=[{"test_accuracy": a} for a in accuracy],
        label_metrics={},
        report=None,
        losses=torch.zeros(4),
        log_pi=None,
        test_accuracy=accuracy[-1],
        seconds=1.0,
    )
    found = cell_figures(done, None, epochs=10)
    assert found["test_accuracy_last10"] == pytest.approx(0.045)
    assert (found["test_accuracy_best"], found["best_epoch"]) == (0.09, 20)
    assert found["epochs"] == 20
    assert cell_figures(done, None, epochs=9)["test_accuracy_last10"] is None


@pytest.mark.usefixtures("no_plots")
def test_methods_that_are_told_more_are_named(tmp_path):
    words = ["--method", "erm,deep-knn,l2rw,co-teaching", "--setting", "noise_rate=0.4"]
    words += ["--clean-per-class", "2", "--threads", "1", "--epochs", "5"]
    done("--out", tmp_path, *words)
    found = {line["method"]: line for line in lines(tmp_path)}
    clean = {method: line["clean_per_class"] for method, line in found.items()}
    assert clean == {"erm": 0, "deep-knn": 2, "l2rw": 2, "co-teaching": 0}
    page = (tmp_path / "table.md").read_text()
    assert "* deep-knn, l2rw: the true labels of 2 samples a class\n" in page
    assert "* co-teaching: a noise rate of 0.4\n" in page
    filtered = found["deep-knn"]
    assert filtered["epochs"] == 10
    assert filtered["best_epoch"] > 5
    assert filtered["test_accuracy_last10"] is None  # the last training has five
    assert 0 < filtered["detected"] < filtered["samples"] - 20
    assert filtered["detection_precision"] > filtered["noise_rate"]


@pytest.mark.usefixtures("no_plots")
def test_a_method_is_told_the_rate_of_each_noise(tmp_path, own_file):
    words = ["--method", "co-teaching", "--noise", "symmetric:0.2,pair:0.45", *QUICK]
    done("--out", tmp_path / "told", *words, "--setting", "noise_rate=realised")
    found = lines(tmp_path / "told")
    assert "* co-teaching: the noise rate\n" in (tmp_path / "told" / "table.md").read_text()
    for line in found:
        rate = line["noise_rate"]
        assert abs(rate - float(line["noise"].split(":")[1])) < 0.02
        spelled = ["--method", "co-teaching", "--noise", line["noise"], *QUICK]
        out = tmp_path / line["noise"].replace(":", "-")
        done("--out", out, *spelled, "--setting", f"noise_rate={rate!r}")
        (same,) = lines(out)
        settings = [cell.pop("settings") for cell in (same, line)]
        assert settings == [{"noise_rate": rate}, {"noise_rate": "realised"}]
        assert without_time(same) == without_time(line)
    words = ["--dataset", own_file, "--noise", "none", "--method", "co-teaching"]
    code, _, err = run(*words, "--setting", "noise_rate=realised", "--quiet", command="run")
    assert code == 2
    assert "noise_rate: expected a number where the true labels are unknown" in err


def recomputed(out):
    """(dataset, noise, method) -> figure -> values of the seeds, from cells.jsonl alone."""
    groups = {}
    for line in lines(out):
        figures = groups.setdefault(key(line)[:3], {})
        for name, value in line.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                figures.setdefault(name, []).append(value)
    return groups


def test_csv_and_json_are_mean_and_deviation_over_the_seeds(finished):
    out, result = finished
    groups = recomputed(out)
    with (out / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {tuple(row[name] for name in AXES[:3]) for row in rows} == set(groups)
    assert len(rows) == sum(len(row["figures"]) for row in result["rows"]) > 30
    by_json = {tuple(r[name] for name in AXES[:3]): r["figures"] for r in result["rows"]}
    for row in rows:
        group = tuple(row[name] for name in AXES[:3])
        values = groups[group][row["figure"]]
        assert float(row["mean"]) == pytest.approx(np.mean(values))
        assert float(row["std"]) == pytest.approx(np.std(values, ddof=1), abs=1e-12)
        assert int(row["seeds"]) == len(values) == 2
        same = by_json[group][row["figure"]]
        assert (float(row["mean"]), float(row["std"])) == (same["mean"], same["std"])


def test_the_page_shows_them_in_percent(finished):
    out, _ = finished
    page = (out / "table.md").read_text()
    pivot = page.split("Test accuracy after the last epoch, %:")[1].split("\n\n")[1]
    head, _, *body = ([c.strip() for c in line.split("|")[1:-1]] for line in pivot.splitlines())
    assert head == ["method", *NOISES]
    groups = recomputed(out)
    for method, *cells in body:
        for noise, cell in zip(NOISES, cells, strict=True):
            values = 100 * np.array(groups["digits", noise, method]["test_accuracy"])
            assert cell == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
    assert [method for method, *_ in body] == list(METHODS)
    assert "oracle" in page
    assert "Failed cells" not in page
    assert "told" not in page


def test_plots_hold_a_line_a_method_and_a_panel_a_method(finished):
    out, _ = finished
    names = {file.name for file in (out / "plots").iterdir()}
    stems = [
        f"{kind}_digits_{n.replace(':', '-')}" for kind in ("accuracy", "pi", "map") for n in NOISES
    ]
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")}
    for stem in stems:
        assert (out / "plots" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        svg = (out / "plots" / f"{stem}.svg").read_text()
        panels = len(re.findall(r'id="axes_\d+"', svg))
        curves = re.findall(r'id="line-([\w-]+)"', svg)
        if stem.startswith("accuracy"):
            assert (curves, panels) == (list(METHODS), 1)
        else:  # erm has no pi
            assert (curves, panels) == ([], 1 if stem.startswith("pi") else 2)


def test_the_same_grid_again_trains_nothing_and_says_the_same(copied, finished):
    before = files_of(copied)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("als_ext.trainer.Trainer.fit", None)
        assert done("--out", copied, *GRID) == (finished[1], "")
    assert files_of(copied) == before


def test_the_report_is_made_again_from_the_files(copied, finished):
    before = files_of(copied)
    shutil.rmtree(copied / "plots")
    for name in ("table.md", "table.csv"):
        (copied / name).unlink()
    assert done("--out", copied, "--report-only") == (finished[1], "")
    assert files_of(copied) == before


def test_the_lines_alone_are_enough_for_the_tables(finished, tmp_path):
    shutil.copy(finished[0] / "cells.jsonl", tmp_path)
    done("--out", tmp_path, "--report-only")
    for name in ("table.md", "table.csv"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()
    assert not (tmp_path / "plots").exists()


@pytest.mark.usefixtures("no_plots")
def test_cells_are_added_and_nothing_else_is_trained(copied):
    before = {key(line): line for line in lines(copied)}
    _, err = done("--out", copied, "--seeds", "2", "--method", "erm", "--noise", "pair:0.45")
    assert trained(err) == ["digits pair:0.45 erm seed 2"]
    _, err = done("--out", copied)  # the grid has a corner now, which is no order to fill it
    assert trained(err) == []
    _, err = done("--out", copied, "--method", "gce", "--seeds", "0")
    assert trained(err) == [f"digits {noise} gce seed 0" for noise in NOISES]
    after = {key(line): line for line in lines(copied)}
    assert len(after) == len(before) + 3
    assert {cell: after[cell] for cell in before} == before
    assert "(1 of 3)" in (copied / "table.md").read_text()


def test_another_setting_is_refused_and_the_folder_left_alone(copied):
    before = files_of(copied)
    message = refused("--out", copied, "--epochs", "3", "--model", "mlp")
    assert "settings.epochs was 2, now 3; settings.model was 'auto', now 'mlp'" in message
    message = refused("--out", copied, "--method", "erm,gce", "--setting", "q=2")
    assert "q: expected" in message
    assert files_of(copied) == before


@pytest.mark.usefixtures("no_plots")
def test_settings_of_a_method_are_part_of_the_grid(tmp_path):
    words = ["--out", tmp_path, "--method", "gce", *QUICK]
    done(*words, "--setting", "q=0.5")
    assert lines(tmp_path)[0]["settings"] == {"q": 0.5}
    assert trained(done(*words)[1]) == []
    assert "methods.gce.settings.q was 0.5, now 0.6" in refused(*words, "--setting", "q=0.6")


@pytest.mark.usefixtures("no_plots")
def test_a_grid_file_may_have_all_of_it(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text(
        'dataset = "digits"\nnoise = ["none"]\nmethod = ["erm", "gce", "hard"]\nseeds = [0, 3]\n'
        'epochs = 9\nbatch-size = 64\nsettings.hard = {method = "gce", q = 0.9}\n'
    )
    out = tmp_path / "out"
    _, err = done("--grid", file, "--out", out, "--epochs", "1", "--seeds", "3")
    assert trained(err) == [f"digits none {name} seed 3" for name in ("erm", "gce", "hard")]
    saved = json.loads((out / "grid.json").read_text())["grid"]
    assert (saved["settings"]["epochs"], saved["settings"]["batch_size"]) == (1, 64)
    kinds = [(line["kind"], line["settings"]) for line in lines(out)]
    assert kinds == [("erm", {}), ("gce", {}), ("gce", {"q": 0.9})]
    assert trained(done("--out", out, "--method", "hard", "--seeds", "4")[1]) == [
        "digits none hard seed 4"
    ]


@pytest.fixture
def own_file(tmp_path):
    """Digits as a user's own file: no map of classes for asymmetric noise, truth unknown."""
    x, y = load_digits(return_X_y=True)
    np.savez(tmp_path / "own.npz", x=x[:400].astype(np.float32), y=y[:400])
    return f"npz:{tmp_path / 'own.npz'}"


@pytest.mark.usefixtures("no_plots")
def test_a_failed_cell_is_recorded_the_rest_goes_on_and_a_retry_mends_it(tmp_path, monkeypatch):
    original = ERM.step

    def broken(self, x, label, index):
        if self.task.config.seed == 0:
            raise RuntimeError("no space\nin /some/where/file")
        return original(self, x, label, index)

    words = ["--out", tmp_path, "--method", "erm", "--seeds", "0-1", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(ERM, "step", broken)
        code, _, err = run(*words)
    assert code == 1
    assert "[1/2] digits symmetric:0.4 erm seed 0: FAILED: RuntimeError: no space in file" in err
    assert err.splitlines()[-1].startswith("als-ext: 1 of 2 cells failed; to try them again: ")
    bad, good = lines(tmp_path)
    error = {"status": "failed", "error": "RuntimeError: no space in file"}
    assert bad == {
        "dataset": "digits",
        "noise": "symmetric:0.4",
        "method": "erm",
        "seed": 0,
        **error,
    }
    assert good["status"] == "done"
    page = (tmp_path / "table.md").read_text()
    assert "* digits symmetric:0.4 erm seed 0: RuntimeError: no space in file" in page
    assert "(1 of 2)" in page
    assert "in broken" in (cell_folder(tmp_path, bad) / "error.txt").read_text()
    _, err = done("--out", tmp_path)
    assert trained(err) == ["digits symmetric:0.4 erm seed 0"]
    assert [line["status"] for line in lines(tmp_path)] == ["done", "done"]
    assert lines(tmp_path)[1] == good
    assert "Failed" not in (tmp_path / "table.md").read_text()
    assert not list(tmp_path.rglob("error.txt"))


@pytest.mark.usefixtures("no_plots")
def test_what_shows_with_the_data_alone_fails_its_cell(tmp_path, own_file):
    words = ["--dataset", own_file, "--noise", "asymmetric:0.2,pair:0.2", "--method", "erm"]
    code, out, _ = run("--out", tmp_path / "out", "--json", *words, *QUICK)
    assert code == 1
    result = json.loads(out)
    assert result["done"] == 1
    assert result["failed"][0]["cell"] == "npz:own.npz asymmetric:0.2 erm seed 0"
    assert "ValueError: " in result["failed"][0]["error"]
    assert str(tmp_path) not in (tmp_path / "out" / "cells.jsonl").read_text()


def test_where_the_truth_is_unknown_nothing_is_said_about_labels(tmp_path, own_file):
    words = ["--dataset", own_file, "--noise", "none", "--method", "als-lc", *QUICK]
    result, _ = done("--out", tmp_path / "out", *words)
    (line,) = lines(tmp_path / "out")
    for name in ("noise_rate", "detection_f1", "label_accuracy_after", "relabel_precision"):
        assert line[name] is None
        assert name not in result["rows"][0]["figures"]
    assert len(list((tmp_path / "out" / "plots").iterdir())) == 6


def test_a_method_that_only_drops_samples_is_measured_as_a_detector(tmp_path, dropping):
    done("--out", tmp_path / "grid", "--method", dropping, *QUICK)
    (line,) = lines(tmp_path / "grid")
    assert line["detected"] == 100
    assert line["detection_precision"] == pytest.approx(line["detection_recall"] * 575 / 100)
    assert line["relabelled"] == 0
    words = ["--method", dropping, "--out", tmp_path / "run", "--epochs", "1"]
    assert run(*words, command="run")[0] == 0
    report = (tmp_path / "run" / dropping / "report.csv").read_text().splitlines()
    assert report[0] == "index,old,new,suspect"
    assert sum(row.endswith(",1") for row in report[1:]) == 100


@pytest.fixture
def dropping(no_plots):
    """A method that suspects the first hundred samples and changes nothing."""

    class Dropping(ERM, name="dropping"):
        def report(self):
            return {"suspect": torch.arange(len(self.task.labels)) < 100}

    yield "dropping"
    del REGISTRY["dropping"]


@pytest.mark.usefixtures("no_plots")
def test_an_embedding_that_is_not_there_shows_before_the_training(tmp_path):
    code, _, err = run("--out", tmp_path, "--method", "erm", "--embedding", "nowhere", *QUICK)
    assert code == 1
    assert "FAILED: ValueError: embedding: expected one of the layers" in err
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("lent", [{0, 1, 2, 3, 4, 5}, {7}])
def test_jobs_share_the_cores_that_are_lent(tmp_path, monkeypatch, lent):
    threads = []

    def results_of(jobs, processes, _display):
        threads.extend(job.usual_threads for job in jobs)
        yield from ((job, {"status": "failed", "error": "not tried"}) for job in jobs)

    monkeypatch.setattr("als_ext.cli.compare.results_of", results_of)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: lent, raising=False)
    assert run("--out", tmp_path, "--method", "erm", "--jobs", "2", "--seeds", "0-2")[0] == 1
    assert threads == [max(1, len(lent) // 2)] * 3


@pytest.mark.usefixtures("no_plots")
def test_checkpoints_of_finished_cells_go_unless_they_are_kept(finished, tmp_path):
    assert not list(finished[0].rglob("checkpoint.pt"))
    done("--out", tmp_path, "--method", "erm", "--keep-checkpoints", *QUICK)
    assert len(list(tmp_path.rglob("checkpoint.pt"))) == 1


@pytest.mark.usefixtures("no_plots")
def test_an_interrupt_keeps_what_is_done_and_says_how_to_go_on(tmp_path, monkeypatch):
    original = ERM.step

    def interrupted(self, x, label, index):
        if self.task.config.seed == 1:
            raise KeyboardInterrupt
        return original(self, x, label, index)

    with monkeypatch.context() as patch:
        patch.setattr(ERM, "step", interrupted)
        code, out, err = run("--out", tmp_path, "--method", "erm", "--seeds", "0-2", *QUICK)
    assert (code, out) == (130, "")
    assert f"go on with: als-ext compare --out {tmp_path}" in err
    assert "Traceback" not in err
    assert [key(line)[3] for line in lines(tmp_path)] == [0]
    _, err = done("--out", tmp_path)
    assert [cell[-1] for cell in trained(err)] == ["1", "2"]


@pytest.mark.usefixtures("no_plots")
def test_two_processes_do_not_work_in_one_folder(copied):
    with locked(copied):
        message = refused("--out", copied)
    assert "expected a folder that nobody works in" in message
    assert done("--out", copied)[1] == ""


def test_without_matplotlib_there_are_tables(copied, monkeypatch):
    shutil.rmtree(copied / "plots")
    monkeypatch.setattr("als_ext.cli.compare.can_plot", lambda: False)
    _, err = done("--out", copied, "--report-only")
    assert err == "als-ext: no plots without matplotlib: pip install 'als_ext[plots]'\n"
    assert not (copied / "plots").exists()


def test_a_map_by_tsne(tmp_path, own_file):
    words = ["--dataset", own_file, "--noise", "pair:0.2", "--method", "erm", "--map", "tsne"]
    done("--out", tmp_path / "out", *words, *QUICK)
    assert "t-SNE" in (tmp_path / "out" / "plots" / "map_npz-own.npz_pair-0.2.svg").read_text()


@pytest.mark.usefixtures("no_plots")
def test_quiet_is_silent_on_stderr(tmp_path):
    assert done("--out", tmp_path, "--method", "erm", "--quiet", *QUICK)[1] == ""


def test_a_display_that_runs_gets_a_bar_and_loses_it_again():
    display = Progress(disable=True)
    with ProgressBar("one", 7, display) as bar:
        bar.step_to(3)
        assert [(task.description, task.completed, task.total) for task in display.tasks] == [
            ("one", 3, 7)
        ]
    assert display.tasks == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "magic"], "method: expected one of 'erm', 'also', 'also-min'"),
        (["--method", "erm,erm"], "method: expected each once, got erm, erm"),
        (["--noise", "symmetric:0.2,symetric:0.4"], "noise: expected one of none, symmetric"),
        (["--noise", "pair:0.2,pair:0.2"], "noise: expected names that differ, got pair:0.2 twice"),
        (["--noise", "file:nowhere.csv"], "noise: expected a file, got none at nowhere.csv"),
        (["--dataset", "imagenet"], "dataset: expected digits, mnist, fashion-mnist, npz:FILE"),
        (["--dataset", "npz:nowhere.npz"], "dataset: expected a file or folder, got none at"),
        (["--dataset", "folder:."], "noise: expected --noise (none, ...) for data of your own"),
        (["--seeds", "2-0"], "seeds: expected numbers and ranges such as 0-2,7, got '2-0'"),
        (["--seeds", "some"], "seeds: expected numbers and ranges"),
        (["--setting", "q=1"], "of erm, als-lc (pretrain), got 'q=1'"),
        (["--method", "gce", "--setting", "q=2"], "q: expected a finite number in (0, 1]"),
        (["--clean-per-class", "-1"], "clean-per-class: expected >= 0, got -1"),
        (["--model", "vgg"], "model: expected one of 'auto', 'cnn', 'mlp', got 'vgg'"),
        (["--epochs", "0"], "epochs: expected >= 1, got 0"),
        (["--epochs", "1"], "epochs: expected more than warmup=1 for als-lc, got 1"),
        (["--lr", "-1"], "lr: expected a finite number"),
        (["--amp", "fp8"], "amp: expected one of 'off', 'bf16', 'f16', got 'fp8'"),
        (["--device", "tpu"], "device: expected auto, cpu or cuda"),
        (["--jobs", "0"], "jobs: expected >= 1, got 0"),
        (["--threads", "0"], "threads: expected >= 1, got 0"),
        (["--checkpoint-seconds", "0"], "checkpoint-seconds: expected a finite number"),
        (["--map", "umap"], "map: expected one of 'pca', 'tsne', got 'umap'"),
        (["--report-only"], "report-only: expected the results of cells, got none in out"),
        (["--report-only", "--epochs", "3"], "report-only: expected no option about the grid"),
        (["--grid", "nowhere.toml"], "grid: expected a file, got none at nowhere.toml"),
        (["--grid", "no.toml"], "grid: expected a TOML file, got no.toml"),
        (["--grid", "name.toml"], "grid: expected one of dataset, noise, method, seeds"),
        (["--grid", "axis.toml"], "method: expected a text or a list of texts, got 3"),
        (["--grid", "empty.toml"], "method: expected at least one, got none"),
        (["--grid", "seeds.toml"], "seeds: expected an int, got float"),
        (["--grid", "table.toml"], "settings: expected the names of methods in table.toml (erm)"),
        (["--grid", "own.toml"], "settings: expected those of gce (q), got 'p'"),
        (["--grid", "type.toml"], "epochs: expected an int, got str"),
        (["--grid", "text.toml"], "device: expected a text, got 1"),
        (["--nope"], "No such option: --nope"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    contents = {
        "no": "= 3",
        "name": "epoch = 3",
        "axis": "method = 3",
        "empty": "method = []",
        "seeds": "seeds = [0, 1.5]",
        "table": 'method = ["erm"]\nsettings.gce.q = 0.5',
        "own": 'method = "gce"\nsettings.gce.p = 0.5',
        "type": 'epochs = "many"',
        "text": "device = 1",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.toml").write_text(content)
    before = files_of(tmp_path)
    assert message in refused("--out", "out", *words)
    assert files_of(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "out: expected a new or an empty folder" in refused("--out", tmp_path)
    assert files_of(tmp_path) == {"notes.txt": b"mine"}
    assert "expected a new or an empty" in refused("--out", tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("grid.json", "{", "grid.json is damaged"),
        ("grid.json", '{"grid": {"cells": []}}', "grid.json is damaged (KeyError"),
        ("cells.jsonl", '{"dataset": "digits", "noi', "line 1 of"),
        ("cells.jsonl", '{"dataset": "digits"}\n', "line 1 of"),
    ],
)
def test_damaged_files_are_named(copied, file, content, message):
    (copied / file).write_text(content)
    before = files_of(copied)
    assert message in refused("--out", copied)
    assert files_of(copied) == before


def test_results_of_other_cells_are_not_overwritten(copied):
    line = {**lines(copied)[0], "seed": 77}
    with (copied / "cells.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert "cells.jsonl has digits symmetric:0.4 erm seed 77" in refused("--out", copied)
    assert lines(copied)[-1] == line


def test_names_that_give_one_folder_are_refused():
    methods = {"a b": Variant("erm"), "a:b": Variant("erm")}
    with pytest.raises(ValueError, match="expected names that differ in letters or digits"):
        make_grid({"digits": "digits"}, {"none": "none"}, methods, [0], {})


def test_detection_of_nothing_is_undefined():
    given, none = torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool)
    figures = detection_metrics(none, given, given)
    assert set(figures.values()) == {None, 0}


@pytest.mark.parametrize("broken", ["os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_lines_as_they_were(copied, monkeypatch, broken):
    grid = read_grid(copied)
    store = Store(copied, grid)
    before = files_of(copied)

    def full(*_arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(OSError, match="no space"):
        store.add(grid.cells[0], {"status": "failed", "error": "it was done"})
    assert files_of(copied) == before


# ---- kill -9 -----------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from als_ext.compare.grid import Variant, make_grid
from als_ext.compare.store import Store
names = {"d": "d"}
grid = make_grid(names, names, {"m": Variant("erm")}, range(2000), {})
store = Store(Path(sys.argv[1]), grid)
for cell in store.pending:
    facts = {"settings": {}, "versions": {}, "model": "m", "device": "cpu", "clean_per_class": 0}
    store.add(cell, {"status": "done", **facts, "padding": "x" * 20_000})
"""


def test_kill_9_while_a_result_is_written_loses_no_line_and_leaves_no_half(tmp_path):
    names = {"d": "d"}
    grid = make_grid(names, names, {"m": Variant("erm")}, range(2000), {})
    pause, seen = random.Random(0), 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
        wait_for(lambda: len(read_results(tmp_path)) > seen + 40, process)  # noqa: B023
        time.sleep(pause.uniform(0.0, 0.1))
        before = len(read_results(tmp_path))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        results = read_results(tmp_path)
        seen = len(results)
        assert seen >= before
        assert list(results) == [Cell("d", "d", "m", seed) for seed in range(seen)]
    assert len(Store(tmp_path, grid).pending) == 2000 - seen
    assert [f.name for f in tmp_path.iterdir() if f.name.endswith(".tmp")] == []


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def start(out, *more):
    words = ["compare", "--out", str(out), "--checkpoint-seconds", "0.02", "--quiet", *more]
    command = [sys.executable, "-m", "als_ext.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def is_alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # nobody's zombie has none
    return False


def children(process):
    """Processes of a command that train, by Linux's own list."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            after_name = status.read_text().rpartition(")")[2].split()
            command = status.with_name("cmdline").read_bytes()
            if int(after_name[1]) == process.pid and b"spawn_main" in command:
                found.append(int(status.parent.name))
    return found


LONG = ["--method", "erm,als-lc", "--epochs", "8", "--threads", "1", "--seeds", "0-1"]


def epochs_of(folder):
    """The whole lines of a cell's metrics."""
    file = folder / "metrics.jsonl"
    return [json.loads(x) for x in file.read_text().split("\n")[:-1]] if file.exists() else []


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("als_ext.cli.compare.draw", lambda *_arguments: [])
        done("--out", out, *LONG)
    return [without_time(line) for line in lines(out)]


@pytest.mark.usefixtures("no_plots")
def test_kill_9_inside_a_cell_and_going_on_gives_the_unbroken_figures(tmp_path, unbroken):
    first, second = (tmp_path / "cells" / f"digits_symmetric-0.4_{m}_0" for m in METHODS)
    kept, trained_before = [], {}
    for folder, more in ((first, LONG), (second, [])):
        process = start(tmp_path, *more)
        wait_for(lambda: len(epochs_of(folder)) > 1, process)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        assert process.communicate()[0] == b""
        assert process.returncode == -signal.SIGKILL
        results = list(read_results(tmp_path).values())
        assert results[: len(kept)] == kept
        kept = results
        trained_before[folder] = torch.load(folder / "checkpoint.pt", weights_only=True)["history"]
        assert 0 < len(trained_before[folder]) < 8
    assert kept
    left_over = tmp_path / f".cells.jsonl.{'0' * 16}.tmp"
    left_over.write_text("half a li")  # as a kill at the worst moment would
    done("--out", tmp_path)
    assert lines(tmp_path)[: len(kept)] == kept
    assert [without_time(line) for line in lines(tmp_path)] == unbroken
    for folder, epochs in trained_before.items():  # not again: their seconds are the same
        assert epochs_of(folder)[: len(epochs)] == epochs
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.usefixtures("no_plots")
def test_processes_give_the_same_figures_and_die_with_their_parent(tmp_path, unbroken):
    process = start(tmp_path, *LONG, "--jobs", "2")
    wait_for(lambda: len(children(process)) == 2, process)
    os.kill(children(process)[0], signal.SIGKILL)  # as the system does when memory runs out
    wait_for(lambda: statuses(tmp_path) >= {"done", "failed"}, process)
    workers = children(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    end = time.monotonic() + 300
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < end, "workers outlive a killed comparison"
        time.sleep(0.05)
    failed = [line for line in lines(tmp_path) if line["status"] == "failed"]
    assert [line["error"] for line in failed] == ["its process ended with code -9"]
    done("--out", tmp_path)
    assert [without_time(line) for line in lines(tmp_path)] == unbroken


def statuses(out):
    return {result["status"] for result in read_results(out).values()}
