"""The page in a real browser: on a phone, a tablet and a desk, in light and dark, with one run and with fifty."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reports
from browser import Browser
from conftest import need
from reports import Report, make_report, make_run, submitted

from fashion_ddp.report.page import PICTURED
from fashion_ddp.report.tables import BEST
from fashion_ddp.report.text import Table, markdown_table


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Models of one and of three seeds, synthetic data, a failed run, and names that mean harm."""
    runs = tmp_path_factory.mktemp("page") / "runs"
    for seed in (0, 1, 2):
        submitted(make_run(runs / f"cnn-{seed}", model="cnn", skill=4.0, seed=seed), energy_j=7.2e6)
    make_run(runs / "linear", model="linear", skill=2.5)
    make_run(runs / "relu", model="relu", dead=(2, 4))
    make_run(runs / ("<img src=http://x/y.png onerror=alert(1)>" + "long" * 30).replace("/", "|"), model="mlp", lr=0.05)
    make_run(runs / "made up", model="linear", dataset="synthetic", data={})
    submitted(make_run(runs / "failed", model="cnn", status="failed", seed=9, summary={"error": "loss is not finite"}))
    return make_report([runs], runs.parent / "report")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    need("chromium")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


OVERFLOWING = """[...document.body.querySelectorAll("*")].filter(e => !e.closest(".box, pre, symbol, .symbols")
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""


def assert_it_fits(browser: Browser, width: int) -> None:
    assert browser.complaints() == [] and browser.ask("document.documentElement.scrollWidth") == width
    assert browser.ask(OVERFLOWING) == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_every_screen(browser: Browser, report: Report, width: int, dark: bool) -> None:
    browser.open(report.out / "report.html", width, dark)
    assert browser.ask("innerWidth") == width
    assert_it_fits(browser, width)
    assert browser.requests() == [(report.out / "report.html").as_uri()]
    colours = [browser.ask(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")]
    light, darkness = (sum(map(int, colour[4:-1].split(","))) > 384 for colour in colours)
    assert light is not dark and darkness is dark


PARTS = ["Are the differences real?", "Beside the tutorials' published figures", "What differs between the rows"]
PARTS += ["Accuracy, and what it costs", "Learning curves", "Dead logits of relu", "Confusion matrices", "By class"]
PARTS += ["Most confused classes", "The same nine test images", "Most confidently wrong", "Samples of the training set"]
PARTS += ["What the layers see", "Models"]


def test_the_page_holds_every_part(browser: Browser, report: Report) -> None:
    browser.open(report.out / "report.html")
    headings = browser.ask("[...document.querySelectorAll('h3')].map(h => h.textContent)")
    assert {*PARTS} <= {*headings}
    assert browser.ask("document.querySelectorAll('.verdict').length") == 2  # real data, and synthetic
    assert browser.ask("document.querySelectorAll('#s1-predictions + p + div figure').length") == 4
    assert browser.ask("document.querySelectorAll('.grid3')[0].querySelectorAll('li').length") == 9
    # Each picture that is used is there, and drawn.
    used = "[...document.querySelectorAll('use')]"
    assert browser.ask(f"{used}.every(u => document.querySelector(u.getAttribute('href')))")
    assert browser.ask(f"{used}.length > 100 && {used}.every(u => u.getBoundingClientRect().width > 0)")
    loaded = "[...document.images].every(i => i.complete && i.naturalWidth > 0) && document.images.length"
    assert browser.ask(loaded) == 2  # feature maps after a convolution and a pooling
    _, *maps = browser.ask("[...document.querySelectorAll('.maps figcaption')].map(c => c.textContent)")
    assert maps == ["2.MaxPool2d: 10 x 7 x 7", "10.Conv2d: 10 x 14 x 14"]
    assert (report.out / "report.html").stat().st_size < 5_000_000


def test_a_prediction_is_marked_right_or_wrong_in_words_too(browser: Browser, report: Report) -> None:
    browser.open(report.out / "report.html")
    shown = "[...document.querySelectorAll('li.right, li.wrong')]"
    told = "t.querySelector('svg').getAttribute('aria-label')"
    tiles: list[Any] = browser.ask(f"{shown}.map(t => [t.className, t.innerText, {told}])")
    assert {kind for kind, *_ in tiles} == {"right", "wrong"}
    for kind, text, label in tiles:
        true, predicted = label.partition(": ")[2].split(", predicted ")
        assert (true == predicted) == (kind == "right") and predicted in text
        assert text[0] == {"right": "\u2713", "wrong": "\u2717"}[kind]
        assert (f"is {true}" in text) == (kind == "wrong")


def test_tables_sort(browser: Browser, report: Report) -> None:
    browser.open(report.out / "report.html")
    titles = report.page.tables[0][0]

    def press(title: str) -> list[str]:
        column, table = titles.index(title), "document.querySelector('table.sortable')"
        browser.ask(f"{table}.tHead.rows[0].cells[{column}].querySelector('button').click()")
        return browser.ask(f"[...{table}.tBodies[0].rows].map(row => row.cells[{column}].textContent)")

    losses = report.column("loss")
    assert len(set(report.column("accuracy %"))) == 4
    assert press("accuracy %") == sorted(report.column("accuracy %"), key=float, reverse=True)
    assert press("accuracy %") == sorted(report.column("accuracy %"), key=float)
    assert press("loss") == sorted(losses, key=float, reverse=True)
    assert press("std")[1:] == ["", "", ""]  # what is no number comes last
    assert [cell.removeprefix(BEST) for cell in press("model")] == ["cnn", "linear", "mlp", "relu"]
    sorted_by = "[...document.querySelectorAll('th[aria-sort]')].map(t => [t.textContent, t.ariaSort])"
    assert browser.ask(sorted_by) == [["model", "ascending"]]


def test_the_page_prints(browser: Browser, report: Report) -> None:
    browser.open(report.out / "report.html", dark=True)
    browser("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert len(browser("Page.printToPDF", preferCSSPageSize=True)["data"]) > 10_000


def test_a_run_made_before_pictures_were_kept_still_has_a_report(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "old", model="cnn")
    (run / "examples.safetensors").unlink()
    (run / "model.txt").unlink()
    r = make_report([tmp_path / "runs"], tmp_path / "report")
    browser.open(r.out / "report.html", 360)
    assert browser.complaints() == [] and browser.ask("document.querySelectorAll('svg.px').length") == 0
    assert browser.ask("document.querySelectorAll('table.matrix').length") == 1


def test_many_classes_with_long_names_fit(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for count, matrices in ((20, 1), (21, 0)):
        monkeypatch.setattr(reports, "CLASSES", [f"a class whose name is long, number {n}" for n in range(count)])
        make_run(tmp_path / str(count) / "one", model="relu", dead=(1, 7))
        r = make_report([tmp_path / str(count)], tmp_path / "report")
        browser.open(r.out / "report.html", 360)
        assert_it_fits(browser, 360)
        assert browser.ask("document.querySelectorAll('table.matrix').length") == matrices
        assert len(r.runs["one"]["confusion"]) == count and f"relu: 2 of {count} logits are dead" in r.text


@pytest.mark.slow
def test_fifty_runs_of_fifty_settings_fit_one_page(browser: Browser, tmp_path: Path) -> None:
    for n in range(50):
        make_run(tmp_path / "runs" / f"run{n}", model="cnn", skill=2 + n / 25, lr=0.001 * (n + 1))
    r = make_report([tmp_path / "runs"], tmp_path / "report")
    assert (r.out / "report.html").stat().st_size < 5_000_000 and len(r.json["pairs"]) == 50 * 49 // 2
    assert len(r.page.tables[0]) == 51 and f"Pictures are shown of the first {PICTURED} rows" in r.text
    browser.open(r.out / "report.html", 360)
    assert_it_fits(browser, 360)
    assert browser.ask("document.querySelectorAll('table.matrix').length") == 50
    outside = """[...document.querySelectorAll('.plot text')].filter(t => { const a = t.getBoundingClientRect(),
        b = t.ownerSVGElement.getBoundingClientRect(); return a.top < b.top - 2 || a.bottom > b.bottom + 2
        || a.left < b.left - 2 || a.right > b.right + 2 }).map(t => t.textContent)"""
    assert browser.ask(outside) == []
    labels = r.page.tables[1]  # of fifty rows, the pairs with the first
    assert len(labels) == 50 and {row[0] for row in labels[1:]} == {r.json["rows"][0]["label"]}


@pytest.mark.quick
def test_a_class_may_have_any_name_in_the_title_of_a_column() -> None:
    title, *_ = markdown_table(Table(["row", "<img src=x onerror=alert(1)>|b"], [False, True], [])).splitlines()
    assert title == r"| row | &lt;img src=x onerror=alert(1)&gt;\|b |"
