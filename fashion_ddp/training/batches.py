"""Which images each rank takes at each step, and how they are augmented.

The images lie decoded on the rank's device, or are read ahead (images.py). For each epoch one CPU generator, seeded by
(seed, epoch) and so the same on every rank, draws the order of the images and an augmentation for each image; both go
to the device once. What else is drawn (partners to mix images with, keys for dropout) has generators of its own and
changes none of it.
Global batch k is rows [kB, (k+1)B) of that order, whatever the number of ranks; a row's place in it decides which rank
takes it. There is no DataLoader: a position in the run is (epoch, step).
"""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fashion_ddp.config import Config
from fashion_ddp.data import Dataset
from fashion_ddp.distributed.world import World
from fashion_ddp.errors import UserError
from fashion_ddp.training.images import Part, Place, lay

DTYPES = {"fp64": torch.float64}  # of the images; mixed precision casts inside the model


def generator(*seeds: int | str) -> torch.Generator:
    """Return a CPU generator for one purpose. Different `seeds` give unrelated numbers."""
    digest = hashlib.sha256(" ".join(map(str, seeds)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def to_unit(images: Tensor, dtype: torch.dtype, kept: Tensor | None = None) -> Tensor:
    """Convert uint8 pixels to numbers in [0, 1]. `kept`: a tensor of that type to put them into."""
    return (images.to(dtype) if kept is None else kept.copy_(images)).div_(255)


# Which batch of the epoch: a number from the host, or an int64 tensor [1] on the device that counts by itself.
Position = int | Tensor


class Rows:
    """The rows of one piece of a batch in tables [steps, pieces, rows], which stay where they are in memory.

    Of a number from the host they are views, of which those of many steps are made at once: each alone would take
    longer to make than a small step needs for its arithmetic.
    """

    AT_ONCE = 512  # steps

    def __init__(self, *tables: Tensor):
        self.tables, self.pieces = tables, tables[0].shape[1]
        self.first, self.views = -self.AT_ONCE, [()]

    def __call__(self, k: Position, piece: int) -> tuple[Tensor, ...]:
        """Return what each table holds for one piece of batch k: [rows]."""
        if not isinstance(k, int):
            return tuple(table[:, piece].index_select(0, k).squeeze(0) for table in self.tables)
        if not 0 <= k - self.first < self.AT_ONCE:
            self.first = k
            some = (table[k : k + self.AT_ONCE].flatten(0, 1).unbind() for table in self.tables)
            self.views = list(zip(*some, strict=True))
        return self.views[(k - self.first) * self.pieces + piece]

    def write(self, k: Position, piece: int, *values: Tensor) -> None:
        """Write one piece of batch k into the tables."""
        if isinstance(k, int):
            for view, value in zip(self(k, piece), values, strict=True):
                view.copy_(value)
        else:
            for table, value in zip(self.tables, values, strict=True):
                table[:, piece].index_copy_(0, k, value.unsqueeze(0))


def split(cfg: Config, data: Dataset) -> dict[str, Part]:
    """Return the parts of a run's data: train, test, and val where the set has one or images are held out for it, drawn
    by seed. Raises UserError where none is left to train on, where both are given, or where neither is that must be."""
    parts = {
        name: Part(images, labels, None, data.stored.get(name), data.sums.get(name))
        for name, images, labels in (
            ("train", data.train_images, data.train_labels),
            ("test", data.test_images, data.test_labels),
            ("val", data.val_images, data.val_labels),
        )
        if images is not None and labels is not None
    }
    count, whole = len(data.train_labels), parts["train"]
    if cfg.validation >= count:
        raise UserError(f"validation must leave images to train on: {cfg.validation} of {count} were asked for")
    if cfg.validation and "val" in parts:
        raise UserError(f"validation: dataset {data.name} has images to choose by, in val/: leave --validation out")
    if cfg.chooses and not cfg.validation and "val" not in parts:
        raise UserError(
            f"{cfg.chooses} needs a validation set, and dataset {data.name} has none (a val/ without a test/ is what "
            "it is tested on): hold training images out, as by --validation 500"
        )
    if cfg.validation:
        order = torch.randperm(count, generator=generator(cfg.seed, "validation")).numpy()
        for name, rows in (("train", order[cfg.validation :]), ("val", order[: cfg.validation])):
            parts[name] = whole.subset(np.sort(rows))
    if cfg.random_resized_crop and whole.stored is not None:  # it moves in what is around, too
        parts["train"] = replace(parts["train"], images=whole.stored)
    return parts


def class_weights(cfg: Config, labels: np.ndarray) -> Tensor | None:
    """Return how much each image counts in the loss, float64 [N]; None where all count the same.

    `balanced` is N / (classes * images of the class), as scikit-learn's. Raises UserError for a list of another length
    than there are classes.
    """
    if cfg.class_weights is None:
        return None
    counts = np.bincount(labels)
    weights = len(labels) / (len(counts) * np.maximum(counts, 1))
    if cfg.class_weights != "balanced":
        weights = np.array(cfg.class_weight_list())
        if len(weights) != len(counts):
            raise UserError(f"class_weights: {len(counts)} classes need as many numbers, {len(weights)} were given")
    return torch.from_numpy(weights[labels])


class Piece(NamedTuple):
    """What one forward pass takes, and what its loss is made of.

    Where images are mixed, the loss of a row is own_share * loss(label) + (1 - own_share) * loss(partner's label).
    """

    images: Tensor  # [rows, C, H, W] in [0, 1], augmented and mixed
    labels: Tensor  # [rows], the images' own: predictions are counted against these
    weights: Tensor  # [rows], 1 or 0
    loss_weights: Tensor  # [rows]; they make the sum of the losses, times these, the mean over the global batch
    keys: Tensor | None  # [rows] int64, for dropout; None where the model has none of ours
    partner_labels: Tensor | None  # [rows]; None where nothing is mixed
    own_share: Tensor | float  # a number of the global batch; 1 where nothing is mixed
    whole_batch: bool  # these rows are the global batch, and the host (of a CPU) knows it: none has weight 0


@dataclass(frozen=True)
class Drawn:
    """What was drawn for an epoch, on the host: the tables of `Batches`, and the rows of each global batch."""

    epoch: int
    in_batch: list[int]
    index: Tensor
    weights: Tensor
    loss_weights: Tensor
    noise: Tensor | None
    keys: Tensor | None
    partners: Tensor | None
    mixes: Tensor | None


class Batches:
    """The training set on one rank's device, cut into this rank's pieces of the global batches.

    A batch is cut among `groups` (the ranks, or the reduction shards): group g takes rows g, g + groups, ... of it.
    A rank's rows of a step form `pieces` forward passes of `rows` rows each: micro-batches, or its shards. Shapes
    never change: where rows are missing (a short last batch, a count that does not divide) the batch's first image
    stands in with weight 0. Nor do the tables' places in memory, which a captured step reads:

        index, targets   [steps, pieces, rows] int64: which images, and their labels
        weights          [steps, pieces, rows]: 1, or 0 where an image stands in
        loss_weights     the same, times the weights of the rows' classes, divided by their sum over the global batch
        noise            [N, 7 or 11] int64: how each image of the set is augmented; None for not at all
        keys             [N] int64: of each image of the set, for dropout; None unless `keyed`
        partners         [steps, pieces, rows] int64: which images these are mixed with; None for not at all
        mixes            [steps, 1, 6]: how, by global batch, as `_mix` takes it; None for not at all
    """

    keyed = False  # whether keys are drawn: the step says so where its model needs them

    def __init__(self, cfg: Config, world: World, part: Part, place: Place = "device"):
        """`place`: where the images lie."""
        self.cfg, self.device, self.part = cfg, world.device, part
        self.dtype = DTYPES.get(cfg.precision, torch.float32)
        self.images = lay(part, world.device, place)
        height, width = part.images.shape[2:]
        self.size = (cfg.image_size, cfg.image_size) if cfg.image_size else (height, width)  # as the model sees them
        self.labels = torch.from_numpy(part.labels).to(self.device)
        self.row_weights = class_weights(cfg, part.labels)
        self.count, self.batch = len(part.labels), min(cfg.batch_size, len(part.labels))
        self.steps = math.ceil(self.count / self.batch)
        self.groups = cfg.reduction_shards or world.size
        if self.groups % world.size:
            raise UserError(f"reduction_shards={self.groups} must be a multiple of the {world.size} ranks")
        per_rank = self.groups // world.size
        self.mine = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
        share = math.ceil(self.batch / self.groups)
        self.rows = min(cfg.micro_batch or share, share)
        self.pieces = per_rank * math.ceil(share / self.rows)
        self.alone = self.groups == self.pieces == 1 and self.device.type == "cpu"
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
        self.kept: dict[bool, Tensor] = {}  # where a piece's images lie, and their partners'; the next take their place
        self.rows_of = Rows(self.index, self.targets, self.weights, self.loss_weights)
        self.noise: Tensor | None = None
        self.keys: Tensor | None = None
        self.partners: Tensor | None = None
        self.mixes: Tensor | None = None
        self.mixing: tuple[Rows, Rows] | None = None  # of partners and mixes
        self.in_batch: list[int] = []  # the rows of each global batch
        self.ahead: Drawn | None = None

    def draw(self, epoch: int) -> None:
        """Fill the tables with the order and the augmentation of an epoch (from 1)."""
        drawn = self.ahead if self.ahead and self.ahead.epoch == epoch else self._draw(epoch)
        self.ahead = None
        self.images.order(drawn.index, drawn.partners)
        self.index.copy_(drawn.index, non_blocking=True)
        self.targets.copy_(self.labels[self.index])
        self.weights.copy_(drawn.weights, non_blocking=True)
        self.loss_weights.copy_(drawn.loss_weights, non_blocking=True)
        self.in_batch = drawn.in_batch
        self.noise = self._place(drawn.noise, self.noise)
        self.keys = self._place(drawn.keys, self.keys)
        self.partners = self._place(drawn.partners, self.partners)
        self.mixes = self._place(drawn.mixes, self.mixes)

    def _place(self, drawn: Tensor | None, table: Tensor | None) -> Tensor | None:
        """Copy what was drawn to where its table lies on the device, which is settled at the first draw."""
        if drawn is None:
            return None
        table = torch.empty_like(drawn, device=self.device) if table is None else table
        return table.copy_(drawn, non_blocking=True)

    def draw_ahead(self, epoch: int) -> None:
        """Draw an epoch for `draw` to take, while a card trains on the one before."""
        self.ahead = self._draw(epoch)

    def _draw(self, epoch: int) -> Drawn:
        """Draw the order and the augmentation of an epoch on the host."""
        draws = generator(self.cfg.seed, "epoch", epoch)
        order = torch.randperm(self.count, generator=draws) if self.cfg.shuffle else torch.arange(self.count)
        batches = _padded(order, self.steps * self.batch).view(self.steps, self.batch)
        in_batch = (batches >= 0).sum(1)
        mine, stand_in = self._cut(batches), batches[:, :1, None]
        real = mine >= 0
        weights = real.to(self.dtype)
        index = torch.where(real, mine, stand_in)
        loss_weights, total = weights, in_batch.to(self.dtype)
        if self.row_weights is not None:
            loss_weights = weights * self.row_weights[index].to(self.dtype)
            total = (self.row_weights[batches.clamp(min=0)] * (batches >= 0)).sum(1).to(self.dtype)
        loss_weights = loss_weights * (self.ranks_averaged / total)[:, None, None]
        keys = partners = mixes = None
        if self.keyed:
            keys = torch.empty(self.count, dtype=torch.int64).random_(generator=generator(self.cfg.seed, "keys", epoch))
        if self.cfg.mixup or self.cfg.cutmix:
            mixing = generator(self.cfg.seed, "mix", epoch)
            partners = torch.where(real, self._cut(_partners(batches, mixing)), stand_in)
            mixes = self._draw_mixes(mixing).to(self.dtype)
        noise = self._draw_noise(draws, epoch)
        if self.device.type == "cuda":  # from pinned memory a copy waits for nobody
            index, weights, loss_weights = index.pin_memory(), weights.pin_memory(), loss_weights.pin_memory()
            others = noise, keys, partners, mixes
            noise, keys, partners, mixes = (None if table is None else table.pin_memory() for table in others)
        return Drawn(epoch, in_batch.tolist(), index, weights, loss_weights, noise, keys, partners, mixes)

    def _cut(self, batches: Tensor) -> Tensor:
        """Return this rank's part [steps, pieces, rows] of a table [steps, batch], with -1 where rows are missing."""
        groups = _padded(batches, self.groups * math.ceil(self.batch / self.groups))
        mine = groups.view(self.steps, -1, self.groups).transpose(1, 2)[:, self.mine]  # [steps, groups of mine, share]
        per_group = self.rows * math.ceil(mine.shape[2] / self.rows)
        return _padded(mine, per_group).reshape(self.steps, self.pieces, self.rows)

    def piece(self, k: Position, piece: int) -> Piece:
        """Return what one forward pass of global batch k takes, whose images were brought."""
        index, labels, weights, loss_weights = self.rows_of(k, piece)
        images = self._augmented(piece, index)
        keys = None if self.keys is None else self.keys.index_select(0, index)
        partner_labels: Tensor | None = None
        own_share: Tensor | float = 1.0
        if self.partners is not None and self.mixes is not None:
            if self.mixing is None:  # the tables stay where the first draw put them
                self.mixing = Rows(self.partners), Rows(self.mixes)
            [partners], [mix] = self.mixing[0](k, piece), self.mixing[1](k, 0)
            images = _mix(images, self._augmented(self.pieces + piece, partners), mix)
            partner_labels, own_share = self.labels.index_select(0, partners), mix[0]
        whole_batch = self.alone and isinstance(k, int) and self.in_batch[k] == len(index)
        return Piece(images, labels, weights, loss_weights, keys, partner_labels, own_share, whole_batch)

    def _augmented(self, place: int, index: Tensor) -> Tensor:
        """Return images [n, C, H, W] of the set in [0, 1], augmented. `place`: where among a step's images they are."""
        images = self.images.take(place, index)
        if self.noise is not None:
            noise = self.noise.index_select(0, index)
            if self.cfg.random_resized_crop:
                images, noise = _crop(images.to(self.dtype), noise[:, :4], self.size), noise[:, 4:]
            images = _augment(images, noise)
        of_partners = place >= self.pieces
        if of_partners not in self.kept:
            self.kept[of_partners] = torch.empty(images.shape, dtype=self.dtype, device=self.device)
        return to_unit(images, self.dtype, self.kept[of_partners])

    def _draw_noise(self, draws: torch.Generator, epoch: int) -> Tensor | None:
        """Draw the augmentation of each image of the set: [N, 7] int64, as `_augment` takes it; where images are
        cropped, 4 columns for `_crop` come first; None for none."""
        cfg, (height, width) = self.cfg, self.size
        moves, blanks = cfg.shift or cfg.flip or cfg.alternating_flip, cfg.erase or cfg.cutout
        if not (moves or blanks or cfg.random_resized_crop):
            return None
        uniform = torch.rand(self.count, 8, generator=draws, dtype=torch.float64)
        shift = torch.randint(-cfg.shift, cfg.shift + 1, (self.count, 2), generator=draws)
        flip = uniform[:, 0] < cfg.flip
        if cfg.alternating_flip:  # Keller Jordan, arXiv 2404.00498: the side of the first epoch is drawn
            sides = torch.randint(2, (self.count,), generator=generator(cfg.seed, "sides"))
            flip = (sides + epoch) % 2 == 1
        # The rectangle of random erasing (Zhong et al., arXiv 1708.04896): 2 to 33 % of the area, sides 0.3 to 1/0.3.
        area = (0.02 + 0.31 * uniform[:, 1]) * height * width
        aspect = torch.exp((2 * uniform[:, 2] - 1) * math.log(1 / 0.3))
        tall = torch.sqrt(area * aspect).round().clamp(max=height) * (uniform[:, 3] < cfg.erase)
        wide = torch.sqrt(area / aspect).round().clamp(max=width)
        top = (uniform[:, 4] * (height - tall + 1)).floor()
        left = (uniform[:, 5] * (width - wide + 1)).floor()
        bottom, right = top + tall, left + wide
        if cfg.cutout:  # DeVries and Taylor, arXiv 1708.04552
            top, bottom = _around(uniform[:, 4], cfg.cutout, height)
            left, right = _around(uniform[:, 5], cfg.cutout, width)
        columns = [shift[:, 0], shift[:, 1], flip, top, bottom, left, right]
        if cfg.random_resized_crop:
            columns = [*self._draw_crops(generator(cfg.seed, "crop", epoch)).unbind(1), *columns]
        return torch.stack([c.long() for c in columns], dim=1)

    def _draw_crops(self, draws: torch.Generator) -> Tensor:
        """Draw a rectangle in each image of the set, [N, 4] float64: top, left, height and width, as torchvision's
        RandomResizedCrop does (Szegedy et al., arXiv 1409.4842): of ten that are tried, the first that fits, or else
        the largest of the ratios in the centre."""
        height, width = self.part.images.shape[2:]
        low, high = 3 / 4, 4 / 3  # of width to height
        tall, wide = min(height, round(width / low)), min(width, round(height * high))
        crops = torch.tensor([(height - tall) // 2, (width - wide) // 2, tall, wide], dtype=torch.float64)
        crops, found = crops.repeat(self.count, 1), torch.zeros(self.count, dtype=torch.bool)
        for _ in range(10):
            uniform = torch.rand(self.count, 4, generator=draws, dtype=torch.float64)
            area = height * width * (1 - (1 - self.cfg.random_resized_crop) * uniform[:, 0])
            aspect = torch.exp(math.log(low) + uniform[:, 1] * math.log(high / low))
            sides = torch.stack([torch.sqrt(area / aspect), torch.sqrt(area * aspect)], 1).round()
            room = torch.tensor([height, width]) - sides
            fits = ((sides > 0) & (room >= 0)).all(1)
            tried = torch.cat([(uniform[:, 2:] * (room + 1)).floor(), sides], 1)
            crops = torch.where((fits & ~found)[:, None], tried, crops)
            found |= fits
        return crops

    def _draw_mixes(self, draws: torch.Generator) -> Tensor:
        """Draw how the images of each global batch are mixed: [steps, 1, 6] float64, as `_mix` takes it."""
        cfg, (height, width) = self.cfg, self.size
        uniform = torch.rand(self.steps, 3, generator=draws, dtype=torch.float64)
        cuts = uniform[:, 0] < (0.5 if cfg.mixup and cfg.cutmix else float(cfg.cutmix > 0))
        concentration = np.where(cuts, cfg.cutmix, cfg.mixup)
        # numpy's, because torch's Beta takes no generator.
        share = torch.from_numpy(np.random.default_rng(draws.initial_seed()).beta(concentration, concentration))
        # CutMix: the rectangle's sides have the image's ratio, and its centre is any pixel (Yun et al., algorithm 1).
        side = torch.sqrt(1 - share) * cuts
        top, bottom = _around(uniform[:, 1], (height * side).round(), height)
        left, right = _around(uniform[:, 2], (width * side).round(), width)
        blend = torch.where(cuts, 1.0, share)
        own_share = blend - (bottom - top) * (right - left) / (height * width)
        return torch.stack([own_share, blend, top, bottom, left, right], dim=1)[:, None]


def _padded(tensor: Tensor, length: int) -> Tensor:
    """Extend the last dimension of a tensor to `length`, with -1."""
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[-1]), value=-1)


def _partners(batches: Tensor, draws: torch.Generator) -> Tensor:
    """Return each row of a table [steps, batch] in another order; -1, of which there may be some at its end, stays."""
    places = torch.rand(batches.shape, generator=draws).masked_fill(batches < 0, 2.0).argsort(1)
    return batches.gather(1, places)


def _around(uniform: Tensor, side: Tensor | int, length: int) -> tuple[Tensor, Tensor]:
    """Return the first pixel [n], and the first one after, of intervals of `side` pixels around one of `length` pixels,
    which `uniform` [n] in [0, 1) chooses. An interval is cut off at the image's ends."""
    first = (uniform * length).floor() - side // 2
    return first.clamp(min=0), (first + side).clamp(max=length)


def _mix(images: Tensor, partners: Tensor, mix: Tensor) -> Tensor:
    """Mix images [n, C, H, W] with their partners as `mix` [6] says: the share of their own labels, that of their own
    pixels, then top, bottom, left and right of a rectangle of the partners' pixels (bottom and right excluded)."""
    height, width = images.shape[2:]
    _, blend, top, bottom, left, right = mix.unbind()
    y, x = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    own = blend * ~((y >= top) & (y < bottom) & (x >= left) & (x < right))  # [H, W]
    return torch.lerp(partners, images, own)


def _crop(images: Tensor, crops: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale a rectangle of each of images [n, C, H, W] to `size`, bilinear, with antialiasing where it shrinks. `crops`
    [n, 4]: top, left, height, width."""
    n, channels, height, width = images.shape
    top, left, tall, wide = crops.to(images.dtype).unbind(1)
    across = torch.bmm(images.reshape(n, channels * height, width), _scaling(left, wide, width, size[1]).mT)
    by_row = across.view(n, channels, height, -1).transpose(1, 2).reshape(n, height, -1)
    down = torch.bmm(_scaling(top, tall, height, size[0]), by_row)
    return down.view(n, size[0], channels, size[1]).transpose(1, 2)


def _scaling(first: Tensor, length: Tensor, of: int, to: int) -> Tensor:
    """Return how much of each of `of` pixels is in each of `to`, [n, to, of], when the `length` [n] pixels from `first`
    [n] on are scaled: weights of a triangle, as Pillow's and torch's antialiasing has them."""
    scale = (length / to)[:, None, None]
    source = torch.arange(of, device=first.device)[None, None] + 0.5 - first[:, None, None]
    centre = (torch.arange(to, device=first.device)[None, :, None] + 0.5) * scale
    weights = (1 - (source - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((source > 0) & (source < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


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
