"""Choose by the validation set: which epoch's weights a run keeps (--keep best), and when it ends (--patience)."""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fashion_ddp.config import Config
from fashion_ddp.distributed.world import World
from fashion_ddp.errors import pluralize
from fashion_ddp.training.ema import lent
from fashion_ddp.training.evaluate import Scores


class Choice:
    """The best epoch so far: of the highest accuracy on the validation set; of equals that of the lowest loss, then the
    first. With --keep best also its weights and buffers. Where nothing is chosen it does nothing and holds nothing."""

    def __init__(self, cfg: Config, world: World, model: nn.Module):
        self.cfg, self.world, self.model = cfg, world, model
        self.epoch, self.accuracy, self.loss = 0, -1.0, math.inf  # of no epoch: any is better
        self.weights, self.buffers = ([tensor.clone() for tensor in tensors] for tensors in self._current())

    def judge(self, epoch: int, scores: Mapping[str, Scores]) -> bool:
        """Compare an epoch with the best before, while the model has the weights that were scored. A collective.

        Returns whether training is to end: --patience epochs in a row were no better.
        """
        if not self.cfg.chooses:
            return False
        val = scores["val"]
        # As rank 0 has them, and records them: the last bits of a loss may differ between unlike processors.
        accuracy, loss = self.world.all_gather_object((val.accuracy, val.loss))[0]
        loss = loss if math.isfinite(loss) else math.inf
        if (accuracy, -loss) > (self.accuracy, -self.loss):
            self.epoch, self.accuracy, self.loss = epoch, accuracy, loss
            self.weights, self.buffers = ([tensor.clone() for tensor in tensors] for tensors in self._current())
        return self.cfg.patience is not None and epoch - self.epoch >= self.cfg.patience

    def outcome(self, epochs: int) -> dict[str, Any]:
        """Return what the summary says of the choice, after so many epochs."""
        kept = {"kept_epoch": self.epoch, "chosen_by": "val/accuracy"} if self.cfg.keep == "best" else {}
        if epochs == self.cfg.epochs or self.cfg.patience is None:
            return kept
        no_better = f"no better validation in {pluralize(self.cfg.patience, 'epoch')}"
        return kept | {"stopped_early": f"after epoch {epochs}, {no_better}"}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the best epoch's weights and buffers."""
        with lent(list(itertools.chain(*self._current())), [*self.weights, *self.buffers]):
            yield

    def state(self) -> dict[str, Any]:
        """Return the state, without the buffers, which may differ between ranks."""
        return {"epoch": self.epoch, "accuracy": self.accuracy, "loss": self.loss, "weights": self.weights}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what another process of the run has saved."""
        self.epoch, self.accuracy, self.loss = state["epoch"], state["accuracy"], state["loss"]
        for weight, value in zip(self.weights, state["weights"], strict=True):
            weight.copy_(value)

    def _current(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the model's present weights and buffers, where the best are to be kept."""
        if self.cfg.keep == "last":
            return [], []
        return [parameter.detach() for parameter in self.model.parameters()], list(self.model.buffers())
