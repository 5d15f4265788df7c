"""The shape of the house: which folder may import from which, and what others keep private is used with a guard.

(Further arrows are ruff's, in pyproject.toml.)
"""

import ast
from collections.abc import Iterator
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


# Private by their names alone, as their documentation shows; Python's own; and what compiled.py tries.
USABLE = {"_asdict", "_replace", "_exit", "_shutdown", "_run_exitfuncs", "_finalizer", "_inductor"}


def test_what_other_libraries_keep_private_is_used_with_a_guard() -> None:
    trees = [ast.parse(path.read_text()) for top in (PACKAGE, CHECKOUT / "launch") for path in top.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    ours |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    used = {name for node in nodes for name in private_names(node) if not name.startswith("_foreach_")}
    assert used - ours - USABLE == set(), "read them through fashion_ddp.private"


def private_names(node: ast.AST) -> Iterator[str]:
    """The names with one underscore that a node reads from something else, or imports."""
    names = [node.attr] if isinstance(node, ast.Attribute) else []
    if isinstance(node, ast.ImportFrom):
        names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    yield from (name for name in names if name.startswith("_") and not name.startswith("__"))
