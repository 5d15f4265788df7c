"""docs/change.md: each change can be applied to this checkout, and its command trains with it."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import CHECKOUT, command, need

PAGE = (CHECKOUT / "docs" / "change.md").read_text()
SECTIONS = {title: text for title, _, text in (part.partition("\n") for part in PAGE.split("\n## ")[1:])}
# One thread: those of runs that share the cores spend them on waiting for each other.
SHORT = ["--epochs", "1", "--tracker", "none", "--device", "cpu", "--threads", "1", "--run-dir", "run"]


def changed(title: str, folder: Path) -> Path:
    """A copy of the package with a section's change."""
    need("git")
    shutil.copytree(CHECKOUT / "fashion_ddp", folder / "fashion_ddp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CHECKOUT / "docs", folder / "docs")
    [change] = re.findall(r"```diff\n(.*?)```", SECTIONS[title], flags=re.DOTALL)
    assert len([line for line in change.splitlines() if line[:1] == "+" and line[:3] != "+++"]) <= 10
    subprocess.run(["git", "apply", "-"], cwd=folder, input=change, text=True, check=True)
    return folder


@pytest.mark.quick
@pytest.mark.parametrize("title", SECTIONS)
def test_a_change_fits_this_code(title: str, tmp_path: Path) -> None:
    changed(title, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_a_change_trains(title: str, tmp_path: Path) -> None:
    folder = changed(title, tmp_path)
    [line] = re.findall(r"^```\n(python .*)\n```", SECTIONS[title], flags=re.MULTILINE)
    words = [*shlex.split(line), *SHORT, *([] if "--dataset" in line else ["--dataset", "synthetic"])]
    done = command(*words, cwd=folder, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["test/accuracy"] > 0.15
    assert title != "A figure" or 0.5 < summary["test/auroc"] <= 1
