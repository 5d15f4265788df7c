"""Reading results: what load_run gives, that docs/results.md tells all of it, and the example that reads many runs."""

import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
import torch
from conftest import CHECKOUT, command
from faults import Fault
from safetensors.torch import save_file
from torch import nn

from fashion_ddp import load_run
from fashion_ddp.errors import UserError
from fashion_ddp.runs import folder
from fashion_ddp.runs.folder import RunFolder
from fashion_ddp.runs.reading import Run

contents = runpy.run_path(str(CHECKOUT / "docs" / "results.py"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all that a run may have."""
    folder = tmp_path_factory.mktemp("finished")
    ranks = faults.start_tiny(1, folder, ["--validation", "100", "--keep", "best", "--tracker", "auto"])
    assert ranks.wait() == [0], ranks.printed()
    return folder / "run"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    ranks = faults.start_tiny(1, folder, [], [Fault("step", "TERM", count=10)])
    assert ranks.wait() == [75], ranks.printed()
    return folder / "run"


class Own(nn.Sequential):
    """A user's model."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int):
        super().__init__(nn.Flatten(), nn.Linear(int(np.prod(image_shape)), classes))


def test_the_model_is_ready_to_answer_and_leaves_random_numbers_as_they_are(finished: Path) -> None:
    before = torch.get_rng_state()
    model = load_run(finished).model()
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training and {p.device.type for p in model.parameters()} == {"cpu"}


def test_reading_imports_neither_torch_nor_wandb_nor_accelerate(finished: Path) -> None:
    code = (
        "import sys; from fashion_ddp import load_run; run = load_run(sys.argv[1]); run.predictions; run.metrics\n"
        "print(sorted({'torch', 'wandb', 'accelerate', 'matplotlib'} & set(sys.modules)))"
    )
    line = [sys.executable, "-c", code, str(finished)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout == "[]\n"


def test_a_users_model_is_named_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "own"))
    config = (path / "config.yaml").read_text().replace("hidden_units: 4", "hidden_units: null")
    (path / "config.yaml").write_text(config.replace("model: cnn", "model: test_reading:Own"))
    expected = Own((1, 28, 28), 10).state_dict()
    save_file(expected, path / "model.safetensors")
    run = load_run(path)
    with pytest.raises(UserError, match=re.escape("own has a model of your own: name it again, as .model(Own) or")):
        run.model()
    monkeypatch.chdir(CHECKOUT / "tests" / "runs")
    for model in (run.model(Own), run.model("test_reading:Own")):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    with pytest.raises(UserError, match="its weights do not fit this Sequential: .*Missing key"):
        run.model("cnn")


def test_a_model_is_exported_as_the_page_says(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cnn-blog-seed42").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs" / "models.md").read_text(), flags=re.DOTALL)
    exec(block, {})  # noqa: S102 - our own page
    images = torch.rand(5, 1, 28, 28)
    assert torch.equal(torch.export.load("cnn.pt2").module()(images), load_run(finished).model()(images))


def test_what_an_unfinished_run_lacks_is_said(stopped: Path) -> None:
    run = load_run(stopped)
    assert run.status == "stopped" and len(run.metrics) == 1 and run.steps
    for ask in (lambda: run.predictions, run.model, lambda: run.image_shape):
        with pytest.raises(UserError, match=r"run has no \w+\.safetensors: the run is stopped, not finished"):
            ask()


def test_a_damaged_file_is_named(finished: Path, tmp_path: Path) -> None:
    run = load_run(shutil.copytree(finished, tmp_path / "own"))
    (run.path / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="own/model.safetensors cannot be read"):
        run.model()


@pytest.mark.quick
@pytest.mark.parametrize("found", [folder.FORMAT + 1, "2", None])
def test_another_format_is_refused_by_name(found: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: cnn\n")
    RunFolder(tmp_path).write_json("summary.json", {"format": found})
    with pytest.raises(UserError, match=re.escape(f"(format {found!r}, and this one reads {folder.FORMAT})")):
        load_run(tmp_path)


@pytest.mark.quick
def test_a_folder_without_a_run_is_named_and_one_of_runs_names_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").touch()
    for name, said in (("none", "none is no run folder: it has no config.yaml"), (".", f"; {tmp_path}/mine is one")):
        with pytest.raises(UserError, match=re.escape(said)):
            load_run(tmp_path / name)


@pytest.mark.quick
def test_the_page_is_up_to_date() -> None:
    assert (CHECKOUT / "docs" / "results.md").read_text() == contents["page"]()


def keys(value: Any, above: str = "") -> set[str]:
    """Every key in what a file holds, as the page writes them."""
    if isinstance(value, list):
        return {above} if not value else set().union(*(keys(each, above + "[]") for each in value))
    if isinstance(value, dict) and value:
        return set().union(*(keys(each, f"{above}.{name}" if above else name) for name, each in value.items()))
    return {above}


def held(run: Run) -> dict[str, list[set[str]]]:
    """The keys of each object of each file of a run."""
    found = {"config.yaml": [keys(run.config)], "summary.json": [keys(run.summary)]}
    for name in ("metrics.jsonl", "steps.jsonl"):
        found[name] = [keys(json.loads(line)) for line in (run.path / name).read_text().splitlines()]
    found["environment.json"] = [keys(start) for start in run.environment]
    if run.status == "finished":
        for name in ("predictions.safetensors", "examples.safetensors"):
            found[name] = [set(run.arrays(name))]
    return found


@pytest.mark.parametrize(
    ("kind", "its"),
    [("finished", {"", "validation", "best", "finished", "W&B"}), ("stopped", {"", "unfinished", "stopped"})],
)
def test_a_real_run_holds_exactly_these_keys(kind: str, its: set[str], request: pytest.FixtureRequest) -> None:
    run = load_run(request.getfixturevalue(kind))
    told = {file.name: [key.name for key in file.keys if key.when in its] for file in contents["files"]()}
    for name, objects in held(run).items():
        patterns = {re.sub("<.*>", ".+", re.escape(key).replace(r"\<", "<").replace(r"\>", ">")) for key in told[name]}
        for found in objects:
            unknown = {key for key in found if not any(re.fullmatch(pattern, key) for pattern in patterns)}
            missing = {p for p in patterns if not any(re.fullmatch(p, key) for key in found)}
            assert (name, unknown, missing) == (name, set(), set())
    names = {name for file in contents["files"]() for name in file.name.replace("/", "").split(", ")}
    assert {path.name for path in run.path.iterdir()} <= names


EXAMPLE = CHECKOUT / "examples" / "read_runs.py"


def test_the_example_makes_a_table_of_runs(finished: Path, stopped: Path, tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLE))
    rows = example["of_runs"]([finished, stopped])
    assert [(row["status"], row["hidden_units"]) for row in rows] == [("finished", 4), ("stopped", 4)]
    assert rows[0]["val/loss"] > 0
    assert [row["epoch"] for row in example["of_epochs"]([finished, stopped])] == [1, 2, 3, 1]

    for path, name in ((finished, "one"), (stopped, "two")):
        (tmp_path / name).symlink_to(path)
    done = command("python", str(EXAMPLE), str(tmp_path), cwd=tmp_path)
    if importlib.util.find_spec("pandas") is None:
        assert (done.returncode, done.stderr) == (2, "error: pandas is not installed: pip install pandas\n")
        return
    assert done.returncode == 0, done.stderr
    accuracy = load_run(finished).summary["test/accuracy"]
    assert f"{accuracy:.6f}" in done.stdout and "stopped" in done.stdout and "4 epochs" in done.stdout
