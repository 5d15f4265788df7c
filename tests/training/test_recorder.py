"""What a run writes of itself: the points and rows of its files, its summary, and how it ended."""

import errno
import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.machine import RankPlacement
from fashion_ddp.distributed.world import World
from fashion_ddp.errors import Stopped, TrainingFailed
from fashion_ddp.runs import lock
from fashion_ddp.runs.folder import RunFolder
from fashion_ddp.runs.reading import load_run
from fashion_ddp.training.evaluate import Scores
from fashion_ddp.training.recorder import open_recorder
from fashion_ddp.training.state import Recorded
from fashion_ddp.training.sync import Trained

pytestmark = pytest.mark.quick

NO_IMAGES = np.empty((0, 1, 28, 28), np.uint8)
TIMINGS = {"time/train_s": 2.0, "time/eval_s": 0.5, "throughput/images_per_s": 30_000.0}
SCORES = {"test": Scores(0.5, 0.75, torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64))}


def recorder(folder: Path, rank: int = 0, saved: dict[str, Any] | None = None, **known: Any) -> Any:
    """The recorder that a rank of two gets, without W&B."""
    world = World(SimpleNamespace(device=torch.device("cpu")), RankPlacement(rank, 2, rank, 2))
    recorded = Recorded()
    if saved:
        recorded.restore(saved)
    return open_recorder(RunFolder(folder), make_config({"tracker": "none", "epochs": 2}), world, known, recorded)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("model: cnn\n")
    return tmp_path


def epoch_of(steps: int, seed: int) -> list[Trained]:
    """Steps of 128 rows, the last of 96, each with a loss and hits of its own."""
    draw = random.Random(seed)
    rows = [128] * (steps - 1) + [96]
    return [Trained(n * draw.uniform(0, 3), draw.randrange(n), n, lr=0.1 / (k + 1)) for k, n in enumerate(rows)]


def play(record: Any, epochs: list[list[Trained]], window: int, start: int = 0, stop: int = 10**6) -> None:
    """Record the steps start .. stop - 1 of a run, as training would."""
    steps = len(epochs[0])
    for number, trained in enumerate(epochs, start=1):
        done = (number - 1) * steps
        first, last = max(start - done, 0), min(stop - done, steps)
        if first > steps or last <= 0:
            continue
        record.begin_epoch(number, steps)
        for at in range(first, last, window):
            record.steps(trained[at : min(at + window, last)])
        if last == steps:
            record.epoch(SCORES, TIMINGS)


@pytest.mark.parametrize("window", [1, 7, 10_000])
@pytest.mark.parametrize("steps", [1, 2, 99, 100, 101, 150, 469, 1875])
def test_points_of_an_epoch_add_up_to_its_figures(steps: int, window: int, folder: Path) -> None:
    epochs = [epoch_of(steps, seed) for seed in (1, 2)]
    with recorder(folder) as record:
        play(record, epochs, window)
    run = load_run(folder)
    for number, (trained, row) in enumerate(zip(epochs, run.metrics, strict=True), start=1):
        before = done = (number - 1) * steps
        images = sum(t.rows for t in trained)
        points = [point for point in run.steps if point["epoch"] == number]
        assert min(steps, 50) <= len(points) <= 100 and points[-1]["step"] == before + steps == row["step"]
        loss = accuracy = 0.0
        for point in points:
            of_point = trained[done - before : point["step"] - before]
            rows = sum(t.rows for t in of_point)
            assert point["loss"] == pytest.approx(sum(t.loss for t in of_point) / rows)
            assert point["lr"] == of_point[-1].lr
            loss, accuracy = loss + rows * point["loss"], accuracy + rows * point["accuracy"]
            done = point["step"]
        exact = pytest.approx(sum(t.loss for t in trained) / images, rel=1e-12)
        assert row["train/loss"] == exact == loss / images
        assert row["train/accuracy"] == pytest.approx(accuracy / images) == sum(t.hits for t in trained) / images
        assert row == row | {"epoch": number, "lr": trained[-1].lr, "test/loss": 0.5, "test/accuracy": 0.75} | TIMINGS


@pytest.mark.parametrize("steps", [3, 150])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.49, 0.5, 0.51, 1.0])
def test_a_run_that_continues_has_each_point_and_row_once(steps: int, share: float, tmp_path: Path) -> None:
    epochs = [epoch_of(steps, seed) for seed in (1, 2)]
    saved_at, killed_at = round(share * 2 * steps), min(round((share + 0.2) * 2 * steps), 2 * steps)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("model: cnn\n")
    with recorder(tmp_path / "whole") as record:
        play(record, epochs, 7)
    with recorder(tmp_path / "parts") as record:
        play(record, epochs, 7, 0, saved_at)
        state = json.loads(json.dumps(asdict(record.recorded)))
        play(record, epochs, 11, saved_at, killed_at)
    with open(tmp_path / "parts" / "steps.jsonl", "a") as file:
        file.write('{"epoch": 2, "st')  # half a line
    with recorder(tmp_path / "parts", saved=state) as record:
        play(record, epochs, 5, saved_at)
    for name in ("steps.jsonl", "metrics.jsonl"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()


def record_an_epoch(record: Any) -> None:
    record.begin_epoch(1, 3)
    record.steps(epoch_of(3, 0))
    record.epoch(SCORES | {"val": SCORES["test"]}, TIMINGS)


def test_summary_while_running_and_at_the_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"time/train_total_s": 4.0, "time/eval_total_s": 1.0, "time/total_s": 9.0}
    known = {"format": 1, "status": "running", "model": "cnn", "parameters": 29_460, "test_evaluations": 0}
    lock.acquire(folder)  # else it would read as interrupted
    with recorder(folder, model="cnn", parameters=29_460) as record:
        known["wandb_id"] = load_run(folder).summary["wandb_id"]  # by which push knows it
        assert load_run(folder).summary == known
        record_an_epoch(record)
        row = load_run(folder).metrics[0]
        known["test_evaluations"] = 1
        assert load_run(folder).summary == known | row and row["val/accuracy"] == 0.75
        record.finish(figures | {"time/step_p50_ms": float("nan")}, NO_IMAGES)
    assert load_run(folder).summary == known | row | figures | {"status": "finished", "time/step_p50_ms": None}
    shown = capsys.readouterr().out
    assert "epoch 1/2" in shown and "test loss 0.5000 accuracy 75.00 %" in shown and str(folder) in shown


# What ends a run -> its status, its error, and what stopped it.
GONE = "another rank ended before its time; its own words, or its launcher's, tell why"
ENDS: list[tuple[BaseException, tuple[str, str, str | None]]] = [
    (TrainingFailed("the loss is nan at step 3"), ("failed", "the loss is nan at step 3", None)),
    (RuntimeError("out of memory"), ("failed", "RuntimeError: out of memory", None)),
    (RuntimeError(), ("failed", "RuntimeError", None)),
    (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), ("failed", GONE, None)),
    (
        Stopped("epoch 1", "SIGUSR2"),
        ("stopped", "stopped (SIGUSR2) and saved in epoch 1: the same command continues", "SIGUSR2"),
    ),
    (KeyboardInterrupt(), ("stopped", "KeyboardInterrupt", None)),
]


@pytest.mark.parametrize("epochs_done", [0, 1])
@pytest.mark.parametrize(("error", "says"), ENDS, ids=[repr(error) for error, _ in ENDS])
def test_summary_tells_how_a_run_ended(
    error: BaseException, says: tuple[str, str, str | None], epochs_done: int, folder: Path
) -> None:
    with pytest.raises(type(error)), recorder(folder) as record:
        if epochs_done:
            record_an_epoch(record)
        raise error
    summary = load_run(folder).summary
    assert tuple(summary.get(name) for name in ("status", "error", "stopped_by")) == says
    assert summary.get("epoch") == (epochs_done or None)


@pytest.mark.parametrize("error", [TrainingFailed("metrics.jsonl cannot be written"), RuntimeError("out of memory")])
def test_a_full_disk_does_not_hide_what_ended_the_run(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(type(error), match=str(error)), recorder(folder) as record:
        record_an_epoch(record)
        before = (folder / "summary.json").read_bytes()
        monkeypatch.setattr(os, "fsync", full)
        raise error
    assert (folder / "summary.json").read_bytes() == before
    warned = "warning: " in capsys.readouterr().out
    assert warned == (not isinstance(error, TrainingFailed))  # which tells of the same trouble


def test_the_name_that_wandb_knows_is_kept_also_by_a_start_without_it(folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps({"wandb_id": "0a1b2c3d", "wandb_mode": "online"}))
    with recorder(folder):
        pass
    summary = load_run(folder).summary
    # And that its server has been told all, is no longer said.
    assert summary["wandb_id"] == "0a1b2c3d" and "wandb_mode" not in summary


def test_only_rank_0_records(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorder(folder, rank=1) as record:
        record_an_epoch(record)
        record.finish({}, NO_IMAGES)
    assert {p.name for p in folder.iterdir()} == {"config.yaml"} and capsys.readouterr().out == ""
