"""Promise 3: the same command continues a run, and the result is the one that was never ended, bit for bit.

Real runs on real ranks, ended by kills and stops in the middle of everything. What a checkpoint's file is, and what
is not taken for one: tests/training/test_checkpoint.py.
"""

import io
import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import ACTIONS, Fault, Ranks, start, summary, wrap
from safetensors.torch import load_file

from fashion_ddp import data
from fashion_ddp.models import architectures
from fashion_ddp.runs.reading import load_run

# 3 epochs of 12 steps on 3,000 images; rows are dealt unevenly to 2, 3 and 4 ranks.
SHORT = ("--validation", "9000", "--batch-size", "250")
STEPS = 12
RICH = (*SHORT, "--batch-norm", "--schedule", "linear", "--shift", "1", "--flip", "0.5", "--erase", "0.3")
RICH += ("--label-smoothing", "0.1", "--mixup", "0.2", "--cutmix", "1")
RICH += ("--optimizer", "muon", "--lr", "0.02", "--ema", "0.9")
OTHER = ("--cutout", "9", "--alternating-flip", "--normalize")  # they exclude flip and erase
NEVER = ("--checkpoint-every", "1000")  # but at a stop, and at the end


@dataclass(frozen=True)
class Local(Fault):
    """A fault with an action of this file: it brings this module, and so the actions below, into the rank."""


def _kill_in_write() -> None:
    """The next file to be written is left under its temporary name."""
    wrap("os", "replace", lambda function, *args: os.kill(os.getpid(), signal.SIGKILL))


ACTIONS["kill in the write"] = _kill_in_write


@dataclass(frozen=True)
class Cut:
    """How one start of a run ends before its time."""

    fault: Fault
    words: tuple[str, ...] = ()
    code: int = -9  # of the rank that it strikes
    before: Callable[[Path], object] = lambda folder: None  # the start: what happens to the folder


def cuts(world_size: int) -> list[Cut]:
    """A run's ends, in the middle of everything: by steps that are saved then, see `POSITIONS`."""
    last = world_size - 1
    return [
        Cut(Local("save", "kill in the write", count=8)),
        Cut(Fault("evaluation", "kill", count=1)),  # the epoch's last step is saved, and not yet evaluated
        Cut(Fault("step", "TERM", rank=last, count=3), code=75),
        Cut(Fault("step", "kill", rank=last, count=6), words=NEVER),  # nothing is saved: steps are to be repeated
        Cut(Fault("step", "kill", count=10)),  # between an evaluation and the next epoch
    ]


POSITIONS = [7, 12, 15, 15, 24]


def begin(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def end(ranks: Ranks) -> None:
    """Wait for a start that is to finish."""
    codes = ranks.wait()
    assert set(codes) == {0}, ranks.printed()


def interrupted(world_size: int, folder: Path, words: Sequence[str], ends: Sequence[Cut], **how: Any) -> Ranks:
    """Start a run again and again until it has finished."""
    for cut in ends:
        cut.before(folder)
        ranks = start(world_size, folder, (*words, *cut.words), [cut.fault], **how)
        codes = ranks.wait()
        assert codes[cut.fault.rank] == cut.code and 0 not in codes, (cut, codes, ranks.printed())
    ranks = start(world_size, folder, words, **how)
    end(ranks)
    return ranks


def positions(ranks: Ranks) -> list[int]:
    """The steps that a run's starts continued after."""
    return [int(step.replace(",", "")) for step in re.findall(r"continued after step ([\d,]+),", ranks.printed())]


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row, or a summary, is the run's and not the machine's."""
    machine = ("time/", "throughput/", "peak_memory", "starts", "timings_mixed", "wandb_id")
    return {name: value for name, value in row.items() if not name.startswith(machine)}


def check_equal(folder: Path, other: Path) -> None:
    """Both runs have the same result, bit for bit, and the same record."""
    for name in ("model", "predictions", "examples"):
        one, two = (load_file(f / "run" / f"{name}.safetensors") for f in (folder, other))
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == [], name
    assert rows(folder, "steps.jsonl") == rows(other, "steps.jsonl")
    assert [*map(untimed, rows(folder, "metrics.jsonl"))] == [*map(untimed, rows(other, "metrics.jsonl"))]
    assert untimed(summary(folder)) == untimed(summary(other))


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"step-{step:09}.pt"


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def left_over(folder: Path) -> None:
    assert len(checkpoints(folder)) == 3  # two, and one that has no name yet


def half_a_line_and_a_flipped_bit(folder: Path) -> None:
    content = bytearray(checkpoint(folder, 12).read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint(folder, 13).write_bytes(content)
    for name in ("metrics.jsonl", "steps.jsonl"):
        with open(folder / "run" / name, "a") as file:
            file.write('{"epoch": 2, "st')


def other_processor(folder: Path) -> None:
    path = folder / "run" / "environment.json"
    starts = json.loads(path.read_text())
    starts[0]["ranks"][1]["cpu"] = "another one"
    path.write_text(json.dumps(starts))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 2 ranks that nothing ended."""
    folder = tmp_path_factory.mktemp("whole")
    end(start(2, folder, RICH))
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ranks]:
    """The same run, ended five times, with things happening to its folder in between."""
    folder = tmp_path_factory.mktemp("parts")
    happens = {1: left_over, 2: half_a_line_and_a_flipped_bit, 4: other_processor}
    ends = [Cut(c.fault, c.words, c.code, happens.get(n, c.before)) for n, c in enumerate(cuts(2))]
    return folder, interrupted(2, folder, RICH, ends)


def test_a_run_that_is_ended_again_and_again_equals_one_that_was_not(whole: Path, parts: tuple[Path, Ranks]) -> None:
    folder, ranks = parts
    assert positions(ranks) == POSITIONS
    check_equal(folder, whole)
    assert checkpoints(folder) == ["step-000000013.pt.broken", "step-000000035.pt", "step-000000036.pt"]
    assert ranks.printed().count("warning") == 1


@pytest.mark.slow
def test_with_compiled_passes_too(tmp_path: Path) -> None:
    words = (*SHORT, "--model", "linear", "--lr", "0.1", "--compile")
    folder, other = begin(tmp_path, "parts"), begin(tmp_path, "whole")
    end(start(2, other, words))
    ranks = interrupted(2, folder, words, [Cut(Fault("step", "TERM", count=15), code=75)])
    assert len(positions(ranks)) == 1 and summary(folder)["compiled"]
    check_equal(folder, other)


def test_what_is_kept_and_was_evaluated_is_the_average(whole: Path) -> None:
    kept, saved = (load_file(whole / "run" / f"{name}.safetensors") for name in ("model", "predictions"))
    content = torch.load(io.BytesIO(checkpoint(whole, 36).read_bytes()[:-32]), weights_only=True)
    assert content["step"]["average"]["updates"] == 36
    moving = [name for name, tensor in content["step"]["model"].items() if not torch.equal(tensor, kept[name])]
    assert set(moving) == {name for name in kept if not name.endswith("num_batches_tracked")}
    averages = [*content["step"]["average"]["weights"], *content["ranks"][0]["buffers"]]
    assert all(any(torch.equal(kept[name], one) for one in averages) for name in kept)
    dataset = data.load("synthetic")
    model = architectures.build(load_run(whole / "run").settings(), dataset.image_shape, len(dataset.classes))
    model.load_state_dict(kept)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(dataset.test_images[:100]) / 255)
    torch.testing.assert_close(logits, saved["logits"][:100])


def test_its_starts_are_counted_and_other_hardware_is_said(whole: Path, parts: tuple[Path, Ranks]) -> None:
    folder, ranks = parts
    environment = json.loads((folder / "run" / "environment.json").read_text())
    assert len(environment) == 6 == summary(folder)["starts"] and summary(whole)["starts"] == 1
    said = [line for line in ranks.printed().splitlines() if "timings are mixed" in line]
    # Also after the start that changed nothing else: the first start's times are in the sums.
    assert [line.partition(",")[0] for line in said] == ["continued after step 15", "continued after step 24"]
    assert summary(folder)["timings_mixed"] is True and summary(whole)["timings_mixed"] is False


def moved(folder: Path, words: Sequence[str]) -> Ranks:
    """A run begun on 4 ranks, continued on 2, finished on 3."""
    for world_size, rank, count in ((4, 3, 8), (2, 0, 13)):
        ranks = start(world_size, folder, words, [Fault("step", "kill", rank=rank, count=count)])
        assert ranks.wait()[rank] == -9, ranks.printed()
    ranks = start(3, folder, words)
    end(ranks)
    assert positions(ranks) == [7, 19]
    return ranks


def test_on_other_ranks_it_is_equal_with_reduction_shards(tmp_path: Path) -> None:
    words = (*SHORT, "--reduction-shards", "12", "--shift", "1", "--schedule", "one_cycle")
    whole, parts = begin(tmp_path, "whole"), begin(tmp_path, "parts")
    end(start(1, whole, words))
    moved(parts, words)
    for folder in (whole, parts):  # what names the ranks
        path = folder / "run" / "summary.json"
        path.write_text(json.dumps(summary(folder) | {"world_size": 0}))
    check_equal(parts, whole)


# Not with adam, which divides by its gradients: those of a bias before batch norm are nothing but rounding.
BATCH_NORM = ("--batch-norm", "--optimizer", "momentum", "--lr", "0.05")


@pytest.mark.slow
@pytest.mark.parametrize("words", [BATCH_NORM, ("--micro-batch", "40", "--clip-norm", "1")], ids=str)
def test_on_other_ranks_it_is_equal_up_to_rounding(words: tuple[str, ...], tmp_path: Path) -> None:
    words = (*SHORT, *words, "--precision", "fp64", "--shift", "1", "--schedule", "one_cycle")
    whole, parts = begin(tmp_path, "whole"), begin(tmp_path, "parts")
    end(start(4, whole, words))
    moved(parts, words)
    one, two = (load_file(f / "run" / "model.safetensors") for f in (whole, parts))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-10)
    losses = [[row["loss"] for row in rows(f, "steps.jsonl")] for f in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-10) and len(losses[0]) == 36
    assert rows(whole, "steps.jsonl")[-1]["accuracy"] > 0.5


NESTEROV = ("--optimizer", "momentum", "--nesterov", "--weight-decay", "0.01", "--no-decay-biases")
KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 rank": (1, (*RICH, "--optimizer", "adamw", "--weight-decay", "0.1")),
    "3 ranks, micro-batches": (3, (*SHORT, "--micro-batch", "40", "--clip-norm", "1", *OTHER)),
    "4 ranks, momentum": (4, (*SHORT, *NESTEROV, "--schedule", "cosine", "--no-shuffle")),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_however_it_trains_it_equals_a_run_that_was_not_ended(kind: str, tmp_path: Path) -> None:
    world_size, words = KINDS[kind]
    whole, parts = begin(tmp_path, "whole"), begin(tmp_path, "parts")
    end(start(world_size, whole, words))
    assert positions(interrupted(world_size, parts, words, cuts(world_size))) == POSITIONS
    check_equal(parts, whole)


# Three models of a user's, with what differs between ranks: statistics and random numbers of each rank's own; random
# numbers drawn in evaluation too, as whoever forgets `training=self.training` does; a buffer that no state_dict holds.
OWN = """
import torch
from torch import nn
from torch.nn import functional as F
from fashion_ddp.models.dropout import SampleDropout

class Own(nn.Sequential):
    def __init__(self, classes, width):
        super().__init__(
            nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Dropout2d(0.2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), SampleDropout(0.1), nn.Linear(13 * 13 * width, classes),
        )

class Drawing(Own):
    def forward(self, images):
        return super().forward(F.dropout(images, 0.1))

class Counting(Own):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, images):
        self.count += self.training
        return super().forward(images) * (1 + self.count / 100)

def own(shape, classes, hidden_units): return Own(classes, hidden_units)
def drawing(shape, classes, hidden_units): return Drawing(classes, hidden_units)
def counting(shape, classes, hidden_units): return Counting(classes, hidden_units)
"""


def with_own(folder: Path) -> Path:
    (folder / "mine.py").write_text(OWN)
    return folder


def own_states(folder: Path, step: int) -> list[dict[str, Any]]:
    """What a checkpoint holds of each rank."""
    return torch.load(io.BytesIO(checkpoint(folder, step).read_bytes()[:-32]), weights_only=True)["ranks"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "drawing", "counting"])
def test_a_user_s_model_goes_on_with_what_each_rank_has_of_its_own(name: str, tmp_path: Path) -> None:
    whole, parts = with_own(begin(tmp_path, "whole")), with_own(begin(tmp_path, "parts"))
    words = (*SHORT, "--model", f"mine:{name}")
    end(start(2, whole, words))
    ends = cuts(2) if name == "own" else cuts(2)[:2]
    assert positions(interrupted(2, parts, words, ends)) == POSITIONS[: len(ends)]
    check_equal(parts, whole)
    one, two = own_states(parts, 36)
    assert not torch.equal(one["generator"], two["generator"])
    assert not torch.equal(one["buffers"][-2 if name == "counting" else 0], two["buffers"][0])


@pytest.mark.slow
def test_a_rank_that_the_run_did_not_have_takes_after_the_first(tmp_path: Path) -> None:
    words = (*SHORT, "--model", "mine:counting", "--epochs", "1")
    ranks = start(1, with_own(tmp_path), words, [Fault("step", "kill", count=8)])
    assert ranks.wait() == [-9]
    end(start(2, tmp_path, words))
    one, two = own_states(tmp_path, 12)
    assert [int(rank["buffers"][0]) for rank in (one, two)] == [12, 12]  # forward passes since the run began
    assert not torch.equal(one["generator"], two["generator"])


@pytest.mark.slow
def test_more_epochs_continue_a_finished_run(tmp_path: Path) -> None:
    whole, parts = begin(tmp_path, "whole"), begin(tmp_path, "parts")
    words = (*SHORT, "--batch-norm", "--shift", "1")
    end(start(2, whole, (*words, "--epochs", "4")))
    end(start(2, parts, (*words, "--epochs", "2")))
    ranks = interrupted(2, parts, (*words, "--epochs", "4"), [Cut(Fault("step", "kill", count=5))])
    assert positions(ranks) == [24, 28]
    for folder in (whole, parts):  # the settings that differ from the recipe are told as the run's first start had them
        assert json.loads((folder / "run" / "summary.json").read_text())["epochs"] == 4
    check_equal(parts, whole)
