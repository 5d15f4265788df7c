"""The file that a run continues from: what goes in comes out, whole or not at all, and nothing else is ever loaded.

One rank in this process, with the real step, recorder and run folder; only the Accelerator is replaced. That a run
ends in the same bits however often it was ended: tests/resume/test_resume.py.
"""

import copy
import errno
import hashlib
import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from trainer import Trainer

from fashion_ddp import user_code
from fashion_ddp.config import Config
from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.machine import RankPlacement
from fashion_ddp.distributed.world import World
from fashion_ddp.errors import Stopped, TrainingFailed
from fashion_ddp.models import architectures
from fashion_ddp.runs.folder import RunFolder
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.checkpoint import Checkpoints
from fashion_ddp.training.evaluate import Scores
from fashion_ddp.training.images import Part
from fashion_ddp.training.recorder import Recorder

pytestmark = pytest.mark.quick

Patch, Screen = pytest.MonkeyPatch, pytest.CaptureFixture[str]

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, 40)
STEPS = 5  # of an epoch
BASE: dict[str, Any] = {"model": "cnn", "hidden_units": 2, "conv_blocks": 1, "batch_norm": True, "optimizer": "adam"}
BASE |= {"lr": 0.01, "device": "cpu", "batch_size": 8, "epochs": 2, "tracker": "none", "checkpoint_every": 0.0}
CHOOSING = {"validation": 8, "keep": "best", "patience": 1}


class Training:
    """What train() builds, on one rank in this process: begun, or continued from what the folder holds."""

    def __init__(self, path: Path, **given: Any):
        self.path, self.cfg = path, make_config(BASE | given)
        accelerator: Any = SimpleNamespace(device=torch.device("cpu"), scaler=None)
        accelerator.prepare_model = lambda model, evaluation_mode: model
        world = World(accelerator, RankPlacement())
        self.model = architectures.build(self.cfg, (1, 8, 8), 10)
        self.trainer = Trainer(self.cfg, world, self.model, Batches(self.cfg, world, Part(IMAGES, LABELS)))
        self.state, self.sync = self.trainer.state, self.trainer.sync
        self.sync.seconds = 0.0  # a sync point after every step
        path.mkdir(exist_ok=True)
        (path / "config.yaml").write_text(self.cfg.to_yaml())
        self.folder = RunFolder(path)
        self.checkpoints = Checkpoints(self.cfg, world, self.folder, self.state)
        self.recorder = Recorder(self.folder, self.cfg, {}, self.state.recorded)

    def until(self, done: int) -> "Training":
        """Train on until so many steps are done."""
        timings = self.state.timings
        for epoch in self.state.epochs():
            self.recorder.begin_epoch(epoch, STEPS)
            self.trainer.batches.draw(epoch)
            phase = timings.measure("train")  # not `with`: what ends within an epoch ends without a word
            phase.__enter__()
            for window in self.sync.windows(STEPS, self.state.steps_of(epoch)):
                for k in window:
                    self.trainer(k)
                    torch.rand(1)  # as a layer that draws would
                self.recorder.steps(self.sync.read(window))
                last = self.state.trained_to_the_end
                if self.sync.save_due or self.sync.stop or last:
                    self.checkpoints.save(required=bool(self.sync.stop) or last)
                if self.sync.stop:
                    raise Stopped(self.state.position, self.sync.stop)
                if self.state.done == done:
                    return self
            phase.__exit__(None, None, None)
            with timings.measure("eval"):
                self.state.choice.judge(epoch, {"val": Scores(0.5, 0.5, torch.zeros(1, 10), torch.zeros(1))})
        return self

    def everything(self) -> dict[str, Any]:
        """All that the next steps depend on."""
        everything = self.state.saved([self.state.of_this_rank()])
        return copy.deepcopy(everything | {"timings": dict(self.state.timings.seconds)})

    def names(self) -> list[str]:
        return sorted(path.name for path in (self.path / "checkpoints").iterdir())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def sealed(state: Any) -> bytes:
    """A checkpoint's file of any content, with a right digest."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue() + hashlib.sha256(file.getvalue()).digest()


def opened(path: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO(path.read_bytes()[:-32]), weights_only=True)


def file(path: Path, step: int) -> Path:
    return path / "checkpoints" / f"step-{step:09}.pt"


@pytest.fixture(scope="module")
def at_7(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run that was ended without a word in its second epoch, and everything of it a step earlier."""
    run = Training(tmp_path_factory.mktemp("at") / "run").until(6)
    return run.path, (run.everything(), run.until(7))[0]


@pytest.fixture
def at_6(at_7: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return at_7[1]


@pytest.fixture
def run(at_7: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return shutil.copytree(at_7[0], tmp_path / "run")


def of_steps(state: dict[str, Any]) -> dict[str, Any]:
    """What of everything does not depend on the time of day."""
    return {name: state[name] for name in ("step", "ranks", "recorder")}


@pytest.mark.parametrize("given", [{}, {"ema": 0.9}, {"decay_biases": False}, CHOOSING], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw", "muon"])
def test_what_is_saved_comes_back(optimizer: str, given: dict[str, Any], tmp_path: Path) -> None:
    first = Training(tmp_path / "run", optimizer=optimizer, **given).until(7)
    torch.manual_seed(99)
    second = Training(tmp_path / "run", optimizer=optimizer, **given)
    assert same(second.everything(), first.everything())
    assert second.state.epochs() == range(2, 3) and second.state.steps_of(2) == 2
    assert ("choice" in first.everything()["step"]) == (given == CHOOSING)
    assert first.trainer.step.norms[0].running_mean is not None and first.trainer.step.norms[0].running_mean.any()


def test_the_optimizer_keeps_settings_of_its_own(run: Path) -> None:
    """`fused` depends on the device, so that the saved settings are not taken."""
    state = opened(file(run, 7))
    assert "param_groups" not in state["step"]["optimizer"] and set(state["step"]["optimizer"]) == set(range(10))
    [group] = Training(run).trainer.optimizer.param_groups
    [fresh] = Training(run.with_name("fresh")).trainer.optimizer.param_groups
    assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in fresh.items() if k != "params"}


def test_the_newest_two_are_kept_and_nothing_else(run: Path) -> None:
    assert Training(run).names() == ["step-000000006.pt", "step-000000007.pt"]
    (run / "checkpoints" / ".step-000000008.pt.4711").write_bytes(b"half")
    (run / "checkpoints" / "step-000000004.pt").write_bytes(b"left by a kill between two removals")
    assert Training(run).until(8).names() == ["step-000000007.pt", "step-000000008.pt"]


def test_a_parameter_that_no_loss_reaches_is_no_fault(tmp_path: Path, monkeypatch: Patch) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.frozen, self.used = nn.Linear(2, 2), nn.Linear(1, 1), nn.Linear(64, 10)
            self.frozen.requires_grad_(False)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.used(images.flatten(1))

    monkeypatch.setattr(user_code, "load", lambda name, what: lambda shape, classes: Unused())
    given = {"model": "mine:Unused", "hidden_units": None, "conv_blocks": None, "batch_norm": False}
    first = Training(tmp_path / "run", **given).until(7)
    assert same(Training(tmp_path / "run", **given).everything(), first.everything())


@pytest.fixture
def falls_back(run: Path, at_6: dict[str, Any], capsys: Screen) -> Callable[[bytes], str]:
    """Check that with this as its newest file the run continues from the other, says so once, and keeps this. Returns
    the warning."""

    def check(content: bytes) -> str:
        file(run, 7).write_bytes(content)
        training = Training(run)
        assert same(of_steps(training.everything()), of_steps(at_6))
        [said] = [line for line in capsys.readouterr().out.splitlines() if "warning" in line.lower()]
        assert "step-000000007.pt cannot be used" in said and "an older one is looked for" in said and len(said) < 400
        assert training.names() == ["step-000000006.pt", "step-000000007.pt.broken"]
        aside = file(run, 7).with_suffix(".pt.broken")
        assert aside.read_bytes() == content
        aside.unlink()
        return said

    return check


def test_a_cut_file_is_not_used(run: Path, falls_back: Callable[[bytes], str]) -> None:
    whole = file(run, 7).read_bytes()
    lengths = {0, 1, 31, 32, 33, 64, len(whole) - 33, len(whole) - 32, len(whole) - 31, len(whole) - 1}
    cut = [whole[:length] for length in sorted(lengths | set(range(100, len(whole), len(whole) // 20)))]
    assert all("it is damaged" in falls_back(content) for content in [*cut, whole + b"\0", bytes(len(whole))])


def test_a_flipped_bit_is_noticed(run: Path, falls_back: Callable[[bytes], str]) -> None:
    whole = file(run, 7).read_bytes()
    for place in sorted({0, 1, len(whole) - 32, len(whole) - 1} | set(range(17, len(whole), len(whole) // 30))):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        assert "it is damaged" in falls_back(bytes(flipped))


def changed(state: dict[str, Any], way: tuple[Any, ...], value: Any, remove: bool = False) -> dict[str, Any]:
    state = copy.deepcopy(state)
    above: Any = state
    for key in way[:-1]:
        above = above[key]
    if remove:
        del above[way[-1]]
    else:
        above[way[-1]] = value
    return state


def later_step(state: dict[str, Any]) -> dict[str, Any]:
    moved = changed(changed(state, ("step", "done"), 2 * STEPS + 1), ("recorder", "step"), 2 * STEPS + 1)
    return changed(moved, ("timings", "seconds"), {"train": [1.0, 1.0], "eval": [1.0, 1.0]})


FOREIGN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another run": (lambda state: changed(state, ("run", "seed"), 43), "another run"),
    "another length": (lambda state: changed(state, ("run", "epochs"), 2), "another run"),
    "a later format": (lambda state: state | {"format": 3}, "this version"),
    "a later step": (later_step, "its step 11"),
    "another model": (lambda state: changed(state, ("step", "model"), nn.Linear(2, 2).state_dict()), "its part 'step'"),
    "a third rank without buffers": (
        lambda state: state | {"ranks": [*2 * state["ranks"], state["ranks"][0] | {"buffers": []}]},
        "its part 'ranks'",  # of a rank that this start has not; another may have it
    ),
    "weights alone": (lambda state: state["step"]["model"], "this version"),
    "a tensor": (lambda state: torch.ones(3), "this version"),
}
# What has the right types must fit too.
SUBTLE: dict[str, tuple[tuple[Any, ...], Any]] = {
    "a generator that is none": (("ranks", 0, "generator"), torch.zeros(5056, dtype=torch.uint8)),
    "a step that was not the record's": (("step", "done"), 6),
    "before the first step": (("step", "done"), 0),
    "an epoch's seconds too many": (("timings", "seconds"), {"train": [1.0, 1.0], "eval": [1.0, 1.0]}),
    "an optimizer of another kind": (("step", "optimizer", 0), {"momentum_buffer": torch.zeros(2, 1, 3, 3)}),
}


@pytest.mark.parametrize("kind", [*FOREIGN, *SUBTLE])
def test_a_foreign_file_is_not_used(kind: str, run: Path, falls_back: Callable[[bytes], str]) -> None:
    state = opened(file(run, 7))
    forge, why = FOREIGN[kind] if kind in FOREIGN else (lambda state: changed(state, *SUBTLE[kind]), "")
    assert why in falls_back(sealed(forge(state)))


def test_what_a_start_here_has_not_is_no_fault_of_a_file(run: Path) -> None:
    before, state = Training(run).everything(), opened(file(run, 7))
    file(run, 7).write_bytes(sealed(state | {"ranks": 3 * state["ranks"]}))
    assert Training(run).state.done == 7
    beside_a_card = changed(state, ("ranks", 0, "cuda_generator"), torch.zeros(16, dtype=torch.uint8))
    file(run, 7).write_bytes(sealed(beside_a_card))
    assert same(Training(run).everything(), before)


def test_another_length_is_another_run_where_the_schedule_depends_on_it(tmp_path: Path, capsys: Screen) -> None:
    Training(tmp_path / "run", schedule="cosine").until(3)
    assert Training(tmp_path / "run", schedule="cosine").state.done == 3
    assert Training(tmp_path / "run", schedule="cosine", epochs=3).state.done == 0
    assert "it belongs to another run" in capsys.readouterr().out


class Code:
    """What a pickle would run when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_code_in_a_file_is_not_run(
    run: Path, falls_back: Callable[[bytes], str], tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Code()))
    Path("executed").unlink()  # so it would run
    plain = pickle.dumps(Code(), protocol=2)
    in_a_part = sealed(changed(opened(file(run, 7)), ("recorder", "lr"), Code()))
    for content in (in_a_part, sealed(Code()), plain + hashlib.sha256(plain).digest()):
        said = falls_back(content)
        assert "holds more than data" in said and "weights_only" not in said
        assert not Path("executed").exists()


def nodes(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every part of a state, with the way to it; of many that are alike, the first two and the last."""
    if way:
        yield way, value
    parts = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, part in parts if len(parts) < 8 else [*parts[:2], parts[-1]]:
        yield from nodes(part, (*way, key))


def wrong(value: Any) -> Iterator[Any]:
    """What a part of a state must not be instead."""
    yield "text"
    yield from [None] * (value is not None)
    if isinstance(value, torch.Tensor):
        other = torch.float64 if value.dtype == torch.float32 else torch.float32
        yield from (value.unsqueeze(0), value.to(other), value.to("meta"), value.tolist(), {})
        yield from [value.to_sparse()] * bool(value.dim())
    elif isinstance(value, dict):
        yield from (value | {"another": None}, list(value.values()), list(value), *[{}] * bool(value))
    elif isinstance(value, list):
        yield from ([*value, None], dict(enumerate(value)), *[[]] * bool(value))
    else:
        yield from (1 if isinstance(value, float | bool) else 1.5, torch.ones(()).bool(), [value])
        yield from [True] * (not isinstance(value, bool))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_is_changed_by_a_state_that_is_wrong_anywhere(run: Path, capsys: Screen) -> None:
    good = opened(file(run, 7))
    training = Training(run.with_name("fresh"))
    (training.path / "checkpoints").mkdir()
    before, tried = training.everything(), 0

    def look(state: dict[str, Any]) -> int:
        """Which step the run continues from."""
        file(training.path, 7).write_bytes(sealed(state))
        Checkpoints(training.cfg, training.checkpoints.world, training.folder, training.state)
        return training.state.done

    for way, value in nodes(good):
        if way == ("ranks", 0, "cuda_generator"):  # of a card that this machine has not
            continue
        forgeries = [changed(good, way, bad) for bad in wrong(value)]
        if way[0] != "run" or value != getattr(Config, str(way[-1]), None):  # older versions name fewer settings
            forgeries.append(changed(good, way, None, remove=True))
        for state in forgeries:
            done = look(state)
            assert done == 0, f"{way} was {value}"
            assert same(training.everything(), before), f"{way} was {value}"
            tried += 1
    assert tried > 250 and capsys.readouterr().out.count("cannot be used") == tried
    assert look(good) == 7


def test_a_checkpoint_of_format_1_is_continued_from(run: Path, tmp_path: Path, capsys: Screen) -> None:
    before = opened(file(run, 7))
    later = {"ema", "normalize", "test_at", "image_size"}  # some of the settings that it does not name
    named = {name: value for name, value in before["run"].items() if name not in later}
    assert len(named) == len(before["run"]) - len(later)
    for given, done in (({}, 7), ({"ema": 0.9}, 0)):  # a run without the new settings, and another one
        again = tmp_path / str(done)
        (again / "checkpoints").mkdir(parents=True)
        file(again, 7).write_bytes(sealed(before | {"format": 1, "run": named}))
        assert Training(again, **given).state.done == done
    assert capsys.readouterr().out.count("it belongs to another run") == 1


def test_without_one_that_can_be_used_the_run_begins_again(run: Path, tmp_path: Path, capsys: Screen) -> None:
    file(run, 6).write_bytes(b"")
    file(run, 7).write_bytes(file(run, 7).read_bytes()[:-1])
    again = Training(run)
    out = capsys.readouterr().out
    assert again.state.done == 0 and out.count("warning") == 3 and out.count("cannot be used (it is damaged") == 2
    assert out.endswith("can be used: the run starts again from nothing\n")
    again.until(10)
    whole = Training(tmp_path / "whole").until(10)
    assert same(of_steps(again.everything()), of_steps(whole.everything()))
    assert (run / "steps.jsonl").read_text() == (tmp_path / "whole" / "steps.jsonl").read_text()
    assert [name for name in again.names() if "broken" in name] == [f"step-00000000{n}.pt.broken" for n in (6, 7)]
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("call", "what"), [("read_bytes", "read"), ("replace", "renamed")])
def test_a_disk_that_is_away_ends_the_start_and_costs_no_checkpoint(
    call: str, what: str, run: Path, monkeypatch: Patch
) -> None:
    content = file(run, 7).read_bytes()
    if call == "replace":  # of what is broken
        file(run, 7).write_bytes(b"")

    def away(path: Path, *args: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, away)
        with pytest.raises(TrainingFailed, match=rf"step-000000007\.pt cannot be {what} \(Input/output error\)"):
            Training(run)
    file(run, 7).write_bytes(content)
    assert Training(run).state.done == 7


def failing(monkeypatch: Patch, name: str, calls: int) -> None:
    """os.<name> fails for the next so many calls: the disk is full."""
    function, left = getattr(os, name), [calls]

    def full(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)

    monkeypatch.setattr(os, name, full)


def test_a_checkpoint_that_cannot_be_removed_harms_nothing(run: Path, monkeypatch: Patch, capsys: Screen) -> None:
    training = Training(run)
    with monkeypatch.context() as patch:

        def refuse(path: Path, missing_ok: bool = False) -> None:
            if path.exists():
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

        patch.setattr(Path, "unlink", refuse)
        training.until(8)
    assert training.names() == [f"step-00000000{n}.pt" for n in (6, 7, 8)] and Training(run).state.done == 8
    training.until(9)
    assert training.names() == [f"step-00000000{n}.pt" for n in (8, 9)] and "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("last", ["the end", "a stop"])
def test_a_last_save_that_fails_ends_the_run(last: str, run: Path, monkeypatch: Patch, capsys: Screen) -> None:
    training = Training(run).until(9)
    failing(monkeypatch, "replace", 1)
    if last == "a stop":
        monkeypatch.setattr("fashion_ddp.distributed.signals.stop_requests", lambda: [True, False, False, False, False])
    with pytest.raises(TrainingFailed, match=r"step-000000010\.pt cannot be written \(No space left on device\)"):
        training.until(10)
    assert Training(run).state.done == 9 and "warning" not in capsys.readouterr().out


def test_the_record_is_on_the_disk_before_the_checkpoint_that_counts_its_lines(run: Path, monkeypatch: Patch) -> None:
    """Else a machine that dies could lose lines and keep the checkpoint, and the lines would not be written again."""
    training, order = Training(run), []
    (run / "metrics.jsonl").touch()
    fsync, replace = os.fsync, os.replace

    def note(name: str) -> None:
        order.append("temporary" if name.startswith(".step-000000008.pt") else name)

    def synced(handle: int) -> None:
        note(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(source: Any, target: Any) -> None:
        note(f"= {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    training.until(8)
    assert order == ["steps.jsonl", "metrics.jsonl", "temporary", "= step-000000008.pt", "checkpoints"]
