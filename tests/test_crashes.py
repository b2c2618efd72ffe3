"""kill -9 at every stage, a full disk, a read-only folder, Ctrl-C: nothing half, nothing lost."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from als_ext.checkpoint import load_checkpoint
from als_ext.cli import main
from als_ext.compare.store import read_grid, read_results
from als_ext.metrics import MetricsWriter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks commands and looks into /proc"),
]
METHODS = ("erm", "als-lc")
HALF = "while it is written"  # a kill that leaves half of the temporary file


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """60 points in 3 classes, as a data set and as the files of ``correct``."""
    folder = tmp_path_factory.mktemp("source")
    g = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = (4 * np.eye(3)[y] + g.normal(size=(60, 3))).astype(np.float32)
    wrong = np.where(g.random(60) < 0.2, (y + 1) % 3, y)
    np.savez(folder / "data.npz", x=x, y=wrong)
    np.save(folder / "e.npy", x)
    np.save(folder / "y.npy", wrong)
    return folder


def words_of(command, source, out):
    train = ["--dataset", f"npz:{source / 'data.npz'}", "--method", ",".join(METHODS)]
    train += ["--epochs", "2", "--warmup", "1", "--period", "1", "--batch-size", "16"]
    train += ["--threads", "1", "--quiet", "--json", "--out", str(out)]
    if command == "run":
        return ["run", *train, "--noise", "none", "--checkpoint-steps", "2"]
    if command == "compare":
        return ["compare", *train, "--noise", "none"]
    files = ["--embeddings", source / "e.npy", "--labels", source / "y.npy", "--k", "5"]
    return ["correct", *map(str, files), "--json", "--out", str(out / "fixed.npz")]


class Stages:
    """Counts the moments in which a file changes, and acts at one of them.

    Args:
        act: called at that moment.
        at: its number, from 0; None only counts.
    """

    def __init__(self, act, at=None):
        self.act, self.at, self.names = act, at, []

    def reach(self, name):
        self.names.append(name)
        if len(self.names) - 1 == self.at:
            self.act()

    @contextlib.contextmanager
    def watched(self):
        fsync, replace, append = os.fsync, os.replace, MetricsWriter.append

        def write(descriptor):
            if os.path.isfile(f"/proc/self/fd/{descriptor}"):
                size = os.fstat(descriptor).st_size
                if len(self.names) == self.at:
                    os.ftruncate(descriptor, size // 2)
                self.reach(HALF)
            fsync(descriptor)

        def rename(old, new):
            self.reach(f"before {Path(new).name} is there")
            replace(old, new)
            self.reach(f"after {Path(new).name} is there")

        def add(writer, record):
            self.reach("before a line of metrics")
            append(writer, record)
            self.reach("between the metrics and the checkpoint")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", write)
            patch.setattr(os, "replace", rename)
            patch.setattr(MetricsWriter, "append", add)
            patch.setattr("als_ext.cli.compare.draw", lambda *_arguments: [])
            yield self


def here(words):
    """Exit code, stdout, stderr of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def forked(words, stages=None, limit=None):
    """Exit code (negative: the signal) and stderr of a command in a process of its own."""
    errors, theirs = os.pipe()  # the limit is one of files
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(theirs, 2)
            sys.stderr = os.fdopen(2, "w")
            sys.stdout = io.StringIO()
            if limit is not None:
                import resource

                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with (stages or Stages(None)).watched():
                code = main(words)
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(errors) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def outcome(folder):
    """All that a finished command has left, by file, without the clock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name in {".lock", "table.md", "table.csv", "metrics.csv"}:
            continue
        if path.suffix == ".pt":
            content = load_checkpoint(path)
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                content = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        elif path.suffix == ".jsonl":
            content = [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            content = json.loads(path.read_text())
        else:
            content = path.read_bytes()
        found[name] = timeless(content)
    return found


def timeless(content):
    """Tensors as their bytes, and no seconds."""
    if isinstance(content, torch.Tensor):
        return str(content.dtype), list(content.shape), content.contiguous().numpy().tobytes()
    if isinstance(content, dict):
        return {k: timeless(v) for k, v in content.items() if k not in {"seconds", "settings"}}
    if isinstance(content, (list, tuple)):
        return [timeless(value) for value in content]
    return content


def all_whole(out):
    """Each file that has its name can be read to its end."""
    for path in out.rglob("checkpoint.pt"):
        load_checkpoint(path)
    for path in [*out.rglob("*.json"), *out.rglob("metrics.jsonl")]:
        for line in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        ):
            json.loads(line)
    for path in out.rglob("*.npz"):
        with np.load(path) as arrays:
            assert all(arrays[name].dtype for name in arrays.files)
    if (out / "grid.json").exists():
        read_grid(out)
        read_results(out)


def go_on(command, words, out):
    """The words that go on after a crash, as the manual has them."""
    if command == "run" and (out / "run.json").exists():
        return [*words, "--resume"]
    if command == "correct":
        return [*words, "--force"]
    return words


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    """What each command leaves, and the stages that it passes."""
    found = {}
    for command in ("run", "compare", "correct"):
        out = tmp_path_factory.mktemp(command)
        with Stages(None).watched() as stages:
            code, _, err = here(words_of(command, source, out))
        assert code == 0, err
        found[command] = (outcome(out), stages.names)
    return found


@pytest.mark.parametrize("command", ["run", "compare", "correct"])
def test_kill_9_at_every_stage_then_going_on_gives_the_bits_of_an_unbroken_run(
    source, unbroken, tmp_path, command
):
    wanted, names = unbroken[command]
    assert HALF in names
    if command != "correct":
        assert "between the metrics and the checkpoint" in names
    for at, name in enumerate(names):
        out = tmp_path / str(at)
        out.mkdir()
        words = words_of(command, source, out)
        kill = Stages(lambda: os.kill(os.getpid(), signal.SIGKILL), at)
        assert forked(words, kill)[0] == -signal.SIGKILL, name
        all_whole(out)
        with Stages(None).watched():
            code, _, err = here(go_on(command, words, out))
        assert code == 0, (at, name, err)
        assert outcome_without_left_overs(command, out) == wanted, (at, name)
        shutil.rmtree(out)
    print(f"{command}: {len(names)} stages")


def outcome_without_left_overs(command, out):
    """But for what a kill may leave (docs/reliability.md).

    ``correct`` a temporary file, since its folder is not its own; ``compare`` the checkpoint of a
    cell that was done, since it cannot know whether that was to be kept.
    """
    left = {"correct": ".fixed.npz.*.tmp", "compare": "cells/*/checkpoint.pt"}
    for path in out.glob(left[command]) if command in left else ():
        path.unlink()
    return outcome(out)


@pytest.mark.parametrize("limit", [0, 1, 100, 1000, 5000, 20_000])
@pytest.mark.parametrize("command", ["run", "compare", "correct"])
def test_a_full_disk_is_one_line_with_the_path_and_costs_nothing_that_was_done(
    source, unbroken, tmp_path, command, limit
):
    """The kernel refuses what goes beyond the limit of a file, as it does on a full disk."""
    words = words_of(command, source, tmp_path)
    code, err = forked(words, limit=limit)
    if code == 0:
        assert limit >= 5000, "the limit is no limit"
    else:
        assert code == 1, err
        said = [line for line in err.splitlines() if line.startswith("als-ext: ")]
        assert "Traceback" not in err
        assert len(said) == 1, err
        if "cells failed" not in err:
            assert "File too large" in err
            assert str(tmp_path) in err
    all_whole_but_cut_metrics(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    with Stages(None).watched():
        code, _, err = here(go_on(command, words, tmp_path))
    assert code == 0, err
    assert outcome(tmp_path) == unbroken[command][0]


def all_whole_but_cut_metrics(out):
    """metrics.jsonl is appended to: its last line may be cut, until the run goes on."""
    for path in out.rglob("metrics.jsonl"):
        text = path.read_text()
        path.write_text(text[: text.rfind("\n") + 1])
    all_whole(out)


@pytest.fixture
def locked_folder():
    """A folder that this process may read and not write, as another user if it is root's."""
    folder = Path(tempfile.mkdtemp())
    os.chmod(folder, 0o755)
    user = os.geteuid()
    yield folder
    os.seteuid(user)
    os.chmod(folder, 0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("command", ["run", "compare", "correct"])
@pytest.mark.usefixtures("unbroken")  # all modules are imported: that user may not read them
def test_a_read_only_folder_is_one_line_with_the_path(source, locked_folder, command):
    shutil.copytree(source, locked_folder / "source")
    (locked_folder / "empty").mkdir()
    for path in (locked_folder, *locked_folder.iterdir()):
        os.chmod(path, 0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    for out in [locked_folder / "empty"] + [locked_folder / "new"] * (command != "correct"):
        code, _, err = here(words_of(command, locked_folder / "source", out))
        assert code == 2
        assert err.count("\n") == 1, err
        assert "Permission denied" in err
        assert str(out) in err
    assert sorted(p.name for p in locked_folder.iterdir()) == ["empty", "source"]
    assert not list((locked_folder / "empty").iterdir())


# ---- Ctrl-C ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "compare"])
def test_ctrl_c_leaves_a_whole_checkpoint_and_no_traceback(source, unbroken, tmp_path, command):
    """A real signal to a real process, at a moment after the first epoch."""
    words = words_of(command, source, tmp_path)
    words[words.index("--epochs") + 1] = "4000"
    process = subprocess.Popen(
        [sys.executable, "-m", "als_ext.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background, as these tests may be, is deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 300
    while not any(f.read_text().count("\n") > 1 for f in tmp_path.rglob("metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("als-ext: ")]
    assert re.fullmatch(rf"als-ext: go on with: als-ext {command} --out .*", said[0]), err
    assert said[1:] == ["als-ext: error: interrupted"]
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    assert 0 < len(load_checkpoint(checkpoint)["history"]) < 4000
    assert not list(tmp_path.rglob("*.tmp"))
