"""Exact evaluation: every sample counts once, on any number of ranks and with any batch size."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from fashion_ddp.config import Config
from fashion_ddp.distributed.world import World, all_reduce
from fashion_ddp.training import metrics
from fashion_ddp.training.batches import DTYPES, to_unit
from fashion_ddp.training.images import Part, Place, lay

ROWS = 128  # per forward pass on a CPU, whose cache bounds it
# Test-time augmentation: what is seen of each image (mirrored, moved down, moved right), and the weight of its logits.
# flip+shift is airbench's (Jordan, arXiv 2404.00498): half of the mean is of images that are moved by a pixel.
SHIFTS = {0: 0.5, -1: 0.25, 1: 0.25}
VIEWS = {
    "none": {(False, 0, 0): 1.0},
    "flip": {(mirrored, 0, 0): 0.5 for mirrored in (False, True)},
    "shift": {(False, by, by): weight for by, weight in SHIFTS.items()},
    "flip+shift": {(mirrored, by, by): weight / 2 for mirrored in (False, True) for by, weight in SHIFTS.items()},
}
PIXELS = 2**21  # per forward pass on a card, which wants much to do at once: 2,675 images of 28 x 28


@dataclass(frozen=True)
class Scores:
    """A model's answers on a set of n images, the same on every rank."""

    loss: float  # mean cross entropy
    accuracy: float  # share of the n
    logits: Tensor  # [n, classes]
    predicted: Tensor  # [n] int64
    figures: dict[str, float] = field(default_factory=dict)  # of training/metrics.py


class Evaluation:
    """A set of images on this rank's device: `evaluation(model)` scores a model on it.

    `evaluation(model, "none", "flip")` also scores the mean of its logits over several views of each image, see
    `VIEWS`; a view that both have passes through the model once.
    """

    def __init__(self, cfg: Config, world: World, part: Part, classes: int, place: Place = "device"):
        """`place`: where the images lie."""
        self.classes, self.dtype, self.count = classes, DTYPES.get(cfg.precision, torch.float32), len(part.labels)
        self.part = part
        self.images = lay(part, world.device, place)
        self.labels = torch.from_numpy(part.labels).to(world.device)
        rows = ROWS if world.device.type == "cpu" else max(ROWS, PIXELS // math.prod(part.images.shape[2:]))
        mine = torch.arange(world.rank, self.count, world.size)
        self.blocks = mine.to(world.device).split(rows)
        self.table = F.pad(mine, (0, len(self.blocks) * rows - len(mine)), value=-1).view(len(self.blocks), 1, rows)

    @torch.no_grad()
    def __call__(self, model: nn.Module, *tta: str) -> list[Scores]:
        ways = [VIEWS[name] for name in tta or ["none"]]
        views = dict.fromkeys(how for way in ways for how in way)
        # Each rank fills its own rows, and one all-reduce brings them together. The last column counts.
        filled = torch.zeros(self.count, len(ways) * self.classes + 1, dtype=self.dtype, device=self.labels.device)
        model.eval()
        self.images.order(self.table)
        for k, index in enumerate(self.blocks):
            self.images.bring(k)
            images = to_unit(self.images.take(0, index), self.dtype)
            seen = {how: model(view(images, *how)).to(self.dtype) for how in views}
            means = [functools.reduce(torch.add, (seen[how] * weight for how, weight in way.items())) for way in ways]
            filled[index] = F.pad(torch.cat(means, 1), (0, 1), value=1.0)
        model.train()
        *several, counted = all_reduce(filled).split([*[self.classes] * len(ways), 1], dim=1)
        once = (counted == 1).sum()
        return [self._scores(logits, once) for logits in several]

    def _scores(self, logits: Tensor, once: Tensor) -> Scores:
        """Compare logits [n, classes] with the labels; `once` of them were computed once."""
        predicted = logits.argmax(1)
        loss = F.cross_entropy(logits.double(), self.labels)
        figures = torch.stack([loss, (predicted == self.labels).sum(), once])
        mean_loss, hits, counted = figures.tolist()  # the one read from the device
        assert counted == self.count, "evaluation must count every sample once"
        return Scores(mean_loss, int(hits) / self.count, logits, predicted)


def view(images: Tensor, mirrored: bool, down: int, right: int) -> Tensor:
    """Mirror images [n, C, H, W] left to right, or not, and move them, zeros coming in."""
    if down or right:
        images = F.pad(images, (right, -right, down, -down))
    return images.flip(-1) if mirrored else images


def evaluate(
    cfg: Config, model: nn.Module, sets: Mapping[str, Evaluation], figures: MetricCollection, last: bool
) -> dict[str, Scores]:
    """Score a model, after an epoch, on each set whose turn it is, with these figures. Where test-time augmentation was
    asked for, its scores stand beside the plain ones of the run's `last` evaluation, as `test_tta`."""
    chosen_by_val = "val" in sets and not cfg.validation  # the set has images to choose by
    at_end = cfg.test_at == "end" or (cfg.test_at == "auto" and chosen_by_val)
    due = {name: one for name, one in sets.items() if last or name != "test" or not at_end}
    augmented = [cfg.tta] if last and cfg.tta != "none" else []
    scores: dict[str, Scores] = {}
    for name, evaluation in due.items():
        labels = torch.from_numpy(evaluation.part.labels)
        for suffix, one in zip(("", "_tta"), evaluation(model, "none", *augmented), strict=False):
            scores[name + suffix] = replace(one, figures=metrics.compute(figures, one.logits, labels))
    return scores
