"""From a run to its report and back: what a run keeps, decisions read, applied, trained on."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from als_ext import CorrectionConfig, LabelCorrector, TrainConfig, Trainer
from als_ext.checkpoint import load_checkpoint
from als_ext.cli import main
from als_ext.correction import labels_digest, read_decisions
from als_ext.data import read_labels
from als_ext.report import read_samples

pytestmark = pytest.mark.usefixtures("one_thread")

GIVEN = torch.tensor([0, 1, 2, 0, 1])


def content(**change):
    return {
        "format": "als_ext decisions",
        "version": 1,
        "method": "als-lc",
        "samples": 5,
        "num_classes": 3,
        "labels_sha256": labels_digest(GIVEN),
        "decisions": [
            {"row": 3, "index": 3, "old": 0, "new": 2, "decision": "accept"},
            {"row": 1, "index": 1, "old": 1, "new": 0, "decision": "reject"},
        ],
        **change,
    }


def entry(**change):
    return content(decisions=[{"row": 1, "old": 1, "new": 0, "decision": "reject", **change}])


@pytest.fixture
def write(tmp_path):
    def write(value):
        path = tmp_path / "decisions.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


def test_decisions_are_applied(write):
    decisions = read_decisions(write(content()))
    assert repr(decisions) == "Decisions(1 accepted, 1 rejected of 5 samples)"
    assert (decisions.method, len(decisions)) == ("als-lc", 2)
    assert decisions.apply(GIVEN, 3).tolist() == [0, 1, 2, 2, 1]
    base = torch.tensor([2, 0, 2, 1, 0])
    assert decisions.apply(GIVEN, 3, base).tolist() == [2, 1, 2, 2, 0]
    assert base.tolist() == [2, 0, 2, 1, 0]
    nothing = read_decisions(write(content(decisions=[])))
    assert nothing.apply(GIVEN, 3, base).tolist() == base.tolist()


@pytest.mark.parametrize("decision", ["accept", "reject"])
def test_an_old_label_that_nobody_gave_is_refused(write, decision):
    """A rejection would write it into the labels."""
    found = read_decisions(write(entry(old=2, decision=decision)))
    with pytest.raises(ValueError, match="expected 1, the given label, as old label of row 1, got"):
        found.apply(GIVEN, 3)
    corrector = LabelCorrector(GIVEN, 3)
    with pytest.raises(ValueError, match="as old label of row 1, got 2"):
        corrector.decide(found)
    assert torch.equal(corrector.labels, GIVEN)


def test_decisions_about_other_labels_are_refused(write):
    decisions = read_decisions(write(content()))
    with pytest.raises(ValueError, match="about 4 samples of 3 classes, got some about 5 of 3"):
        decisions.apply(GIVEN[:4], 3)
    with pytest.raises(ValueError, match="about 5 samples of 2 classes, got some about 5 of 3"):
        decisions.apply(GIVEN, 2)
    with pytest.raises(ValueError, match="other given labels"):
        decisions.apply(1 - GIVEN.clamp(max=1), 3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[]", '"format": "als_ext decisions"'),
        (content(format="x"), '"format": "als_ext decisions"'),
        (content(version=2), "expected version 1, got 2"),
        (content(samples=0), "samples, an integer >= 1, got 0"),
        (content(samples=True), "samples, an integer >= 1, got True"),
        (content(num_classes=1), "num_classes, an integer >= 2, got 1"),
        (content(labels_sha256=None), "labels_sha256, a text, got None"),
        (content(method=3), "method, a text, got 3"),
        (content(decisions={}), "a list of decisions"),
        (content(decisions=[3]), "entry 0: expected an object, got 3"),
        (entry(row=5), r"entry 0: expected row, an integer in \[0, 5\), got 5"),
        (entry(row=-1), r"row, an integer in \[0, 5\), got -1"),
        (entry(row=1.0), "row, an integer"),
        (entry(old=3), r"old, an integer in \[0, 3\), got 3"),
        (entry(new=None), "new, an integer"),
        (entry(new=1), "expected another label than 1, got 1"),
        (entry(decision="maybe"), "expected accept or reject, got 'maybe'"),
        (entry(decision=["accept"]), "expected accept or reject"),
        (content(decisions=content()["decisions"][:1] * 2), "entry 1: row 3 is decided twice"),
    ],
)
def test_files_that_are_no_decisions_are_refused(write, value, message):
    with pytest.raises(ValueError, match=message):
        read_decisions(write(value))


def test_a_corrector_keeps_what_was_decided(write):
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(200) % 2
    x = torch.randn(200, 8, generator=generator) + 4 * truth[:, None]
    given = truth.clone()
    given[:40] = 1 - given[:40]
    entries = [
        {"row": 0, "old": int(given[0]), "new": int(truth[0]), "decision": "reject"},
        {"row": 1, "old": int(given[1]), "new": int(truth[1]), "decision": "accept"},
        {"row": 100, "old": int(given[100]), "new": 1 - int(given[100]), "decision": "accept"},
    ]
    file = content(
        samples=200, num_classes=2, labels_sha256=labels_digest(given), decisions=entries
    )
    decisions = read_decisions(write(file))
    corrector = LabelCorrector(given, 2, CorrectionConfig(metric="l2"))
    corrector.step(x)
    assert corrector.decide(decisions).tolist() == [0, 100]  # 1 was relabelled so already
    expected = truth.clone()
    expected[0], expected[100] = given[0], 1 - truth[100]
    assert torch.equal(corrector.labels, expected)
    corrector.step(x)
    assert torch.equal(corrector.labels, expected), "pinned"
    last = corrector.history
    assert last.sample[-2:].tolist() == [0, 100]
    assert last.epoch[-2:].tolist() == [-1, -1]
    assert last.share[-2:].isnan().all()
    again = LabelCorrector(given, 2, CorrectionConfig(metric="l2"))
    again.load_state_dict(corrector.state_dict())
    again.step(x)
    assert torch.equal(again.labels, expected)
    undone = corrector.undo()  # the second step, which changed nothing
    assert undone.numel() == 0
    corrector.undo()
    standing = expected[[0, 1, 100]].tolist()
    assert corrector.labels[[0, 1, 100]].tolist() == standing, "pinned"
    assert corrector.labels[2] == given[2]
    corrector.step(x)
    assert torch.equal(corrector.labels, expected)
    other = LabelCorrector(truth, 2)
    with pytest.raises(ValueError, match="other given labels"):
        other.decide(decisions)
    assert torch.equal(other.labels, truth)


def test_neighbours_are_those_of_the_last_correction(monkeypatch, tmp_path):
    seen = []
    step = LabelCorrector.step

    def noted(self, *arguments):
        seen.append(step(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(LabelCorrector, "step", noted)
    truth = torch.arange(600) % 3
    x = 4 * torch.eye(3)[truth] + torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    labels = truth.clone()
    labels[:150] = (labels[:150] + 1) % 3
    model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    config = TrainConfig(method="als-lc", epochs=5, warmup=1, period=2, embedding="1")
    result = Trainer(model, config, num_classes=3, out=tmp_path / "a").fit(x, labels)
    assert len(seen) >= 1
    assert torch.equal(result.report["suspect"], seen[-1].suspect)
    assert torch.equal(result.neighbours.long(), seen[-1].neighbours[seen[-1].suspect, :8])
    assert result.neighbours.dtype == torch.int32
    saved = load_checkpoint(tmp_path / "a" / "checkpoint.pt")["method"]["neighbours"]
    assert torch.equal(saved, result.neighbours)
    again = Trainer(model, config, num_classes=3, out=tmp_path / "a")
    assert torch.equal(again.fit(x, labels, resume=True).neighbours, result.neighbours)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on digits, and what it keeps of its samples."""
    out = tmp_path_factory.mktemp("run") / "run"
    words = ["--epochs", "4", "--warmup", "2", "--method", "erm,als-lc", "--quiet", "--json"]
    assert main(["run", *words, "--out", str(out)]) == 0
    return out, read_samples(out / "als-lc" / "samples.npz")


def test_a_run_keeps_what_the_report_needs(run):
    out, samples = run
    truth = load_digits().target
    assert (samples.true == truth[samples.index]).all()
    assert (samples.label == np.load(out / "als-lc" / "labels.npy")).all()
    assert 0.35 < (samples.given != samples.true).mean() < 0.45
    assert samples.class_names == tuple("0123456789")
    state = load_checkpoint(out / "als-lc" / "checkpoint.pt")
    assert np.array_equal(samples.loss, state["losses"].numpy())
    assert np.exp(samples.log_pi).sum() == pytest.approx(1, abs=1e-4)
    assert samples.neighbours.shape == (samples.suspect.sum(), 8)
    suspects = np.flatnonzero(samples.suspect)
    assert (samples.neighbours != suspects[:, None]).all(), "no sample is its own neighbour"
    same = samples.true[samples.neighbours] == samples.true[suspects][:, None]
    assert same.mean() > 0.8
    plain = read_samples(out / "erm" / "samples.npz")
    assert (plain.label == plain.given).all()
    assert plain.suspect is plain.neighbours is plain.log_pi is None


def test_a_resumed_run_writes_them_again(run, capsys):
    out, samples = run
    file = out / "als-lc" / "samples.npz"
    file.unlink()
    assert main(["report", str(out)]) == 2
    assert f"als-ext run --out {out} --resume" in capsys.readouterr().err
    assert main(["run", "--out", str(out), "--resume", "--json"]) == 0
    capsys.readouterr()
    again = read_samples(file)
    for name in type(samples).__dataclass_fields__:
        assert np.array_equal(getattr(again, name), getattr(samples, name)), name


def test_decide_writes_the_labels(run, write, tmp_path, capsys):
    out, samples = run
    at = samples.relabelled[:20]
    entries = [
        {
            "row": int(i),
            "old": int(samples.given[i]),
            "new": int(samples.label[i]),
            "decision": "accept" if k % 2 else "reject",
        }
        for k, i in enumerate(at)
    ]
    digest = labels_digest(torch.from_numpy(samples.given))
    file = write(content(samples=1438, num_classes=10, labels_sha256=digest, decisions=entries))
    labels = tmp_path / "labels.npy"
    words = ["decide", str(out), str(file), "--out", str(labels)]
    assert main([*words, "--undecided", "reject", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "accepted": 10,
        "rejected": 10,
        "changed": 10,
        "samples": 1438,
        "out": str(labels),
    }
    expected = samples.given.copy()
    expected[at[1::2]] = samples.label[at[1::2]]
    assert (read_labels(labels).numpy() == expected).all()


def test_a_run_keeps_what_was_decided(run, write, tmp_path, capsys):
    _, samples = run
    moved = samples.relabelled
    rejected = moved[:30]
    stays = np.flatnonzero(samples.given == samples.label)[:30]  # nobody proposed these
    new = {int(i): int(samples.label[i]) for i in moved[:60]}
    new |= {int(i): int((samples.given[i] + 1) % 10) for i in stays}
    entries = [
        {
            "row": i,
            "old": int(samples.given[i]),
            "new": label,
            "decision": "reject" if i in rejected else "accept",
        }
        for i, label in new.items()
    ]
    digest = labels_digest(torch.from_numpy(samples.given))
    file = write(content(samples=1438, num_classes=10, labels_sha256=digest, decisions=entries))
    again = tmp_path / "again"
    words = ["--method", "als-lc,knn-relabel", "--epochs", "4", "--warmup", "1", "--period", "1"]
    words = ["run", *words, "--decisions", str(file), "--out", str(again), "--quiet", "--json"]
    assert main(words) == 0
    given = samples.given.copy()
    for i, label in new.items():
        given[i] = given[i] if i in rejected else label
    decided = np.array(list(new))
    for method in ("als-lc", "knn-relabel"):
        found = read_samples(again / method / "samples.npz")
        assert (found.given == given).all()
        assert (found.label[decided] == given[decided]).all(), method
        others = np.setdiff1d(samples.relabelled, decided)
        assert (found.label[others] != given[others]).mean() > 0.8, "corrections went on"
        assert found.suspect[rejected].mean() > 0.8, "it would have changed them"
    first = read_samples(again / "als-lc" / "samples.npz")
    assert main(["run", "--out", str(again), "--resume", "--json"]) == 0
    resumed = read_samples(again / "als-lc" / "samples.npz")
    assert (resumed.label == first.label).all()

    capsys.readouterr()
    entries[0]["decision"] = "accept"
    changed = content(samples=1438, num_classes=10, labels_sha256=digest, decisions=entries)
    write(changed)
    assert main(["run", "--out", str(again), "--resume"]) == 2
    assert "labels sha256" in capsys.readouterr().err
    write({**changed, "decisions": entries[:29]})
    assert main(["run", "--out", str(again), "--resume"]) == 2
    assert "kept sha256" in capsys.readouterr().err
    assert main(["run", "--seed", "1", "--decisions", str(file)]) == 2
    assert "other given labels" in capsys.readouterr().err


def test_errors_of_decide(run, write, tmp_path, capsys):
    out, samples = run
    digest = labels_digest(torch.from_numpy(samples.given))
    whole = content(samples=1438, num_classes=10, labels_sha256=digest, decisions=[])
    target = tmp_path / "labels.npy"
    for value, words, message in (
        (whole, ["--undecided", "maybe"], "undecided: expected one of 'accept', 'reject'"),
        (whole, ["--method", "also"], "method: expected one of the run's"),
        ({**whole, "method": "also"}, [], "method: expected one of the run's"),
        ({**whole, "labels_sha256": "0"}, [], "other given labels"),
        (content(), [], "about 1438 samples of 10 classes, got some about 5 of 3"),
    ):
        code = main(["decide", str(out), str(write(value)), "--out", str(target), *words])
        assert code == 2
        assert message in capsys.readouterr().err
        assert not target.exists()
    target.write_text("mine")
    assert main(["decide", str(out), str(write(whole)), "--out", str(target)]) == 2
    assert "exists" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main(["decide", str(out), str(tmp_path / "none.json"), "--out", str(target)]) == 2
    assert "expected a file, got none" in capsys.readouterr().err
