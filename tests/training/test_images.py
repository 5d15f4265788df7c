"""Images that are read ahead: the same pixels as those on a device, from memory that does not grow with the set."""

import resource
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ranks
from trainer import Trainer

from fashion_ddp.config import Config
from fashion_ddp.config.layers import make_config
from fashion_ddp.data.cache import centre, pixel_sums
from fashion_ddp.distributed import machine
from fashion_ddp.distributed.world import World, open_world
from fashion_ddp.errors import TrainingFailed, UserError
from fashion_ddp.models import architectures
from fashion_ddp.training import images
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.evaluate import Evaluation
from fashion_ddp.training.images import Part, Place, Resident, Stream

quick = pytest.mark.quick
CPU = torch.device("cpu")
COUNT, ROOM, SEEN = 83, 13, 10


def part(folder: Path, kind: str) -> Part:
    """Noise, two channels: in memory, in a file with room around what is seen, or some of that file's."""
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 2, ROOM, ROOM), dtype=np.uint8)
    labels = np.arange(COUNT) % 10
    if kind == "memory":
        return Part(centre(pixels, SEEN), labels)
    (folder / "train.u8").write_bytes(pixels.tobytes())
    stored = np.memmap(folder / "train.u8", np.uint8, "c", shape=pixels.shape)
    whole = Part(centre(stored, SEEN), labels, None, stored, pixel_sums(centre(stored, SEEN)))
    if kind == "room":
        return Part(stored, labels, None, stored)
    return whole if kind == "file" else whole.subset(np.flatnonzero(np.arange(COUNT) % 3))


def brought(source: Any, table: torch.Tensor, k: int) -> list[torch.Tensor]:
    """What a source gives at each place of a step; of rows that are not wanted nothing is said."""
    source.bring(k)
    return [source.take(place, row.clamp(min=0))[row >= 0].clone() for place, row in enumerate(table[k])]


@quick
@pytest.mark.parametrize("kind", ["memory", "file", "some of a file", "room"])
def test_images_that_are_read_ahead_are_those_that_lie_on_the_device(tmp_path: Path, kind: str) -> None:
    of = part(tmp_path, kind)
    resident, stream = Resident(of, CPU), Stream(of, CPU)
    draws = torch.Generator().manual_seed(0)
    for _ in range(2):  # epochs
        table = torch.randint(-1, len(of.labels), (9, 2, 5), generator=draws)
        stream.order(table)
        # In turn, from the midst of an epoch on, as a run that is continued, and the same step twice.
        for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 5, 0):
            assert all(map(torch.equal, brought(stream, table, k), brought(resident, table, k)))
    stream.order(table[:, :1], table[:, 1:])  # partners lie after
    assert all(map(torch.equal, brought(stream, table, 3), brought(resident, table, 3)))
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


@quick
def test_sums_are_those_of_the_pixels(tmp_path: Path) -> None:
    some = part(tmp_path, "some of a file")
    assert some.rows is not None and len(some.rows) == len(some.labels) < COUNT
    seen = some.images[some.rows].astype(np.int64)
    for of in (some, Part(some.images[some.rows], some.labels)):
        assert np.array_equal(of.sums(), np.stack([seen.sum((2, 3)), (seen**2).sum((2, 3))], 2))


@quick
def test_a_file_that_is_cut_short_or_gone_is_told(tmp_path: Path) -> None:
    stream = Stream(part(tmp_path, "file"), CPU)
    with open(tmp_path / "train.u8", "r+b") as file:
        file.truncate(40 * 2 * ROOM**2 + 7)
    table = torch.tensor([[[1, 2]], [[3, 40]], [[5, 6]]])
    stream.order(table)
    stream.bring(0)
    with pytest.raises(TrainingFailed, match=r"train.u8 cannot be read \(it ends before image 40\): mend that, and"):
        stream.bring(1)
    stream.close()


def trained(cfg: Config, of: Part, to_test: Part, place: Place, stop: int | None) -> list[torch.Tensor]:
    """Losses, weights and answers of two epochs; from a step of the second on by another process's objects."""
    torch.manual_seed(0)
    with open_world(cfg) as world:
        model = architectures.build(cfg, (2, SEEN, SEEN), 10)
        step = Trainer(cfg, world, model, Batches(cfg, world, of, place))
        losses = []
        for epoch in (1, 2):
            step.batches.draw(epoch)
            for k in range(step.batches.steps):
                if (epoch, k) == (2, stop):  # a process that goes on begins in mid-epoch
                    step.batches.images.close()
                    step.batches.images = images.lay(of, CPU, place)
                    step.batches.draw(epoch)
                step(k)
                losses += [one.loss for one in step.read(range(k, k + 1))]
        evaluation = Evaluation(cfg, world, to_test, 10, place)
        scores = evaluation(model, "none", "flip")
        for source in (step.batches.images, evaluation.images):
            source.close()
        return [torch.tensor(losses), *model.state_dict().values(), *(one.logits for one in scores)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["memory", "some of a file", "room"])
def test_a_run_that_reads_ahead_has_the_same_bits(tmp_path: Path, kind: str, world_size: int) -> None:
    given: dict[str, Any] = {"model": "cnn", "batch_size": 20, "device": "cpu", "threads": 1, "shift": 1, "flip": 0.5}
    given |= {"mixup": 0.3} if kind != "room" else {"random_resized_crop": 0.2, "image_size": SEEN, "micro_batch": 4}
    cfg, parts = make_config(given), [part(tmp_path, kind), part(tmp_path, "memory" if kind == "memory" else "file")]
    for seen, resident in zip(
        *(ranks(world_size, trained, cfg, *parts, place, stop) for place, stop in (("host", 2), ("device", None))),
        strict=True,
    ):
        assert all(map(torch.equal, seen, resident))


def held(folder: Path, count: int) -> int:
    """How much this process's memory grows, at most, while it takes every image of a set in a file."""
    with open(folder / f"{count}.u8", "wb") as file:
        file.truncate(count * 3 * 64**2)
    stored = np.memmap(folder / f"{count}.u8", np.uint8, "c", shape=(count, 3, 64, 64))
    stream = Stream(Part(stored, np.zeros(count, np.int64), None, stored), CPU)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = torch.randperm(count).view(-1, 1, 100)
    stream.order(table)
    for k in range(len(table)):
        stream.bring(k)
    stream.close()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    for count in (1_000, 20_000):  # 12 and 246 MB
        [grown] = ranks(1, held, tmp_path, count)
        assert grown < 30e6


class Card:
    """A world of two ranks with a card each, of which the other one has its own answer."""

    device, device_name = torch.device("cuda", 1), "a card"
    card_memory = World.card_memory

    def __init__(self, other: Any = 0):
        self.other = other

    def all_gather_object(self, mine: Any) -> list[Any]:
        return [mine, self.other if type(self.other) is type(mine) else mine]

    def raise_together(self, work: Any) -> Any:
        return work()


GB = 10**9


@quick
@pytest.mark.parametrize(
    ("asked", "needed", "others", "place"),
    [
        ("auto", 9 * GB, 0, "device"), ("auto", 11 * GB, 0, "trial"), ("auto", 41 * GB, 0, "host"),
        ("auto", 9 * GB, 2, "host"), ("auto", 9 * GB, 1, "trial"), ("host", 1, 0, "host"),
        ("device", 39 * GB, 2, "device"),
    ],
)  # fmt: skip
def test_a_set_lies_on_cards_where_it_fits_on_all(
    monkeypatch: pytest.MonkeyPatch, asked: Any, needed: int, others: int, place: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * GB, 80 * GB))
    world: Any = Card(others)
    pixels = np.broadcast_to(np.uint8(0), (needed, 1, 1, 1))
    of = Part(pixels, np.broadcast_to(np.int64(0), needed))
    assert images.choose_place(Config(data_on=asked), world, [of]) == place


@quick
@pytest.mark.parametrize(("runs", "free", "expected"), [(1, 60, (60, 80)), (2, 60, (37, 40)), (4, 5, (5, 20))])
def test_runs_that_share_a_card_divide_its_memory(
    runs: int, free: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHION_DDP_RUNS_PER_CARD", str(runs))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3)  # its own, of what is taken
    assert World.card_memory(Card()) == expected  # type: ignore[arg-type]


@quick
@pytest.mark.parametrize(("free", "other", "moved"), [(5000, True, True), (4999, True, False), (5000, False, False)])
def test_after_a_trial_step_images_move_where_they_fit_beside_it_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, other: bool, moved: bool
) -> None:
    of, world = part(tmp_path, "some of a file"), Card(other)
    set_bytes = 2 * len(of.labels) * 2 * SEEN**2  # of two parts
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (set_bytes + free, 1_000_000))
    monkeypatch.setattr(images, "MARGIN", 0.001)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3000)  # and 0.1 % of all, 8 a weight
    on_cpu: Any = world
    world.device = CPU
    table = torch.tensor([[[3, 5]], [[7, 0]]])
    holders = [SimpleNamespace(part=of, images=Stream(of, CPU)) for _ in range(2)]
    wanted = [image.clone() for image in brought_first(holders[0].images, table)]
    with ExitStack() as scope:
        images.settle(on_cpu, "trial", [torch.zeros(125)], holders, scope)
        assert [holder.images.lie_on for holder in holders] == ["device" if moved else "host"] * 2
        assert all(map(torch.equal, brought_first(holders[0].images, table), wanted))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def brought_first(source: Any, table: torch.Tensor) -> list[torch.Tensor]:
    source.order(table)
    return brought(source, table, 0)


@quick
def test_a_set_that_is_wanted_on_a_card_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    world: Any = Card()
    with pytest.raises(UserError, match=r"takes 0.00 GB, and 0.00 GB of memory are free on a card \(cuda:1\): leave"):
        images.choose_place(Config(data_on="device"), world, [Part(np.zeros((2000, 1, 1, 1)), np.zeros(2000))])


@quick
def test_in_a_machine_s_memory_only_what_lies_in_a_file_needs_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of, world = part(tmp_path, "file"), Card()
    on_cpu: Any = world
    world.device = CPU
    for free, kind, place in ((of.nbytes - 1, "file", "host"), (of.nbytes, "file", "device"), (1, "memory", "device")):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        assert images.choose_place(Config(), on_cpu, [part(tmp_path, kind)]) == place
    monkeypatch.setattr(machine, "free_memory", lambda: None)
    assert images.choose_place(Config(), on_cpu, [of]) == "device"
