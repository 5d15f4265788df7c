"""Read a run's results from Python.

    from fashion_ddp import load_run
    run = load_run("runs/cnn-blog-seed42")
    run.summary["test/accuracy"]        docs/results.md lists every name
    run.metrics[-1], run.steps[-1]      one dict per epoch; about 100 per epoch
    run.predictions["logits"]           numpy
    model = run.model()                 the trained network, for images [N, C, H, W] in [0, 1]

Needs torch for the model only, and neither Accelerate nor wandb.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
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

COST_FILE = "cost.json"  # what a submitted run cost, which its launcher writes
GRID_SIZE = 9  # test images in a grid of predictions: the same in every run on the same data


@dataclass(frozen=True)
class Run:
    """The content of a run folder. What was not written yet is empty."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    environment: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    cost: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        return self.summary.get("status", "not started")

    @cached_property
    def predictions(self) -> "dict[str, np.ndarray]":
        """Return logits [n, classes] float32, predicted [n] int64 and labels [n] int64 of the test set's n images.

        Raises UserError where the run is not finished, or the file cannot be read.
        """
        return self.arrays("predictions.safetensors")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of the images that the model takes. Raises UserError where the run is not finished."""
        channels, height, width = self.arrays("examples.safetensors")["image"].shape
        return channels, height, width

    def arrays(self, name: str) -> "dict[str, np.ndarray]":
        """Return the arrays in one of the safetensors files of a finished run.

        Raises UserError where the run is not finished, or the file cannot be read.
        """
        if self.status != "finished":
            raise UserError(f"{self.path} has no {name}: the run is {self.status}, not finished; train it to its end")
        return read_arrays(self.path / name)

    def settings(self) -> Config:
        """Return config.yaml as a Config. Raises UserError where its values are no longer accepted."""
        known = {name: self.config[name] for name in asdict(Config()) if name in self.config}
        try:
            return Config(**known)
        except UserError as error:
            raise UserError(f"{self.path / 'config.yaml'}: {error}: restore it or remove the run") from None

    def model(self, user_model: "str | Callable[..., nn.Module] | None" = None) -> "nn.Module":
        """Return the trained network on the CPU, in evaluation mode.

        It maps images [N, C, H, W] in [0, 1] to logits [N, classes]. A run with a model of your own needs `user_model`:
        that function or class, or its name as package.module:Name, because a run folder alone never decides which code
        is imported.

        Raises UserError where the run is not finished, the model must be named, or the weights do not fit it.
        """
        weights = self.arrays("model.safetensors")
        import torch

        from fashion_ddp.models import architectures

        cfg = self.settings()
        if user_model is None and is_code(cfg.model):
            raise UserError(
                f"{self.path} has a model of your own: name it again, as .model({cfg.model.partition(':')[2]}) or "
                f"--model {cfg.model}"
            )
        if isinstance(user_model, str):
            cfg = replace(cfg, model=user_model)
        function = user_model if callable(user_model) else None
        with torch.random.fork_rng(devices=[]):  # leave the caller's random numbers as they are
            model = architectures.build(cfg, self.image_shape, len(self.summary["classes"]), function=function)
        try:
            model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}: its weights do not fit this {type(model).__name__}: {reason}") from None
        return model.eval()


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run folder. What was not written yet is empty, and an incomplete last line is left out.

    Raises UserError for a path that is no run folder, a damaged file, or one that a later version wrote.
    """
    path = Path(path)
    if not (path / "config.yaml").is_file():
        below = "".join(f"; {found.parent} is one" for found in sorted(path.glob("*/config.yaml"))[:1])
        raise UserError(f"{path} is no run folder: it has no config.yaml{below}")
    config, _ = read_mapping(path / "config.yaml")
    summary = read_summary(path)
    return Run(
        path=path,
        config=config,
        summary=summary,
        environment=_read_json(path / "environment.json", []),
        metrics=_read_lines(path / "metrics.jsonl"),
        steps=_read_lines(path / "steps.jsonl"),
        cost=_read_json(path / COST_FILE, {}),
    )


def read_summary(path: Path) -> dict[str, Any]:
    """Return the summary in a run folder; empty where the run was not started. Raises UserError as `load_run` does."""
    summary: dict[str, Any] = _read_json(path / "summary.json", {})
    if (found := summary.get("format", FORMAT)) != FORMAT:
        raise UserError(
            f"{path} was written by a later version of fashion_ddp (format {found!r}, and this one reads {FORMAT}): "
            "update to read it"
        )
    if summary.get("status") == "running" and holder(path) is None:
        summary = _read_json(path / "summary.json", {})  # again: it may have ended meanwhile
        if summary.get("status") == "running":
            summary["status"] = "interrupted"  # its process was killed
    return summary


def find_runs(paths: list[Path]) -> list[Path]:
    """Return the run folders among the given folders and directly below them, in the order given, each once.

    Raises UserError for a path that has none.
    """
    runs: list[Path] = []
    for path in paths:
        below = sorted(p.parent for p in path.glob("*/config.yaml")) if path.is_dir() else []
        found = [path] if (path / "config.yaml").is_file() else below
        if not found:
            raise UserError(f"{path}: no run folder there; train first, or name folders that hold a config.yaml")
        runs += found
    return list(dict.fromkeys(p.resolve() for p in runs))


def read_arrays(path: Path, missing_ok: bool = False) -> "dict[str, np.ndarray]":
    """Return the arrays in a safetensors file; none for a missing file if that is accepted.

    Raises UserError for a file that is missing or cannot be read.
    """
    if missing_ok and not path.exists():
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file  # not at the top: most readers need neither it nor numpy

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it or remove the run") from None


def _read_json(path: Path, default: T) -> T:
    """Return the file's content, which must be of the default's type; the default for a missing file."""
    return _decode(path, path.read_bytes(), type(default)) if path.exists() else default


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines, without an incomplete last line; none for a missing file."""
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


def evenly_spaced(count: int, size: int) -> "np.ndarray":
    """Return `count` indices, int64, spread evenly over a set of `size` images; all indices where it has fewer."""
    import numpy as np

    count = min(count, size)
    return np.arange(count) * size // max(count, 1)


def softmax(logits: "np.ndarray") -> "np.ndarray":
    """Return probabilities [n, classes] in float64."""
    import numpy as np

    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
