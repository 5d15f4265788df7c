"""The shape of the house: which folder may import from which. (Further arrows are ruff's, in pyproject.toml.)"""

import ast
from pathlib import Path

import pytest
from conftest import CHECKOUT

pytestmark = pytest.mark.quick

PACKAGE = CHECKOUT / "fashion_ddp"
# A folder imports from itself and from those before it, its neighbours in one entry left out.
ORDER = [{"ground"}, {"config"}, {"distributed"}, {"data", "models"}, {"runs"}, {"tracking", "report"}, {"training"}]
NEVER = {"runs": {"data"}, "report": {"data", "models", "distributed"}}


def room(path: Path) -> str:
    """The folder that a file lies in; of a file at the top, whether it is a command or ground."""
    folder = path.relative_to(PACKAGE).parts[0]
    return folder if (PACKAGE / folder).is_dir() else "command" if "__main__" in path.read_text() else "ground"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    imports = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
    names = (f"{node.module}.{alias.name}".split(".") for node in imports for alias in node.names)
    asked = {name[1] for name in names if name[0] == "fashion_ddp"}
    imported = {name if (PACKAGE / name).is_dir() else room(PACKAGE / f"{name}.py") for name in asked - {"load_run"}}
    own = room(path)
    below = set().union(*ORDER[: next((n for n, rooms in enumerate(ORDER) if own in rooms), None)])
    assert path == PACKAGE / "__init__.py" or imported <= (below | {own}) - NEVER.get(own, set())
