"""The methods of the literature: their known effect on a problem small enough to see it."""

import re
from pathlib import Path

import pytest
from blobs import blobs, train

from als_ext import TrainConfig, Trainer, baselines
from als_ext.methods import ERM, METHODS, Method
from als_ext.models import MLP

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_baseline_is_registered_under_its_name():
    for name in baselines.__all__:
        method = getattr(baselines, name)
        assert METHODS[method.name] is method


def test_each_baseline_has_its_section_in_alphabetical_order():
    page = (Path(__file__).parents[1] / "docs" / "baselines.md").read_text()
    sections = re.findall(r"^## (\S+)$", page, re.M)
    assert sections == sorted(getattr(baselines, name).name for name in baselines.__all__)


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match="'gce' again"):
        type(Method)("Again", (Method,), {}, name="gce")


def test_a_notebooks_cell_may_run_twice(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", None)  # takes it out in the end
    del METHODS["mine"]
    for _ in range(2):
        mine = type(Method)("Mine", (ERM,), {"__module__": "__main__"}, name="mine")
        assert METHODS["mine"] is mine


def test_settings_of_another_method_are_refused():
    with pytest.raises(ValueError, match=r"settings: expected those of gce \(q\), got 'p'"):
        Trainer(MLP((3,), 3), TrainConfig(method="gce", settings={"p": 1}), num_classes=3)
    with pytest.raises(ValueError, match="it has none"):
        Trainer(MLP((3,), 3), TrainConfig(method="erm", settings={"q": 1}), num_classes=3)
    with pytest.raises(ValueError, match="q: expected"):
        Trainer(MLP((3,), 3), TrainConfig(method="gce", settings={"q": 1.5}), num_classes=3)


def test_gce_memorises_less_than_erm():
    x, given, _ = blobs()
    test = blobs(seed=1)
    test = (test[0], test[2])
    plain = train("erm", given, x, test).test_accuracy
    robust = train("gce", given, x, test, q=0.7).test_accuracy
    assert robust > plain + 0.05
