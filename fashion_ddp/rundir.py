"""The run folder: the only interface between training and everything that reads results.

    config.yaml               the resolved settings; loads back with --config
    environment.json          one object per start: versions, machine, ranks, code, data, command
    metrics.jsonl             one object per epoch
    steps.jsonl               about 100 objects per epoch
    summary.json              status and the last figures: what a table needs
    model.txt                 the model's layers, as printed at the start
    predictions.safetensors   logits [n, classes] float32, predicted [n] int64, labels [n] int64 of the test set
    examples.safetensors      what a report draws: training samples, test images, feature maps of one of them
    model.safetensors         the weights after the last epoch
    checkpoints/              what a run that was stopped or killed continues from; the newest two
    logs/                     one file per rank: stacks and errors

Written by rank 0 alone (but its log, by each rank). Files are replaced whole or appended to by the line, so that a
reader sees no half file; half a last line, which a kill may leave, is mended when the run continues.
"""

import contextlib
import errno
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np

from fashion_ddp.config import Config
from fashion_ddp.errors import TrainingFailed, UserError
from fashion_ddp.lock import Lock, holder
from fashion_ddp.private import redact
from fashion_ddp.settings import read_mapping

T = TypeVar("T")

FORMAT = 1  # of summary.json; counts up when a reader of old folders would misread new ones


def plain(value: Any) -> Any:
    """A value as strict JSON can hold it: null for what is not finite, text for a path; and without secrets."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return redact(str(value)) if isinstance(value, str | Path) else value


def write_whole(path: Path, content: str | bytes, last_look: Callable[[], object] = lambda: None) -> None:
    """Replace a file so that a reader, or a crash, finds the old content or the new, never a part.

    `last_look` may raise when all is written but the new name, which keeps the old file.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        last_look()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else the new name itself may be lost with the machine
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(folder)


# --- Writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """A run folder that this run may write. Every write raises TrainingFailed where it cannot be done."""

    path: Path
    finished: bool = False  # it holds this very run, complete: nothing is left to do
    lock: Lock | None = None

    def make(self, name: str) -> None:
        """Make a folder inside, where there is none."""
        with self._writing(name):
            (self.path / name).mkdir(exist_ok=True)

    def write(self, name: str, content: str | bytes) -> None:
        """Replace a file, whole."""
        with self._writing(name):
            write_whole(self.path / name, content, self._check)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with self._writing(name), open(self.path / name, "a") as file:
            file.write(_lines(rows))

    def keep_lines(self, name: str, keep: list[dict[str, Any]]) -> None:
        """Leave only these of a file's rows, where it holds others."""
        path, content = self.path / name, _lines(keep)
        with self._writing(name):
            changed = path.exists() and path.read_bytes() != content.encode()
        if changed:
            self.write(name, content)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            self._check()
            yield
        except OSError as error:
            raise TrainingFailed(
                f"{self.path / name} cannot be written ({error.strerror or error}): mend that, and give the same "
                "command again, which continues from the last checkpoint"
            ) from error

    def _check(self) -> None:
        if self.lock is not None:
            self.lock.check()


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)


# --- Reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run folder says, as far as it was written."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    environment: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    steps: list[dict[str, Any]]

    @property
    def status(self) -> str:
        return self.summary.get("status", "not started")

    @cached_property
    def predictions(self) -> "dict[str, np.ndarray]":
        """Of the test set's n images: logits [n, classes] float32, predicted [n] int64, labels [n] int64.

        Raises UserError where the run is not finished, or the file cannot be read.
        """
        return self.arrays("predictions.safetensors")

    def arrays(self, name: str) -> "dict[str, np.ndarray]":
        """The arrays of one of the files that a finished run leaves. Raises UserError where it has none."""
        if self.status != "finished":
            raise UserError(f"{self.path} has no {name}: the run is {self.status}, not finished; train it to its end")
        return read_arrays(self.path / name)

    def settings(self) -> Config:
        """config.yaml as a Config. Raises UserError where it is no longer one."""
        known = {name: self.config[name] for name in asdict(Config()) if name in self.config}
        try:
            return Config(**known)
        except UserError as error:
            raise UserError(f"{self.path / 'config.yaml'}: {error}: restore it or remove the run") from None


def read_arrays(path: Path) -> "dict[str, np.ndarray]":
    """The arrays of a safetensors file. Raises UserError for one that is not there, or cannot be read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file  # not at the top: most readers need neither it nor numpy

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it or remove the run") from None


def read_run(path: Path) -> Run:
    """Read a run folder. What is absent is empty; a last line cut short is left out.

    Raises UserError for a folder without config.yaml, a file that is not what it should be, or a later format.
    """
    if not (path / "config.yaml").is_file():
        below = "".join(f"; {found.parent} is one" for found in sorted(path.glob("*/config.yaml"))[:1])
        raise UserError(f"{path} is no run folder: it has no config.yaml{below}")
    config, _ = read_mapping(path / "config.yaml")
    summary: dict[str, Any] = _read_json(path / "summary.json", {})
    if (found := summary.get("format", FORMAT)) != FORMAT:
        raise UserError(
            f"{path} was written by a later version of fashion_ddp (format {found!r}, and this one reads {FORMAT}): "
            "update to read it"
        )
    if summary.get("status") == "running" and holder(path) is None:
        summary = _read_json(path / "summary.json", {})  # again: it may have ended meanwhile
        if summary.get("status") == "running":
            summary["status"] = "interrupted"  # its process is gone without a word
    return Run(
        path=path,
        config=config,
        summary=summary,
        environment=_read_json(path / "environment.json", []),
        metrics=_read_lines(path / "metrics.jsonl"),
        steps=_read_lines(path / "steps.jsonl"),
    )


def _read_json(path: Path, absent: T) -> T:
    return _decode(path, path.read_bytes(), type(absent)) if path.exists() else absent


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [_decode(path, line, dict) for line in lines if line.endswith(b"\n")]


def _decode(path: Path, content: bytes, kind: type[T]) -> T:
    try:
        value = json.loads(content)
        if isinstance(value, kind):
            return value
        problem = f"expected a {kind.__name__}"
    except ValueError as error:  # no JSON, or not even text
        problem = str(error)
    raise UserError(f"{path} is not what a run writes ({problem}): restore it or remove the run")


def find_runs(paths: list[Path]) -> list[Path]:
    """The run folders among and directly below the given folders, in the order given, each once.

    Raises UserError for a path that holds none.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(p.parent for p in path.glob("*/config.yaml")) if path.is_dir() else []
        here = [path] if (path / "config.yaml").is_file() else inside
        if not here:
            raise UserError(f"{path}: no run folder there; train first, or name folders that hold a config.yaml")
        found += here
    return list(dict.fromkeys(p.resolve() for p in found))
