"""Which images each rank takes at each step, and how they are augmented.

The whole set lives decoded on the rank's device. For each epoch one CPU generator, seeded by (seed, epoch) and so the
same on every rank, draws the order of the images and an augmentation for each image; both go to the device once.
Global batch k is rows [kB, (k+1)B) of that order, whatever the number of ranks; a row's place in it decides which rank
takes it. There is no DataLoader and no worker: a position in the run is (epoch, step).
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fashion_ddp.config import Config
from fashion_ddp.data import Dataset
from fashion_ddp.distributed.world import World
from fashion_ddp.errors import UserError

DTYPES = {"fp64": torch.float64}  # of the images; mixed precision casts inside the model


def generator(*seeds: int | str) -> torch.Generator:
    """Return a CPU generator for one purpose. Different `seeds` give unrelated numbers."""
    digest = hashlib.sha256(" ".join(map(str, seeds)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def to_unit(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert uint8 pixels to numbers in [0, 1]."""
    return images.to(dtype).div_(255)


Index = np.ndarray | slice
# Which batch of the epoch: a number from the host, or an int64 tensor [1] on the device that counts by itself.
Position = int | Tensor


def row(table: Tensor, k: Position, piece: int) -> Tensor:
    """Return what a table [steps, pieces, rows] holds for one piece of batch k: [rows]. Of a number it is a view, which
    costs nothing."""
    return table[k, piece] if isinstance(k, int) else table[:, piece].index_select(0, k).squeeze(0)


def set_row(table: Tensor, k: Position, piece: int, values: Tensor) -> None:
    """Write one piece of batch k into a table [steps, pieces, rows]."""
    if isinstance(k, int):
        table[k, piece] = values
    else:
        table[:, piece].index_copy_(0, k, values.unsqueeze(0))


def split(cfg: Config, data: Dataset) -> tuple[Index, Index]:
    """Return the indices of the training images that are trained on, and of those held out for validation, drawn by
    seed. Raises UserError where none is left to train on."""
    count = len(data.train_labels)
    if cfg.validation >= count:
        raise UserError(f"validation must leave images to train on: {cfg.validation} of {count} were asked for")
    if not cfg.validation:
        return slice(None), slice(0)  # a slice copies nothing
    order = torch.randperm(count, generator=generator(cfg.seed, "validation")).numpy()
    return np.sort(order[cfg.validation :]), np.sort(order[: cfg.validation])


@dataclass(frozen=True)
class Drawn:
    """What was drawn for an epoch, on the host: the tables of `Batches`, and the rows of each global batch."""

    epoch: int
    index: Tensor
    weights: Tensor
    loss_weights: Tensor
    in_batch: list[int]
    noise: Tensor | None


class Batches:
    """The training set on one rank's device, cut into this rank's pieces of the global batches.

    A batch is cut among `groups` (the ranks, or the reduction shards): group g takes rows g, g + groups, ... of it.
    A rank's rows of a step form `pieces` forward passes of `rows` rows each: micro-batches, or its shards. Shapes
    never change: where rows are missing (a short last batch, a count that does not divide) the batch's first image
    stands in with weight 0. Nor do the tables' places in memory, which a captured step reads:

        index, targets   [steps, pieces, rows] int64: which images, and their labels
        weights          [steps, pieces, rows]: 1, or 0 where an image stands in
        loss_weights     the same, divided by the rows of the global batch
        noise            [N, 7] int64: how each image of the set is augmented; None for not at all
    """

    def __init__(self, cfg: Config, world: World, images: np.ndarray, labels: np.ndarray):
        self.cfg, self.device = cfg, world.device
        self.dtype = DTYPES.get(cfg.precision, torch.float32)
        self.images = torch.from_numpy(images).to(self.device)
        self.labels = torch.from_numpy(labels).to(self.device)
        self.count, self.batch = len(labels), min(cfg.batch_size, len(labels))
        self.steps = math.ceil(self.count / self.batch)
        self.groups = cfg.reduction_shards or world.size
        if self.groups % world.size:
            raise UserError(f"reduction_shards={self.groups} must be a multiple of the {world.size} ranks")
        per_rank = self.groups // world.size
        self.mine = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
        share = math.ceil(self.batch / self.groups)
        self.rows = min(cfg.micro_batch or share, share)
        self.pieces = per_rank * math.ceil(share / self.rows)
        # Of a full batch, how many rows each rank gets.
        rows = [len(range(group, self.batch, self.groups)) for group in range(self.groups)]
        self.shares = [sum(rows[r * per_rank : (r + 1) * per_rank]) for r in range(world.size)]
        # DDP takes the mean of the ranks' gradients, of which the sum is wanted; shards are added up as they are.
        self.ranks_averaged = 1 if cfg.reduction_shards else world.size
        shape = self.steps, self.pieces, self.rows
        self.index = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.targets = torch.zeros_like(self.index)
        self.weights = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.loss_weights = torch.zeros_like(self.weights)
        self.noise: Tensor | None = None
        self.in_batch: list[int] = []  # the rows of each global batch
        self.ahead: Drawn | None = None

    def draw(self, epoch: int) -> None:
        """Fill the tables with the order and the augmentation of an epoch (from 1)."""
        drawn = self.ahead if self.ahead and self.ahead.epoch == epoch else self._draw(epoch)
        self.ahead = None
        self.index.copy_(drawn.index, non_blocking=True)
        self.targets.copy_(self.labels[self.index])
        self.weights.copy_(drawn.weights, non_blocking=True)
        self.loss_weights.copy_(drawn.loss_weights, non_blocking=True)
        self.in_batch = drawn.in_batch
        if drawn.noise is not None:
            if self.noise is None:
                self.noise = torch.empty_like(drawn.noise, device=self.device)
            self.noise.copy_(drawn.noise, non_blocking=True)

    def draw_ahead(self, epoch: int) -> None:
        """Draw an epoch for `draw` to take, while a card trains on the one before."""
        self.ahead = self._draw(epoch)

    def _draw(self, epoch: int) -> Drawn:
        """Draw the order and the augmentation of an epoch on the host."""
        draws = generator(self.cfg.seed, "epoch", epoch)
        order = torch.randperm(self.count, generator=draws) if self.cfg.shuffle else torch.arange(self.count)
        batches = _padded(order, self.steps * self.batch).view(self.steps, self.batch)
        in_batch = (batches >= 0).sum(1)
        groups = _padded(batches, self.groups * math.ceil(self.batch / self.groups))
        mine = groups.view(self.steps, -1, self.groups).transpose(1, 2)[:, self.mine]  # [steps, groups of mine, share]
        per_group = self.rows * math.ceil(mine.shape[2] / self.rows)
        mine = _padded(mine, per_group).reshape(self.steps, self.pieces, self.rows)
        real = mine >= 0
        weights = real.to(self.dtype)
        loss_weights = weights * (self.ranks_averaged / in_batch.to(self.dtype))[:, None, None]
        index, noise = torch.where(real, mine, batches[:, :1, None]), self._draw_noise(draws)
        if self.device.type == "cuda":  # from pinned memory a copy waits for nobody
            index, weights, loss_weights = index.pin_memory(), weights.pin_memory(), loss_weights.pin_memory()
            noise = None if noise is None else noise.pin_memory()
        return Drawn(epoch, index, weights, loss_weights, in_batch.tolist(), noise)

    def piece(self, k: Position, piece: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what one forward pass of global batch k takes: images [rows, C, H, W] in [0, 1], augmented; labels
        [rows]; weights [rows], 1 or 0; and loss weights [rows], which make the sum of the weighted losses the mean."""
        index = row(self.index, k, piece)
        images = self.images.index_select(0, index)
        if self.noise is not None:
            images = _augment(images, self.noise.index_select(0, index))
        labels, weights = row(self.targets, k, piece), row(self.weights, k, piece)
        return to_unit(images, self.dtype), labels, weights, row(self.loss_weights, k, piece)

    def _draw_noise(self, draws: torch.Generator) -> Tensor | None:
        """Draw the augmentation of each image of the set: [N, 7] int64, as `_augment` takes it; None for none."""
        cfg, (height, width) = self.cfg, self.images.shape[2:]
        if not (cfg.shift or cfg.flip or cfg.erase):
            return None
        uniform = torch.rand(self.count, 8, generator=draws, dtype=torch.float64)
        shift = torch.randint(-cfg.shift, cfg.shift + 1, (self.count, 2), generator=draws)
        flip = uniform[:, 0] < cfg.flip
        # The rectangle of random erasing (Zhong et al., arXiv 1708.04896): 2 to 33 % of the area, sides 0.3 to 1/0.3.
        area = (0.02 + 0.31 * uniform[:, 1]) * height * width
        aspect = torch.exp((2 * uniform[:, 2] - 1) * math.log(1 / 0.3))
        tall = torch.sqrt(area * aspect).round().clamp(max=height) * (uniform[:, 3] < cfg.erase)
        wide = torch.sqrt(area / aspect).round().clamp(max=width)
        top = (uniform[:, 4] * (height - tall + 1)).floor()
        left = (uniform[:, 5] * (width - wide + 1)).floor()
        columns = [shift[:, 0], shift[:, 1], flip, top, top + tall, left, left + wide]
        return torch.stack([c.long() for c in columns], dim=1)


def _padded(tensor: Tensor, length: int) -> Tensor:
    """Extend the last dimension of a tensor to `length`, with -1."""
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[-1]), value=-1)


def _augment(images: Tensor, noise: Tensor) -> Tensor:
    """Flip, move and blank images [n, C, H, W], each as its row of noise [n, 7] says: rows down, columns to the right,
    flip (0 or 1), then top, bottom, left and right of the blank rectangle (bottom and right excluded)."""
    n, channels, height, width = images.shape
    down, right, flip, top, bottom, left, far_right = noise[:, :, None].unbind(1)  # [n, 1] each
    y = torch.arange(height, device=images.device)[None]
    x = torch.arange(width, device=images.device)[None]
    from_y, from_x = y - down, x - right  # [n, H], [n, W]
    shown_y, shown_x = (from_y >= 0) & (from_y < height), (from_x >= 0) & (from_x < width)
    from_x = torch.where(flip == 1, width - 1 - from_x, from_x)
    source = from_y.clamp(0, height - 1)[:, :, None] * width + from_x.clamp(0, width - 1)[:, None]  # [n, H, W]
    moved = images.flatten(2).gather(2, source.view(n, 1, -1).expand(-1, channels, -1)).view_as(images)
    blank = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < far_right))[:, None]
    shown = (shown_y[:, :, None] & shown_x[:, None]) & ~blank
    return moved * shown[:, None]
