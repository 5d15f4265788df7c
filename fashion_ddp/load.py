"""Read a run's results from Python.

    from fashion_ddp import load_run
    run = load_run("runs/cnn-blog-seed42")
    run.summary["test/accuracy"]        docs/results.md lists every name
    run.metrics[-1], run.steps[-1]      one dict per epoch; about 100 per epoch
    run.predictions["logits"]           numpy
    model = run.model()                 the trained network, for images [N, C, H, W] in [0, 1]

Needs neither torch (but for the model) nor Accelerate nor wandb.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

from fashion_ddp.errors import UserError
from fashion_ddp.names import is_code
from fashion_ddp.rundir import Run, read_run


@dataclass(frozen=True)
class LoadedRun(Run):
    """What a run folder says, and the model that it holds."""

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

        from fashion_ddp import models

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
            model = models.build(cfg, self.image_shape, len(self.summary["classes"]), function=built)
        try:
            model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}: its weights do not fit this {type(model).__name__}: {reason}") from None
        return model.eval()


def load_run(path: str | os.PathLike[str]) -> LoadedRun:
    """Read a run folder: what is absent, of a run that is not finished, is empty.

    Raises UserError for a path that is no run folder, a damaged file, or one that a later version wrote.
    """
    run: dict[str, Any] = vars(read_run(Path(path)))
    return LoadedRun(**run)
