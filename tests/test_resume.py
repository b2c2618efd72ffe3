"""Checkpoints and resuming: the same bits as an unbroken run, whatever killed it and whenever."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from als_ext import TrainConfig, Trainer
from als_ext.checkpoint import load_checkpoint, save_checkpoint
from als_ext.correction import CorrectionConfig
from als_ext.methods import METHODS
from als_ext.models import MLP, SmallCNN

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3
N = 150


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    true = torch.arange(N) % CLASSES
    x = 4 * nn.functional.one_hot(true, CLASSES) + torch.randn(N, CLASSES, generator=g)
    given = torch.where(torch.rand(N, generator=g) < 0.3, (true + 1) % CLASSES, true)
    return x, given, true


def trainer(out, method="als-lc", width=16, **settings):
    torch.manual_seed(0)
    model = MLP((CLASSES,), CLASSES, hidden=(32, width))
    model.features.append(nn.Dropout(0.2))  # draws from the global generator
    base = {"epochs": 5, "batch_size": 16, "warmup": 2, "period": 1, "device": "cpu"}
    config = TrainConfig(method=method, **{**base, "checkpoint_steps": 4, **settings})
    return Trainer(model, config, num_classes=CLASSES, out=out)


class Killed(BaseException):
    pass


def fit(run, source=None, labels=None, **arguments):
    x, given, true = data()
    return run.fit(
        x if source is None else source,
        given if labels is None else labels,
        **{
            "test": (x, true),
            "true_labels": true,
            "clean": (x[:30], true[:30], torch.arange(30)),
            **arguments,
        },
    )


def killed_at(run, step, **arguments):
    """Train until a step, which raises before it does anything."""
    method = METHODS[run.config.method]
    original, seen = method.step, []

    def breaking(self, *batch):
        seen.append(1)
        if len(seen) > step:
            raise Killed
        return original(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "step", breaking)
        with pytest.raises(Killed):
            fit(run, **arguments)


def without_time(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def assert_same_run(folder, other_folder):
    """Every tensor and number of the final checkpoints, but for the clock."""
    states = [load_checkpoint(f / "checkpoint.pt") for f in (folder, other_folder)]
    for state in states:
        del state["seconds"]
        state["history"] = without_time(state["history"])
    assert_equal(*states)


def assert_equal(a, b, at=""):
    assert type(a) is type(b), at
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, at
        assert torch.equal(a, b), at
    elif isinstance(a, dict):
        assert list(a) == list(b), at
        for key in a:
            assert_equal(a[key], b[key], f"{at}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{at}/{i}")
    else:
        assert a == b, at


# 10 steps an epoch: inside the first epoch before and after a checkpoint, at an epoch's end, right
# after a correction, in the last epoch.
@pytest.mark.parametrize("step", [1, 7, 20, 23, 38, 49])
def test_a_resumed_correction_run_is_the_unbroken_one(tmp_path, step):
    fit(trainer(tmp_path / "whole"))
    killed_at(trainer(tmp_path / "broken"), step)
    fit(trainer(tmp_path / "broken"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    for name in ("metrics.jsonl", "metrics.csv"):
        whole, broken = ((tmp_path / f / name).read_text() for f in ("whole", "broken"))
        assert len(whole.splitlines()) == len(broken.splitlines())
    lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "erm"},
        {"method": "also"},
        {"method": "also", "amp": "f16"},
        {"method": "also", "also": {"mode": "descent-ascent"}},
        {"method": "als-lc", "also": {"direction": "min"}},
        {"method": "also-min"},
        {"method": "co-teaching", "settings": {"noise_rate": 0.3}},
        {"method": "confident-learning", "epochs": 1, "settings": {"folds": 2}},  # 3 trainings
        {"method": "deep-knn", "epochs": 2},  # 2 trainings, both broken
        {"method": "deep-knn", "epochs": 2, "amp": "f16"},
        {"method": "elr"},
        {"method": "erm-early-stop"},
        {"method": "knn-relabel"},
        {"method": "l2rw", "settings": {"clean_batch": 10}},
        {"method": "mentornet-dd"},
        {"method": "mentornet-pd"},
        {"method": "random-relabel"},
    ],
    ids=str,
)
def test_every_method_resumes_exactly(tmp_path, settings):
    fit(trainer(tmp_path / "whole", **settings))
    killed_at(trainer(tmp_path / "broken", **settings), 17)
    killed_at(trainer(tmp_path / "broken", **settings), 11, resume=True)  # and once more
    fit(trainer(tmp_path / "broken", **settings), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


# 10 steps an epoch: without labels, right after the first correction and further on through the
# channel, right after the second, on views
@pytest.mark.parametrize("step", [7, 20, 27, 40, 53])
def test_images_resume_exactly(tmp_path, step):
    def run(name):
        torch.manual_seed(0)
        model = SmallCNN((1, 12, 12), CLASSES)
        settings = {"pretrain": 2}
        config = TrainConfig(
            epochs=4,
            warmup=2,
            period=2,
            batch_size=16,
            device="cpu",
            checkpoint_steps=4,
            settings=settings,
        )
        return Trainer(model, config, num_classes=CLASSES, out=tmp_path / name)

    images = torch.randn(N, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    test = (images, data()[2])
    fit(run("whole"), images, test=test)
    killed_at(run("broken"), step, source=images, test=test)
    fit(run("broken"), images, test=test, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


class Augmented(Dataset):
    """Random items from all three global generators."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, at):
        noise = 0.1 * np.random.standard_normal() + 0.1 * random.random()  # noqa: NPY002
        return self.x[at] + noise + 0.1 * torch.randn(())


def test_random_augmentation_resumes_exactly(tmp_path):
    source = {"source": Augmented(data()[0])}
    fit(trainer(tmp_path / "whole", epochs=3), **source)
    killed_at(trainer(tmp_path / "broken", epochs=3), 17, **source)
    fit(trainer(tmp_path / "broken", epochs=3), resume=True, **source)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_of_other_stages_is_refused(tmp_path):
    killed_at(trainer(tmp_path / "run"), 17)
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    saved["data"]["epochs in all"] = 4
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", saved)
    with pytest.raises(ValueError, match=r"resume: .*epochs in all was 4, now 5"):
        fit(trainer(tmp_path / "run"), resume=True)


def test_a_prior_is_part_of_the_settings(tmp_path):
    prior = torch.arange(1.0, N + 1)
    fit(trainer(tmp_path / "whole", also={"prior": prior}))
    killed_at(trainer(tmp_path / "broken", also={"prior": prior}), 17)
    with pytest.raises(ValueError, match=r"resume: .*also\.prior was a tensor .150., now a tensor"):
        fit(trainer(tmp_path / "broken", also={"prior": prior + 1}), resume=True)
    with pytest.raises(ValueError, match=r"resume: .*also\.prior was a tensor .*, now None"):
        fit(trainer(tmp_path / "broken"), resume=True)
    fit(trainer(tmp_path / "broken", also={"prior": prior.clone()}), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_finished_run_resumes_to_its_result_without_a_step(tmp_path):
    first = fit(trainer(tmp_path / "run"))
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    run = trainer(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS["als-lc"], "step", None)
        again = fit(run, resume=True)
    assert again.history == first.history
    assert again.test_accuracy == first.test_accuracy
    assert torch.equal(again.labels, first.labels)
    assert_equal(again.report, first.report)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    x, _, true = data()
    with torch.no_grad():
        accuracy = (run.model(x).argmax(1) == true).double().mean()
    assert float(accuracy) == first.test_accuracy  # the model holds theta, in eval mode


def test_time_passes_on_across_a_resume(tmp_path):
    killed_at(trainer(tmp_path / "run"), 30)
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", {**saved, "seconds": 1000.0})
    result = fit(trainer(tmp_path / "run"), resume=True)
    assert 1000 < result.seconds < 1100


def test_checkpoints_by_the_clock(tmp_path):
    run = trainer(tmp_path / "run", checkpoint_steps=None, checkpoint_seconds=1e-9)
    killed_at(run, 4)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["batches"]["position"] == 4


def test_an_out_folder_with_a_run_is_not_touched(tmp_path):
    fit(trainer(tmp_path / "run", epochs=3))
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    with pytest.raises(FileExistsError, match=r"out: expected a folder without a run, got .*run"):
        fit(trainer(tmp_path / "run", epochs=3))
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 6}, "epochs was 5, now 6"),
        ({"lr": 0.1, "seed": 3}, r"lr was 0.001, now 0.1; seed was 0, now 3"),
        ({"method": "erm"}, "method was 'als-lc', now 'erm'"),
        ({"correction": CorrectionConfig(rounds=1)}, "correction.rounds was 6, now 1"),
        ({"also": {"pi_lr": 0.1}}, "also.pi_lr was None, now 0.1"),
        ({"width": 17}, r"'features.3.weight' of shape \[17, 32\] \(this model\), got \[16, 32\]"),
    ],
)
def test_another_run_is_refused_and_left_alone(tmp_path, change, message):
    killed_at(trainer(tmp_path / "run"), 20)
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=message):
        fit(trainer(tmp_path / "run", **change), resume=True)
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before


def test_other_labels_are_refused(tmp_path):
    killed_at(trainer(tmp_path / "run"), 20)
    with pytest.raises(ValueError, match="labels sha256 was"):
        fit(trainer(tmp_path / "run"), labels=data(seed=1)[1], resume=True)


def test_what_changes_no_result_may_change(tmp_path):
    killed_at(trainer(tmp_path / "run"), 20)
    run = trainer(tmp_path / "run", checkpoint_steps=7, checkpoint_seconds=5.0)
    assert len(fit(run, resume=True).history) == 5


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        del raw[len(raw) // 2 :]
    elif how == "empty":
        raw.clear()
    elif how == "one byte":
        at = raw.find(b"data/0")
        raw[raw.find(b"FB", at) + 70] ^= 1  # inside the first tensor's storage
    elif how == "text":
        raw[:] = b"not a checkpoint at all\n" * 9
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["truncated", "empty", "one byte", "text"])
def test_a_damaged_checkpoint_is_named(tmp_path, how):
    killed_at(trainer(tmp_path / "run"), 20)
    path = tmp_path / "run" / "checkpoint.pt"
    damage(path, how)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint: .*(truncated or damaged|is damaged).*"):
        fit(trainer(tmp_path / "run"), resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": torch.zeros(3)}, "expected a checkpoint of als_ext, got another file"),
        ([1, 2], "expected a checkpoint of als_ext"),
        ({"format": "als_ext checkpoint", "version": 999}, "expected version 1, got 999"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_a_file_with_code_in_it_is_refused(tmp_path):
    torch.save({"format": "als_ext checkpoint", "version": 1, "x": Killed}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none at .*nothing\.pt"):
        load_checkpoint(tmp_path / "nothing.pt")


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def fail(*_arguments, **_named):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]


WRITER = """
import sys, torch
from als_ext.checkpoint import save_checkpoint
step = 0
while True:
    step += 1
    save_checkpoint(sys.argv[1], {"step": step, "tensor": torch.full((1_000_000,), step)})
"""


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


def test_kill_9_while_writing_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    pause = random.Random(0)
    for _ in range(3):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        wait_for(path.exists, process)
        time.sleep(pause.uniform(0.0, 0.1))  # a write takes some 10 ms: the kill falls into one
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        state = load_checkpoint(path)
        assert (state["tensor"] == state["step"]).all()


def command(out, *more):
    words = ["run", "--method", "erm,als-lc", "--epochs", "25", "--period", "5"]
    words += ["--threads", "1", "--json", "--out", str(out), "--checkpoint-steps", "20", *more]
    return [sys.executable, "-m", "als_ext.cli", *words]


def figures(text):
    result = json.loads(text)
    for method in ("erm", "als-lc"):
        del result[method]["seconds"]
    return result


def kill_after(out, method, epoch, pause, *more):
    """Start the command, kill it a pause after the method's epoch, check that it was at work."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command(out, *more), **pipes)
    metrics = out / method / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= epoch, process)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    output, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert output == b""
    assert epoch - 1 <= len(load_checkpoint(out / method / "checkpoint.pt")["history"]) < 25


def test_kill_9_at_random_moments_then_resume_gives_the_unbroken_result(tmp_path):
    """The promise of the command line, with real processes and real kills."""
    whole = subprocess.run(command(tmp_path / "a"), capture_output=True, text=True, check=True)
    moments = random.Random(0)
    for method, more in (("erm", []), ("als-lc", ["--resume"])):  # a kill inside each of the two
        kill_after(tmp_path / "b", method, moments.randint(2, 12), moments.uniform(0, 0.1), *more)
    again = subprocess.run(
        command(tmp_path / "b", "--resume"), capture_output=True, text=True, check=True
    )
    assert figures(again.stdout) == figures(whole.stdout)
    for method in ("erm", "als-lc"):
        assert_same_run(tmp_path / "a" / method, tmp_path / "b" / method)
    report = os.path.join("als-lc", "report.csv")
    assert (tmp_path / "a" / report).read_bytes() == (tmp_path / "b" / report).read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))
