"""The reader of command lines: every spelling, every mistake, and the help of every command."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import CHECKOUT, command

from fashion_ddp.config import Config, flags
from fashion_ddp.errors import UserError

pytestmark = pytest.mark.quick


@dataclass(frozen=True)
class Example:
    """A command of a test."""

    first: flags.Positional[Path]
    """The first word."""
    others: flags.Positional[tuple[Path, ...]] = field(default_factory=lambda: (Path("usual"),))
    """Further words."""
    some_seeds: tuple[int, ...] = (42,)
    """Several values."""
    name: str | None = None
    """May be None."""
    # Another group
    lr: float = 0.1
    """A number; 100 % of them."""
    kind: Literal["a", "b"] = "a"
    """One of two."""
    force: bool = False
    """A switch."""


GIVEN: dict[str, dict[str, Any]] = {
    "run": {},
    "run a b": {"others": (Path("a"), Path("b"))},
    "run a --lr 3 b": {"others": (Path("a"), Path("b")), "lr": 3.0},
    "--force run a": {"others": (Path("a"),), "force": True},
    "run --some-seeds 1 2": {"some_seeds": (1, 2)},
    "run --some_seeds=1 2": {"some_seeds": (1, 2)},
    "run --some-seeds -1 --some-seeds 3 +4": {"some_seeds": (3, 4)},
    "run --some-seeds": {"some_seeds": ()},
    "run --lr -1 --lr=-1e-3": {"lr": -0.001},
    "run --name x --name None": {"name": None},
    "run --name=--x=y_z": {"name": "--x=y_z"},
    "run --kind b -- --a_b": {"kind": "b", "others": (Path("--a_b"),)},
}


@pytest.mark.parametrize("line", GIVEN)
def test_what_a_command_line_gives(line: str) -> None:
    assert flags.parse(Example, "example", line.split()) == Example(**{"first": Path("run")} | GIVEN[line])


MISTAKES = {
    "": "FIRST is missing: The first word.",
    "run --lrr 1": "unknown flag --lrr; did you mean --lr?",
    "run --forc": "unknown flag --forc; did you mean --force?",  # no abbreviations
    "run --no-force": "unknown flag --no-force; did you mean --force?",
    "run -x": "unknown flag -x; see --help",
    "run --password=12345678 --token 12345678": "unknown flag --password; see --help",
    "run --lr": "lr needs a value, as in --lr=VALUE",
    "run --some-seeds 1 --name --force": "name needs a value, as in --name=VALUE",
    "run --force=yes": "--force takes no value, got 'yes'",
    "run --lr x": "lr must be a number, got 'x'",
    "run --some-seeds 1 x": "some_seeds must be a whole number, got 'x'",
    "run --kind c": "kind: unknown 'c'; choices: a, b",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_told_without_a_value_that_may_be_secret(line: str) -> None:
    with pytest.raises(UserError) as error:
        flags.parse(Example, "example", line.split())
    assert str(error.value).startswith(MISTAKES[line]) and "12345678" not in str(error.value)


def test_words_for_another_reader_stay_in_their_order() -> None:
    @dataclass(frozen=True)
    class Launcher:
        models: tuple[str, ...] = ()
        epochs_of: int = 1

    words = "--epochs 3 --models a b --model_args x=1 y=2 --epochs_of=2 --no-shuffle --lr -1 c"
    given, others = flags.parse_known(Launcher, "launcher", words.split())
    assert given == Launcher(("a", "b"), 2)
    assert " ".join(others) == "--epochs 3 --model-args x=1 y=2 --no-shuffle --lr -1 c"


COMMANDS = {
    "fashion_ddp.train": "fashion_ddp.config.cli:Command",
    "fashion_ddp.compare": "fashion_ddp.compare:Arguments",
    "fashion_ddp.predict": "fashion_ddp.predict:Arguments",
    "fashion_ddp.push": "fashion_ddp.push:Arguments",
    "fashion_ddp.data": "fashion_ddp.data.__main__:Arguments",
    "launch.local": "launch.local:Arguments",
    "launch.submit": "launch.submission:Submission",
    "launch.status": "launch.status:Arguments",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_everything_without_heavy_libraries(name: str, tmp_path: Path) -> None:
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('imported:', *{'torch', 'wandb', 'accelerate'} & set(sys.modules)))\n"
        f"sys.argv = ['x', '--help']; runpy.run_module('{name}', run_name='__main__', alter_sys=True)"
    )
    done = command("python", "-c", code, cwd=tmp_path, PYTHONPATH=str(CHECKOUT), COLUMNS="200")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("imported:\n")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"usage: python -m {name} [flags]") and max(map(len, lines)) <= 100
    module, arguments = COMMANDS[name].split(":")
    text = " ".join(done.stdout.split())
    for argument in flags.arguments(getattr(importlib.import_module(module), arguments)).values():
        assert ", ".join(argument.flags) in text and len(argument.documented.meaning.split()) > 1
        assert argument.documented.meaning in text, argument.name


def test_help_shows_groups_choices_and_the_defaults_that_hold(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        flags.parse(Example, "example", ["--help", "--unknown"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Another group: --lr NUMBER A number; 100 % of them. (default: 0.1)" in said
    assert "--kind {a,b} One of two. (default: a)" in said and "OTHERS Further words. (default: usual)" in said
    with pytest.raises(SystemExit):
        flags.show_help(Example, "example", {"lr": 0.5})
    assert "(default: 0.5)" in " ".join(capsys.readouterr().out.split())


def test_a_rank_that_is_not_the_first_prints_no_help(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        flags.parse(Example, "example", ["--help"])
    assert capsys.readouterr().out == ""


def test_every_setting_of_a_run_is_documented() -> None:
    assert list(flags.documentation(Config)) == list(flags.arguments(Config))
