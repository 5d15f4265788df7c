"""The site file: what the jobs of a group share, in YAML. slurm/site.yaml is one, with every key explained."""

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fashion_ddp.config.layers import read_mapping
from fashion_ddp.errors import UserError, nearest

Options = dict[str, str | int | float | bool]  # of sbatch; True is an option without a value, False leaves it out

# Options of sbatch that the command has flags for, or that would break what it does.
OURS = {"nodes": "--nodes", "cpus-per-task": "--cpus-per-rank", "time": "--time", "array": "--at-once"}
OURS |= dict.fromkeys(("ntasks", "ntasks-per-node"), "--ranks-per-node")
REFUSED = dict.fromkeys(("output", "error", "open-mode"), "the log's place is known to launch.status")
REFUSED |= {"signal": "a job must be told ahead of its end", "clusters": "give the command on the cluster itself"}
REFUSED |= dict.fromkeys(("wrap", "wait", "parsable", "quiet", "test-only"), "sbatch is called for you")
REFUSED["gpus-per-task"] = "ranks must see each other's cards: use --gpus-per-node"
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """A site file's content; all of it may be left out."""

    setup: tuple[str, ...] = ()  # lines of shell
    python: str = ""  # how Python is called
    data_dir: str = ""
    runs_dir: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    slurm: Options = field(default_factory=dict)
    report: Options = field(default_factory=dict)  # beyond `slurm`, for the job that compares

    def flags(self) -> list[str]:
        """What it says about every run, as flags. The user's own variables say it better."""
        named = {"data_dir": self.data_dir, "runs_dir": self.runs_dir}
        given = {name: path for name, path in named.items() if path and f"FASHION_DDP_{name.upper()}" not in os.environ}
        return [word for name, path in given.items() for word in (f"--{name.replace('_', '-')}", path)]


def read(path: Path | None) -> Site:
    """The file that is named, or $FASHION_DDP_SITE; empty without either. Raises UserError with file and line."""
    named = os.environ.get("FASHION_DDP_SITE")
    path = path or (Path(named) if named else None)
    if path is None:
        return Site()
    content, lines = read_mapping(path)
    known, given = [one.name for one in fields(Site)], {}
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{path}:{lines[(key,)]}: unknown key {key!r}; {nearest(key, known)}")
        try:
            if value is not None:  # all that stood below it is commented out
                given[key] = _checked(key, value)
        except _Wrong as wrong:
            line = lines.get((key, wrong.name), lines[(key,)])
            raise UserError(f"{path}:{line}: {key}{'.' * bool(wrong.name)}{wrong.name}{wrong}") from None
    return Site(**given)


class _Wrong(Exception):
    def __init__(self, text: str, name: str = ""):
        super().__init__(text)
        self.name = name  # below the key


def _checked(key: str, value: Any) -> Any:
    if key == "setup":
        if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
            raise _Wrong(f" must be a list of lines of shell (put each in quotes), got {value!r}")
        return tuple(value)
    if key in ("python", "data_dir", "runs_dir"):
        if not isinstance(value, str) or not value:
            raise _Wrong(f" must be text, got {value!r}")
        return value if key == "python" else _path(value)
    if not isinstance(value, dict):
        raise _Wrong(f" must hold `name: value` lines, got {value!r}")
    for name, one in value.items():
        if isinstance(one, bool) and key == "environment" or not isinstance(one, str | int | float):
            raise _Wrong(f" must be text or a number, got {one!r}: put it in quotes", name)
        if key == "environment":
            _check_variable(name)
    return {name: str(one) for name, one in value.items()} if key == "environment" else _options(value)


def _path(text: str) -> str:
    """A path of all users: `~`, $USER and the like become theirs."""
    path = os.path.expanduser(os.path.expandvars(text))
    if not os.path.isabs(path) or "$" in path:
        raise _Wrong(f" must be a path from / on, of variables that are set, got {text!r}")
    return path


def _check_variable(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise _Wrong(" is no name of a variable", name)
    if SECRET.search(name):
        raise _Wrong(" would be written to every job's script: keep secrets in your home, as `wandb login` does", name)


def _options(given: Options) -> Options:
    """Options as sbatch spells them."""
    found: Options = {}
    for key, value in given.items():
        name = key.lstrip("-").replace("_", "-")
        if name in OURS:
            raise _Wrong(f" is the command's own: give {OURS[name]}", key)
        if name in REFUSED:
            raise _Wrong(f" cannot be chosen: {REFUSED[name]}", key)
        found[name] = value
    return found


def options(pairs: tuple[str, ...]) -> Options:
    """`key=value` texts of --slurm; a key alone is an option without a value. Raises UserError."""
    given: Options = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not re.fullmatch(r"-*[A-Za-z][\w-]*", key):
            raise UserError(f"--slurm {text}: expected an option of sbatch, as key=value")
        given[key] = value if equals else True
    try:
        return _options(given)
    except _Wrong as wrong:
        raise UserError(f"--slurm: {wrong.name}{wrong}") from None
