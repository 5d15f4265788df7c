"""What a run records, and that nothing that happens to W&B stops it.

The trainer itself runs, on built-in data, in a process of its own; W&B is the real one, or a package that stands in
its way and does its worst.
"""

import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, command, ranks

from fashion_ddp import train
from fashion_ddp.config import TrainingFailed
from fashion_ddp.evaluate import Scores
from fashion_ddp.machine import Place
from fashion_ddp.ranks import World
from fashion_ddp.rundir import Run, RunFolder, read_run
from fashion_ddp.settings import make_config
from fashion_ddp.step import Trained
from fashion_ddp.tracking import open_recorder

TIMINGS = {"time/train_s": 2.0, "time/eval_s": 0.5, "throughput/images_per_s": 30_000.0}
SCORES = {"test": Scores(0.5, 0.75, torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64))}


# --- Files ------------------------------------------------------------------------------------------------------


def recorder(folder: Path, rank: int = 0, **known: Any) -> Any:
    """The recorder that a rank of two gets, without W&B."""
    world = World(SimpleNamespace(device=torch.device("cpu")), Place(rank, 2, rank, 2), threads=1)
    return open_recorder(RunFolder(folder, finished=False), make_config({"tracker": "none", "epochs": 2}), world, known)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("model: cnn\n")
    return tmp_path


def epoch_of(steps: int, seed: int) -> list[Trained]:
    """Steps of 128 rows, the last of 96, each with a loss and hits of its own."""
    draw = random.Random(seed)
    rows = [128] * (steps - 1) + [96]
    return [Trained(n * draw.uniform(0, 3), draw.randrange(n), n, lr=0.1 / (k + 1)) for k, n in enumerate(rows)]


@pytest.mark.parametrize("window", [1, 7, 10_000])
@pytest.mark.parametrize("steps", [1, 2, 99, 100, 101, 150, 469, 1875])
def test_points_of_an_epoch_add_up_to_its_figures(steps: int, window: int, folder: Path) -> None:
    epochs = [epoch_of(steps, seed) for seed in (1, 2)]
    with recorder(folder) as record:
        for number, trained in enumerate(epochs, start=1):
            record.begin_epoch(number, steps)
            for start in range(0, steps, window):
                record.steps(trained[start : start + window])
            record.epoch(SCORES, TIMINGS)
    run = read_run(folder)
    for number, (trained, row) in enumerate(zip(epochs, run.metrics, strict=True), start=1):
        done, images = (number - 1) * steps, sum(t.rows for t in trained)
        points = [point for point in run.steps if point["epoch"] == number]
        assert min(steps, 50) <= len(points) <= 100 and points[-1]["step"] == done + steps == row["step"]
        loss = accuracy = 0.0
        for point in points:
            of_point = trained[done - (number - 1) * steps : point["step"] - (number - 1) * steps]
            rows = sum(t.rows for t in of_point)
            assert point["loss"] == pytest.approx(sum(t.loss for t in of_point) / rows)
            assert point["lr"] == of_point[-1].lr
            loss, accuracy = loss + rows * point["loss"], accuracy + rows * point["accuracy"]
            done = point["step"]
        assert row["train/loss"] == pytest.approx(loss / images, rel=1e-12)
        assert row["train/loss"] == pytest.approx(sum(t.loss for t in trained) / images, rel=1e-12)
        assert row["train/accuracy"] == pytest.approx(accuracy / images) == sum(t.hits for t in trained) / images
        assert row == row | {"epoch": number, "lr": trained[-1].lr, "test/loss": 0.5, "test/accuracy": 0.75} | TIMINGS


def record_an_epoch(record: Any) -> None:
    record.begin_epoch(1, 3)
    record.steps(epoch_of(3, 0))
    record.epoch(SCORES | {"val": SCORES["test"]}, TIMINGS)


def test_summary_while_running_and_at_the_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {
        "time/train_total_s": 4.0,
        "time/eval_total_s": 1.0,
        "time/total_s": 9.0,
        "time/step_p50_ms": float("nan"),
    }
    with recorder(folder, model="cnn", parameters=29_460) as record:
        assert read_run(folder).summary == {"format": 1, "status": "running", "model": "cnn", "parameters": 29_460}
        record_an_epoch(record)
        row = read_run(folder).metrics[0]
        assert (
            read_run(folder).summary == {"format": 1, "status": "running", "model": "cnn", "parameters": 29_460} | row
        )
        assert row["val/accuracy"] == 0.75
        record.finish(figures)
    summary = read_run(folder).summary
    assert summary == {"format": 1, "status": "finished", "model": "cnn", "parameters": 29_460} | row | figures | {
        "time/step_p50_ms": None
    }
    shown = capsys.readouterr().out
    assert "epoch 1/2" in shown and "test loss 0.5000 accuracy 75.00 %" in shown and str(folder) in shown


@pytest.mark.parametrize("epochs_done", [0, 1])
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (TrainingFailed("the loss is nan at step 3"), "failed", "TrainingFailed: the loss is nan at step 3"),
        (RuntimeError("out of memory"), "failed", "RuntimeError: out of memory"),
        (KeyboardInterrupt(), "stopped", "interrupted"),
    ],
)
def test_summary_tells_how_a_run_ended(
    error: BaseException, status: str, said: str, epochs_done: int, folder: Path
) -> None:
    with pytest.raises(type(error)), recorder(folder) as record:
        if epochs_done:
            record_an_epoch(record)
        raise error
    summary = read_run(folder).summary
    assert summary["status"] == status and summary["error"] == said
    assert summary.get("epoch") == (epochs_done or None)


def test_only_rank_0_records(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorder(folder, rank=1) as record:
        record_an_epoch(record)
        record.finish({})
    assert [p.name for p in folder.iterdir()] == ["config.yaml"] and capsys.readouterr().out == ""


# --- W&B --------------------------------------------------------------------------------------------------------

FLAGS = ["--dataset", "synthetic", "--model", "linear", "--epochs", "1", "--device", "cpu", "--threads", "1"]
KEY = "0123456789" * 4  # of the right length, and nobody's


def trainer(folder: Path, words: list[str], env: dict[str, str], packages: Path | None) -> int:
    """Run the trainer in this process, what it prints going to folder/printed; its exit code."""
    os.chdir(folder)
    os.environ.update(env)
    printed = os.open("printed", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(printed, stream)
    if packages:
        sys.path.insert(0, str(packages))
    try:
        return train.main([*FLAGS, "--run-dir", "run", *words])
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def trained(folder: Path, *words: str, packages: Path | None = None, **env: str) -> tuple[Run, str]:
    """A whole run, which must have finished; its records, and what was printed."""
    [code] = ranks(1, trainer, folder, list(words), env, packages)
    printed = (folder / "printed").read_text()
    assert code == 0, printed
    return finished(folder), printed


def finished(folder: Path) -> Run:
    run = read_run(folder / "run")
    assert run.summary["status"] == "finished" and len(run.metrics) == 1 and len(run.steps) == 94
    assert run.summary["test/accuracy"] > 0.5
    return run


def mirrored(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What W&B has of a run: its overview, and the rows that were logged."""
    [inside] = (folder / "run" / "wandb").glob("offline-run-*")
    inspect = "wandb", "leet", "inspect", "--json"
    overview = command(*inspect, "--summary", str(inside), cwd=folder)
    records = command(*inspect, str(inside), cwd=folder)
    assert overview.returncode == records.returncode == 0, overview.stderr + records.stderr
    rows = [json.loads(line) for line in records.stdout.splitlines()]
    return json.loads(overview.stdout), [row["history"] for row in rows if row["type"] == "history"]


def wandb_lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("W&B: ")]


def test_without_an_account_wandb_mirrors_the_run_offline(tmp_path: Path) -> None:
    run, printed = trained(tmp_path)
    assert len(wandb_lines(printed)) == 1 and "W&B: offline, in run/wandb; `wandb sync " in printed
    overview, rows = mirrored(tmp_path)
    assert (overview["state"], overview["exit_code"], overview["project"]) == ("finished", 0, "fashion_ddp")
    assert overview["config"] == overview["config"] | {"model": "linear", "lr": 0.1, "batch_size": 128, "seed": 42}
    summary = overview["summary"]
    same = [name for name, value in run.summary.items() if isinstance(value, int | float | str) and name != "step"]
    assert {name: summary[name] for name in same} == pytest.approx({name: run.summary[name] for name in same})
    assert len(rows) == len(run.steps) + len(run.metrics)


def test_the_users_project_wins(tmp_path: Path) -> None:
    trained(tmp_path, WANDB_MODE="offline", WANDB_PROJECT="mine", WANDB_NAME="ignored")
    assert mirrored(tmp_path)[0]["project"] == "mine"


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        (["--tracker", "none"], {}, []),
        ([], {"WANDB_MODE": "disabled"}, []),
        ([], {"WANDB_API_KEY": "too-short"}, ["W&B: offline"]),
        ([], {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, ["W&B: online failed", "W&B: offline"]),
        ([], {"WANDB_MODE": "online"}, ["W&B: online failed", "W&B: offline"]),
    ],
    ids=["none", "disabled", "malformed key", "server refuses", "online without a key"],
)
def test_no_network_and_no_key_stop_nothing(
    tmp_path: Path, words: list[str], env: dict[str, Any], said: list[str]
) -> None:
    _, printed = trained(tmp_path, *words, **env)
    lines = wandb_lines(printed)
    assert len(lines) == len(said) and all(map(str.startswith, lines, said)), printed
    offline = list((tmp_path / "run").glob("wandb/offline-run-*"))
    assert len(offline) == said.count("W&B: offline")


FAKES = {
    "missing": "raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')",
    "broken": "raise SyntaxError('two versions of protobuf')",
    "raises everywhere": "def __getattr__(name): raise RuntimeError(f'{name}: no such luck')",
    "raises when called": (
        "def fail(*args, **settings): raise OSError('the service is gone')\nlogin = Settings = init = teardown = fail\n"
    ),
    "raises after the start": (
        "class Run:\n"
        "    url = 'nowhere'\n"
        "    def define_metric(self, *args, **settings): pass\n"
        "    def __getattr__(self, name): raise ConnectionResetError(f'{name}: the service is gone')\n"
        "login = Settings = teardown = lambda *args, **settings: True\n"
        "init = lambda **settings: Run()\n"
    ),
    "raises at the end": (
        "class Run:\n"
        "    url = 'nowhere'\n"
        "    def define_metric(self, *args, **settings): pass\n"
        "    def log(self, row): pass\n"
        "    def __getattr__(self, name): raise ConnectionResetError(f'{name}: the service is gone')\n"
        "login = Settings = teardown = lambda *args, **settings: True\n"
        "init = lambda **settings: Run()\n"
    ),
    "has no address": (
        "class Run:\n"
        "    def define_metric(self, *args, **settings): pass\n"
        "    log = finish = define_metric\n"
        "    def __getattr__(self, name): raise ConnectionResetError(f'{name}: the service is gone')\n"
        "login = Settings = teardown = lambda *args, **settings: True\n"
        "init = lambda **settings: Run()\n"
    ),
}


@pytest.mark.parametrize("tracker", ["auto", "wandb"])
@pytest.mark.parametrize("fake", FAKES)
def test_a_wandb_that_raises_stops_nothing(fake: str, tracker: str, tmp_path: Path) -> None:
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(FAKES[fake])
    _, printed = trained(tmp_path, "--tracker", tracker, packages=tmp_path / "packages")
    assert "Traceback" not in printed and len(wandb_lines(printed)) <= 4
    if tracker == "wandb":  # asked for by name: then its absence is told
        assert wandb_lines(printed)


# --- W&B and the program as users start it ----------------------------------------------------------------------


def start(folder: Path, *words: str, **streams: Any) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "fashion_ddp.train", *FLAGS, "--run-dir", "run", *words]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(line, cwd=folder, env=env | {"PYTHONPATH": str(CHECKOUT)}, **streams)


def until(found: Callable[[], Any], seconds: float = 120) -> Any:
    """What `found` returns once that is something."""
    limit = time.monotonic() + seconds
    while not (result := found()):
        if time.monotonic() > limit:
            pytest.fail("waited in vain")
        time.sleep(0.02)
    return result


@pytest.mark.parametrize("mode", [None, "online"])
def test_no_question_is_asked_on_a_terminal(mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    ours, its = pty.openpty()
    with start(tmp_path, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        shown = b""
        try:
            # Nothing is ever typed: a question would leave the terminal silent.
            while select.select([ours], [], [], 60)[0]:
                shown += os.read(ours, 65536)
            process.kill()
        except OSError:  # the program has closed its end
            pass
        assert process.wait(timeout=60) == 0, shown.decode()
    os.close(ours)
    finished(tmp_path)
    assert shown.count(b"W&B: offline") == 1 and shown.count(b"W&B: online failed") == (mode == "online")


def child_named(parent: int, name: str) -> int | None:
    """The process id of a process's child by name."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = stat.read_text().partition(" (")
        except OSError:  # it ended
            continue
        comm, _, rest = rest.rpartition(") ")
        if comm == name and int(rest.split()[1]) == parent:
            return int(pid)
    return None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the service in /proc")
def test_training_outlives_wandbs_service(tmp_path: Path) -> None:
    words = ["--epochs", "4", "--batch-size", "8"]
    with open(tmp_path / "printed", "wb") as printed:
        process = start(tmp_path, *words, stdout=printed, stderr=subprocess.STDOUT)
    with process:
        steps = tmp_path / "run" / "steps.jsonl"
        until(lambda: process.poll() is not None or (steps.exists() and steps.read_text()))
        service = child_named(process.pid, "wandb-core")
        assert service is not None and process.poll() is None
        os.kill(service, signal.SIGKILL)
        assert process.wait(timeout=120) == 0
    run, lines = read_run(tmp_path / "run"), (tmp_path / "printed").read_text().splitlines()
    assert run.summary["status"] == "finished" and len(run.metrics) == 4
    assert sum(line.startswith("W&B: stopped") for line in lines) == 1
    assert sum(line.startswith("epoch ") for line in lines) == 4 and lines[-1].startswith("finished"), lines
