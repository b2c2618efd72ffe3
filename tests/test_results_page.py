"""docs/results.md and README.md say what the committed cells say."""

import json

import pytest

from bench import results_page


@pytest.mark.parametrize("page", results_page.PAGES, ids=lambda page: page.name)
def test_a_page_is_made_from_the_committed_cells(page):
    text = page.read_text(encoding="utf-8")
    assert results_page._PART.search(text)
    assert results_page.with_tables(text) == text, "run: python bench/results_page.py"


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Two seeds of one cell, one of another, and one that failed."""
    monkeypatch.setattr(results_page, "CELLS", tmp_path)
    line = {"dataset": "d", "noise": "pair:0.45", "method": "als-lc", "status": "done"}
    line |= {"samples": 1000, "label_accuracy_before": 0.5, "label_accuracy_after": 0.9}
    line |= {"relabel_precision": 0.75, "relabel_recall": 1.0, "seconds": 2.0, "seed": 0}
    line |= {"detected": 400, "detection_precision": 0.95, "test_accuracy": 0.8}
    other = {**line, "seed": 1, "test_accuracy": 0.9}
    plain = {**line, "method": "erm", "noise": "none", "relabel_precision": None}
    failed = {**line, "seed": 2, "status": "failed", "test_accuracy": None}
    folder = tmp_path / "compare-d"
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in (line, other, plain, failed))
    (folder / "cells.jsonl").write_text(lines)


def test_tables_by_hand(cells):
    assert results_page.accuracy_table("d").splitlines() == [
        "| test accuracy, % | none | pair 45 % |",
        "| --- | --- | --- |",
        "| als-lc | – | 85.00 ± 7.07 |",
        "| erm | 80.00 | – |",
    ]
    row = results_page.labels_table("d").splitlines()[2]
    # 400 doubted, 5 % of them of the 500 good ones
    assert row == (
        "| pair 45 % | 50.00 ± 0.00 | 90.00 ± 0.00 | 75.00 ± 0.00 | 100.00 ± 0.00 "
        "| 4.00 ± 0.00 | 2 | 2 |"
    )


def test_published_figures_stand_beside_ours_by_hand(cells, tmp_path):
    line = {"noise": "file:sym_r0.2.json", "method": "als-lc", "status": "done", "seed": 0}
    (tmp_path / "compare-d" / "cells.jsonl").write_text(json.dumps({**line, "test_accuracy": 0.99}))
    noises = ["file:sym_r0.2.json", "file:idn_r0.2.csv"]
    published = {"noises": noises, "last": {"A": [98.5, 70], "B": [99.75, 1.25]}}
    (tmp_path / "published-d.json").write_text(json.dumps(published))
    assert results_page.published_table("d").splitlines() == [
        "| label file | als-lc | A | B |",
        "| --- | --- | --- | --- |",
        "| sym_r0.2 | 99.00 | 98.50 | 99.75 |",
        "| idn_r0.2 | – | 70.00 | 1.25 |",
    ]


def test_tables_of_corrections_by_hand(cells, tmp_path):
    line = {"set": "wine", "samples": 178, "noise": "pair:0.3"}
    rights = {"plain vote, k = 5": 0.7, "correct_labels": 0.8, "plain vote, k = 10": 0.75}
    lines = [{**line, "method": m, "label_accuracy_after": a} for m, a in rights.items()]
    (tmp_path / "correction-t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert results_page.right_table("t").splitlines()[2] == "| wine, n = 178 | 0.750 / 0.800 |"
    figures = {"label_accuracy_after": 0.9, "relabel_precision": 0.5, "good_labels_changed": 0.01}
    line = {"noise": "none", "label_accuracy_before": 1.0, "survival": 0.97}
    line |= {"plain_vote": {**figures, "k": 20}, "correct_labels": {**figures, "k": 0}}
    (tmp_path / "correction-u.jsonl").write_text(json.dumps(line))
    row = "| none | 1.000 | 0.970 | 20 | 0.900 | 0.900 | 0.500 | 0.500 | 1.00% | 1.00% |"
    assert results_page.vote_table("u").splitlines()[2] == row


def test_only_marked_parts_are_replaced(cells):
    page = "a\n<!-- results: d accuracy -->\nold\n<!-- results: end -->\nb\n"
    new = results_page.with_tables(page)
    assert new.startswith("a\n<!-- results: d accuracy -->\n\n| test accuracy")
    assert new.endswith("|\n\n<!-- results: end -->\nb\n")
    assert results_page.with_tables(new) == new
