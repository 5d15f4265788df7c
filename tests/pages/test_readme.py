"""The pages: links lead somewhere, none grows too long, what programs print is up to date, and README's blocks work."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import CHECKOUT
from torch import nn

from fashion_ddp.config import cli
from fashion_ddp.config.layers import recipe_settings
from fashion_ddp.models import architectures

pytestmark = pytest.mark.quick

PAGES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md"))]


def block(kind: str) -> str:
    """The README's one block of that kind."""
    [code] = re.findall(rf"```{kind}\n(.*?)```", (CHECKOUT / "README.md").read_text(), flags=re.DOTALL)
    return code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize(("page", "lines"), [("README", 150), ("CONTRIBUTING", 80), ("docs/trouble-shooting", 399)])
def test_a_page_stays_short(page: str, lines: int) -> None:
    assert len((CHECKOUT / f"{page}.md").read_text().splitlines()) <= lines


PRINTED = {"scaling_model.py": "scaling.md", "page.py scaling": "scaling.md", "page.py": "performance.md"}


@pytest.mark.parametrize(("program", "page"), PRINTED.items())
def test_what_a_program_prints_stands_in_its_page(program: str, page: str) -> None:
    name, *words = program.split()
    line = [sys.executable, str(CHECKOUT / "benchmarks" / name), *words]
    printed = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    assert printed in (CHECKOUT / "docs" / page).read_text()


def test_a_drawing_is_described_by_what_its_runs_said() -> None:
    text = "".join(page.read_text() for page in PAGES)
    drawings = sorted((CHECKOUT / "docs" / "pictures").glob("*.svg"))
    for drawing in drawings:
        assert f"![{title(drawing.read_text())}](pictures/{drawing.name})" in text
    assert drawings


def test_a_drawing_says_what_its_curves_say() -> None:
    draw = runpy.run_path(str(CHECKOUT / "benchmarks" / "pictures.py"))
    one = [(step, 2 / step) for step in range(1, 300)]
    other = [(step, value + (3e-4 if step == 77 else 1e-5)) for step, value in one]
    assert "of which the largest is 3.0e-4" in title(draw["draw_ranks"]([one, one, other, one]))
    told = [title(draw["draw_interrupted"](one, one[:200], one, 150, equal)) for equal in (True, False)]
    assert told[0].endswith("both are equal to the bit") and told[1].endswith("both are NOT equal")
    assert "killed after step 200" in told[0] and "the checkpoint of step 150" in told[0]


def title(drawing: str) -> str:
    return next(iter(ElementTree.fromstring(drawing))).text or ""


def test_the_model_to_add_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "ARCHITECTURES", {})
    names = {"architecture": architectures.architecture, "Shape": architectures.Shape, "nn": nn}
    exec(block("python"), names)  # noqa: S102 - our own page
    [build] = architectures.ARCHITECTURES.values()
    assert build((1, 28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_recipe_to_add_can_be_added(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(block("yaml"))
    recipe = str(tmp_path / "mine.yaml")
    assert recipe_settings(recipe, "cnn")["hidden_units"] == 32
    assert recipe_settings(recipe, "pkg:Net")["lr"] == 0.001
    cli.parse(["--recipe", recipe, "--model", "cnn"])
