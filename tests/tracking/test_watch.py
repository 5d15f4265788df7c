"""Runs brought to W&B while they are being trained: real runs, the real wandb, and as much of its server as need be."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import psutil
import pytest
from conftest import _as_main, _server, forked
from faults import Fault, Ranks, eventually
from test_mirror import check_told, sorted_out, start
from wandb_server import WandbServer

from fashion_ddp.distributed import failures
from fashion_ddp.runs import lock
from fashion_ddp.runs.reading import load_run, read_summary
from fashion_ddp.tracking import watch
from fashion_ddp.tracking.upload import why_left_out

SOON = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.5"}  # seconds between two requests of W&B's; else 15


def _watching(*args: Any) -> None:
    watch.LOOK_EVERY = 0.5
    os.setpgid(0, 0)  # of its own, with all processes that it starts
    _as_main(*args)


class Watcher:
    """`python -m fashion_ddp.push --watch`, which looks twice a second."""

    def __init__(self, *words: str, cwd: Path, **env: str):
        self.printed_to = cwd / f"watch{len(list(cwd.glob('watch*')))}"
        surroundings = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | SOON | env
        args = ("fashion_ddp.push", ("--watch", *words), cwd, surroundings, [str(self.printed_to)] * 2)
        self.process = _server.Process(target=_watching, args=args)
        self.process.start()

    def printed(self) -> str:
        return self.printed_to.read_text() if self.printed_to.exists() else ""

    def wait(self) -> int | None:
        self.process.join(300)
        assert "Traceback" not in self.printed(), self.printed()
        return self.process.exitcode

    def bringing(self) -> set[int]:
        """The processes that bring a run."""
        found = set()
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                if any("spawn_main" in word for word in child.cmdline()):
                    found.add(child.pid)
        return found

    def kill(self) -> None:
        """Kill it and all that it started, at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.join()


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Callable[..., Watcher]]:
    """Start watchers, none of which is left."""
    started: list[Watcher] = []

    def begin(*words: str, **env: str) -> Watcher:
        started.append(Watcher(*words, cwd=tmp_path, **env))
        return started[-1]

    yield begin
    for watcher in started:
        watcher.kill()


@pytest.fixture
def finished(tmp_path: Path, uninterrupted: Path) -> Path:
    """The folder of a finished run."""
    return Path(shutil.copytree(uninterrupted / "run", tmp_path / "runs" / "one"))


def known(server: WandbServer, run: Path) -> tuple[int, int]:
    """How many points and epochs of a run its server has."""
    name = read_summary(run).get("wandb_id")
    points, epochs = sorted_out(list(server.history[name].values()) if name in server.history else [])
    return len(points), len(epochs)


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in rows]


@pytest.mark.slow
def test_points_of_running_runs_are_told_once_whatever_is_killed(
    tmp_path: Path, watching: Callable[..., Watcher]
) -> None:
    def training(name: str, at: int) -> Ranks:
        """A run that waits at its `at`-th step of this start, and saves nothing before its end."""
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "go").unlink(missing_ok=True)
        words = ["--checkpoint-every", "1000"]
        return faults.start_tiny(1, tmp_path / name, words, [Fault("step", "wait", count=at)], WANDB_MODE="offline")

    runs = {name: tmp_path / name / "run" for name in ("one", "two")}
    for name in runs:
        (tmp_path / name).mkdir()
    with WandbServer() as server:
        watcher = watching(*runs, **server.env)
        eventually(lambda: "no run folder yet" in watcher.printed())
        trainings = {name: training(name, 11) for name in runs}
        eventually(lambda: [known(server, run) for run in runs.values()] == [(10, 1)] * 2)
        watcher.kill()

        # One begins again from its first step, and waits at an earlier one than before.
        trainings["one"].send(signal.SIGKILL)
        trainings["one"].wait()
        trainings["one"] = training("one", 7)
        (tmp_path / "two" / "go").touch()
        assert trainings["two"].wait() == [0], trainings["two"].printed()
        watcher = watching(*runs, **server.env)
        eventually(lambda: known(server, runs["two"]) == (24, 3) and 0 in server.exits)
        eventually(lambda: load_run(runs["one"]).steps[-1]["step"] == 6 and watcher.bringing())
        os.kill(watcher.process.pid, signal.SIGTERM)
        assert watcher.wait() == os.EX_TEMPFAIL
        assert watcher.printed().endswith("stopped (SIGTERM): the same command continues\n")
        assert not lock.holder(runs["one"] / "wandb") and known(server, runs["one"]) == (10, 1)

        watcher = watching(*runs, **server.env)
        (tmp_path / "one" / "go").touch()
        assert trainings["one"].wait() == [0], trainings["one"].printed()
        assert watcher.wait() == 0 and watcher.printed().endswith("pushed: 2 runs\n"), watcher.printed()
        for run in map(load_run, runs.values()):
            name = run.summary["wandb_id"]
            # What was told of an epoch before it was trained again keeps its times.
            metrics, rows = without_times(run.metrics), without_times(server.rows(name))
            check_told(dataclasses.replace(run, metrics=metrics), rows)
            assert json.loads(server.summaries[name])["test/accuracy"] == run.summary["test/accuracy"]
            assert ("run_table", f"run-{name}-predictions") in server.artifacts
        assert len(server.history) == 2 and server.exits[-1] == 0
    assert not list(tmp_path.glob("*/run/wandb/offline-run-*"))


@pytest.mark.slow
def test_one_process_at_a_time_pushes_a_run(finished: Path, tmp_path: Path, watching: Callable[..., Watcher]) -> None:
    with WandbServer() as server:
        held = lock.acquire(finished / "wandb")
        watcher = watching("runs", **server.env)
        eventually(lambda: "one is being pushed by process" in watcher.printed())
        plain = forked("fashion_ddp.push", "runs", cwd=tmp_path, **server.env)
        assert "one is being pushed by process" in plain.stdout and plain.stdout.endswith("pushed: 0 runs\n")
        assert not server.told
        held.release()
        assert watcher.wait() == 0 and watcher.printed().count("being pushed") == 1, watcher.printed()
        run = load_run(finished)
        check_told(run, server.rows(run.summary["wandb_id"]))


@pytest.mark.slow
def test_a_network_that_is_away_is_waited_for_and_said_once(
    finished: Path, tmp_path: Path, watching: Callable[..., Watcher]
) -> None:
    with WandbServer() as server:
        server.silent.set()
        watcher = watching("runs", **server.env)
        seen: set[int] = set()

        def three_tries() -> bool:
            seen.update(watcher.bringing())
            return len(seen) >= 3

        eventually(three_tries, within=240)
        server.silent.clear()
        assert watcher.wait() == 0, watcher.printed()
        assert watcher.printed().count("W&B: online failed") == 1, watcher.printed()
        run = load_run(finished)
        check_told(run, server.rows(run.summary["wandb_id"]))


@pytest.mark.slow
def test_a_training_leaves_wandb_to_who_pushes_its_run(tmp_path: Path) -> None:
    with WandbServer() as server:
        first = start(tmp_path, strikes=[Fault("step", "TERM", count=2)], **server.env)
        assert first.wait() == [75] and len(server.exits) == 1, first.printed()
        asked, held = len(server.asked), lock.acquire(tmp_path / "run" / "wandb")
        second = start(tmp_path, strikes=[Fault("step", "TERM", count=2)], **server.env)
        assert second.wait() == [75], second.printed()
        assert len(server.asked) == asked and "pushes the run meanwhile" in second.printed()
        held.release()
    assert load_run(tmp_path / "run").summary["wandb_mode"] == "offline"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("tracker", "summary", "watching", "not_watching"),
    [
        ("auto", {}, "not been started", "not been started"),
        ("none", {"wandb_id": "a"}, None, "is being trained"),
        ("none", {"starts": 1}, "earlier version", "is being trained"),
        ("auto", {"wandb_id": "a"}, "tells W&B itself", "is being trained"),  # it does not know yet whether it can
        ("auto", {"wandb_id": "a", "wandb_mode": None}, "tells W&B itself", "is being trained"),
        ("auto", {"wandb_id": "a", "wandb_mode": "online"}, "tells W&B itself", "is being trained"),
        ("auto", {"wandb_id": "a", "wandb_mode": "offline"}, None, "is being trained"),
    ],
    ids=str,
)
def test_which_running_runs_are_brought(
    tracker: str, summary: dict[str, Any], watching: str | None, not_watching: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(f"model: cnn\ntracker: {tracker}\n")
    if summary:
        (tmp_path / "summary.json").write_text(json.dumps({"status": "running", **summary}))
    training = lock.acquire(tmp_path)
    for is_watching, expected in ((True, watching), (False, not_watching)):
        why = why_left_out(load_run(tmp_path), is_watching)
        assert (expected in (why or "")) if expected else why is None
    training.release()
    assert bool(summary) == (why_left_out(load_run(tmp_path)) is None)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("status", "error", "over"),
    [
        ("finished", "", True),
        ("failed", "it broke", True),
        ("failed", f"{failures.LOST_RANK}; {failures.CONTINUES}", False),
        ("failed", "nothing happened for 60 s (--timeout): all wait for rank 1 on node7", False),
        ("stopped", "stopped (SIGTERM)", False),
    ],
)
def test_a_run_that_a_cluster_starts_again_is_waited_for(status: str, error: str, over: bool) -> None:
    assert watch.is_over({"status": status, "error": error}) == over


def test_what_cannot_be_watched_is_said(tmp_path: Path) -> None:
    for words, env, said in (
        (["nowhere"], {}, "nowhere: no run folder there"),
        ([".", "--report", "report"], {}, "push the report afterwards"),
        (["."], {"WANDB_MODE": "offline"}, "give WANDB_MODE=online"),
    ):
        done = forked("fashion_ddp.push", "--watch", *words, cwd=tmp_path, **env)
        assert done.returncode == 2 and said in done.stderr, done.stdout + done.stderr
