"""The run folder: the only interface between training and everything that reads results.

    config.yaml               the resolved settings; loads back with --config
    environment.json          one object per start: versions, machine, ranks, code, data, command
    metrics.jsonl             one object per epoch
    steps.jsonl               about 100 objects per epoch
    summary.json              status and the last figures: what a table needs
    model.txt                 the model's layers, as printed at the start
    predictions.safetensors   logits [n, classes] float32, predicted [n] int64, labels [n] int64 of the test set
    examples.safetensors      what a report draws: training samples, one test image and its feature maps
    model.safetensors         the weights after the last epoch

Written by rank 0 alone. Files are replaced whole or appended to by the line, so that a reader sees no half file.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from fashion_ddp import settings
from fashion_ddp.config import Config, UserError
from fashion_ddp.provenance import differences, identity
from fashion_ddp.settings import read_mapping

T = TypeVar("T")

FORMAT = 1  # of summary.json; counts up when a reader of old folders would misread new ones


def plain(value: Any) -> Any:
    """A value as strict JSON can hold it: null for what is not finite, text for a path."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader, or a crash, finds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- Writing ----------------------------------------------------------------------------------------------------


_locks: list[IO[str]] = []  # held, by being open, until the process ends


@dataclass(frozen=True)
class RunFolder:
    """A run folder that this run may write."""

    path: Path
    finished: bool  # it holds this very run, complete: nothing is left to do

    def write_json(self, name: str, value: Any) -> None:
        write_whole(self.path / name, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with open(self.path / name, "a") as file:
            file.write("".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows))


def name(cfg: Config) -> str:
    """`<model>-<recipe>-seed<seed>`, then every setting that changes the result and differs from the recipe."""
    parts = [cfg.model, Path(cfg.recipe).stem, f"seed{cfg.seed}"]
    parts += [f"{key}{value}" for key, value in settings.changed(cfg).items()]
    text = re.sub(r"[^\w.+=-]+", "_", "-".join(parts)).lstrip(".")
    if len(text) > 80:
        text = f"{text[:71]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def folder_of(cfg: Config) -> Path:
    """The run's folder, as given or as named."""
    return cfg.run_dir or cfg.runs_dir / name(cfg)


class Outdated(UserError):
    """The folder holds this very run, finished, but made by other code, versions or data."""


def check(cfg: Config, made_by_now: dict[str, Any], fresh: bool = False, reuse: bool = False) -> str:
    """What the run's folder holds: "nothing", "unfinished" (to `fresh`, any run) or "finished" (this one, complete).

    Raises UserError for a folder that belongs to something else, Outdated for a run that other code finished.
    """
    path = folder_of(cfg)
    if not path.exists() or (path.is_dir() and not any(p.name != ".lock" for p in path.iterdir())):
        return "nothing"
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} exists and is no run folder: choose another --run-dir")
    if fresh:
        return "unfinished"
    old = read_run(path)
    if different := differences(plain(identity(old.settings())), plain(identity(cfg))):
        raise UserError(
            f"{path} belongs to another run ({'; '.join(different)}): choose another --run-dir, "
            "or --fresh to keep it under another name"
        )
    if old.summary.get("status") != "finished":
        return "unfinished"
    start = old.environment[-1] if old.environment else {}
    if not reuse and (different := differences(start.get("made_by", {}), made_by_now)):
        raise Outdated(
            f"{path} is finished, but was not made by this code and these versions ({'; '.join(different)}): "
            "--fresh keeps it under another name and trains anew, --reuse accepts it"
        )
    return "finished"


def claim(cfg: Config, made_by_now: dict[str, Any], fresh: bool = False, reuse: bool = False) -> RunFolder:
    """Take the run's folder for this process, made or emptied by renaming what it held.

    Raises UserError where it belongs to another run, is held by another process, or cannot be written.
    """
    path = folder_of(cfg)
    try:
        # Before the lock, too: what is finished or not ours is not touched, not even by a lock file.
        if check(cfg, made_by_now, fresh, reuse) == "finished":
            return RunFolder(path, finished=True)
        path.mkdir(parents=True, exist_ok=True)
        _lock(path)
        state = check(cfg, made_by_now, fresh, reuse)
        if state == "unfinished":
            aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.{n}")).exists())
            path.rename(aside)
            path.mkdir()
            _lock(path)
            print(f"kept what {path} held as {aside}", flush=True)
        if state != "finished":
            write_whole(path / "config.yaml", cfg.to_yaml())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): choose another --runs-dir") from None
    return RunFolder(path, finished=state == "finished")


def _lock(path: Path) -> None:
    lock = open(path / ".lock", "a+")  # noqa: SIM115 - kept open
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip()
        raise UserError(f"{path} is in use by {holder}: wait for it, or choose another --run-dir") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    _locks.append(lock)


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

    def settings(self) -> Config:
        """config.yaml as a Config. Raises UserError where it is no longer one."""
        known = {name: self.config[name] for name in asdict(Config()) if name in self.config}
        try:
            return Config(**known)
        except UserError as error:
            raise UserError(f"{self.path / 'config.yaml'}: {error}: restore it, or remove the run") from None


def read_run(path: Path) -> Run:
    """Read a run folder. What is absent is empty; a last line cut short is left out.

    Raises UserError for a folder without config.yaml, a file that is not what it should be, or a later format.
    """
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is no run folder: it has no config.yaml")
    config, _ = read_mapping(path / "config.yaml")
    summary: dict[str, Any] = _read_json(path / "summary.json", {})
    if summary.get("format", FORMAT) > FORMAT:
        raise UserError(f"{path} was written by a later version of fashion_ddp: update to read it")
    return Run(
        path=path,
        config=config,
        summary=summary,
        environment=_read_json(path / "environment.json", []),
        metrics=_read_lines(path / "metrics.jsonl"),
        steps=_read_lines(path / "steps.jsonl"),
    )


def _read_json(path: Path, absent: T) -> T:
    return _decode(path, path.read_text(), type(absent)) if path.exists() else absent


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [_decode(path, line, dict) for line in lines if line.endswith("\n")]


def _decode(path: Path, text: str, kind: type[T]) -> T:
    try:
        value = json.loads(text)
        if isinstance(value, kind):
            return value
        problem = f"expected a {kind.__name__}"
    except json.JSONDecodeError as error:
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
