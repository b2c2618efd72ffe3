"""How races run on a GPU, on a device that is made up: the clock, rows, targets, peers."""

import json
import time

import pytest
import torch

from bench import gpu_report, peers, race, roofline
from bench.__main__ import main as bench_main
from bench.clock import CudaClock

CPU = torch.device("cpu")


# ---- timing ------------------------------------------------------------------------------------


class FakeCuda:
    """A device on a clock of its own, on which a kernel takes 2 ms."""

    def __init__(self):
        self.log, self.now, self.free = [], 0.0, 0.0  # host; when the device is done

    def Event(self, enable_timing):
        assert enable_timing
        return FakeEvent(self)

    def launch(self, seconds=2e-3):
        self.free = max(self.now, self.free) + seconds

    def synchronize(self):
        self.log.append("synchronize")
        self.now = max(self.now, self.free)

    def _sleep(self, cycles):
        self.log.append("sleep")
        self.launch(cycles / 2e9)


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.cuda.log.append("record")
        self.at = max(self.cuda.now, self.cuda.free)

    def query(self):
        return self.cuda.now >= self.at

    def synchronize(self):
        self.cuda.log.append("wait")
        self.cuda.now = max(self.cuda.now, self.at)

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def kernels(cuda, host_s=0.0, waits=False):
    """Two kernels with ``host_s`` of the host before each; ``waits`` for the device between."""

    def call():
        cuda.log.append("call")
        for number in range(2):
            if waits and number:
                cuda.now = max(cuda.now, cuda.free)
            cuda.now += host_s
            cuda.launch()

    return call


def test_device_time_is_of_events_with_a_cold_cache():
    cuda = FakeCuda()
    clock = CudaClock(cuda, lambda: cuda.log.append("flush"))
    call = kernels(cuda)
    assert clock.device_seconds(call) == pytest.approx(4e-3)
    assert cuda.log == ["flush", "sleep", "record", "call", "record", "wait"]
    assert not clock.waits


@pytest.mark.parametrize(("host_s", "tries"), [(1e-4, 0), (3e-3, 2), (0.03, 3)])
def test_device_time_holds_no_gaps_of_the_host(host_s, tries):
    cuda = FakeCuda()
    clock = CudaClock(cuda, lambda: None)
    call = kernels(cuda, host_s)
    for _ in range(3):
        assert clock.device_seconds(call) == pytest.approx(4e-3)
    assert cuda.log.count("call") == 3 + tries, "the device was busy for 1, 4, 16, 64 ms"
    assert not clock.waits


def test_a_call_that_waits_for_the_device_is_named():
    cuda = FakeCuda()
    clock = CudaClock(cuda, lambda: None)
    call, other = kernels(cuda, 1e-3, waits=True), kernels(cuda)
    assert clock.device_seconds(call) == pytest.approx(5e-3), "one gap, of the host's 1 ms"
    assert clock.waits == {id(call)}
    before = cuda.log.count("call")
    clock.device_seconds(call)
    assert cuda.log.count("call") == before + 1, "no more tries"
    assert clock.device_seconds(other) == pytest.approx(4e-3)
    assert clock.waits == {id(call)}


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
    """Ratios are those of device times, targets those of the GPU."""
    cuda = FakeCuda()
    monkeypatch.setattr(race, "CudaClock", lambda: CudaClock(cuda, lambda: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    made = race.Lineup("error", limit=1e-6)
    made.ours(lambda: cuda.launch(), lambda: 0.0)
    made.peer("theirs", lambda: (time.sleep(0.05), kernels(cuda, waits=True)()))
    made.ceiling("half", lambda: cuda.launch(), repeat=2)
    made.derive = lambda median: {"figure": median["theirs"] / median["ours"]}
    made.at_least, made.at_most = {"of a CPU": 1.0}, {"of a CPU": 1.0}
    one = race.Race(
        *("op", "case", lambda _: made),
        counts=race.Counts(10.0, 5.0),
        gpu_at_least={"theirs": 1.5, "half": 0.6},
        gpu_at_most={"figure": 1.5},
    )
    row = race.run(one, device="cuda", quick=True)
    ours, theirs, half = row["contenders"]
    assert theirs["ratio"] == pytest.approx(2.0)
    assert theirs["median_s"] == pytest.approx(4e-3)
    assert half["ratio"] == pytest.approx(0.5)
    assert theirs["wall"]["median_s"] >= 0.05 > ours["wall"]["median_s"]
    assert [c["waits"] for c in row["contenders"]] == [False, True, False]
    assert row["counted"] == {"bytes": 10.0, "flops": 5.0, "unit": "float32"}
    met = {target["what"]: target["met"] for target in row["targets"]}
    assert met == {"theirs": True, "half": False, "figure": False}
    text = "\n".join(gpu_report.race({"name": "op/case", **row}))
    assert "| theirs | peer | 4000 (4000 – 4000) | 2.000 |" in text
    assert "2 (waits) |" in text
    assert "Gate passed" in text


def test_a_row_of_the_cpu_has_no_device_times():
    one = race.Race("op", "case", lambda _: two(), gpu_at_least={"theirs": 1e9})
    row = race.run(one, quick=True)
    assert all("wall" not in contender for contender in row["contenders"])
    assert row["targets"] == []


# ---- rows of a GPU -----------------------------------------------------------------------------


def fake_race(name, targets=False, fails=()):
    """A race that raises as long as ``fails`` holds a thing."""

    def setup(device):
        if fails:
            fails.pop()
            raise RuntimeError("an illegal memory access")
        made = race.Lineup("error", limit=1.0)
        made.ours(lambda: None, lambda: 0.0)
        return made

    aims = {"peer": 1.0} if targets else {}
    return race.Race("op", name, setup, gpu_at_least=aims)


def rows_of(path):
    return {
        row["case"] if "case" in row else row["name"]: row
        for row in json.loads(path.read_text())["rows"]
    }


def test_a_row_that_failed_is_run_again_behind_those_that_are_missing(
    tmp_path, monkeypatch, capsys
):
    fails = ["once", "twice"]
    races = [fake_race("a", fails=fails), fake_race("b")]
    monkeypatch.setattr(race, "all_races", lambda quick: races)
    words = ["--quick", "--out", str(tmp_path / "rows.json"), "--resume"]
    assert bench_main(words) == 1
    assert list(rows_of(tmp_path / "rows.json")) == ["op/a", "b"]
    races.append(fake_race("c"))
    capsys.readouterr()
    assert bench_main(words) == 1
    said = capsys.readouterr().err
    assert said.index("op/c") < said.index("op/a")
    assert "op/b" not in said
    assert bench_main(words) == 0
    assert list(rows_of(tmp_path / "rows.json")) == ["a", "b", "c"]


def test_a_lost_device_ends_the_call_and_the_peaks_are_kept(tmp_path, monkeypatch):
    races = [fake_race("a", fails=["once"]), fake_race("b")]
    monkeypatch.setattr(race, "all_races", lambda quick: races)
    monkeypatch.setattr(race, "device_is_lost", lambda: True)
    monkeypatch.setattr(roofline, "measure", lambda: {"bytes": 1.0})
    monkeypatch.setattr(race, "CudaClock", lambda: CudaClock(FakeCuda(), lambda: None))
    path = tmp_path / "rows.json"
    words = ["--quick", "--device", "cuda", "--out", str(path), "--resume"]
    assert bench_main(words) == 1
    result = json.loads(path.read_text())
    assert result["peaks"] == {"bytes": 1.0}
    assert list(rows_of(path)) == ["op/a"], "what follows would fail too"


def test_targets_first_and_the_other_rows_into_the_same_file(tmp_path, monkeypatch):
    races = [fake_race("a"), fake_race("b", targets=True)]
    monkeypatch.setattr(race, "all_races", lambda quick: races)
    words = ["--quick", "--out", str(tmp_path / "rows.json"), "--resume"]
    assert bench_main([*words, "--targets"]) == 0
    assert list(rows_of(tmp_path / "rows.json")) == ["b"]
    assert bench_main(words) == 0
    assert list(rows_of(tmp_path / "rows.json")) == ["a", "b"]


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


def test_logits_need_a_gradient_where_one_is_taken_and_nowhere_else(monkeypatch):
    """Liger-Kernel makes the gradient in its forward pass of logits that need one."""
    from bench import bench_sample_loss as bench

    seen = {}

    def spy(logits, target):
        seen.setdefault(part, set()).add(logits.requires_grad)
        return torch.nn.functional.cross_entropy(logits, target, reduction="none")

    monkeypatch.setattr(peers, "load", lambda *_: spy)
    for part in ("forward", "full"):
        case = f"cross_entropy {part}, 64 × 10, float32"
        (one,) = [r for r in bench.races(True) if r.case == case]
        lineup = one.setup(CPU)
        for contender in lineup.contenders:
            if contender.name in peers.LOSSES:
                contender.call()
    assert seen == {"forward": {False}, "full": {True}}


def test_what_is_fastest_of_a_library_races_too(monkeypatch):
    from bench import bench_weighted_loss as bench

    monkeypatch.setattr(peers, "load", lambda *_: torch.nn.functional.cross_entropy)
    lineup = next(bench.races(True)).setup(CPU)
    assert set(peers.UNWEIGHTED) <= {c.name for c in lineup.contenders}


def test_a_table_of_the_cpu_does_not_name_a_gpus_peers():
    made = two()
    assert peers.load(made, "FlashLib", dict, CPU, False) is None
    assert made.skipped == {}
