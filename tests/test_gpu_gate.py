"""The gate of everything that needs a GPU: rehearsed on the CPU; resuming, failing, timing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # the benchmarks are in the checkout, not in the installed package

from bench import gpu_cases, gpu_gate, gpu_parts, gpu_report, machine, peers, race  # noqa: E402
from bench.clock import CudaClock  # noqa: E402
from bench.gpu_parts import PYTHON, Part, Step  # noqa: E402

CPU = torch.device("cpu")
HERE = {"python": "3.12", "torch": "2.14"}


@pytest.fixture(autouse=True)
def quick_facts(monkeypatch):
    """No process that imports torch for every gate that is tested."""
    monkeypatch.setattr(gpu_gate, "facts", lambda: HERE)


def code(text):
    return (PYTHON, "-c", text)


def gate(folder, *steps, words=(), **named):
    """Rehearses parts that are given as steps: their exit status, and the state they leave."""
    parts = [Part(name, name, (step,)) for name, step in named.items()]
    parts += [Part(f"part {number}", "", (step,)) for number, step in enumerate(steps)]
    status = gpu_gate.main(["--dry-run", "--out", str(folder), *words], lambda *_: parts)
    (path,) = folder.glob("gpu-dry-run-*.json")
    return status, json.loads(path.read_text())


def note(folder, name):
    """A step that leaves a line a run."""
    return Step((), dry=code(f"open({str(folder / name)!r}, 'a').write('x')"))


# ---- the rehearsal -----------------------------------------------------------------------------

REHEARSED = ("build", "sanitizer-memcheck", "large", "bench-weighted_loss")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The script as a user calls it; all parts are rehearsed by .ci/run."""
    folder = tmp_path_factory.mktemp("gate")
    words = [word for name in REHEARSED for word in ("--part", name)]
    done = subprocess.run(
        [str(ROOT / "bench" / "gpu_gate.sh"), "--dry-run", "--out", str(folder), *words],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_the_rehearsal_runs_what_a_cpu_can(rehearsal):
    folder, said = rehearsal
    (path,) = folder.glob("gpu-dry-run-*[0-9a-f].json")
    state = json.loads(path.read_text())
    assert {name: part["status"] for name, part in state["parts"].items()} == dict.fromkeys(
        REHEARSED, "done"
    )
    assert "compute-sanitizer --tool memcheck" in said, "the command of the GPU is shown"
    assert "0 failed, 0 skipped" in next(folder.glob("*-large.log")).read_text()
    assert "build_ext --inplace   (only shown)" in said


def test_the_page_names_skipped_peers_and_that_nothing_was_measured(rehearsal):
    (page,) = rehearsal[0].glob("gpu-dry-run-*.md")
    text = page.read_text()
    assert "nothing on this page was measured on a GPU" in text
    assert "* Liger-Kernel: needs a CUDA device" in text
    assert "* QuACK: needs a CUDA device" in text
    assert "| torch eager | peer |" in text
    assert "| graphs | not run |" in text


def test_results_do_not_say_where_the_checkout_is(rehearsal):
    for path in rehearsal[0].iterdir():
        text = path.read_text()
        assert str(ROOT) not in text, path.name
        assert sys.executable not in text, path.name
        assert str(rehearsal[0]) not in text, path.name


def test_every_part_has_a_rehearsal_and_a_limit_below_the_gates():
    parts = gpu_parts.all_parts("out", "9.0a")
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert any(step.dry for step in part.steps), part.name
        for step in part.steps:
            assert "cuda" not in step.dry or "-m" in step.dry, step
            if "--max-minutes" in step.command:
                minutes = float(step.command[step.command.index("--max-minutes") + 1])
                assert 60 * minutes < gpu_gate.LIMIT_S <= 540
    assert {"TORCH_CUDA_ARCH_LIST": "9.0a", "ALS_CUDA": "1"} in [s.env for s in parts[0].steps]


def test_no_test_file_is_left_out_and_every_gpu_operation_is_raced():
    called = [
        Path(word).name
        for part in gpu_parts.all_parts("out", None)
        for step in part.steps
        if step.tests
        for word in step.command
        if word.startswith("tests/")
    ]
    assert sorted(called) == sorted(p.name for p in (ROOT / "tests").glob("test_*.py"))
    assert {r.op for r in race.all_races(False) if r.runs_on("cuda")} == set(gpu_parts.BENCHED)


# ---- resuming and failing ----------------------------------------------------------------------


def test_what_is_done_is_not_done_again(tmp_path):
    steps = {"a": note(tmp_path, "a"), "b": note(tmp_path, "b")}
    out = tmp_path / "out"
    assert gate(out, **steps, words=("--part", "b"))[0] == 0
    assert not (tmp_path / "a").exists()
    for _ in range(2):
        assert gate(out, **steps)[0] == 0
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "x"


def test_another_commit_or_environment_begins_anew(tmp_path, monkeypatch):
    out, step = tmp_path / "out", note(tmp_path, "a")
    gate(out, a=step)
    (state,) = out.glob("*.json")
    rows = state.with_name(f"{state.stem}-bench-knn.json")
    rows.write_text("{}")
    monkeypatch.setattr(gpu_gate, "facts", lambda: {**HERE, "torch": "another"})
    gate(out, a=step)
    assert (tmp_path / "a").read_text() == "xx"
    assert not rows.exists(), "rows of another environment are set aside"
    assert rows.with_suffix(".old").exists()
    monkeypatch.setattr(gpu_gate, "code_key", lambda: "another")
    parts = [Part("a", "", (step,))]
    assert gpu_gate.main(["--dry-run", "--out", str(out)], lambda *_: parts) == 0
    assert (tmp_path / "a").read_text() == "xxx"
    assert len(list(out.glob("gpu-dry-run-*.md"))) == 2


def test_a_failing_part_fails_the_gate_and_the_rest_still_runs(tmp_path, capsys):
    bad = Step((), dry=code("print('what went wrong'); raise SystemExit(4)"))
    steps = {"bad": bad, "good": note(tmp_path, "good")}
    out = tmp_path / "out"
    status, state = gate(out, **steps)
    assert status == 1
    assert state["parts"]["bad"]["status"] == "FAILED"
    assert state["parts"]["bad"]["why"] == "exit 4"
    assert state["parts"]["good"]["status"] == "done"
    assert "what went wrong" in capsys.readouterr().out
    (page,) = out.glob("*.md")
    assert "| bad | FAILED |" in page.read_text()
    steps["bad"] = note(tmp_path, "bad")
    assert gate(out, **steps)[0] == 0, "a part that failed is run again"
    assert (tmp_path / "good").read_text() == "x"


def test_a_part_at_its_time_limit_is_unfinished_and_its_children_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_gate, "LIMIT_S", 1.0)
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    sleeper = "import subprocess, sys, time; "
    sleeper += f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(30)"
    start = time.monotonic()
    status, state = gate(tmp_path / "out", slow=Step((), dry=code(sleeper)))
    assert time.monotonic() - start < 25
    assert status == 3
    assert state["parts"]["slow"]["why"] == "the time limit"
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_a_benchmark_that_leaves_rows_out_is_unfinished(tmp_path):
    status, state = gate(tmp_path / "out", rows=Step((), dry=code("raise SystemExit(3)")))
    assert status == 3
    assert state["parts"]["rows"]["status"] == "unfinished"


def run_step(step, tmp_path, dry=False):
    return gpu_gate.run_step(step, dry, tmp_path / "log", 60.0, {})


def test_a_missing_tool_is_not_a_pass(tmp_path):
    record = run_step(Step(("no-such-tool", "python")), tmp_path)
    assert record["status"] == "MISSING"
    assert record["why"] == "no-such-tool is not installed"
    missing = [Part("tool", "", (Step((), dry=("no-such-tool",)),))]
    words = ["--dry-run", "--out", str(tmp_path / "out")]
    assert gpu_gate.main(words, lambda *_: missing) == 1


def test_tests_that_are_all_skipped_fail_on_a_gpu(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text("import pytest\ndef test_a(): pytest.skip('no device')\n")
    words = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}")
    step = Step((*words, str(file)), dry=(*words, str(file)), tests=True)
    assert run_step(step, tmp_path)["why"] == "every test was skipped"
    assert run_step(step, tmp_path, dry=True)["status"] == "done"
    file.write_text("def test_a(): pass\n")
    record = run_step(step, tmp_path)
    assert record["status"] == "done"
    assert record["tests"] == {"ran": 1, "skipped": 0, "failed": 0}


def test_bad_input(tmp_path, capsys):
    words = ["--dry-run", "--out", str(tmp_path), "--part", "nothing"]
    assert gpu_gate.main(words) == 2
    assert "nothing" in capsys.readouterr().out
    assert gpu_gate.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert gpu_gate.main(["--list", "--out", str(tmp_path)]) == 0
    assert "sanitizer-racecheck" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_file_names_hold_the_gpu_and_the_code():
    assert gpu_gate.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    commit = machine.commit()["hash"]
    assert gpu_gate.code_key().startswith(commit[:8] if commit else "tree-")


# ---- cases -------------------------------------------------------------------------------------


def test_a_wrong_replay_is_noticed(monkeypatch, capsys):
    """Graphs that replay the inputs of the capture must not pass."""

    def stale(job, device):
        place = [t.clone() for t in job.run()]
        return (lambda: None), place

    few = gpu_cases.jobs(CPU)[:1]
    monkeypatch.setattr(gpu_cases, "jobs", lambda device: few)
    assert gpu_cases.main(["graphs", "--device", "cpu"]) == 0
    monkeypatch.setattr(gpu_cases, "captured", stale)
    assert gpu_cases.main(["graphs", "--device", "cpu"]) == 1
    assert "FAILED: AssertionError" in capsys.readouterr().out


def test_a_case_without_room_is_named(monkeypatch, capsys):
    def no_room(device, gib):
        raise gpu_cases.Skipped(f"needs {gib} GiB")

    monkeypatch.setattr(gpu_cases, "_room", no_room)
    assert gpu_cases.main(["large", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "large: knn_vote: SKIPPED: needs 40 GiB" in said
    assert "8 skipped" in said


def test_jobs_call_every_operation_of_the_gpu():
    names = " ".join(job.name for job in gpu_cases.jobs(CPU))
    assert all(op in names for op in ("losses", "knn,", "knn_vote", "pi_step", "also_step"))


# ---- timing ------------------------------------------------------------------------------------


class FakeCuda:
    """Notes what a clock does; its device takes 2 ms a call."""

    def __init__(self):
        self.log = []

    def Event(self, enable_timing):
        assert enable_timing
        return FakeEvent(self.log)

    def synchronize(self):
        self.log.append("synchronize")

    def _sleep(self, cycles):
        self.log.append(("sleep", cycles))


class FakeEvent:
    def __init__(self, log):
        self.log = log

    def record(self):
        self.log.append("record")

    def synchronize(self):
        self.log.append("wait")

    def elapsed_time(self, end):
        return 2.0


def test_device_time_is_of_events_with_a_cold_cache_and_no_gaps_of_the_host():
    cuda = FakeCuda()
    clock = CudaClock(cuda, lambda: cuda.log.append("flush"))

    def call():
        cuda.log.append("call")
        time.sleep(0.02)

    assert clock.device_seconds(call) == pytest.approx(2e-3)
    names = [entry[0] if isinstance(entry, tuple) else entry for entry in cuda.log]
    assert names == ["flush", "sleep", "record", "call", "record", "wait"]
    cuda.log.clear()
    clock.device_seconds(call)
    assert cuda.log[1][1] >= 0.02 * 1.5e9, "the device is busy while the host enqueues"


def test_wall_time_starts_when_the_device_is_idle():
    cuda = FakeCuda()
    clock = CudaClock(cuda, lambda: cuda.log.append("flush"))
    seconds = clock.wall_seconds(lambda: (cuda.log.append("call"), time.sleep(0.01)))
    assert cuda.log == ["flush", "synchronize", "call", "synchronize"]
    assert seconds >= 0.01


def two():
    made = race.Lineup("error", limit=1e-6)
    made.ours(lambda: None, lambda: 0.0)
    made.peer("theirs", lambda: time.sleep(0.05))
    return made


def test_a_row_of_a_gpu_has_device_and_wall_times(monkeypatch):
    """The ratio is that of device times; the fake gives all calls the same."""
    cuda = FakeCuda()
    monkeypatch.setattr(race, "CudaClock", lambda: CudaClock(cuda, lambda: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    row = race.run(race.Race("op", "case", lambda _: two()), device="cuda", quick=True)
    ours, theirs = row["contenders"]
    assert theirs["ratio"] == 1.0
    assert theirs["median_s"] == pytest.approx(2e-3)
    assert theirs["wall"]["median_s"] >= 0.05 > ours["wall"]["median_s"]
    text = "\n".join(gpu_report.race({"name": "op/case", **row}))
    assert "| theirs | peer | 2000 (2000 – 2000) | 1.000 |" in text
    assert "Gate passed" in text


def test_a_row_of_the_cpu_has_no_device_times():
    row = race.run(race.Race("op", "case", lambda _: two()), quick=True)
    assert all("wall" not in contender for contender in row["contenders"])


# ---- peers -------------------------------------------------------------------------------------


def test_a_peer_whose_import_or_error_raises_is_named():
    def broken():
        raise ImportError("No module named 'quack'")

    made = two()
    assert peers.load(made, "QuACK", broken, torch.device("cuda"), False) is None
    assert made.skipped == {"QuACK": "ImportError: No module named 'quack'"}
    assert peers.load(made, "Liger-Kernel", dict, torch.device("cuda"), False) == {}
    made.peer("wrong", lambda: None, error=broken)
    row = race.run(race.Race("op", "case", lambda _: made), quick=True)
    assert row["skipped"]["wrong"] == "ImportError: No module named 'quack'"


def test_peers_race_on_logits_of_their_own(monkeypatch):
    """A peer that overwrites its logits, as Liger-Kernel does, must not reach those of others."""
    from bench import bench_sample_loss as bench

    def inplace(logits, target):
        losses = torch.nn.functional.cross_entropy(logits.clone(), target, reduction="none")
        with torch.no_grad():
            logits.zero_()
        return losses

    monkeypatch.setattr(peers, "load", lambda lineup, name, *_: inplace)
    (case,) = [r for r in bench.races(True) if r.case == "cross_entropy forward, 64 × 10, float32"]
    row = race.run(case, quick=True)
    assert row["gate"]["passed"]
    assert {peers.LIGER, peers.QUACK} <= {c["name"] for c in row["contenders"]}
    errors = {c["name"]: c["error"] for c in row["contenders"]}
    assert errors["torch eager"] < 1e-5


def test_a_table_of_the_cpu_does_not_name_a_gpus_peers():
    made = two()
    assert peers.load(made, "FlashLib", dict, CPU, False) is None
    assert made.skipped == {}
