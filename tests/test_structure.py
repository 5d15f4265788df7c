"""The shape of the house: who may import whom, and how large a room may grow. (Further arrows are ruff's.)"""

import ast
from pathlib import Path

import pytest
from conftest import CHECKOUT

pytestmark = pytest.mark.quick

# A module imports from floors below its own, or from its own room. Top floor last.
FLOORS = [
    {"errors"},
    {"private", "names", "position"},
    {"console", "clock", "stop", "own_code"},
    {"config", "lock"},
    {"initial"},
    {"settings", "provenance", "machine", "memory", "optim", "published", "synthetic", "download", "idx", "contents"},
    {"cli", "rundir", "meeting", "data", "own_data", "image_folder"},
    {"ranks"},
    {"sync", "claim", "report", "batches", "watch", "trace", "pictures", "norm"},
    {"transfer", "panels"},
    {"models"},
    {"compare", "step", "evaluate", "load", "tracking", "probe"},
    {"start", "graph", "recorder", "results", "predict", "push", "check"},
    {"checkpoint"},
    {"train"},
]
DATA_ROOM = {"data", "own_data", "image_folder", "idx", "published", "synthetic", "download"}
FILES = sorted((CHECKOUT / "fashion_ddp").rglob("*.py"))


def room(path: Path) -> str:
    """The module, or the package, that a file belongs to."""
    return path.relative_to(CHECKOUT / "fashion_ddp").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms of fashion_ddp that a file imports from, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fashion_ddp":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fashion_ddp."):
            found.add((node.module or "").split(".")[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_imports_point_down(path: Path) -> None:
    if path.name == "__init__.py" and path.parent.name == "fashion_ddp":
        return
    floor = next(n for n, rooms in enumerate(FLOORS) if room(path) in rooms)
    own = DATA_ROOM if room(path) in DATA_ROOM else {room(path)}
    below = set().union(*FLOORS[:floor]) | own
    assert imported(path) <= below


def test_the_report_knows_run_folders_only() -> None:
    for path in FILES:
        if room(path) in ("report", "compare"):
            assert imported(path) <= {"config", "rundir", "report", "errors", "console", "private"}, path


@pytest.mark.parametrize("path", [*FILES, *(CHECKOUT / "launch").glob("*.py")], ids=lambda path: path.name)
def test_a_module_stays_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 250


def test_the_loop_is_one_screen() -> None:
    tree = ast.parse((CHECKOUT / "fashion_ddp" / "train.py").read_text())
    [train] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert (train.end_lineno or 0) - train.lineno < 60
