"""A model of the user's own: its arguments, its source, and whole runs under every launcher."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import CHECKOUT, command, forked
from torch import nn

from fashion_ddp import user_code
from fashion_ddp.config.layers import make_config
from fashion_ddp.errors import UserError
from fashion_ddp.runs import claim, provenance
from fashion_ddp.runs.reading import Run, load_run

quick = pytest.mark.quick
SMALL = ("--dataset", "synthetic", "--tracker", "none", "--device", "cpu", "--epochs", "1", "--threads", "1")
SMALL += ("--validation", "11000", "--run-dir", "run")


class Net(nn.Module):
    def __init__(
        self, image_shape: Any, classes: int, width: int = 4, dropout: float = 0.0, *,
        act: Literal["relu", "tanh"] = "relu", norm: bool = False, name: str = "x", top: int | None = 3,
        sizes: tuple[int, ...] = (1, 2), plain=0.5, free=None,
    ) -> None:  # fmt: skip
        super().__init__()


@quick
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("width=3", 3),
        ("dropout=1", 1.0),
        ("dropout=1e-3", 0.001),
        ("act=tanh", "tanh"),
        ("norm=true", True),
        ("norm=False", False),
        ("name=3", "3"),
        ("name=a=b", "a=b"),
        ("top=None", None),
        ("top=5", 5),
        ("sizes=[3, 4]", (3, 4)),
        ("plain=2", 2.0),
        ("free=7", 7),
        ("free=yes please", "yes please"),
    ],
)
def test_arguments_are_of_the_types_of_the_signature(text: str, value: Any) -> None:
    found = user_code.convert_arguments(Net, [text])[text.partition("=")[0]]
    assert found == value and type(found) is type(value)


@quick
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("widht=3", "unknown 'widht'; did you mean 'width'? choices: width, dropout, act, norm, name, top, sizes"),
        ("classes=3", "unknown 'classes'"),
        ("width=2.5", "width must be a whole number, got '2.5'"),
        ("dropout=much", "dropout must be a number, got 'much'"),
        ("norm=3", "norm must be true or false, got '3'"),
        ("top=x", "top must be a whole number"),
        ("act=relo", "act: unknown 'relo'; did you mean 'relu'? choices: relu, tanh"),
        ("sizes=[3", "sizes must be a value as YAML writes it"),
    ],
)
def test_a_wrong_argument_is_named(text: str, said: str) -> None:
    with pytest.raises(UserError) as told:
        user_code.convert_arguments(Net, [text])
    assert f"model_args: {said}" in str(told.value)


@quick
def test_a_file_that_was_edited_between_two_runs_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    kept = []
    for value in ("1", "1", "22"):
        (tmp_path / "edited.py").write_text(f"kept = [{value}]")
        kept.append(user_code.load("edited:kept", "model"))
    assert kept == [[1], [1], [22]] and kept[0] is kept[1]


@quick
def test_a_function_may_take_any_argument_or_none() -> None:
    assert user_code.convert_arguments(lambda shape, classes, **more: None, ["a=1", "b=x"]) == {"a": 1, "b": "x"}
    with pytest.raises(UserError, match="unknown 'a'; it takes none"):
        user_code.convert_arguments(lambda shape, classes: None, ["a=1"])


@quick
def test_arguments_make_the_run(tmp_path: Path) -> None:
    def made(*arguments: str) -> Any:
        return make_config({"model": "my.net:Net", "model_args": list(arguments)})

    one = made("dropout=0.2", "depth=3")
    assert one == made("depth=3", "dropout=0.2") and claim.run_name(one) == "my.net_Net-blog-seed42-depth3-dropout0.2"
    changed = provenance.differences(provenance.identity(one), provenance.identity(made("depth=4", "dropout=0.2")))
    assert changed == ["depth: 3 -> 4"]
    (tmp_path / "mine.yaml").write_text("all: {}\nmodels: {'my.net:Net': {model_args: {depth: 5, act: relu}}}\n")
    recipe = {"model": "my.net:Net", "recipe": str(tmp_path / "mine.yaml")}
    assert make_config(recipe).model_args == ("act=relu", "depth=5")
    assert claim.run_name(make_config(recipe)) == "my.net_Net-mine-seed42"
    for wrong in (["dropout"], ["=3"], ["a=1", "a=2"]):
        with pytest.raises(UserError, match="model_args: "):
            made(*wrong)


@quick
def test_the_source_is_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "deep").mkdir()
    source, copy = tmp_path / "deep" / "nets_7.py", tmp_path / "model.py"
    source.write_text("import no_such_package\n")  # it is read, not imported
    cfg = make_config({"model": "deep.nets_7:Net"})
    before = provenance.made_by(cfg, {})
    copy.write_bytes(source.read_bytes())
    assert user_code.source_path(cfg.model) == source and not user_code.source_differs(cfg.model, copy)
    source.write_text("import no_such_package\n\n")
    assert user_code.source_differs(cfg.model, copy)
    after = provenance.made_by(cfg, {})
    assert provenance.differences(before, after) == ["another source of the model"]
    source.unlink()
    assert user_code.source_differs(cfg.model, copy) and user_code.source_path(cfg.model) is None
    assert user_code.source_path("no_such_7:Net") is None and user_code.source_path("no_such.module_7:Net") is None
    assert "model source" not in provenance.made_by(make_config({"model": "cnn"}), {})


EXAMPLE = "examples.my_model:net"
ARGUMENTS = ("--model-args", "depth=3", "width=4", "dropout=0.2")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder of the user's, with the example in it, that is on no path of Python's."""
    shutil.copytree(CHECKOUT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


TRAIN = "-m fashion_ddp.train --model"
LAUNCHERS = {
    "torchrun": f"torchrun --standalone --nproc-per-node 2 {TRAIN}",
    "accelerate": f"accelerate launch --num_processes 1 --cpu --dynamo_backend no --mixed_precision no {TRAIN}",
    "local": "python -m launch.local --ranks 2 --models",
    "submit": "python -m launch.submit --executor local --models",
}


def check_run(here: Path, done: subprocess.CompletedProcess[str]) -> Run:
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run(here / "run")
    assert run.summary["status"] == "finished"
    assert {"depth": "3", "dropout": "0.2", "width": "4"}.items() <= run.summary["changed"].items()
    convolutions = (9 + 1) * 4 + 2 * (9 * 4 + 1) * 4
    assert run.summary["parameters"] == convolutions + 4 * 28 * 28 * 10 + 10 and run.summary["rank_invariant"] is False
    assert run.config["model_args"] == ["depth=3", "dropout=0.2", "width=4"]
    assert (run.path / "model.py").read_bytes() == (here / "examples" / "my_model.py").read_bytes()
    return run


def test_a_model_in_the_current_folder_trains_and_its_source_is_known(here: Path) -> None:
    words = ("fashion_ddp.train", "--model", EXAMPLE, *SMALL, *ARGUMENTS)
    run = check_run(here, forked(*words, cwd=here))
    again = forked(*words, cwd=here)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    with open(here / "examples" / "my_model.py", "a") as file:
        file.write("\n# another\n")
    changed = forked(*words, cwd=here)
    assert changed.returncode == 2 and "another source of the model" in changed.stderr
    kept = json.loads((run.path / "environment.json").read_text())
    assert len(kept) == 1 and len(kept[0]["made_by"]["model source"]) == 64


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_model_in_the_current_folder_trains_under_every_launcher(launcher: str, here: Path) -> None:
    words = (*LAUNCHERS[launcher].split(), EXAMPLE, *SMALL, *ARGUMENTS)
    check_run(here, command(*words, cwd=here, ACCELERATE_CONFIG_FILE=""))


def test_a_wrong_argument_ends_a_launch_before_any_run(here: Path) -> None:
    for launcher in (("fashion_ddp.train", "--model"), ("launch.local", "--models")):
        done = forked(*launcher, EXAMPLE, *SMALL, "--model-args", "detph=3", cwd=here)
        assert done.returncode == 2 and not (here / "run").exists(), done.stdout
        said = "unknown 'detph'; did you mean 'depth'? choices: depth, width, dropout"
        assert done.stderr == f"error: model_args: {said}\n"


@quick
def test_the_example_fits_other_images() -> None:
    from examples.my_model import net

    assert net((3, 20, 16), 7, depth=1)(torch.zeros(2, 3, 20, 16)).shape == (2, 7)
