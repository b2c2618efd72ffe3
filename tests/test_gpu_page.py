"""The GPU part of the page: the targets of the design, limits by formula, rooflines.

No figure here was measured: results are SYNTHETIC, made by these tests, and stay in their folders.
"""

import pytest
import torch

from bench import gpu_page, inputs, race, record, report, roofline

PART = "<!-- bench: GPU -->\n<!-- bench: end -->\n"
PEAKS = {"bytes": 2e12, "bfloat16": 400e12, "float32": 50e12, "nothing_s": 2e-6}
# What the kernels are to reach on a GPU: race -> figure, at least or at most.
NARROW = {"copy of the same bytes": 0.8, "torch.compile": 2.5, "QuACK": 1.5}
LIGER = {"Liger-Kernel, mean (no weights)": 1.4}
LAUNCH = {"forward_over_an_empty_launch": 1.2}
ADAM = {"fused AdamW (one step)": 1 / 1.35, "foreach composite": 3.0}
SELF = "Q = 100000, M = 100000, self"
MANY = "Q = 16384, M = 100000, random, bfloat16"
DESIGN = {
    "weighted_loss/32768 × 256, bfloat16": NARROW,
    "weighted_loss/32768 × 1024, bfloat16": NARROW,
    "weighted_loss/32768 × 2048, bfloat16": NARROW,
    "weighted_loss/8192 × 4096, bfloat16": LIGER,
    "weighted_loss/8192 × 128256, bfloat16": LIGER,
    "weighted_loss/256 × 10, float32": LAUNCH,
    "weighted_loss/256 × 10, bfloat16": LAUNCH,
    "weighted_loss/4096 × 100, bfloat16": LAUNCH,
    "sample_loss/cross_entropy full, 32768 × 256, bfloat16": NARROW,
    "sample_loss/cross_entropy full, 32768 × 1024, bfloat16": NARROW,
    "sample_loss/cross_entropy full, 8192 × 32000, bfloat16": {"Liger-Kernel": 1.4},
    "pi_step/dense, n = 1e+08, B = 1024": {
        "copy of the same bytes": 0.85,
        "reference, torch eager": 4.0,
        "reference, torch.compile": 1.5,
    },
    "pi_step/lazy, n = 1e+09 against 1e+06, B = 256": {"time_over_that_of_few_samples": 1.2},
    f"knn/D = 128, k = 10, {SELF}, bfloat16": {
        "FlashLib": 2.5,
        "bfloat16 products at their peak": 0.45,
    },
    f"knn/D = 256, k = 10, {SELF}, bfloat16": {"FlashLib": 2.0},
    f"knn/D = 128, k = 10, {SELF}, float32": {"FlashLib": 1.5},
    f"knn/D = 512, k = 10, {MANY}": {"bfloat16 product": 0.9},
    f"knn/D = 768, k = 10, {MANY}": {"bfloat16 product": 0.9},
    f"knn/D = 128, k = 64 against 8, {MANY}": {"time_at_k_64_over_k_8": 1.25},
    "knn/D = 128, k = 10, Q = 1, M = 1000000, random, float32": {"read of the database": 0.8},
    "knn/D = 128, k = 10, Q = 16, M = 1000000, random, float32": {"read of the database": 0.8},
    "knn_vote/search and vote, D = 128, k = 10, Q = 100000, self, bfloat16": {
        "search_and_vote_over_search": 1.03
    },
    **{f"also_step/{case}": ADAM for case in ("1 × 16M", "60 × 200k", "8 × 12k")},
}


def test_every_target_of_the_design_has_a_row_that_runs_on_a_gpu():
    found = {r.name: r for r in race.all_races(False) if r.runs_on("cuda")}
    for name, aims in DESIGN.items():
        got = {**found[name].gpu_at_least, **found[name].gpu_at_most}
        assert got.items() >= aims.items(), name
        assert found[name].counts is not None, name


def test_every_row_of_a_gpu_is_counted():
    """But for those that wait for the host's memory, which these limits do not know."""
    rows = [r for r in race.all_races(False) if r.runs_on("cuda") and r.counts is None]
    assert not [r.name for r in rows if "from the host" not in r.case]


# ---- limits ------------------------------------------------------------------------------------


def test_the_limit_is_the_longer_of_two():
    by_bytes, by_products = race.Counts(4e12, 50e12), race.Counts(2e12, 800e12, "bfloat16")
    assert roofline.limit_s(by_bytes, PEAKS) == 2.0
    assert roofline.bound(by_bytes, PEAKS) == "bytes"
    assert roofline.limit_s(by_products, PEAKS) == 2.0
    assert roofline.bound(by_products, PEAKS) == "bfloat16"


def test_counts_are_those_of_the_task():
    assert inputs.counts(10, 1000, "bfloat16", passes=2).bytes == 2 * 2 * 10_000 + 16 * 10
    from bench import bench_knn

    made = bench_knn.counts(3, 100, 8, 5, "float32", False)
    assert made.bytes == 4 * 8 * 103 + 12 * 15
    assert made.flops == 2 * 3 * 100 * 8


def test_peaks_are_measured():
    found = roofline.measure("cpu", moved=1 << 16, size=32)
    assert set(found) == set(PEAKS)
    assert all(value > 0 for value in found.values())


# ---- synthetic results -------------------------------------------------------------------------


def synthetic(gate=0.0):
    """A row as a GPU would bring it: 1 GB, 1 GFLOP, ours 1 ms; half of the limit is reached."""

    def contender(name, role, seconds, waits=False):
        times = {"median_s": seconds, "p20_s": seconds, "p80_s": seconds}
        ratio, rounds = seconds / 1e-3, 20
        return {"name": name, "role": role, "ratio": ratio, **times, "rounds": rounds} | {
            "waits": waits,
            "error": None,
        }

    row = {"op": "knn", "case": "synthetic", "name": "knn/synthetic", "device": "cuda"}
    row["gate"] = {"measure": "none", "error": gate, "limit": 1.0, "passed": gate <= 1.0}
    row["contenders"] = [contender("ours", "ours", 1e-3), contender("theirs", "peer", 3e-3, True)]
    row["counted"] = {"bytes": 1e9, "flops": 1e9, "unit": "float32"}
    row["targets"] = [
        {"what": "theirs", "least": 2.5, "got": 3.0, "met": True},
        {"what": "a_figure", "most": 1.2, "got": 1.5, "met": False},
    ]
    row |= {"skipped": {"QuACK": "ImportError: none"}, "note": "", "derived": {"a_figure": 1.5}}
    failed = {"op": "knn", "name": "knn/broken", "failed": "RuntimeError: an illegal access"}
    result = {**record.head("table", {"quick": False, "device": "cuda"}), "rows": [row, failed]}
    result["machine"] = {**result["machine"], "gpu": "SYNTHETIC GPU"}
    return {**result, "peaks": PEAKS}


def test_without_a_result_the_page_says_that_nothing_was_measured():
    text = report.render(PART, {})
    assert "**Nothing has been measured on a GPU.**" in text
    assert "Limits are **estimated**" in text
    for name in DESIGN:
        assert f"| {name} |" in text, name
    assert "| 4,203 | 8.41 | 1,255 (bytes) | 876 (bytes) |" in text, "8192 × 128256: 4.2 GB"
    assert report.render(text, {}) == text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 140


def test_a_result_is_shown_with_its_shares_and_targets():
    text = report.render(PART, {"gpu.json": synthetic()})
    assert "Nothing has been measured" not in text
    assert "### SYNTHETIC GPU" in text
    row = "| synthetic | 1,000 | 50 % (bytes) | 1 | 1 | theirs 3.00 (waits) | "
    assert row + "theirs ≥ 2.50: 3.00; a figure ≤ 1.20: **1.50** | 0.0e+00 ≤ 1.0e+00 |" in text
    assert "* Not raced: QuACK: ImportError: none." in text
    assert "knn/broken: FAILED: RuntimeError: an illegal access" in text
    assert "img/roofline-synthetic-gpu-knn.svg" in text
    assert "no work at all shows as 2.0 µs" in text


def test_a_gpu_does_not_stand_among_the_results_of_a_cpu():
    cpu = {**synthetic(), "settings": {"quick": False, "device": "cpu"}}
    part = "<!-- bench: targets -->\n<!-- bench: end -->\n"
    both = report.render(part, {"cpu.json": cpu, "gpu.json": synthetic(), "b.json": synthetic()})
    assert both == report.render(part, {"cpu.json": cpu})
    with pytest.raises(ValueError, match="at most one result of each kind"):
        report.render(part, {"cpu.json": cpu, "again.json": cpu})
    origin = report.origin({"gpu.json": synthetic(), "cpu.json": cpu})
    assert origin.count("SYNTHETIC GPU") == 1


def test_a_copy_without_git_is_known_by_its_files():
    result = synthetic()
    result["commit"] = {"hash": None, "dirty": None, "files": "12345678"}
    assert "unknown (files 12345678)" in report.origin({"gpu.json": result})
    result["commit"] = {"hash": "9" * 40, "dirty": True, "files": "12345678"}
    changed = "commit 99999999 with uncommitted changes (files 12345678)"
    assert changed in report.origin({"gpu.json": result})


def test_rooflines_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for _ in range(2):
        report.draw(synthetic(), tmp_path)
        (drawn,) = tmp_path.iterdir()
        text = drawn.read_text()
        assert drawn.name == "roofline-synthetic-gpu-knn.svg"
        for said in ("synthetic: 50 % of the limit", "memory 2.00 TB/s", "SYNTHETIC GPU"):
            assert said in text
    assert len(drawn.read_bytes()) < 100 * 1024


def test_a_row_that_was_not_counted_is_shown_without_a_share():
    result = synthetic()
    result["rows"][0]["counted"] = None
    text = gpu_page.measured(result)
    assert "| synthetic | 1,000 | – | – | – |" in text
    assert "roofline" not in text


# ---- errors against float64 --------------------------------------------------------------------


def batch(rows=7, classes=5):
    return inputs.batch(rows, classes, "float32", torch.device("cpu"))


def test_the_reference_in_blocks_is_the_reference(monkeypatch):
    from als_ext.reference.sample_loss import sample_loss

    data = batch()
    (whole,) = inputs.exact(sample_loss, *data)()
    monkeypatch.setattr(inputs, "BLOCK", 10)
    want = inputs.exact(sample_loss, *data)
    blocks = list(want())
    assert [some.start for some, _, _ in blocks] == [0, 2, 4, 6]
    assert torch.equal(torch.cat([values for _, values, _ in blocks]), whole[1])
    assert torch.equal(torch.cat([slope for _, _, slope in blocks]), whole[2])
    total = (data[2] * whole[1]).sum()
    assert inputs.losses_off((whole[1], whole[2]), want()) == 0
    assert inputs.total_off((total, whole[2]), data[2], want()) == pytest.approx(0, abs=1e-15)
    wrong = whole[2].clone()
    wrong[6, 0] += 1.0
    assert inputs.losses_off((whole[1], wrong), want()) > 0.1
    assert inputs.total_off((total, wrong), data[2], want()) > 0.1
    assert inputs.total_off((total + 1.0, whole[2]), data[2], want()) > 0.01


@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_is_an_error(place):
    want = (torch.ones(3), torch.ones(3, 2))
    got = [part.clone() for part in want]
    got[place][1] = float("nan")
    assert not inputs.deviation(tuple(got), want) <= 1.0
    assert inputs.deviation(want, want) == 0


def test_a_wrong_result_that_is_nan_is_written_and_read(tmp_path):
    path = tmp_path / "a.json"
    record.write(path, synthetic(gate=float("nan")))
    (row, _) = record.read(path)["rows"]
    assert not row["gate"]["passed"]
    assert "FAILED: nan" in report.gate_text(row)


def test_a_result_goes_on_after_a_restart_of_the_machine(tmp_path):
    path, result = tmp_path / "a.json", synthetic()
    record.write(path, result)
    result["machine"]["memory_gib"] = 1.0
    assert record.start(path, result, resume=True)["rows"]
    result["machine"]["gpu"] = "another"
    with pytest.raises(ValueError, match="machine"):
        record.start(path, result, resume=True)
