"""Read the site file: YAML with what all jobs of a group have in common. slurm/site.yaml explains every key."""

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fashion_ddp.config.layers import read_mapping
from fashion_ddp.errors import UserError, nearest

SbatchOptions = dict[str, str | int | float | bool]  # True: an option without a value; False: leave the option out

# Options of sbatch for which launch.submit has flags.
OWN_FLAGS = {"nodes": "--nodes", "cpus-per-task": "--cpus-per-rank", "time": "--time", "array": "--at-once"}
OWN_FLAGS |= dict.fromkeys(("ntasks", "ntasks-per-node"), "--ranks-per-node")
# Options of sbatch that would break what launch.submit does, and why.
REFUSED = dict.fromkeys(("output", "error", "open-mode"), "launch.status must know where the log is")
REFUSED |= {
    "signal": "a job must get its signal ahead of its end",
    "clusters": "give the command on the cluster itself",
}
REFUSED |= dict.fromkeys(("wrap", "wait", "parsable", "quiet", "test-only"), "sbatch is called for you")
REFUSED["gpus-per-task"] = "ranks must see each other's cards: use --gpus-per-node"
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """The content of a site file. Every key may be left out."""

    setup: tuple[str, ...] = ()  # lines of shell
    python: str = ""  # how Python is called
    data_dir: str = ""
    runs_dir: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    slurm: SbatchOptions = field(default_factory=dict)
    report: SbatchOptions = field(default_factory=dict)  # for the job that compares, in addition to `slurm`

    def flags(self) -> list[str]:
        """Return the folders as flags of a run, but for those that the user's own environment variables name."""
        named = {"data_dir": self.data_dir, "runs_dir": self.runs_dir}
        given = {name: path for name, path in named.items() if path and f"FASHION_DDP_{name.upper()}" not in os.environ}
        return [word for name, path in given.items() for word in (f"--{name.replace('_', '-')}", path)]


def read_site(path: Path | None) -> Site:
    """Read the site file `path`, or else $FASHION_DDP_SITE; without either, return an empty Site.

    Raises UserError with file and line where the file cannot be read or used.
    """
    variable = os.environ.get("FASHION_DDP_SITE")
    path = path or (Path(variable) if variable else None)
    if path is None:
        return Site()
    content, lines = read_mapping(path)
    known, given = [one.name for one in fields(Site)], {}
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{path}:{lines[(key,)]}: unknown key {key!r}; {nearest(key, known)}")
        try:
            if value is not None:  # a key whose lines are all commented out
                given[key] = _check_value(key, value)
        except _Invalid as invalid:
            line = lines.get((key, invalid.name), lines[(key,)])
            raise UserError(f"{path}:{line}: {key}{'.' * bool(invalid.name)}{invalid.name}{invalid}") from None
    return Site(**given)


class _Invalid(Exception):
    def __init__(self, text: str, name: str = ""):
        super().__init__(text)
        self.name = name  # of the entry below the key


def _check_value(key: str, value: Any) -> Any:
    if key == "setup":
        if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
            raise _Invalid(f" must be a list of lines of shell (put each in quotes), got {value!r}")
        return tuple(value)
    if key in ("python", "data_dir", "runs_dir"):
        if not isinstance(value, str) or not value:
            raise _Invalid(f" must be text, got {value!r}")
        return value if key == "python" else _path(value)
    if not isinstance(value, dict):
        raise _Invalid(f" must hold `name: value` lines, got {value!r}")
    for name, one in value.items():
        if isinstance(one, bool) and key == "environment" or not isinstance(one, str | int | float):
            raise _Invalid(f" must be text or a number, got {one!r}: put it in quotes", name)
        if key == "environment":
            _check_variable(name)
    return {name: str(one) for name, one in value.items()} if key == "environment" else _check_options(value)


def _path(text: str) -> str:
    """Return a path with `~`, $USER and other variables replaced, so that one line serves all users."""
    path = os.path.expanduser(os.path.expandvars(text))
    if not os.path.isabs(path) or "$" in path:
        raise _Invalid(f" must be an absolute path, with variables that are set, got {text!r}")
    return path


def _check_variable(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise _Invalid(" is not a valid name of a variable", name)
    if SECRET.search(name):
        raise _Invalid(
            " would be written to every job's script: keep secrets in your home, as `wandb login` does", name
        )


def _check_options(given: SbatchOptions) -> SbatchOptions:
    """Return options with their names as sbatch spells them. Raises _Invalid for options that may not be given."""
    found: SbatchOptions = {}
    for key, value in given.items():
        name = key.lstrip("-").replace("_", "-")
        if name in OWN_FLAGS:
            raise _Invalid(f" is set by launch.submit itself: give {OWN_FLAGS[name]}", key)
        if name in REFUSED:
            raise _Invalid(f" cannot be chosen: {REFUSED[name]}", key)
        found[name] = value
    return found


def parse_options(pairs: tuple[str, ...]) -> SbatchOptions:
    """Read the `key=value` texts of --slurm; a key alone is an option without a value. Raises UserError."""
    given: SbatchOptions = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not re.fullmatch(r"-*[A-Za-z][\w-]*", key):
            raise UserError(f"--slurm {text}: expected an option of sbatch, as key=value")
        given[key] = value if equals else True
    try:
        return _check_options(given)
    except _Invalid as invalid:
        raise UserError(f"--slurm: {invalid.name}{invalid}") from None
