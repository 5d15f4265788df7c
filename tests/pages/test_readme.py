"""What the README and CONTRIBUTING tell people to type, open and paste works."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import CHECKOUT
from torch import nn

from fashion_ddp.config import cli, flags
from fashion_ddp.config.layers import recipe_settings
from fashion_ddp.models import architectures
from launch import submission
from launch.submission import Submission

pytestmark = pytest.mark.quick

DOCS = sorted(str(page.relative_to(CHECKOUT)) for page in (CHECKOUT / "docs").glob("*.md"))
EVERY = ["README.md", "CONTRIBUTING.md", *DOCS]
# The commands of docs/change.md are test_change.py's.
PAGES = [page for page in EVERY if page not in ("docs/change.md", "docs/slurm.md")]
TEXT = "\n".join((CHECKOUT / page).read_text() for page in PAGES)
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)
TYPED = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
TYPED += [line.partition("#")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines()]
NAMES = ("path/to", "package.module", "...", "--help")  # stand for something of the reader's
TYPED = sorted({line for line in TYPED if not any(name in line for name in NAMES)})
TRAIN = [line for line in TYPED if "-m fashion_ddp.train " in line]
FLAGS = [line for line in TYPED if re.match(r"--[\w-]+ ", line)]
MAKE = [line for line in TYPED if line.startswith("make ")]
SUBMIT = sorted(
    set(re.findall(r"python -m launch\.submit( --[^`\n]*)", "\n".join((CHECKOUT / p).read_text() for p in EVERY)))
)


def block(kind: str) -> str:
    """The README's one block of that kind, which is its first."""
    return next(code for found, code in BLOCKS if found == kind)


@pytest.mark.parametrize("line", TRAIN)
def test_a_training_command_is_valid(line: str) -> None:
    cli.parse(shlex.split(line.partition("-m fashion_ddp.train ")[2]))


@pytest.mark.parametrize("line", FLAGS)
def test_flags_are_valid(line: str) -> None:
    cli.parse(["--model", "cnn", *shlex.split(line)])


@pytest.mark.parametrize("line", MAKE)
def test_a_make_target_and_its_variables_exist(line: str) -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    for word in shlex.split(line)[1:]:
        name, equals, _ = word.partition("=")
        pattern = rf"^{name} \?=" if equals else rf"^([\w -]+ )?{name}( [\w -]+)?:"
        assert re.search(pattern, makefile, flags=re.MULTILINE), word


@pytest.mark.parametrize("line", SUBMIT)
def test_a_submission_is_valid(line: str) -> None:
    words = shlex.split(line.partition("#")[0])
    asked, others = flags.parse_known(Submission, "launch.submit", words)
    assert submission.commands(asked, others, [])


@pytest.mark.parametrize("page", EVERY)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", (CHECKOUT / page).read_text()):
        file, _, heading = link.partition("#")
        target = (CHECKOUT / page).parent / file if file else CHECKOUT / page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize(
    ("program", "page"),
    [
        ("scaling_model.py", "docs/scaling.md"),
        ("page.py scaling", "docs/scaling.md"),
        ("page.py", "docs/performance.md"),
        ("page.py readme", "README.md"),
    ],
)
def test_what_a_program_prints_stands_in_its_page(program: str, page: str) -> None:
    name, *words = program.split()
    line = [sys.executable, str(CHECKOUT / "benchmarks" / name), *words]
    printed = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    assert printed in (CHECKOUT / page).read_text()


def test_a_drawing_is_described_by_what_its_runs_said() -> None:
    drawings = sorted((CHECKOUT / "docs" / "pictures").glob("*.svg"))
    for drawing in drawings:
        assert f"![{title(drawing.read_text())}](docs/pictures/{drawing.name})" in TEXT
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
