"""Exact evaluation: every sample counts once, on any number of ranks and with any batch size."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashion_ddp.config import Config
from fashion_ddp.distributed.world import World, all_reduce
from fashion_ddp.training.batches import DTYPES, to_unit

ROWS = 128  # per forward pass on a CPU, whose cache bounds it
PIXELS = 2**21  # per forward pass on a card, which wants much to do at once: 2,675 images of 28 x 28


@dataclass(frozen=True)
class Scores:
    """A model's answers on a set of n images, the same on every rank."""

    loss: float  # mean cross entropy
    accuracy: float  # share of the n
    logits: Tensor  # [n, classes]
    predicted: Tensor  # [n] int64


class Evaluation:
    """A set of images on this rank's device: `evaluation(model)` scores a model on it."""

    def __init__(self, cfg: Config, world: World, images: np.ndarray, labels: np.ndarray, classes: int):
        self.classes, self.dtype, self.count = classes, DTYPES.get(cfg.precision, torch.float32), len(labels)
        self.images = torch.from_numpy(images).to(world.device)
        self.labels = torch.from_numpy(labels).to(world.device)
        self.mine = torch.arange(world.rank, self.count, world.size, device=world.device)
        self.rows = ROWS if world.device.type == "cpu" else max(ROWS, PIXELS // math.prod(images.shape[2:]))

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Scores:
        # Each rank fills its own rows, and one all-reduce brings them together. The last column counts.
        filled = torch.zeros(self.count, self.classes + 1, dtype=self.dtype, device=self.mine.device)
        model.eval()
        for index in self.mine.split(self.rows):
            logits = model(to_unit(self.images.index_select(0, index), self.dtype))
            filled[index] = F.pad(logits.to(self.dtype), (0, 1), value=1.0)
        model.train()
        logits, counted = all_reduce(filled).split([self.classes, 1], dim=1)
        predicted = logits.argmax(1)
        loss = F.cross_entropy(logits.double(), self.labels)
        figures = torch.stack([loss, (predicted == self.labels).sum(), (counted == 1).sum()])
        mean_loss, hits, once = figures.tolist()  # the one read from the device
        assert once == self.count, "evaluation must count every sample once"
        return Scores(mean_loss, int(hits) / self.count, logits, predicted)
