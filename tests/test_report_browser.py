"""The report in headless Chromium: filters, keys, decisions out and in, nothing fetched."""

import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from report_run import images, make_run
from test_report import NASTY

from als_ext.cli import main
from als_ext.correction import read_decisions
from als_ext.data import read_labels
from als_ext.report import write_report

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install 'als_ext[browser]')"
)
CHROMIUM = os.environ.get("ALS_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH (ALS_CHROMIUM names another)"
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Opens a report; whatever the page complains about or asks for fails the test."""
    contexts, complaints = [], []

    def open_page(path, **options):
        context = browser.new_context(viewport={"width": 1400, "height": 900}, **options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: note(request.url))
        page.goto(path.as_uri())
        return page

    def note(url):
        if not url.startswith(("file://", "blob:", "data:")):
            complaints.append(f"request of {url}")

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report about 300 samples with some 120 relabels, and the samples."""
    folder = tmp_path_factory.mktemp("report")
    x, y = images(300, 4)
    samples = make_run(folder / "run", x, y, 120, ("cat", "dog", "bird", "fish"))
    write_report(folder / "run", folder / "report.html")
    return folder / "report.html", samples


def status(page):
    return page.locator("#status").inner_text()


def cells(page, heading):
    at = page.locator("#head th").all_inner_texts().index(heading)
    return page.locator(f"#rows td:nth-child({at + 1})").all_inner_texts()


def focused(page):
    return page.evaluate("document.activeElement.closest('tr')?.children[1].textContent")


def test_filters(opened, report):
    path, samples = report
    page = opened(path)
    at = np.flatnonzero(samples.given != samples.label)
    old, new, share = samples.given[at], samples.label[at], samples.share[at]
    assert status(page).startswith(f"{len(at)} of {len(at)} relabels shown.")
    page.get_by_label("Given class").select_option("bird")
    assert status(page).startswith(f"{(old == 2).sum()} of ")
    assert set(cells(page, "Given")) == {"bird"}
    page.get_by_label("New class").select_option("cat")
    assert status(page).startswith(f"{((old == 2) & (new == 0)).sum()} of ")
    page.get_by_role("button", name="Reset filters").click()
    page.get_by_label("Share from, %").fill("20")
    page.get_by_label("to, %", exact=True).fill("60")
    assert status(page).startswith(f"{((share >= 0.2) & (share <= 0.6)).sum()} of ")
    page.get_by_role("button", name="Reset filters").click()
    page.get_by_label("True label").select_option("given was right")
    assert status(page).startswith(f"{(old == samples.true[at]).sum()} of ")
    page.get_by_label("True label").select_option("all")
    page.get_by_label("Row", exact=True).fill(str(at[7]))
    assert cells(page, "Row") == [str(at[7])]
    page.get_by_label("Row", exact=True).fill("no such")
    assert status(page).startswith("0 of ")
    assert page.locator("#detail").is_hidden()
    page.locator('.pair[data-old="1"][data-new="3"]').click()
    assert status(page).startswith(f"{((old == 1) & (new == 3)).sum()} of ")
    assert focused(page) == cells(page, "Row")[0]


def test_orders_and_pages(opened, report):
    path, samples = report
    page = opened(path)
    at = np.flatnonzero(samples.given != samples.label)
    by_margin = at[np.argsort(samples.margin[at], kind="stable")]
    assert cells(page, "Row") == [str(row) for row in by_margin[:50]]
    page.get_by_role("button", name="Next").click()
    assert cells(page, "Row") == [str(row) for row in by_margin[50:100]]
    page.get_by_role("button", name="Last").click()
    assert cells(page, "Row") == [str(row) for row in by_margin[100:]]
    page.get_by_label("Page", exact=True).fill("1")
    page.get_by_label("Page", exact=True).press("Enter")
    assert cells(page, "Row") == [str(row) for row in by_margin[:50]]
    page.get_by_label("Order").select_option("highest loss first")
    by_loss = at[np.argsort(-samples.loss[at], kind="stable")]
    assert cells(page, "Row") == [str(row) for row in by_loss[:50]]


def test_everything_by_keyboard(opened, report):
    page = opened(report[0])
    page.keyboard.press("Tab")  # the link past the summary
    page.keyboard.press("Enter")
    for _ in range(40):
        page.keyboard.press("Tab")
        if focused(page):
            break
    rows = cells(page, "Row")
    assert focused(page) == rows[0]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    for key, place in (("ArrowDown", 1), ("j", 2), ("k", 1), ("ArrowUp", 0), ("ArrowUp", 0)):
        page.keyboard.press(key)
        assert focused(page) == rows[place]
    page.keyboard.press("a")
    assert status(page).startswith(f"row {rows[0]}: accepted.")
    assert focused(page) == rows[1]
    page.keyboard.press("r")
    assert "1 accepted, 1 rejected" in status(page)
    assert cells(page, "Decision")[:3] == ["accepted", "rejected", "open"]
    page.keyboard.press("z")
    assert "1 accepted, 0 rejected" in status(page)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("o")
    assert "0 accepted, 0 rejected" in status(page)
    page.keyboard.press("PageDown")
    assert page.locator("#page").input_value() == "2"
    page.keyboard.press("End")
    assert page.locator("#page").input_value() == "3"
    page.keyboard.press("Home")
    assert focused(page) == rows[0]
    page.keyboard.press("Tab")  # out of the list again
    assert focused(page) is None


def test_decisions_go_out_and_come_back(opened, report, tmp_path, capsys):
    path, samples = report
    page = opened(path)
    page.get_by_label("Given class").select_option("dog")
    page.get_by_role("button", name="Reject all shown").click()
    page.get_by_role("button", name="Reset filters").click()
    page.get_by_label("Decision", exact=True).select_option("open")
    page.locator("#detail").get_by_role("button", name="Accept").click()
    accepted = int(cells(page, "Row")[0])
    with page.expect_download() as download:
        page.get_by_role("button", name="Export decisions").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == "decisions-als-lc.json"
    found = read_decisions(file)
    changed = samples.given != samples.label
    dogs = np.flatnonzero(changed & (samples.given == 1))
    assert found.row[~found.accepted].tolist() == dogs.tolist()
    assert found.row[found.accepted].tolist() == [accepted]

    expected = samples.label.copy()
    expected[dogs] = 1
    words = ["decide", str(path.parent / "run"), str(file), "--out", str(tmp_path / "labels.npy")]
    assert main(words) == 0
    assert f"1 accepted, {len(dogs)} rejected" in capsys.readouterr().out
    assert (read_labels(tmp_path / "labels.npy").numpy() == expected).all()
    assert main([*words, "--force", "--undecided", "reject"]) == 0
    expected = samples.given.copy()
    expected[accepted] = samples.label[accepted]
    assert (read_labels(tmp_path / "labels.npy").numpy() == expected).all()

    again = opened(path)  # another profile: nothing is kept there
    assert "0 accepted, 0 rejected" in status(again)
    again.get_by_label("Import decisions").set_input_files(file)
    again.get_by_text(f"{len(dogs) + 1} decisions taken.").wait_for()
    assert f"1 accepted, {len(dogs)} rejected" in status(again)
    content = json.loads(file.read_text())
    for change, message in (
        ({"labels_sha256": "0"}, "it is about other labels"),
        ({"format": "x"}, "it is no file of decisions"),
        ({"decisions": 3}, "it has no list of decisions"),
    ):
        wrong = tmp_path / "wrong.json"
        wrong.write_text(json.dumps({**content, **change}))
        again.get_by_label("Import decisions").set_input_files(wrong)
        again.get_by_text(f"Not imported: {message}").wait_for()
    assert f"1 accepted, {len(dogs)} rejected" in status(again)


def test_decisions_survive_a_closed_tab(opened, report):
    page = opened(report[0])
    page.get_by_role("button", name="Accept all shown").click()
    assert " 0 open" in status(page)
    page.reload()
    assert " 0 open" in status(page)
    page.get_by_role("button", name="Reopen all shown").click()
    page.get_by_role("button", name="Undo").click()
    assert " 0 open" in status(page)


def test_names_with_markup_stay_text(opened, tmp_path):
    x, y = images(80, 4)
    make_run(tmp_path / "run", x, y, 30, NASTY)
    write_report(tmp_path / "run", tmp_path / "r.html")
    page = opened(tmp_path / "r.html")
    assert page.evaluate("window.pwned") is None
    assert page.locator("script").count() == 2
    assert page.locator("main img, main b, main iframe").count() == 0
    assert set(cells(page, "Given")) | set(cells(page, "New")) == set(NASTY)
    for i in range(10):
        page.locator("#rows tr").nth(i).click()
    assert page.evaluate("window.pwned") is None


def test_nothing_can_be_fetched(browser, report):
    page = browser.new_page()
    page.goto(report[0].as_uri())
    refused = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'done', () => 'refused')")
    assert refused == "refused"
    says = page.evaluate(
        """() => new Promise((resolve) => {
          const told = (event) => resolve(event.effectiveDirective);
          document.addEventListener("securitypolicyviolation", told);
          document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/a.png" }));
        })"""
    )
    assert says == "img-src"
    page.close()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_shows_its_sample(opened, tmp_path, channels):
    x, y = images(200, 8, channels=channels)
    samples = make_run(tmp_path / "run", x, y, 60)
    write_report(tmp_path / "run", tmp_path / "r.html")
    page = opened(tmp_path / "r.html")
    for i in (0, 1, 20):
        row = page.locator("#rows tr").nth(i)
        row.click()
        sample = int(row.locator("td").nth(1).inner_text())
        shown = [(page.locator("#detail .large .picture"), sample)]
        near = samples.neighbours[np.count_nonzero(samples.suspect[:sample])]
        shown += [(page.locator("#detail li .picture").nth(k), near[k]) for k in (0, 7)]
        for picture, expected in shown:
            pixels = np.asarray(Image.open(io.BytesIO(picture.screenshot())).convert("RGB"))
            height, width, _ = pixels.shape
            middles = ((np.arange(8) + 0.5) * width / 8).astype(int)
            column = pixels[height // 8 : 7 * height // 8, middles, 0].mean(0)
            assert column.argmax() == y[expected]
            assert column.max() > 200


def test_100_000_relabels_stay_quick(opened, tmp_path):
    x, y = images(250_000, 10)
    make_run(tmp_path / "run", x, y, 100_000)
    write_report(tmp_path / "run", tmp_path / "r.html")
    (tmp_path / "empty.html").write_text("<!DOCTYPE html><link rel=icon href=data:,>")
    page = opened(tmp_path / "empty.html")
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy():
        """Seconds that the page's thread computed: other processes do not count."""
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "TaskDuration")

    seconds = {}
    for name, act in (
        ("open", lambda: page.goto((tmp_path / "r.html").as_uri())),
        ("order", lambda: page.get_by_label("Order").select_option("highest loss first")),
        ("filter", lambda: page.get_by_label("Given class").select_option("3")),
        ("reset", lambda: page.get_by_role("button", name="Reset filters").click()),
        ("accept all", lambda: page.get_by_role("button", name="Accept all shown").click()),
        ("last page", lambda: page.get_by_role("button", name="Last", exact=True).click()),
        ("key", lambda: page.locator("#rows tr").first.press("ArrowDown")),
    ):
        before = busy()
        act()
        status(page)
        seconds[name] = busy() - before
    print(", ".join(f"{name} {took:.2f} s" for name, took in seconds.items()))
    assert 0 < seconds.pop("open") < 6
    assert 0 < max(seconds.values()) < 1
    assert page.locator("#rows tr").count() <= 50
    assert " 0 open" in status(page)


NAMED = {"button", "combobox", "spinbutton", "searchbox", "textbox", "image", "region", "table"}


def test_every_control_has_a_name(opened, report):
    page = opened(report[0])
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    controls = [n for n in nodes if n.get("role", {}).get("value") in NAMED and not n["ignored"]]
    assert len(controls) > 50
    assert not [n for n in controls if not n.get("name", {}).get("value")]


CONTRAST = """() => {
  const rgba = (text) => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return [...numbers.slice(0, 3).map((v) => v * scale), numbers[3] ?? 1];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
    }
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *:not(script)")) {
    const text = [...node.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim());
    if (!text || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const ink = rgba(node instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${node.tagName} ${node.className} ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(opened, report, scheme):
    page = opened(report[0], color_scheme=scheme)
    page.locator("#rows tr").first.press("a")
    page.locator("#rows tr").nth(1).press("r")
    page.locator("summary").click()
    assert page.evaluate(CONTRAST) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    assert dark == (scheme == "dark")
