"""Read a run's results from Python.

    from fashion_ddp import load_run
    run = load_run("runs/cnn-blog-seed42")
    run.summary["test/accuracy"]        docs/results.md lists every name
    run.metrics[-1], run.steps[-1]      one dict per epoch; about 100 per epoch
    run.predictions["logits"]           numpy
    model = run.model()                 the trained network, for images [N, C, H, W] in [0, 1]

Needs neither torch (but for the model) nor Accelerate nor wandb.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

from fashion_ddp.config import Config
from fashion_ddp.config.layers import read_mapping
from fashion_ddp.config.names import is_code
from fashion_ddp.errors import UserError
from fashion_ddp.runs.folder import FORMAT
from fashion_ddp.runs.lock import holder

T = TypeVar("T")

GRID = 9  # test images that a grid of predictions shows: the same in every run on the same data


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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the model takes."""
        channels, height, width = self.arrays("examples.safetensors")["image"].shape
        return channels, height, width

    def model(self, own: "str | Callable[..., nn.Module] | None" = None) -> "nn.Module":
        """The trained network in evaluation mode, on the CPU: images [N, C, H, W] in [0, 1] to logits [N, classes].

        `own`: of a run with a model of your own, that function or class once more, or its name as
        package.module:Name. A run folder never decides by itself which code is imported.

        Raises UserError for an unfinished run, a model that must be named, and one that the weights do not fit.
        """
        weights = self.arrays("model.safetensors")
        import torch

        from fashion_ddp.models import architectures

        cfg = self.settings()
        if own is None and is_code(cfg.model):
            raise UserError(
                f"{self.path} has a model of your own: name it again, as .model({cfg.model.partition(':')[2]}) or "
                f"--model {cfg.model}"
            )
        if isinstance(own, str):
            cfg = replace(cfg, model=own)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are none of a reader's business
            built = own if callable(own) else None
            model = architectures.build(cfg, self.image_shape, len(self.summary["classes"]), function=built)
        try:
            model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}: its weights do not fit this {type(model).__name__}: {reason}") from None
        return model.eval()


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run folder: what is absent, of a run that is not finished, is empty.

    Raises UserError for a path that is no run folder, a damaged file, or one that a later version wrote.
    """
    return read_run(Path(path))


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


def evenly(count: int, of: int) -> "np.ndarray":
    """So many places in a set of `of` images, from its beginning to its end."""
    import numpy as np

    count = min(count, of)
    return np.arange(count) * of // max(count, 1)


def softmax(logits: "np.ndarray") -> "np.ndarray":
    """Probabilities [n, classes] in float64."""
    import numpy as np

    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
