"""The command line: results, files, exit codes, and one clear line for every bad input."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from als_ext.checkpoint import load_checkpoint
from als_ext.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = {
    "test_accuracy",
    "label_accuracy_before",
    "label_accuracy_after",
    "relabel_precision",
    "relabel_recall",
    "seconds",
}
SHORT = ["--epochs", "3", "--warmup", "2"]


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def no_constants(name):
    raise AssertionError(f"{name} is no JSON")


def result_of(capsys, *words):
    code, out, err = run(capsys, "run", "--json", *words)
    assert code == 0, err
    assert err == ""  # no terminal: no progress bar
    return json.loads(out, parse_constant=no_constants)


def refused(capsys, *words):
    """The one line that says what is wrong."""
    code, out, err = run(capsys, *words)
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("als-ext: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err.removeprefix("als-ext: error: ").strip()


def files_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    """Digits as a user's own file, 30 % of the training labels wrong and nobody knows which."""
    bunch = load_digits()
    rng = np.random.default_rng(0)
    y = bunch.target.copy()
    wrong = rng.permutation(1400)[:420]
    y[wrong] = (y[wrong] + rng.integers(1, 10, 420)) % 10
    path = tmp_path_factory.mktemp("own") / "own.npz"
    np.savez(
        path,
        x_train=bunch.data[:1400].astype(np.float32),
        y_train=y[:1400],
        x_test=bunch.data[1400:].astype(np.float32),
        y_test=y[1400:],
    )
    return path, bunch.target[:1400]


@pytest.fixture(scope="module")
def default_run():
    """The main job, as a user starts it: a process of its own, no option."""
    command = [sys.executable, "-m", "als_ext.cli", "run", "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_without_options_the_method_stands_beside_erm_and_is_better(default_run):
    result = json.loads(default_run.stdout, parse_constant=no_constants)
    assert default_run.stderr == ""
    assert result["dataset"] == "digits"
    assert result["noise"] == "symmetric:0.4"
    assert result["noise_rate"] == pytest.approx(0.4, abs=0.001)
    erm, method = result["erm"], result["als-lc"]
    assert erm.keys() >= KEYS
    assert method.keys() >= KEYS
    assert (
        erm["label_accuracy_after"] == erm["label_accuracy_before"] == pytest.approx(0.6, abs=0.001)
    )
    assert erm["relabel_precision"] is None
    assert method["label_accuracy_after"] > 0.95
    assert method["relabel_precision"] > 0.93
    assert method["relabel_recall"] > 0.93
    assert method["test_accuracy"] > 0.94
    assert method["test_accuracy"] > erm["test_accuracy"] + 0.03
    assert erm["seconds"] + method["seconds"] < 60


def test_the_same_command_gives_the_same_figures(capsys):
    first, second = (result_of(capsys, *SHORT, "--method", "als-lc") for _ in range(2))
    for result in (first, second):
        del result["als-lc"]["seconds"]
    assert first == second
    assert "erm" not in first


def test_the_table_shows_every_figure(capsys):
    code, out, err = run(capsys, "run", *SHORT, "--method", "erm", "--method", "als-lc", "--quiet")
    assert code == 0
    assert err == ""
    words = out.split()
    assert {"erm", "als-lc", "precision", "recall", "seconds", "before", "after"} <= set(words)
    assert "symmetric:0.4" in out


def test_nothing_is_written_without_out(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result_of(capsys, *SHORT)
    assert list(tmp_path.iterdir()) == []


def test_out_holds_settings_metrics_checkpoints_and_labels(capsys, tmp_path):
    out = tmp_path / "new" / "run"
    result = result_of(capsys, *SHORT, "--out", out)
    assert json.loads((out / "result.json").read_text()) == result
    assert json.loads((out / "run.json").read_text())["settings"]["method"] == ["erm", "als-lc"]
    assert sorted(f.name for f in (out / "erm").iterdir()) == [
        "checkpoint.pt",
        "metrics.csv",
        "metrics.jsonl",
        "samples.npz",
    ]
    labels = np.load(out / "als-lc" / "labels.npy")
    with (out / "als-lc" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "old", "new", "share", "margin", "suspect"]
    assert [int(row["new"]) for row in rows] == labels.tolist()
    changed = [row for row in rows if row["old"] != row["new"]]
    assert len(changed) == result["als-lc"]["relabelled"] > 0
    assert {row["suspect"] for row in changed} == {"1"}
    truth = load_digits().target
    right = np.mean([truth[int(row["index"])] == int(row["new"]) for row in rows])
    assert right == pytest.approx(result["als-lc"]["label_accuracy_after"])
    assert not list(out.rglob("*.tmp"))


def test_own_data_has_no_truth_to_measure_with(capsys, tmp_path, digits_file):
    path, true = digits_file
    out = tmp_path / "run"
    words = ["--dataset", f"npz:{path}", "--method", "als-lc", "--epochs", "8", "--out", out]
    result = result_of(capsys, *words)
    figures = result["als-lc"]
    for key in KEYS - {"seconds", "test_accuracy"}:
        assert figures[key] is None, key
    assert result["noise"] == "none"
    assert result["noise_rate"] is None
    before = (np.load(path)["y_train"] == true).mean()
    assert (np.load(out / "als-lc" / "labels.npy") == true).mean() > before + 0.2


def test_labels_from_a_file_are_measured_against_those_of_the_data_set(
    capsys, tmp_path, digits_file
):
    path, true = digits_file
    clean, noisy = tmp_path / "clean.npz", tmp_path / "noisy.csv"
    arrays = dict(np.load(path))
    np.savez(clean, **{**arrays, "y_train": true})
    noisy.write_text("label\n" + "\n".join(map(str, arrays["y_train"])) + "\n")
    result = result_of(
        capsys, "--dataset", f"npz:{clean}", "--labels", noisy, *SHORT, "--method", "als-lc"
    )
    assert result["noise"] == "file:noisy.csv"
    assert result["noise_rate"] == pytest.approx(0.3)
    assert result["als-lc"]["label_accuracy_before"] == pytest.approx(0.7)
    by_noise = result_of(
        capsys,
        "--dataset",
        f"npz:{clean}",
        "--noise",
        f"file:{noisy}",
        *SHORT,
        "--method",
        "als-lc",
    )
    del result["als-lc"]["seconds"], by_noise["als-lc"]["seconds"]
    assert by_noise == result


def test_a_label_file_covers_all_rows_of_a_source_that_is_split_here(capsys, tmp_path):
    truth = load_digits().target
    np.save(tmp_path / "labels.npy", truth)
    result = result_of(
        capsys, "--labels", tmp_path / "labels.npy", *SHORT, "--method", "erm", "--seed", "3"
    )
    assert result["noise_rate"] == 0.0
    np.save(tmp_path / "labels.npy", truth[:1438])
    message = refused(capsys, "run", "--labels", tmp_path / "labels.npy")
    assert "expected 1797 labels, got 1438" in message


def test_a_cnn_trains_on_a_folder_of_images(capsys, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind, place in (("left", slice(0, 7)), ("right", slice(7, 14))):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for number in range(60):
            image = rng.integers(0, 60, (14, 14)).astype(np.uint8)
            image[:, place] += 150
            Image.fromarray(image).save(tmp_path / "images" / kind / f"{number:03d}.png")
    words = ["--dataset", f"folder:{tmp_path / 'images'}", "--noise", "pair:0.25", "--model", "cnn"]
    result = result_of(capsys, *words, *SHORT, "--method", "als-lc", "--out", tmp_path / "run")
    assert result["als-lc"]["label_accuracy_after"] > 0.95
    with (tmp_path / "run" / "als-lc" / "report.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert (tmp_path / "images" / row["file"]).is_file()


@pytest.mark.slow
def test_mnist_reads_its_files_and_learns(capsys, mnist_dir):
    words = ["--dataset", "mnist", "--data-dir", mnist_dir, "--noise", "symmetric:0.5"]
    result = result_of(capsys, *words, "--method", "erm", "--epochs", "1", "--batch-size", "512")
    assert result["samples"] == 60000
    assert result["noise_rate"] == 0.5
    assert result["erm"]["test_accuracy"] > 0.93


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "magic"], "method: expected one of 'erm', 'also'"),
        (["--method", "erm,erm"], "method: expected each once, got erm, erm"),
        (["--noise", "symetric:0.4"], "noise: expected one of none, symmetric"),
        (["--noise", "symmetric:40"], "expected a rate in [0, 1], got 40"),
        (["--noise", "file:nowhere.csv"], "labels: expected a file, got none at"),
        (["--noise", "none", "--labels", "y.csv"], "expected --noise or --labels, got both"),
        (["--labels", "nowhere.npy"], "labels: expected a file, got none at"),
        (["--dataset", "imagenet"], "dataset: expected one of digits"),
        (["--dataset", "npz:nowhere.npz"], "nowhere.npz"),
        (["--dataset", "folder:nowhere"], "nowhere"),
        (["--model", "vgg"], "model: expected one of auto, cnn, mlp, got 'vgg'"),
        (["--model", "cnn"], "model: cnn expects images"),
        (["--embedding", "nope"], "embedding: expected one of the layers features"),
        (["--epochs", "0"], "epochs: expected >= 1, got 0"),
        (["--epochs", "1"], "epochs: expected more than warmup=1 for als-lc, got 1"),
        (["--epochs", "6", "--warmup", "6"], "epochs: expected more than warmup=6"),
        (["--epochs", "many"], "--epochs"),
        (["--batch-size", "0"], "batch_size: expected >= 1, got 0"),
        (["--lr", "-1"], "lr: expected a finite number"),
        (["--seed", "-1"], "seed: expected >= 0, got -1"),
        (["--threads", "0"], "threads: expected >= 1, got 0"),
        (["--amp", "fp8"], "amp: expected one of 'off', 'bf16', 'f16', got 'fp8'"),
        (["--device", "tpu"], "device: expected auto, cpu or cuda"),
        (["--resume"], "resume: expected --out with the folder of a run, got none"),
        (
            ["--method", "gce", "--setting", "p=1"],
            "setting: expected NAME=VALUE with a name of gce",
        ),
        (["--method", "gce", "--setting", "q"], "setting: expected NAME=VALUE"),
        (["--method", "gce", "--setting", "q=2"], "q: expected a finite number in (0, 1]"),
        (["--setting", "q=1"], "of erm, als-lc (pretrain), got 'q=1'"),
        (["--clean-per-class", "100000"], "clean-per-class: expected at most"),
        (["--clean-per-class", "-1"], "clean-per-class: expected >= 0, got -1"),
        (["--nope"], "No such option: --nope"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    out = [] if "--resume" in words else ["--out", "run"]
    got = refused(capsys, "run", *words, *out)
    assert message in got
    assert list(tmp_path.iterdir()) == []


def test_missing_idx_files_are_named(capsys, tmp_path, monkeypatch):
    def no_network(*_arguments, **_named):
        raise OSError("no network")

    monkeypatch.setattr("socket.create_connection", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    message = refused(capsys, "run", "--dataset", "mnist", "--data-dir", tmp_path / "none")
    assert "train-images-idx3-ubyte" in message


def test_bad_commands(capsys):
    assert "Missing command" in refused(capsys)
    assert "No such command" in refused(capsys, "train")


def test_traceback_on_request(capsys):
    code, _, err = run(capsys, "--traceback", "run", "--method", "magic")
    assert code == 2
    assert "Traceback" in err


def test_a_failure_keeps_its_traceback(capsys, monkeypatch):
    def fail(*_arguments, **_named):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("als_ext.cli.run.load_run_data", fail)
    code, out, err = run(capsys, "run", "--json")
    assert (code, out) == (1, "")
    assert "Traceback" in err
    assert err.splitlines()[-1] == "als-ext: error: RuntimeError: out of memory"


def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    def interrupt(*_arguments, **_named):
        raise KeyboardInterrupt

    monkeypatch.setattr("als_ext.trainer.Trainer.fit", interrupt)
    code, out, err = run(capsys, "run", "--out", tmp_path / "run")
    assert (code, out) == (130, "")
    assert f"go on with: als-ext run --out {tmp_path / 'run'} --resume" in err
    assert "Traceback" not in err


def test_an_out_folder_that_holds_something_is_refused(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = refused(capsys, "run", "--out", tmp_path)
    assert message.startswith(f"out: expected a new or an empty folder, got {tmp_path}")
    assert "out: expected a new" in refused(capsys, "run", "--out", tmp_path / "notes.txt")
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


def test_resume_needs_a_run(capsys, tmp_path):
    message = refused(capsys, "run", "--out", tmp_path / "none", "--resume")
    assert message.startswith("resume: expected the folder of a run, got no")
    assert not (tmp_path / "none").exists()
    (tmp_path / "run.json").write_text("{")
    assert "is damaged" in refused(capsys, "run", "--out", tmp_path, "--resume")


def test_resume_takes_the_saved_settings_and_refuses_others(capsys, tmp_path):
    out = tmp_path / "run"
    words = [*SHORT, "--method", "als-lc", "--seed", "4"]
    first = result_of(capsys, *words, "--out", out)
    assert result_of(capsys, "--out", out, "--resume") == first
    assert result_of(capsys, *words, "--out", out, "--resume") == first
    before = files_of(out)
    message = refused(
        capsys, "run", "--out", out, "--resume", "--seed", "5", "--epochs", "9", "--method", "erm"
    )
    assert "epochs was 3, now 9; method was ['als-lc'], now ['erm']; seed was 4, now 5" in message
    assert files_of(out) == before


def test_a_run_is_resumed_from_any_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    np.savez("mine.npz", x=(rng.standard_normal((90, 4)) + 4 * y[:, None]).astype("f4"), y=y)
    np.save("store", np.roll(y, 1))
    Path("wrong.npy").symlink_to("store.npy")
    words = ["--dataset", "npz:mine.npz", "--noise", "file:wrong.npy", *SHORT, "--method", "erm"]
    first = result_of(capsys, *words, "--out", "run")
    assert (first["dataset"], first["noise"]) == ("npz:mine.npz", "file:wrong.npy")
    assert str(tmp_path / "mine.npz") in Path("run/run.json").read_text()
    assert result_of(capsys, *words, "--out", "run", "--resume") == first
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert result_of(capsys, "--out", "../run", "--resume") == first


def test_resume_refuses_a_damaged_checkpoint_and_one_of_another_shape(capsys, tmp_path):
    out = tmp_path / "run"
    result_of(capsys, *SHORT, "--method", "als-lc", "--out", out)
    checkpoint = out / "als-lc" / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    before = files_of(out)
    assert "truncated or damaged" in refused(capsys, "run", "--out", out, "--resume")
    assert files_of(out) == before
    checkpoint.write_bytes(whole)
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["head.weight"] = torch.zeros(11, 128)
    torch.save(state, checkpoint)
    before = files_of(out)
    message = refused(capsys, "run", "--out", out, "--resume")
    assert "expected 'head.weight' of shape [10, 128] (this model), got [11, 128]" in message
    assert files_of(out) == before


@pytest.fixture
def vectors(tmp_path):
    """Embeddings, wrong labels and scores in npy files, and the true labels."""
    rng = np.random.default_rng(0)
    true = np.arange(600) % 3
    points = 4 * np.eye(3)[true] + rng.standard_normal((600, 3))
    labels = np.where(rng.random(600) < 0.3, (true + rng.integers(1, 3, 600)) % 3, true)
    np.save(tmp_path / "e.npy", points.astype(np.float32))
    np.save(tmp_path / "y.npy", labels)
    np.save(tmp_path / "s.npy", (labels != true) + 0.1 * rng.random(600))
    return tmp_path, labels, true


def correct_words(folder, *more):
    files = ["--embeddings", folder / "e.npy", "--labels", folder / "y.npy"]
    return ["correct", *files, "--out", folder / "fixed.npz", *more]


def test_correct_mends_labels_of_embeddings(capsys, vectors):
    folder, labels, true = vectors
    code, out, err = run(capsys, *correct_words(folder, "--json", "--scores", folder / "s.npy"))
    assert (code, err) == (0, "")
    summary = json.loads(out, parse_constant=no_constants)
    saved = np.load(folder / "fixed.npz", allow_pickle=False)
    assert (saved["given_labels"] == labels).all()
    assert (saved["labels"] == true).mean() > 0.97
    assert (
        summary["changed"] == int((saved["labels"] != labels).sum()) == int(saved["changed"].sum())
    )
    assert summary["samples"] == 600
    for name in ("suspect", "share", "margin", "winner", "log_odds"):
        assert saved[name].shape == (600,)


def test_correct_takes_its_options(capsys, vectors):
    folder, labels, _ = vectors
    words = correct_words(folder, "--k", "15", "--metric", "l2", "--suspects", "0.1", "--scores")
    code, out, _ = run(capsys, *words, folder / "s.npy", "--voters", "all", "--min-share", "0.5")
    assert code == 0
    assert "k = 15" in out
    assert int((np.load(folder / "fixed.npz")["labels"] != labels).sum()) <= 60
    code, _, _ = run(
        capsys, *correct_words(folder, "--force", "--min-share", "1.0", "--threads", "1")
    )
    assert code == 0


def test_correct_overwrites_only_when_told(capsys, vectors):
    folder, _, _ = vectors
    (folder / "fixed.npz").write_bytes(b"mine")
    assert "expected a new file" in refused(capsys, *correct_words(folder))
    assert (folder / "fixed.npz").read_bytes() == b"mine"
    assert run(capsys, *correct_words(folder, "--force"))[0] == 0
    assert "labels" in np.load(folder / "fixed.npz")


def test_correct_that_fails_while_writing_leaves_the_old_file(capsys, vectors, monkeypatch):
    folder, _, _ = vectors
    (folder / "fixed.npz").write_bytes(b"mine")

    def full(*_arguments, **_named):
        raise OSError("no space left on device")

    monkeypatch.setattr("numpy.savez", full)
    assert run(capsys, *correct_words(folder, "--force"))[0] == 1
    assert (folder / "fixed.npz").read_bytes() == b"mine"
    assert sorted(f.name for f in folder.iterdir()) == ["e.npy", "fixed.npz", "s.npy", "y.npy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "fixed.npy"], "out: expected a name that ends in .npz"),
        (["--out", "nowhere/fixed.npz"], "out: expected an existing folder, got nowhere"),
        (["--embeddings", "none.npy"], "embeddings: expected a file, got none at none.npy"),
        (["--embeddings", "cut.npy"], "embeddings: expected a whole npy file, got cut.npy"),
        (["--embeddings", "text.npy"], "embeddings: expected a whole npy file, got text.npy"),
        (["--embeddings", "nan.npy"], "embeddings: expected finite"),
        (["--embeddings", "y.npy"], "embeddings: expected 2 dimensions, got shape [600]"),
        (["--labels", "short.npy"], "short.npy: expected 600 labels, got 599"),
        (["--labels", "none.npy"], "none.npy"),
        (["--num-classes", "2"], "expected a label in [0, 2), got 2"),
        (["--scores", "short.npy"], "scores: expected 600 entries"),
        (["--k", "0"], "k: expected >= 1, got 0"),
        (["--k", "600"], "k"),
        (["--k", "few"], "k: expected auto or a whole number, got 'few'"),
        (["--metric", "l1"], "metric: expected one of 'cosine', 'l2', got 'l1'"),
        (["--suspects", "some"], "suspects: expected auto, score or a share, got 'some'"),
        (["--suspects", "score"], "scores"),
        (["--voters", "me"], "voters: expected one of"),
        (["--min-share", "2"], "min_share: expected a finite number in [0, 1], got 2"),
        (["--threads", "-1"], "threads: expected >= 1, got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_correct_refuses_bad_input(capsys, vectors, monkeypatch, words, message):
    folder, labels, _ = vectors
    monkeypatch.chdir(folder)
    raw = (folder / "e.npy").read_bytes()
    (folder / "cut.npy").write_bytes(raw[: len(raw) // 2])
    (folder / "text.npy").write_text("1 2 3\n")
    np.save(folder / "nan.npy", np.full((600, 3), np.nan, dtype=np.float32))
    np.save(folder / "short.npy", labels[:599])
    before = files_of(folder)
    arguments = {"--embeddings": "e.npy", "--labels": "y.npy", "--out": "fixed.npz"}
    arguments.update({words[0]: words[1]})
    flat = [word for pair in arguments.items() for word in pair]
    assert message in refused(capsys, "correct", *flat)
    assert files_of(folder) == before


def test_info_says_what_was_built(capsys):
    code, out, _ = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["torch"] == torch.__version__
    assert set(facts["methods"]) >= {"erm", "also", "als-lc"}
    assert facts["gpus"] == [] or torch.cuda.is_available()
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert torch.__version__ in out


def test_help_and_completion(capsys, monkeypatch):
    code, out, _ = run(capsys, "run", "--help")
    assert code == 0
    assert "--data-dir" in out
    monkeypatch.setenv("_ALS_EXT_COMPLETE", "source_bash")
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    assert "complete" in capsys.readouterr().out


def test_settings_go_to_the_methods_that_have_them(capsys, tmp_path):
    words = ["--method", "erm,gce", "--setting", "q=0.5", "--epochs", "1"]
    result_of(capsys, *words, "--out", tmp_path / "run")
    configs = {
        name: load_checkpoint(tmp_path / "run" / name / "checkpoint.pt")["config"]["settings"]
        for name in ("erm", "gce")
    }
    assert configs == {"erm": {}, "gce": {"q": 0.5}}
