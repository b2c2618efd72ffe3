"""The report's file: what it says, what it leaves out, and that all text in it stays text."""

import base64
import hashlib
import io
import json
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from report_run import images, make_run

from als_ext.cli import main
from als_ext.report import read_samples, write_report, write_samples
from als_ext.report.charts import line_chart

NASTY = (
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 2'>",
    "\"'&<b>\u2028&amp;",
    "plain",
)


class Page(HTMLParser):
    """Tags and texts as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.scripts, self.open = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data.strip())

    @property
    def data(self):
        return json.loads(self.scripts[0])

    def by_id(self, name):
        return [tag for tag, attrs in self.tags if attrs.get("id") == name]


def column(packed):
    return np.frombuffer(base64.b64decode(packed["data"]), f"<{packed['type']}")


def page_of(folder, **options):
    out = folder.parent / "report.html"
    written = write_report(folder, out, overwrite=True, **options)
    text = out.read_text(encoding="utf-8")
    assert written.size == len(text.encode("utf-8"))
    return Page(text), text, written


@pytest.fixture
def run(tmp_path):
    x, y = images(200, 4)
    return tmp_path / "run", make_run(tmp_path / "run", x, y, 60)


def test_every_relabel_is_in_the_file(run):
    folder, samples = run
    page, _, written = page_of(folder)
    data = page.data
    at = np.flatnonzero(samples.given != samples.label)
    found = {name: column(packed) for name, packed in data["columns"].items()}
    assert (found["row"] == at).all()
    assert (found["old"] == samples.given[at]).all()
    assert (found["new"] == samples.label[at]).all()
    assert (found["true"] == samples.true[at]).all()
    for name in ("share", "margin", "loss", "log_pi"):
        assert (found[name] == getattr(samples, name)[at]).all()
    near = samples.neighbours  # of the suspects, which are the relabels here
    assert (found["near"].reshape(near.shape) == near).all()
    assert (found["near_old"].reshape(near.shape) == samples.given[near]).all()
    assert (found["near_new"].reshape(near.shape) == samples.label[near]).all()
    assert data["count"] == written.relabels == len(at)
    assert data["classes"] == ["0", "1", "2", "3"]
    assert "index" not in found  # it is the row


def test_counts_of_the_classes_are_those_of_the_relabels(run):
    folder, samples = run
    page, _, _ = page_of(folder)
    buttons = [attrs for _, attrs in page.tags if attrs.get("class", "").startswith("pair")]
    for attrs in buttons:
        old, new = int(attrs["data-old"]), int(attrs["data-new"])
        count = int(((samples.given == old) & (samples.label == new)).sum())
        assert attrs["aria-label"] == f"{count} from {old} to {new}"
    both = {(o, n) for o, n in zip(samples.given, samples.label, strict=True) if o != n}
    assert len(buttons) == len(both)


def test_grey_pictures_are_the_samples_to_the_bit(run):
    folder, _ = run
    page, _, _ = page_of(folder)
    pictures = page.data["pictures"]
    assert pictures["size"] == pictures["pitch"] == [8, 8]
    head, data = pictures["sheets"][0].split(",")
    assert head == "data:image/png;base64"
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    x, _ = images(200, 4)
    for tile, row in enumerate(column(pictures["rows"])):
        top, left = 8 * (tile // 32), 8 * (tile % 32)
        assert (sheet[top : top + 8, left : left + 8] == x[row, 0]).all()


def test_colour_pictures_are_small_and_do_not_bleed(tmp_path):
    x = np.zeros((40, 3, 90, 60), np.uint8)
    x[::2, 0] = 255  # red and blue in turn
    x[1::2, 2] = 255
    make_run(tmp_path / "run", x, np.arange(40) % 2, 20)
    page, _, _ = page_of(tmp_path / "run", picture_size=30)
    pictures = page.data["pictures"]
    assert (pictures["size"], pictures["pitch"]) == ([20, 30], [24, 32])
    sheet = Image.open(io.BytesIO(base64.b64decode(pictures["sheets"][0].split(",")[1])))
    assert sheet.format == "JPEG"
    pixels = np.asarray(sheet).astype(int)
    for tile, row in enumerate(column(pictures["rows"])):
        top, left = 32 * (tile // 32), 24 * (tile % 32)
        expected = [255, 0, 0] if row % 2 == 0 else [0, 0, 255]
        assert abs(pixels[top : top + 30, left : left + 20] - expected).max() < 16


def test_only_the_least_sure_are_pictured_and_the_page_says_so(run):
    folder, samples = run
    at = np.flatnonzero(samples.given != samples.label)
    page, text, written = page_of(folder, pictures=5)
    assert written.pictured == 5
    assert page.by_id("capped")
    assert f"5 of {len(at)} relabels" in text
    first = np.argsort(samples.margin[at], kind="stable")[:5]
    expected = np.unique(np.append(samples.neighbours[first], at[first]))
    assert (column(page.data["pictures"]["rows"]) == expected).all()
    page, _, written = page_of(folder, pictures=0)
    assert (written.pictured, page.data["pictures"]) == (0, {"kind": "none"})
    page, _, written = page_of(folder)
    assert written.pictured == len(at)
    assert not page.by_id("capped")


def test_rows_of_numbers(tmp_path):
    x = np.random.default_rng(0).standard_normal((60, 20)).astype(np.float32)
    make_run(tmp_path / "run", x, np.arange(60) % 3, 20)
    page, text, _ = page_of(tmp_path / "run", features=7)
    found = page.data["pictures"]
    rows = column(found["rows"])
    assert (column(found["values"]).reshape(-1, 7) == x[rows, :7]).all()
    assert "first 7 of 20 numbers" in text
    page, _, _ = page_of(tmp_path / "run", features=20)
    assert not page.by_id("features")


def test_without_its_data_the_report_says_what_is_missing(run):
    folder, samples = run
    data = folder.parent / "data.npz"
    moved = data.rename(folder.parent / "elsewhere.npz")
    page, text, written = page_of(folder)
    assert page.by_id("missing")
    assert "cannot be read" in text
    assert str(data) in written.missing
    assert written.pictured == 0
    assert page.data["count"] == (samples.given != samples.label).sum()
    assert page_of(folder, dataset=f"npz:{moved}")[2].pictured > 0
    x, y = images(200, 4)
    np.savez(data, x_train=x, y_train=(y + 1) % 4)
    assert "no longer the one" in page_of(folder)[2].missing


def test_what_a_run_did_not_keep_is_left_out(tmp_path):
    x, y = images(80, 4)
    make_run(tmp_path / "run", x, y, 30, neighbours=False, known=False)
    page, text, _ = page_of(tmp_path / "run")
    assert "kept no neighbours" in text
    assert not {"near", "true"} & page.data["columns"].keys()
    assert 'name="truth"' not in text


def test_a_method_that_changed_nothing(run):
    page, text, written = page_of(run[0], method="erm")
    assert (written.relabels, page.data["count"]) == (0, 0)
    assert "erm changed no label" in text
    assert not page.by_id("filters")


def test_many_classes_are_listed_as_pairs(tmp_path):
    x, y = images(4000, 100)
    samples = make_run(tmp_path / "run", x, y, 2000)
    page, text, _ = page_of(tmp_path / "run")
    buttons = [attrs for _, attrs in page.tags if attrs.get("class") == "pair"]
    assert len(buttons) == 50
    changed = samples.given != samples.label
    pairs = samples.given[changed] * 100 + samples.label[changed]
    most = np.bincount(pairs).max()
    assert f": {most}</button>" in text
    assert f"{len(np.unique(pairs)) - 50} more are left out" in text


def test_names_with_markup_stay_text(tmp_path):
    x, y = images(80, 4)
    make_run(tmp_path / "run", x, y, 30, NASTY)
    page, text, _ = page_of(tmp_path / "run")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert {"img", "b", "iframe"}.isdisjoint(tags)
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert page.data["classes"] == list(NASTY)
    for name in NASTY:
        assert name in page.texts  # as an option of a filter
    assert "<script>window" not in text


def test_markup_in_the_files_of_a_run_stays_text(run):
    folder, _ = run
    result = json.loads((folder / "result.json").read_text())
    result |= {"dataset": NASTY[0], "noise": NASTY[1]}
    (folder / "result.json").write_text(json.dumps(result))
    settings = {"settings": {"method": ["erm", "als-lc"], "dataset": f"npz:{NASTY[0]}"}}
    (folder / "run.json").write_text(json.dumps(settings))
    page, text, _ = page_of(folder)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in page.tags]
    assert "<script>window" not in text


def test_the_page_allows_its_own_script_and_style_and_nothing_else(run):
    page, text, _ = page_of(run[0])
    (policy,) = [a["content"] for _, a in page.tags if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data: blob:;")
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    for part in (page.scripts[1], style):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    links = [a.get("href") or a.get("src") for _, a in page.tags if "href" in a or "src" in a]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not [a for _, a in page.tags if "style" in a]  # the policy would drop it


def test_100_000_relabels(tmp_path):
    x, y = images(250_000, 10)
    make_run(tmp_path / "run", x, y, 100_000)
    start = time.monotonic()
    page, _, written = page_of(tmp_path / "run")
    assert time.monotonic() - start < 60
    assert written.relabels == page.data["count"] > 98_000
    assert len(column(page.data["columns"]["row"])) == written.relabels
    assert written.size < 13e6


def test_a_damaged_run_is_refused(run, capsys):
    folder, _ = run
    cases = {
        "run.json": ["{", "[]", "{}", '{"settings": {"method": ["magic"]}}'],
        "result.json": ["{", "[]", "{}", '{"erm": {"relabelled": 1}, "als-lc": {"relabelled": 1}}'],
        "als-lc/metrics.jsonl": ["{", "{}", '{"epoch": NaN}', "[1]"],
        "als-lc/samples.npz": ["", "PK", "nonsense"],
    }
    for name, contents in cases.items():
        whole = (folder / name).read_bytes()
        for content in contents:
            (folder / name).write_text(content)
            assert main(["report", str(folder)]) == 2, (name, content)
            assert name.split("/")[-1] in capsys.readouterr().err
            assert not (folder / "report.html").exists()
        (folder / name).write_bytes(whole)
    assert main(["report", str(folder)]) == 0


def test_errors_of_the_command(run, capsys):
    folder, _ = run
    assert main(["report", str(folder)]) == 0
    for words, message in (
        ([str(folder)], "which exists (see --force)"),
        ([str(folder.parent)], "expected a folder of als-ext run --out; got no"),
        ([str(folder), "--method", "also", "--force"], "one of the run's, erm, als-lc, got 'also'"),
        ([str(folder), "--pictures", "-1", "--force"], "pictures: expected >= 0, got -1"),
        ([str(folder), "--picture-size", "3", "--force"], "picture_size: expected >= 4, got 3"),
        ([str(folder), "--features", "0", "--force"], "features: expected >= 1, got 0"),
        ([str(folder), "--out", str(folder / "no" / "r.html")], "does not exist"),
    ):
        assert main(["report", *words]) == 2
        assert message in capsys.readouterr().err
    (folder / "result.json").unlink()
    assert main(["report", str(folder), "--force"]) == 2
    assert "expected a finished run" in capsys.readouterr().err
    (folder / "als-lc" / "samples.npz").unlink()


def test_samples_come_back_as_they_were(run, tmp_path):
    folder, samples = run
    again = read_samples(folder / "als-lc" / "samples.npz")
    write_samples(tmp_path / "copy.npz", again)
    for name in type(samples).__dataclass_fields__:
        value, other = getattr(samples, name), getattr(read_samples(tmp_path / "copy.npz"), name)
        assert np.array_equal(value, other), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"given": np.full(200, 4)}, "given: expected values in"),
        ({"label": np.full(200, -1)}, "label: expected values in"),
        ({"loss": np.zeros(199, np.float32)}, "loss: expected"),
        ({"loss": np.zeros(200, np.int64)}, "of kind 'f'"),
        ({"neighbours": np.full((5, 8), 3)}, "a row a suspect"),
        ({"neighbours": np.zeros(5, np.int32)}, "neighbours: expected"),
        ({"given": np.array([object()] * 200)}, "damaged"),
        ({"words": np.frombuffer(b'{"class_names": 3}', np.uint8)}, "damaged"),
        ({"words": None}, "damaged"),
        ({"given": None}, "damaged"),
    ],
)
def test_damaged_samples_are_refused(run, change, message):
    path = run[0] / "als-lc" / "samples.npz"
    arrays = {**dict(np.load(path)), **change}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match="samples") as error:
        read_samples(path)
    assert message in str(error.value)


def test_charts_write_counts_as_people_do():
    chart = str(line_chart("Changed", {"a": [(1, 0), (2, 11_902)]}, "epoch"))
    assert "At the end: a 11,902." in chart
    assert ">10,000</text>" in chart
    assert "e+" not in chart
