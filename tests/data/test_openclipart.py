"""Pictures that nobody here made: the walk through docs/data.md, on Debian's clip art."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT, command

from fashion_ddp.runs.reading import load_run

WHOLE = Path("/usr/share/openclipart/png")
PACKAGE = "openclipart-png"


@pytest.fixture(scope="module")
def clip_art() -> None:
    """The package, installed where that is possible."""
    if os.environ.get("FASHION_DDP_CI"):
        pytest.skip(f"{PACKAGE} is not fetched in CI")
    if not WHOLE.is_dir() and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "install", "-y", "-q", PACKAGE], check=False, capture_output=True)
    if not WHOLE.is_dir():
        pytest.skip(f"needs Debian's package {PACKAGE}, which is not here and cannot be installed")


@pytest.mark.slow
@pytest.mark.usefixtures("clip_art")
def test_the_walk_from_an_installed_folder_to_a_prediction(tmp_path: Path) -> None:
    page = (CHECKOUT / "docs/data.md").read_text()
    walk = page.partition("### A walk")[2].partition("\nWhat to know:")[0]
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", walk, re.DOTALL | re.MULTILINE)
    [split] = [text for kind, text in fences if kind == "python"]
    prepare, train, compare = "".join(text for kind, text in fences if not kind).splitlines()
    subprocess.run([sys.executable, "-c", split], cwd=tmp_path, check=True)
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    made = command(*shlex.split(prepare), cwd=tmp_path, **env)
    named = re.findall(r"^  (clipart/\S+\.png): ", made.stderr, re.MULTILINE)
    assert made.returncode == 2 and named and "leave them out with --skip-broken" in made.stderr, made.stderr

    briefly = ["--epochs", "2", "--tracker", "none"]
    done = command(*shlex.split(train), *briefly, cwd=tmp_path, **env)
    assert done.returncode == 0 and "decoding" not in done.stdout, done.stderr
    [path] = (tmp_path / "runs").iterdir()
    run = load_run(path)
    assert [one.partition(": ")[0] for one in run.environment[0]["left_out"]] == named
    assert run.summary["world_size"] == 2 and run.summary["image_shape"] == [3, 64, 64]
    assert sum(run.summary["training_images_by_class"]) == run.summary["training_images"] > 1000
    largest = max(map(list(run.predictions["labels"]).count, range(6))) / run.summary["test_images"]
    assert run.summary["test/accuracy"] > 1.2 * largest

    done = command(*shlex.split(compare), cwd=tmp_path)
    assert done.returncode == 0 and "balanced accuracy %" in (tmp_path / "report/report.md").read_text(), done.stderr
    assert (tmp_path / "report/report.html").stat().st_size < 5_000_000
    picture = next((tmp_path / "clipart/test/food").iterdir())
    done = command("python", "-m", "fashion_ddp.predict", str(path), str(picture), cwd=tmp_path)
    assert done.returncode == 0 and "food" in done.stdout, done.stderr
