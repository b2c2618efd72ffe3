"""The measuring itself: gates that fail, rows that are kept, right fits, pages made anew."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from bench import curve, race, record, report
from bench.__main__ import main
from bench.gpu_parts import ROOT

THREADS = torch.get_num_threads()
CPU = torch.device("cpu")
PAGE = ROOT / "docs" / "performance.md"


@pytest.fixture(autouse=True)
def same_threads():
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def own_clock(monkeypatch):
    """Time that passes by sleeping alone: ratios do not depend on what else the machine does."""
    now = [0.0]

    def tick():
        now[0] += 1e-9
        return now[0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", tick)
    monkeypatch.setattr(time, "sleep", sleep)


def bench(*words):
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """The whole table at small sizes, in another process, as a user makes it."""
    path = tmp_path_factory.mktemp("bench") / "table.json"
    done = bench("--quick", "--threads", 2, "--out", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done


def test_every_row_has_a_gate_ours_a_peer_a_ceiling_and_ratios(quick_run):
    result = record.read(quick_run[0])
    assert result["complete"]
    assert not [row for row in result["rows"] if "failed" in row]
    names = [row["name"] for row in result["rows"]]
    assert len(set(names)) == len(names)
    assert [r.name for r in race.all_races(quick=True)] == names
    for row in report.raced(result):
        assert row["gate"]["passed"], row["name"]
        assert row["gate"]["error"] <= row["gate"]["limit"]
        assert len(report.of(row, "ours")) == 1
        assert report.of(row, "ceiling"), row["name"]
        assert report.of(row, "peer") or row["skipped"], row["name"]
        for contender in row["contenders"]:
            assert len(contender["seconds"]) == contender["rounds"] == 2
            assert contender["p20_s"] <= contender["median_s"] <= contender["p80_s"]
            want = contender["median_s"] / report.ours(row)["median_s"]
            assert contender["ratio"] == pytest.approx(want)


def test_every_operation_is_raced(quick_run):
    """A whole operation must not drop out of the table by being skipped."""
    rows = report.raced(record.read(quick_run[0]))
    ops = {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir() and p.name != "common"}
    assert ops | {"overhead", "epoch", "correction"} <= {row["op"] for row in rows}


def test_the_head_says_where_it_was_measured(quick_run):
    result = record.read(quick_run[0])
    assert result["settings"] == {"quick": True, "device": "cpu"}
    assert result["machine"]["threads"] == 2
    assert {"cpu", "cores", "caches", "memory_gib", "transparent_huge_pages"} <= set(
        result["machine"]
    )
    assert {"python", "torch", "numpy", "faiss-cpu", "scikit-learn", "cleanlab"} == set(
        result["versions"]
    ) - {"threadpoolctl"}
    assert result["als_ext"]["version"]
    assert set(result["commit"]) == {"hash", "dirty", "files"}
    assert str(ROOT) not in quick_run[0].read_text()


def test_peers_that_are_missing_are_named(quick_run):
    result = record.read(quick_run[0])
    compiled = [r for r in report.raced(result) if "torch.compile" in r["skipped"]]
    assert compiled, "a quick run compiles nothing and has to say so"
    text = report.markdown(result)
    assert "torch.compile: a quick run compiles nothing" in text
    for peer in ("Liger-Kernel", "QuACK, one pass (no weights)", "FlashLib"):
        assert re.search(rf"{re.escape(peer)}.*: needs a CUDA device", text), peer
    assert "torch.compile: skipped" in quick_run[1].stdout


def test_resume_keeps_the_rows_and_runs_the_missing_ones(quick_run, tmp_path):
    result = record.read(quick_run[0])
    result["rows"] = [row for row in result["rows"] if row["op"] != "knn_vote"]
    kept = result["rows"]
    path = tmp_path / "part.json"
    record.write(path, result)
    words = ("--quick", "--threads", "2", "--out", str(path))
    assert main(words) == 2  # would overwrite
    assert main([*words, "--resume", "--max-minutes", "0"]) == 3
    assert record.read(path)["rows"] == kept
    assert main([*words, "--resume"]) == 0
    after = record.read(path)
    assert after["complete"]
    assert [row for row in after["rows"] if row["op"] != "knn_vote"] == kept
    assert any(row["op"] == "knn_vote" for row in after["rows"])


def test_a_run_of_another_machine_is_not_resumed(quick_run, tmp_path, capsys):
    result = record.read(quick_run[0])
    result["machine"]["threads"] = 1
    path = tmp_path / "other.json"
    record.write(path, result)
    assert main(["--quick", "--threads", "2", "--out", str(path), "--resume"]) == 2
    assert "machine" in capsys.readouterr().err


def test_a_gpu_may_be_on_another_host_at_the_next_call(tmp_path):
    fresh = record.head("table", {"device": "cuda", "quick": True})
    fresh["machine"] |= {"gpu": "some", "gpu_memory_gib": 80.0}
    path = tmp_path / "part.json"
    host = {**fresh["machine"], "cpu": "another", "cores": 99, "threads": 99, "caches": {}}
    record.write(path, {**fresh, "machine": host})
    assert record.start(path, fresh, resume=True)["machine"] == host
    for machine in ({**host, "gpu": "other"}, {**host, "gpu_memory_gib": 40.0}):
        record.write(path, {**fresh, "machine": machine})
        with pytest.raises(ValueError, match="would differ in machine"):
            record.start(path, fresh, resume=True)


def test_an_unknown_operation_is_bad_input(tmp_path, capsys):
    assert main(["--quick", "--only", "nothing", "--out", str(tmp_path / "a.json")]) == 2
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def lineup(error=0.0, peer=lambda: time.sleep(0.002)):
    made = race.Lineup("error", limit=1e-6)
    made.ours(lambda: time.sleep(0.001), lambda: error)
    made.peer("slow", peer)
    made.ceiling("nothing", lambda: None)
    return made


def row_of(**arguments):
    return race.run(race.Race("op", "case", lambda _: lineup(**arguments)), quick=True)


@pytest.mark.parametrize("error", [2e-6, float("inf"), float("nan")])
def test_a_wrong_result_fails_the_gate(error):
    assert not row_of(error=error)["gate"]["passed"]


def test_a_wrong_contender_fails_the_gate_of_its_race():
    """The gate looks at what ours returns, not at a number that somebody typed."""
    from bench import bench_knn_vote

    right = bench_knn_vote.knn_vote
    try:
        bench_knn_vote.knn_vote = lambda *a: [part + 1 for part in right(*a)]
        wrong = race.run(next(bench_knn_vote.races(True)), quick=True)
    finally:
        bench_knn_vote.knn_vote = right
    assert not wrong["gate"]["passed"]
    assert race.run(next(bench_knn_vote.races(True)), quick=True)["gate"]["passed"]


def test_ratios_are_those_of_the_medians(own_clock):
    row = row_of()
    slow = row["contenders"][1]
    assert slow["ratio"] == pytest.approx(2.0, rel=1e-4)
    assert row["contenders"][0]["ratio"] == 1.0


def test_a_peer_that_raises_is_skipped_by_name_and_ours_is_not():
    def broken():
        raise RuntimeError("no compiler")

    row = row_of(peer=broken)
    assert row["skipped"] == {"slow": "RuntimeError: no compiler"}
    made = race.Lineup("error", 0.0)
    made.ours(broken, lambda: 0.0)
    with pytest.raises(RuntimeError, match="no compiler"):
        race.run(race.Race("op", "case", lambda _: made), quick=True)


def test_targets_stand_beside_what_was_reached(own_clock):
    made = lineup()
    made.at_least = {"slow": 1.1, "nothing": 0.9, "absent": 1.0}
    made.derive = lambda medians: {"figure": 2.0}
    made.at_most = {"figure": 1.0}
    row = race.run(race.Race("op", "case", lambda _: made), quick=True)
    met = {target["what"]: target["met"] for target in row["targets"]}
    assert met == {"slow": True, "nothing": False, "figure": False}
    text = report.targets([{"rows": [{"name": "op/case", **row}]}])
    assert text.startswith("1 of 3 targets are met.")
    assert "| op/case | figure | ≤ 1.00 | **2.00** | **no** |" in text


def test_what_is_unavailable_is_a_named_row():
    def setup(_):
        raise race.Unavailable("not in this version")

    row = race.run(race.Race("op", "case", setup), quick=True)
    assert row["skipped_row"] == "not in this version"


def test_a_race_that_would_end_too_late_is_left_out():
    with pytest.raises(race.OutOfTime):
        race.run(race.Race("op", "case", lambda _: lineup()), seconds_left=1e-3)


def test_calls_are_interleaved_and_spread():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = race.interleave(calls, {"a": 6, "b": 6, "c": 2}, CPU)
    assert {name: len(t) for name, t in times.items()} == {"a": 6, "b": 6, "c": 2}
    assert all({"a", "b"} <= set(order[at : at + 4]) for at in range(0, 11))
    assert max(order.index("c"), 13 - len(order)) < 9
    assert order[0] == "a"
    assert order[2] == "b", "the second round starts with the second contender"


@pytest.mark.parametrize(
    ("seconds", "want"),
    [
        ({"ours": 0.02, "peer": 0.03}, {"ours": 30, "peer": 30}),
        ({"ours": 1e-6, "peer": 1e-6}, {"ours": 40, "peer": 40}),
        ({"ours": 0.4, "peer": 0.5}, {"ours": 20, "peer": 20}),
        ({"ours": 0.01, "peer": 1.5}, {"ours": 20, "peer": 5}),
        ({"ours": 3.0, "peer": 5.0}, {"ours": 5, "peer": 5}),
        ({"ours": 3.0, "peer": 15.0}, {"ours": 5, "peer": 3}),
    ],
)
def test_number_of_rounds(seconds, want):
    got = race.plan(seconds, {"ours": "ours", "peer": "peer"}, quick=False)
    assert got == want


def test_quantiles():
    times = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert race.quantile(times, 0.2) == 2.0
    assert race.quantile(times, 0.8) == 5.0
    assert race.quantile([3.0], 0.8) == 3.0


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law(power):
    x = [1e2, 1e3, 1e4, 1e6]
    fit = curve.exponent(x, [3.0 * a**power for a in x])
    assert fit["exponent"] == pytest.approx(power, abs=1e-12)
    assert fit["r2"] == pytest.approx(1.0)


def test_the_exponent_is_that_of_least_squares():
    fit = curve.exponent([1.0, 10.0, 100.0], [1.0, 100.0, 100.0])
    assert fit["exponent"] == pytest.approx(1.0)
    assert fit["r2"] == pytest.approx(0.75)


def sleeper(scale):
    return {x: lambda x=x: lambda: time.sleep(scale * x) for x in (1.0, 2.0, 4.0, 8.0)}


def unavailable():
    raise race.Unavailable("not here")


def test_a_curve_fits_over_its_range_and_compares(own_clock):
    made = curve.Curve("op", "x", {"a": sleeper(2e-3), "b": {1.0: unavailable}}, 2.0, reference=1.0)
    row = curve.run_curve(made, quick=True)
    (series,) = row["series"]
    assert row["skipped"] == {"b": "not here"}
    assert (series["fit"]["from"], series["fit"]["to"]) == (2.0, 8.0)
    assert series["fit"]["exponent"] == pytest.approx(1.0, abs=1e-4)
    assert series["compare"]["ratio"] == pytest.approx(8.0, rel=1e-4)


@pytest.fixture(scope="module")
def quick_curves(tmp_path_factory):
    path = tmp_path_factory.mktemp("curves") / "curves.json"
    done = bench("curves", "--quick", "--threads", 2, "--out", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_curves_of_every_operation_that_promises_one(quick_curves):
    result = record.read(quick_curves)
    assert result["complete"]
    assert {row["op"] for row in result["rows"]} == {"pi_step", "weighted_loss", "knn"}
    assert len([row for row in result["rows"] if row["op"] == "knn"]) == 3
    for row in result["rows"]:
        ours = [s for s in row["series"] if s["name"].startswith("ours")]
        assert ours, row["x"]
        assert all("exponent" in series["fit"] for series in ours), row["x"]


def test_a_report_renders_and_marks_what_is_slower(quick_run, quick_curves, capsys):
    assert main(["report", str(quick_run[0]), str(quick_curves)]) == 0
    shown = capsys.readouterr().out
    assert "## knn" in shown
    assert "exponent" in shown
    assert report.times(0.934) == "**0.93**"
    assert report.times(1.0) == "1.00"
    assert report.times(12.34) == "12.3"
    result = record.read(quick_run[0])
    row = next(row for row in report.raced(result) if report.of(row, "peer"))
    report.of(row, "peer")[0]["ratio"] = 0.5
    assert f"{row['name']}: {report.of(row, 'peer')[0]['name']} takes 0.50" in report.losses(result)
    row["gate"]["passed"] = False
    assert "FAILED" in report.operation(result, row["op"])


def test_a_page_gets_its_parts_and_small_plots(quick_run, quick_curves):
    pytest.importorskip("matplotlib")
    end = "<!-- bench: end -->\n"
    text = f"a\n<!-- bench: knn -->\nold\n{end}b\n<!-- bench: curves -->\n{end}"
    results = {p.name: record.read(p) for p in (quick_run[0], quick_curves)}
    page = report.render(text, results)
    assert page.startswith("a\n<!-- bench: knn -->\n\n| knn |")
    assert "old" not in page
    assert "\nb\n" in page
    assert report.render(page, results) == page
    folder = quick_curves.parent / "img"
    for _ in range(2):
        for result in results.values():
            report.draw(result, folder)
        drawn = {p.name: p.read_bytes() for p in folder.iterdir()}
        assert len(drawn) == 6
        assert max(map(len, drawn.values())) < 100 * 1024
    for result in results.values():
        report.draw(result, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == drawn, "the same bytes each time"


def test_the_page_shows_what_the_committed_results_say():
    text = PAGE.read_text()
    names = report.sources(text)
    if not names:
        pytest.skip("no result is committed yet")
    results = {name: record.read(ROOT / name) for name in names}
    assert report.render(text, results) == text, "python -m bench report FILE... --page PAGE"
    images = set(report.re.findall(r"\(img/([\w.-]+)\)", text))
    assert images <= {p.name for p in (PAGE.parent / "img").iterdir()}
    for result in results.values():
        assert not result["settings"]["quick"]
        assert result["complete"] or report.of_gpu(result), "a lent GPU may not bring every row"
        assert all(row.get("gate", {"passed": True})["passed"] for row in result["rows"])


def test_json_is_a_row_a_line(quick_run):
    text = quick_run[0].read_text()
    rows = json.loads(text)["rows"]
    assert len(text.splitlines()) >= len(rows)
    assert all(json.dumps(row) in text for row in rows)
