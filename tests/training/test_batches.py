"""Which rows make a batch, who takes them, and what augmentation does to them: each against a slow reference."""

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as transforms
from torchvision.transforms import RandomResizedCrop

from fashion_ddp.config import Config
from fashion_ddp.data import Dataset
from fashion_ddp.distributed.machine import RankPlacement
from fashion_ddp.distributed.world import World
from fashion_ddp.errors import UserError
from fashion_ddp.training.batches import Batches, split, to_unit
from fashion_ddp.training.images import Part

pytestmark = pytest.mark.quick

COUNT = 103  # a prime: no batch size divides it
HEIGHT, WIDTH = 9, 12
IMAGES = np.random.default_rng(0).integers(1, 256, (COUNT, 2, HEIGHT, WIDTH), dtype=np.uint8)
LABELS = np.arange(COUNT)  # each image's label is its index, so that it is known wherever it turns up


def batches(
    rank: int = 0, size: int = 1, images: np.ndarray = IMAGES, epoch: int = 1, keyed: bool = False, **settings: Any
) -> Batches:
    """One rank's batches, with an epoch drawn."""
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    world = World(accelerator, RankPlacement(rank, size, rank, size))
    ours = Batches(Config(model="linear", **settings), world, Part(images, np.arange(len(images))))
    ours.keyed = keyed
    ours.draw(epoch)
    return ours


def every_rank(size: int, **settings: Any) -> list[Batches]:
    return [batches(rank, size, **settings) for rank in range(size)]


def rows(ours: Batches, step: int) -> list[int]:
    """The real rows of one rank's step."""
    labels = torch.stack([ours.piece(step, piece).labels for piece in range(ours.pieces)])
    return labels[ours.weights[step] == 1].tolist()


def order_of(**settings: Any) -> list[int]:
    """The epoch's order of the images, from one process that takes the set in one batch."""
    return rows(batches(**settings | {"batch_size": COUNT}), 0)


# --- Rows -------------------------------------------------------------------------------------------------------

CUTS: list[dict[str, Any]] = [{}, {"micro_batch": 3}, {"micro_batch": 1000}, {"reduction_shards": 60}]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("batch_size", [1, 2, 10, 50, 51, 60, 103, 200])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_each_batch_is_cut_into_the_ranks_rows(size: int, batch_size: int, cut: dict[str, Any]) -> None:
    world = every_rank(size, batch_size=batch_size, **cut)
    order = order_of()
    batch = min(batch_size, COUNT)
    assert {ours.steps for ours in world} == {-(-COUNT // batch)}
    shapes = {tuple(t.shape) for ours in world for t in (ours.index, ours.weights, ours.loss_weights)}
    assert shapes == {(world[0].steps, world[0].pieces, world[0].rows)}
    for k in range(world[0].steps):
        expected = order[k * batch : (k + 1) * batch]
        assert sorted(row for ours in world for row in rows(ours, k)) == sorted(expected)
        if not cut:
            assert [rows(ours, k) for ours in world] == [expected[rank::size] for rank in range(size)]
        for ours in world:
            assert ours.in_batch[k] == len(expected)
            # DDP divides the sum of the ranks' gradients by their number; shards are added up as they are.
            averaged = 1 if "reduction_shards" in cut else size
            share = torch.where(ours.weights[k] == 1, averaged / len(expected), 0.0)
            torch.testing.assert_close(ours.loss_weights[k], share)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_parts_of_a_batch_have_the_size_asked_for(cut: dict[str, Any]) -> None:
    for size, batch_size in product((1, 2, 3), (7, 50, 1000)):
        ours = batches(0, size, batch_size=batch_size, **cut)
        batch = min(batch_size, COUNT)
        share = -(-batch // (cut.get("reduction_shards") or size))
        assert ours.rows == min(cut.get("micro_batch") or share, share)
        held = ours.rows * ours.pieces * size
        assert batch <= held
        if not cut:
            assert held < batch + size  # as little padding as equal shapes allow


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.float32), ("fp64", torch.float64)])
def test_pixels_are_numbers_from_0_to_1(precision: Any, dtype: torch.dtype) -> None:
    assert batches(precision=precision).piece(0, 0).images.dtype == dtype
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_unit(every, dtype), torch.arange(256, dtype=dtype) / 255)


def test_each_seed_and_epoch_has_a_draw_of_its_own_unless_the_order_is_the_file_s() -> None:
    assert order_of(shuffle=False) == order_of(shuffle=False, epoch=2) == list(range(COUNT))

    def draw(**given: Any) -> tuple[Any, ...]:
        ours = batches(batch_size=COUNT, shift=2, flip=0.5, erase=0.5, mixup=0.5, keyed=True, **given)
        tables = ours.noise, ours.partners, ours.mixes, ours.keys
        return (*(tuple(t.flatten().tolist()) for t in (ours.index, *tables) if t is not None),)

    cases = [{"seed": seed, "epoch": epoch} for seed, epoch in product((0, 1, 11, 111, 2**63 - 1), (1, 2, 11, 111))]
    draws = [draw(**case) for case in cases]
    assert draws == [draw(**case) for case in cases]
    orders, *others = (set(part) for part in zip(*draws, strict=True))
    assert [len(orders), *map(len, others)] == [len(cases)] * 5
    assert all(sorted(order) == list(range(COUNT)) for order in orders)


def test_an_epoch_drawn_ahead_changes_nothing_before_it_is_taken_and_is_that_epoch() -> None:
    def tables(ours: Batches) -> list[Any]:
        taken = [t for step in range(ours.steps) for t in ours.piece(step, 0) if isinstance(t, torch.Tensor)]
        return [
            *(t.tolist() for t in (*taken, ours.index, ours.targets, ours.weights, ours.loss_weights)),
            ours.in_batch,
        ]

    given: dict[str, Any] = {"shift": 2, "erase": 0.5, "batch_size": 10, "mixup": 0.5, "cutmix": 0.5, "keyed": True}
    first, second, third = (tables(batches(epoch=epoch, **given)) for epoch in (1, 2, 3))
    ours = batches(**given)
    ours.draw_ahead(2)
    assert tables(ours) == first
    ours.draw(2)
    assert tables(ours) == second
    ours.draw_ahead(2)
    ours.draw(3)
    assert tables(ours) == third


def test_a_draw_leaves_no_trace() -> None:
    """Neither torch's own random numbers nor an earlier epoch changes a draw, nor are they changed."""
    ours = batches(epoch=3, flip=0.5)
    expected, state = ours.index.clone(), torch.get_rng_state()
    for epoch in (1, 2, 3):
        torch.rand(7)
        before = torch.get_rng_state()
        ours.draw(epoch)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(ours.index, expected) and not torch.equal(torch.get_rng_state(), state)


def dataset(count: int) -> Dataset:
    """Images whose label is their place."""
    images, labels = np.zeros((count, 1, 2, 2), np.uint8), np.arange(count)
    return Dataset("small", ("a",), images, labels, images[:1], labels[:1], md5={}, source="")


def held_out(cfg: Config, count: int = 100) -> list[int]:
    return split(cfg, dataset(count))["val"].labels.tolist()


@pytest.mark.parametrize("held", [0, 1, 40, 99])
def test_validation_takes_its_images_from_training(held: int) -> None:
    parts = {name: part.labels.tolist() for name, part in split(Config(validation=held), dataset(100)).items()}
    trained_on, kept_out = parts["train"], parts.get("val", [])
    assert len(kept_out) == held and sorted([*trained_on, *kept_out]) == list(range(100))
    assert list(trained_on) == sorted(trained_on)  # the order of the file, for recipes that do not shuffle


def test_validation_is_drawn_by_seed() -> None:
    drawn = [held_out(Config(validation=20, seed=seed)) for seed in (1, 2, 3, 1)]
    assert len(set(map(tuple, drawn))) == 3 and drawn[0] == drawn[3]
    assert all(set(indices) != set(range(20)) for indices in drawn)
    # Its seed alone: what else the run draws leaves it the same.
    other = Config(validation=20, seed=1, epochs=9, batch_size=3, flip=0.5)
    assert held_out(other) == drawn[0]


def test_validation_must_leave_images() -> None:
    with pytest.raises(UserError, match="validation must leave images to train on: 100 of 100"):
        split(Config(validation=100), dataset(100))


def augmented(image: np.ndarray, noise: list[int]) -> np.ndarray:
    """One image [C, H, W] as its row of noise says, pixel by pixel: flipped, moved, blanked."""
    down, right, flip, top, bottom, left, far_right = noise
    out = np.zeros_like(image)
    for y, x in product(range(HEIGHT), range(WIDTH)):
        from_y, from_x = y - down, x - right
        inside = 0 <= from_y < HEIGHT and 0 <= from_x < WIDTH
        blank = top <= y < bottom and left <= x < far_right
        if inside and not blank:
            out[:, y, x] = image[:, from_y, WIDTH - 1 - from_x if flip else from_x]
    return out


AUGMENTATIONS: list[dict[str, Any]] = [{"shift": 3}, {"flip": 0.5}, {"flip": 1.0}, {"erase": 1.0}, {"flip": 1e-300}]
AUGMENTATIONS += [{"shift": 2, "flip": 0.5, "erase": 0.5}, {"shift": 50}]  # further than the image is wide
AUGMENTATIONS += [{"shift": 1, "alternating_flip": True, "cutout": 4}, {"cutout": 50}]


@pytest.mark.parametrize("settings", AUGMENTATIONS, ids=str)
def test_augmentation_does_what_its_noise_says(settings: dict[str, Any]) -> None:
    ours = batches(batch_size=COUNT, **settings)
    assert ours.noise is not None
    images, labels, *_ = ours.piece(0, 0)
    for image, label in zip(images, labels.tolist(), strict=True):
        expected = augmented(IMAGES[label], ours.noise[label].tolist())
        assert np.array_equal((image * 255).round().byte().numpy(), expected)


def test_each_kind_of_noise_acts_alone() -> None:
    assert batches().noise is None
    kinds: list[tuple[str, dict[str, Any]]] = [("shift", {"shift": 1}), ("flip", {"flip": 1.0})]
    kinds += [("flip", {"alternating_flip": True}), ("blank", {"erase": 1.0}), ("blank", {"cutout": 3})]
    kinds += [("crop", {"random_resized_crop": 0.5})]
    for moved, settings in kinds:
        noise = batches(**settings).noise
        assert noise is not None
        *crop, down, right, flip, top, bottom, _, _ = noise.T
        acts = {"shift": down.any() or right.any(), "flip": flip.any(), "blank": (bottom > top).any()}
        acts["crop"] = torch.tensor(bool(crop))
        assert {kind: bool(does) for kind, does in acts.items()} == {kind: kind == moved for kind in acts}


@pytest.mark.parametrize("mixed", [{}, {"mixup": 0.5}, {"mixup": 0.5, "cutmix": 1.0}], ids=str)
@pytest.mark.parametrize("cut", CUTS[:2] + [{"reduction_shards": 12}], ids=str)
def test_what_is_drawn_belongs_to_the_image_wherever_it_is_computed(cut: dict[str, Any], mixed: dict[str, Any]) -> None:
    def by_label(world: list[Batches]) -> list[torch.Tensor]:
        seen, others = torch.zeros(COUNT, *IMAGES.shape[1:]), torch.zeros(COUNT, 3, dtype=torch.float64)
        for ours in world:
            for k, piece in product(range(ours.steps), range(ours.pieces)):
                images, labels, weights, _, keys, partner_labels, own_share, _ = ours.piece(k, piece)
                real = weights == 1  # a row that only fills the shape has another's labels, and another partner
                seen[labels[real]] = images[real]
                assert keys is not None and (partner_labels is not None) == bool(mixed)
                partners = labels if partner_labels is None else partner_labels
                others[labels[real]] = torch.stack(
                    [keys[real] >> 11, partners[real], torch.full_like(labels[real], 1) * own_share], dim=1
                ).double()
        return [seen, others]

    noisy: dict[str, Any] = {"batch_size": 20, "shift": 2, "flip": 0.5, "erase": 0.5, "keyed": True} | mixed
    noisy |= {"random_resized_crop": 0.3} if mixed.get("cutmix") else {}
    alone = by_label(every_rank(1, **noisy))
    for size in (2, 3, 4):
        assert all(map(torch.equal, by_label(every_rank(size, **noisy, **cut)), alone))


def test_how_often_and_how_much() -> None:
    """Over 40,000 images of 28 x 28; the draw is fixed, so nothing here is left to chance."""
    many = np.zeros((40_000, 1, 28, 28), np.uint8)
    noise = batches(images=many, shift=2, flip=0.3, erase=0.6).noise
    assert noise is not None
    down, right, flip, top, bottom, left, far_right = noise.double().T
    assert float(flip.mean()) == pytest.approx(0.3, abs=0.01)
    for moves in (down, right):
        counts = torch.bincount(moves.long() + 2)
        assert len(counts) == 5 and float(counts.min()) > 0.95 * 8000 and float(counts.max()) < 1.05 * 8000
    assert abs(float(torch.corrcoef(torch.stack([down, right, flip])).fill_diagonal_(0).abs().max())) < 0.02
    erased = bottom > top
    assert float(erased.double().mean()) == pytest.approx(0.6, abs=0.01)
    tall, wide = (bottom - top)[erased], (far_right - left)[erased]
    assert bool((top >= 0).all() and (bottom <= 28).all() and (left >= 0).all() and (far_right <= 28).all())
    area, aspect = tall * wide / 28**2, (tall / wide).log()
    assert float(area.mean()) == pytest.approx((0.02 + 0.33) / 2, abs=0.01)
    # Sides are whole pixels, so small rectangles miss 2 % and 0.3 a little.
    assert 0.01 < float(area.min()) < 0.03 and 0.31 < float(area.max()) < 0.36
    assert float(aspect.mean()) == pytest.approx(0.0, abs=0.02) and float(aspect.abs().max()) < 1.6
    # It lies anywhere that it fits: as far from one side as from the other.
    assert float((top + bottom)[erased].mean()) == pytest.approx(28, abs=0.3)
    assert float((left + far_right)[erased].mean()) == pytest.approx(28, abs=0.3)
    assert float(top[erased].min()) == 0 and float(bottom[erased].max()) == 28


def test_sides_alternate_from_epoch_to_epoch() -> None:
    def flipped(epoch: int, **given: Any) -> torch.Tensor:
        noise = batches(epoch=epoch, alternating_flip=True, **given).noise
        assert noise is not None
        return noise[:, 2]

    first = flipped(1)
    assert 30 < int(first.sum()) < 73  # of 103
    for epoch in (2, 3, 8):
        assert torch.equal(flipped(epoch, shift=2), (first + epoch - 1) % 2)
    assert not torch.equal(flipped(1, seed=1), first)


@pytest.mark.parametrize("side", [1, 7, 8, 40])
def test_cutout_blanks_a_square_around_any_pixel(side: int) -> None:
    many = np.zeros((40_000, 1, 28, 28), np.uint8)
    noise = batches(images=many, cutout=side).noise
    assert noise is not None
    for first, after in (noise[:, 3:5].T, noise[:, 5:].T):
        # Of a centre at each pixel: what is left of the interval within the image.
        left = {(max(0, c - side // 2), min(28, c - side // 2 + side)) for c in range(28)}
        found, times = torch.stack([first, after]).unique(dim=1, return_counts=True)
        assert set(map(tuple, found.T.tolist())) == left
        if len(left) == 28:
            assert float(times.min()) * 28 / 40_000 > 0.9 and float(times.max()) * 28 / 40_000 < 1.1
    assert abs(float(torch.corrcoef(noise[:, [3, 5]].T.double())[0, 1])) < 0.02


@pytest.mark.parametrize("size", [0, 5])  # that of the images, to which a crop grows, or a smaller one
def test_a_random_crop_is_torchvisions(size: int) -> None:
    ours = batches(batch_size=COUNT, random_resized_crop=0.1, precision="fp64", flip=0.5, image_size=size)
    assert ours.noise is not None
    shape = [size or HEIGHT, size or WIDTH]
    images, labels, *_ = ours.piece(0, 0)
    for image, label in zip(images, labels.tolist(), strict=True):
        *crop, _, _, flip, _, _, _, _ = ours.noise[label].tolist()
        pixels = torch.from_numpy(IMAGES[label]).double() / 255
        theirs = transforms.resized_crop(pixels, *crop, shape, antialias=True)
        torch.testing.assert_close(image, theirs.flip(-1) if flip else theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width", "least"), [(64, 64, 0.08), (9, 40, 0.5), (20, 30, 1.0)])
def test_crops_are_drawn_as_torchvision_draws_them(height: int, width: int, least: float) -> None:
    noise = batches(images=np.zeros((5_000, 1, height, width), np.uint8), random_resized_crop=least).noise
    assert noise is not None
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    drawn = [RandomResizedCrop.get_params(image, [least, 1.0], [3 / 4, 4 / 3]) for _ in range(5_000)]
    for ours, theirs in zip(noise[:, :4].double().T, torch.tensor(drawn).double().T, strict=True):
        assert float(ours.min()) == float(theirs.min()) and abs(float(ours.max() - theirs.max())) <= 1
        gap = 4 * float(theirs.std()) * math.sqrt(2 / 5_000)
        assert abs(float(ours.mean() - theirs.mean())) <= gap
        assert abs(float(ours.std() - theirs.std())) <= gap


def test_each_seed_and_epoch_has_crops_of_its_own() -> None:
    noise = [batches(random_resized_crop=0.1, **one).noise for one in ({}, {}, {"epoch": 2}, {"seed": 7})]
    first, again, later, other = (table[:, :4] for table in noise if table is not None)
    assert torch.equal(first, again) and not torch.equal(first, later) and not torch.equal(first, other)


# --- Mixing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("given", [{"mixup": 0.2}, {"cutmix": 1.0, "micro_batch": 3}], ids=str)
def test_partners_are_the_batch_in_another_order(given: dict[str, Any], size: int) -> None:
    world = every_rank(size, batch_size=20, **given)
    for k in range(world[0].steps):
        own = sorted(row for ours in world for row in rows(ours, k))
        partners: list[int] = []
        for ours in world:
            assert ours.partners is not None
            partners += ours.partners[k][ours.weights[k] == 1].tolist()
        assert sorted(partners) == own
    [ours] = every_rank(1, batch_size=COUNT, **given | {"micro_batch": 0})
    assert ours.partners is not None
    assert int((ours.partners == ours.index).sum()) < 6  # as of any order: one on average


def test_partners_are_augmented_as_they_are_themselves() -> None:
    noisy: dict[str, Any] = {"batch_size": COUNT, "shift": 2, "flip": 0.5, "cutout": 4, "precision": "fp64"}
    images, labels, *_ = batches(**noisy).piece(0, 0)
    own = images[labels.argsort()]
    mixed, labels, _, _, _, partner_labels, own_share, _ = batches(mixup=1.0, **noisy).piece(0, 0)
    assert partner_labels is not None and 0.01 < float(own_share) < 0.99
    torch.testing.assert_close(mixed, own_share * own[labels] + (1 - own_share) * own[partner_labels])


def test_a_share_is_drawn_for_each_batch_from_beta() -> None:
    """Over 20,000 batches of 2; the draw is fixed, so nothing here is left to chance."""
    many = np.zeros((40_000, 1, 28, 28), np.uint8)

    def mixes(**given: Any) -> list[torch.Tensor]:
        drawn = batches(images=many, batch_size=2, precision="fp64", **given).mixes
        assert drawn is not None and drawn.shape == (20_000, 1, 6)
        return [*drawn[:, 0].unbind(1)]

    def check_beta(share: torch.Tensor, a: float, **tolerance: float) -> None:
        assert float(share.mean()) == pytest.approx(0.5, abs=0.01)
        assert float(share.var()) == pytest.approx(1 / (4 * (2 * a + 1)), **tolerance)

    for a in (0.2, 1.0, 3.0):
        share, blend, *rectangle = mixes(mixup=a)
        assert torch.equal(share, blend) and torch.equal(rectangle[0], rectangle[1])
        check_beta(share, a, rel=0.03)

    share, blend, top, bottom, left, right = mixes(cutmix=1.0)
    assert bool((blend == 1).all() and (top >= 0).all() and (bottom <= 28).all() and (bottom >= top).all())
    torch.testing.assert_close(share, 1 - (bottom - top) * (right - left) / 28**2)
    # What was drawn shows where nothing is cut off.
    inside = (top > 0) & (left > 0) & (bottom < 28) & (right < 28)
    assert torch.equal((bottom - top)[inside], (right - left)[inside]) and int(inside.sum()) > 2000
    middle = (top + bottom)[(bottom - top) == 4] / 2
    assert sorted(middle.unique().tolist()) == list(range(2, 27))

    share, blend, top, bottom, _, _ = mixes(mixup=3.0, cutmix=1000.0)
    cut = blend == 1
    assert float(cut.double().mean()) == pytest.approx(0.5, abs=0.01)
    check_beta(share[~cut], 3.0, rel=0.05)
    assert bool((top == bottom)[~cut].all()) and bool((top < bottom)[cut].all())
    assert 18 <= float((bottom - top)[cut].max()) <= 21  # nearly half of the area, before it is cut off
