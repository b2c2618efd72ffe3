"""The gate of everything that needs a GPU: rehearsed on the CPU; resuming, failing, building."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu_build, gpu_cases, gpu_gate, gpu_parts, machine, race
from bench.gpu_parts import PYTHON, ROOT, Part, Step

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

REHEARSED = ("build", "sanitizer-memcheck-rest", "large", "targets-pi", "bench-also")


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
        timeout=900,
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
    assert "also_step" in next(folder.glob("*-memcheck-rest.log")).read_text()
    (rows,) = folder.glob("*-bench.json")
    assert {row["op"] for row in json.loads(rows.read_text())["rows"]} == {
        *("pi_step", "also_step"),
    }, "all parts write to one file"
    assert "python -m bench.gpu_build\n    dry run:" in said, "a CPU cannot fit"


def test_the_page_names_skipped_peers_and_that_nothing_was_measured(rehearsal):
    (page,) = rehearsal[0].glob("gpu-dry-run-*.md")
    text = page.read_text()
    assert "--max-minutes {" not in text
    assert "nothing on this page was measured on a GPU" in text
    assert "* reference, torch.compile: a quick run compiles nothing" in text
    assert "| foreach composite | peer |" in text
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
        assert part.seconds < gpu_gate.LIMIT_S <= 540
        for step in part.steps:
            assert "cuda" not in step.dry or "-m" in step.dry, step
            if "bench" in step.command:
                assert step.stops_in_time, part.name
    env = {"TORCH_CUDA_ARCH_LIST": "9.0a", "ALS_CUDA": "1"}
    assert env in [step.env for step in parts[0].steps]


def test_what_says_most_comes_first():
    names = [part.name for part in gpu_parts.all_parts("out", None)]
    order = ["build", "tests-rest", "sanitizer-memcheck-knn", "targets-knn", "targets-also"]
    assert [name for name in names if name in order] == order
    assert names.index("targets-also") < names.index("graphs") < names.index("bench-knn")


def test_no_test_of_a_gpu_is_left_out_and_every_gpu_operation_is_raced():
    words = [sys.executable, "-m", "pytest", "-m", "cuda", "--collect-only", "-q", "tests"]
    words += ["-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("tests/")]
    collected = {line.split("::")[0] for line in lines}
    called = [f"tests/{name}" for group in gpu_parts.TESTS.values() for name in group]
    assert sorted(called) == sorted(collected), done.stdout[-2000:]
    raced = [op for ops in gpu_parts.RACED.values() for op in ops]
    assert {r.op for r in race.all_races(False) if r.runs_on("cuda")} == set(raced)
    assert len(raced) == len(set(raced))


def test_every_case_is_in_a_group():
    named = {name for group in gpu_parts.CASES.values() for name in group}
    assert {job.name.split(",")[0] for job in gpu_cases.jobs(CPU)} == named


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
    rows = state.with_name(f"{state.stem}-bench.json")
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


def part(folder, name, seconds, step=None):
    return Part(name, name, (step or note(folder, name),), seconds)


def run_gate(folder, parts, *words):
    status = gpu_gate.main(["--dry-run", "--out", str(folder / "out"), *words], lambda *_: parts)
    (path,) = (folder / "out").glob("gpu-dry-run-*.json")
    return status, {name: p["status"] for name, p in json.loads(path.read_text())["parts"].items()}


def test_parts_run_while_they_fit_and_the_next_call_goes_on(tmp_path, capsys):
    parts = [part(tmp_path, "a", 10), part(tmp_path, "long", 500), part(tmp_path, "b", 20)]
    status, done = run_gate(tmp_path, parts, "--minutes", "2")
    assert status == 3
    assert done == {"a": "done", "b": "done"}, "what fits behind a part that does not is run"
    assert "long: left for the next call" in capsys.readouterr().out
    assert run_gate(tmp_path, parts) == (0, {"a": "done", "b": "done", "long": "done"})
    assert (tmp_path / "a").read_text() == "x"


def test_a_part_is_cut_off_at_the_minutes_and_then_given_more(tmp_path):
    sleeper = Step((), dry=code("import time; time.sleep(30)"))
    start = time.monotonic()
    status, done = run_gate(tmp_path, [part(tmp_path, "slow", 1, sleeper)], "--minutes", "0.05")
    assert time.monotonic() - start < 20
    assert (status, done) == (3, {"slow": "unfinished"})
    slow = part(tmp_path, "slow", 60)
    assert gpu_gate.needed_s(slow, None) == 60
    assert gpu_gate.needed_s(slow, {"status": "unfinished", "seconds": 100.0}) == 150
    assert gpu_gate.needed_s(slow, {"status": "unfinished", "seconds": 500.0}) == gpu_gate.LIMIT_S
    assert gpu_gate.needed_s(slow, {"status": "FAILED", "seconds": 100.0}) == 60


def test_without_libraries_nothing_else_is_run(tmp_path):
    bad = part(tmp_path, "build", 1, Step((), dry=code("raise SystemExit(1)")))
    status, done = run_gate(tmp_path, [bad, part(tmp_path, "a", 1)])
    assert (status, done) == (1, {"build": "FAILED"})
    good = part(tmp_path, "build", 1)
    assert run_gate(tmp_path, [good, part(tmp_path, "a", 1)])[0] == 0


def test_what_failed_is_run_again_when_the_others_are_done(tmp_path):
    order = tmp_path / "order"

    def logs(name, last=""):
        line = f"open({str(order)!r}, 'a').write({name!r}); {last}"
        return part(tmp_path, name, 1, Step((), dry=code(line)))

    assert run_gate(tmp_path, [logs("a", "raise SystemExit(1)"), logs("b")], "--part", "a")[0] == 1
    assert run_gate(tmp_path, [logs("a"), logs("b")])[0] == 0
    assert order.read_text() == "aba"


def test_what_took_a_whole_time_limit_comes_last_at_the_next_call(tmp_path, monkeypatch):
    a, b = part(tmp_path, "a", 1), part(tmp_path, "b", 1)
    hung = {"status": "unfinished", "seconds": gpu_gate.LIMIT_S}
    assert gpu_gate.goes_last(a, hung)
    assert not gpu_gate.goes_last(a, {**hung, "seconds": 300.0}), "that was the call's time"
    assert not gpu_gate.goes_last(part(tmp_path, "build", 1), hung)
    began = []
    record = {"status": "unfinished", "seconds": gpu_gate.LIMIT_S, "steps": [], "why": "hung"}
    monkeypatch.setattr(gpu_gate, "run_part", lambda p, *_: began.append(p.name) or record)
    for _ in range(2):
        run_gate(tmp_path, [a, b], *(["--part", "a"] if not began else []))
    assert began == ["a", "b", "a"]


def test_a_step_knows_its_minutes_and_finds_the_package_first(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somebodys")
    text = "import os, sys; print(sys.argv[1], *os.environ['PYTHONPATH'].split(os.pathsep))"
    step = Step((*code(text), gpu_parts.MINUTES))
    record = gpu_gate.run_step(step, False, tmp_path / "log", 100.0, {})
    assert record["status"] == "done"
    assert record["command"].endswith(" 1.00"), "100 s, less those for the last row"
    assert (tmp_path / "log").read_text().split() == ["1.00", str(ROOT), "/somebodys"]


def test_a_benchmark_that_leaves_rows_out_is_unfinished_and_no_other_step(tmp_path):
    ends = code("raise SystemExit(3)")
    steps = {"rows": Step((*ends, gpu_parts.MINUTES), dry=ends), "tests": Step(ends, dry=ends)}
    status, state = gate(tmp_path / "out", **steps)
    assert status == 1
    assert state["parts"]["rows"]["status"] == "unfinished"
    assert state["parts"]["tests"]["status"] == "FAILED"
    del steps["tests"]
    assert gate(tmp_path / "other", **steps)[0] == 3


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


def test_a_list_leaves_another_environments_files_alone(tmp_path, capsys, monkeypatch):
    gate(tmp_path, a=note(tmp_path, "a"))
    (state,) = tmp_path.glob("*.json")
    state.with_name(f"{state.stem}-bench.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    words = ["--list", "--dry-run", "--out", str(tmp_path)]
    parts = [part(tmp_path, "a", 1)]
    for facts, status in ((HERE, "done"), ({**HERE, "torch": "another"}, "–")):
        monkeypatch.setattr(gpu_gate, "facts", lambda facts=facts: facts)
        capsys.readouterr()
        assert gpu_gate.main(words, lambda *_: parts) == 0
        assert f"a{'':21} {status}" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_input(tmp_path, capsys):
    words = ["--dry-run", "--out", str(tmp_path), "--part", "nothing"]
    assert gpu_gate.main(words) == 2
    assert "nothing" in capsys.readouterr().out
    assert gpu_gate.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert gpu_gate.main(["--list", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "sanitizer-racecheck-knn" in said
    assert machine.commit()["files"] in said
    assert not list(tmp_path.iterdir())


def test_file_names_hold_the_gpu_and_the_code():
    assert gpu_gate.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    commit = machine.commit()["hash"]
    assert gpu_gate.code_key().startswith(commit[:8] if commit else "tree-")


# ---- the build ---------------------------------------------------------------------------------


@pytest.fixture
def building(monkeypatch):
    """What setup.py is asked for; why the libraries do not fit, call by call."""

    def prepare(*reasons, metadata=True, status=0):
        asked, left = [], list(reasons)
        monkeypatch.setattr(gpu_build, "has_metadata", lambda: metadata)
        monkeypatch.setattr(gpu_build, "why_not", lambda: left.pop(0))
        monkeypatch.setattr(gpu_build, "setup", lambda *words: asked.append(words[0]) or status)
        return asked

    return prepare


def test_libraries_that_fit_are_not_built_again(building, capsys):
    asked = building(None)
    assert gpu_build.main() == 0
    assert asked == []
    asked = building(None, metadata=False)
    assert gpu_build.main() == 0
    assert asked == ["egg_info"], "a copy of the sources alone does not know its version"


def test_libraries_that_do_not_fit_are_built(building, capsys):
    asked = building("sources 12, those here are 34", None)
    assert gpu_build.main() == 0
    assert asked == ["build_ext"]
    assert "sources 12, those here are 34" in capsys.readouterr().out
    building("old", "no kernel image is available")
    assert gpu_build.main() == 1, "a build that still does not fit is no build"
    building("old", status=1)
    assert gpu_build.main() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be libraries that fit")
def test_why_libraries_do_not_fit_is_said():
    assert "CUDA" in gpu_build.why_not()


def test_the_digest_is_that_of_every_source(tmp_path):
    digest = gpu_build.runpy.run_path(str(ROOT / "csrc" / "digest.py"))["digest"]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    before = digest(tmp_path)
    assert before == digest(ROOT), "no matter where"
    for name in ("csrc/knn/knn_kernels.cuh", "csrc/common/tensor.h", "setup.py"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        assert digest(tmp_path) != before, name
        before = digest(tmp_path)


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
    assert gpu_cases.main(["large", "--device", "cpu", "--only", "nothing"]) == 1
    said = capsys.readouterr().out
    assert "large: knn_vote: SKIPPED: needs 40 GiB" in said
    skipped = said.count("SKIPPED: ")
    assert skipped >= 8
    assert f"{skipped} skipped" in said


def test_jobs_call_every_operation_of_the_gpu():
    names = " ".join(job.name for job in gpu_cases.jobs(CPU))
    assert all(op in names for op in ("losses", "knn,", "knn_vote", "pi_step", "also_step"))
