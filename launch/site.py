"""Read the site file: YAML with what all jobs of a group have in common. site.yaml explains every key."""

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

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
RUNTIMES = Literal["pyxis", "apptainer"]
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


@dataclass(frozen=True)
class Container:
    """In which the ranks run. Outside of it stays the batch script, which alone calls SLURM."""

    image: str
    runtime: RUNTIMES
    mounts: tuple[str, ...] = ()  # folders, in addition to those that every job needs

    def srun_args(self, folders: list[Path], cwd: Path, variables: list[str]) -> list[str]:
        """Return the options of srun. `folders` are mounted under their own names; an image that sets one of the
        `variables` itself does not win."""
        if self.runtime != "pyxis":
            return []
        mounts = ",".join(f"{folder}:{folder}" for folder in self._mounted(folders))
        image = [f"--container-image={self.image}", f"--container-mounts={mounts}", f"--container-workdir={cwd}"]
        return [*image, f"--container-env={','.join(variables)}"]

    def prefix(self, folders: list[Path], cwd: Path, cards: bool) -> str:
        """Return the shell words that stand before Python."""
        if self.runtime != "apptainer":
            return ""
        mounts = ",".join(map(str, self._mounted(folders)))
        words = ["apptainer", "exec", *["--nv"] * cards, "--bind", mounts, "--pwd", str(cwd), self.image]
        return shlex.join(words) + " "

    def setup(self, variables: list[str]) -> list[str]:
        """Return the lines of shell by which an image that sets one of the `variables` itself does not win."""
        return [f'export APPTAINERENV_{name}="${name}"' for name in variables] if self.runtime == "apptainer" else []

    def _mounted(self, folders: list[Path]) -> list[Path]:
        wanted = sorted({*folders, *map(Path, self.mounts)})
        if bad := next((one for one in wanted if re.search("[:,]", str(one))), None):
            raise UserError(f"{bad}: a folder with a comma or a colon cannot be mounted in a container: rename it")
        return [one for one in wanted if not any(other in wanted for other in one.parents)]


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
    container: Container | None = None

    @classmethod
    def from_record(cls, content: Mapping[str, Any]) -> "Site":
        """Return the Site of which `dataclasses.asdict` and JSON have made `content`."""
        container = content.get("container")
        given = dict(content) | {"setup": tuple(content["setup"])}
        return cls(
            **given | {"container": container and Container(**container | {"mounts": tuple(container["mounts"])})}
        )

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
    if key == "container":
        return _check_container(value)
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


def _check_container(value: Any) -> Container:
    if not isinstance(value, dict):
        raise _Invalid(f" must hold image, runtime and, as you like, mounts, got {value!r}")
    for name in value:
        if name not in ("image", "runtime", "mounts"):
            raise _Invalid(": there is no such key; image, runtime, mounts", name)
    image, mounts = value.get("image"), value.get("mounts") or []
    runtime: Any = value.get("runtime")
    if not isinstance(image, str) or not image:
        raise _Invalid(f" must be text, as the runtime takes it, got {image!r}", "image")
    if runtime not in get_args(RUNTIMES):
        raise _Invalid(f" must be {' or '.join(get_args(RUNTIMES))}, got {runtime!r}", "runtime")
    if not isinstance(mounts, list) or not all(isinstance(one, str) for one in mounts):
        raise _Invalid(f" must be a list of folders, got {mounts!r}", "mounts")
    return Container(os.path.expandvars(image), runtime, tuple(_path(one) for one in mounts))


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
