"""Figures of time are sums and quantiles of what was measured; none is asserted in seconds."""

import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fashion_ddp.training.timing import StepClock, Timings, peak_memory_bytes

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time stands still, but for what this is told to add."""
    now = 1000.0

    def add(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "time", lambda: 1e9 + now)
    return add


def take_steps(clock: StepClock, durations: list[list[float]], advance: Callable[[float], None]) -> None:
    """Steps of these seconds, by window."""
    for window in durations:
        for seconds in window:
            clock.start()
            advance(seconds)
            clock.stop()
        clock.read()
        advance(100)  # an evaluation


def steps_of(seconds: list[float]) -> StepClock:
    clock = StepClock(CPU)
    clock.first, clock.seconds = seconds[0], seconds[1:]
    return clock


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """A state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def saved_and_restored(clock: StepClock) -> StepClock:
    """The clock of a process that continues the run."""
    later = StepClock(CPU)
    later.restore(saved(clock.state()))
    return later


@pytest.mark.parametrize("windows", [[[1.0], [2.0, 3.0]], [[1.0, 2.0, 3.0]], [[1.0]]])
def test_every_step_is_timed_once_but_the_first_of_a_process_that_continues(
    windows: list[list[float]], advance: Callable[[float], None]
) -> None:
    clock = StepClock(CPU)
    assert clock.first is None
    take_steps(clock, windows, advance)
    before = [seconds for window in windows for seconds in window][1:]
    assert clock.first == 1.0 and clock.seconds == before
    for later in ([[70.0], [8.0, 9.0]], [[70.0, 8.0, 9.0]]):
        clock = saved_and_restored(clock)
        take_steps(clock, later, advance)
        before += [8.0, 9.0]  # and not 70: what a process does only once is no step of the run
        assert clock.first == 1.0 and clock.seconds == before


def test_a_process_that_does_nothing_changes_no_figure(advance: Callable[[float], None]) -> None:
    clock = StepClock(CPU)
    take_steps(clock, [[1.0], [0.1, 0.2, 0.4]], advance)
    for _ in range(3):
        clock = saved_and_restored(clock)
        clock.read()
    assert clock.first == 1.0 and clock.seconds == pytest.approx([0.1, 0.2, 0.4], rel=1e-6)


def figures_of(images: int, ranks: int, steps: StepClock) -> dict[str, Any]:
    """Of a run whose epochs trained for 6 s and 2 s."""
    measured = Timings(started=time.time() - 1)
    with measured.measure("train"):
        pass
    measured.seconds["train"], measured.seconds["eval"] = [6.0, 2.0], [1.0, 0.5]
    return measured.of_run(images, ranks, steps)


def test_figures_of_the_run_are_over_all_of_it() -> None:
    steps = steps_of([5.0, *np.linspace(0.001, 0.101, 41).tolist()])  # the first is kept apart
    figures = figures_of(1600, 4, steps)
    expected = {"time/train_total_s": 8.0, "time/eval_total_s": 1.5, "time/first_step_s": 5.0}
    expected |= {"throughput/images_per_s": 200.0, "throughput/images_per_s_per_rank": 50.0}
    expected |= {"time/step_p50_ms": pytest.approx(51), "time/step_p95_ms": pytest.approx(96)}
    assert figures == figures | expected and 0 < figures["time/startup_s"] <= figures["time/total_s"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_of_hardly_any_steps_has_no_quantiles(count: int) -> None:
    figures = figures_of(1, 1, steps_of([0.5] * count))
    assert figures["time/first_step_s"] == 0.5 and str(figures["time/step_p95_ms"]) == "nan"  # null in summary.json


def test_the_seconds_of_all_processes_are_added_up(advance: Callable[[float], None]) -> None:
    """Three processes: the first saves 3 s into its second epoch and is killed later, the second 2 s further on."""

    def spend(timings: Timings, phase: str, seconds: float) -> None:
        with timings.measure(phase):
            advance(seconds)

    def start(startup: float, state: dict[str, Any] | None = None) -> Timings:
        timings = Timings(started=time.time())
        if state:
            timings.restore(state)
        advance(startup)
        return timings

    first = start(10)
    spend(first, "train", 5)
    spend(first, "eval", 1)
    with first.measure("train"):
        advance(3)
        state = saved(first.state())
        advance(50)  # lost: no checkpoint holds it
    assert state["total"] == 19
    advance(1000)  # between two processes
    second = start(20, state)
    with second.measure("train"):
        advance(2)
        state = saved(second.state())
        advance(50)
    third = start(30, state)
    spend(third, "train", 4)
    spend(third, "eval", 1.5)
    expected = {"time/train_s": 3 + 2 + 4, "time/eval_s": 1.5, "throughput/images_per_s": 100}
    assert third.of_epoch(images=900) == expected
    spend(third, "train", 6)  # an epoch of its own owes nothing to the processes before
    spend(third, "eval", 1)
    figures = third.of_run(images=1, ranks=1, steps=steps_of([1.0]))
    assert third.seconds == {"train": [5, 9, 6], "eval": [1, 1.5, 1]}
    assert figures["time/startup_s"] == 10 + 20 + 30
    assert figures["time/train_total_s"] == 20 and figures["time/eval_total_s"] == 3.5
    assert figures["time/total_s"] == 19 + (20 + 2) + (30 + 4 + 1.5 + 6 + 1)


def test_memory_is_counted_in_bytes() -> None:
    assert np.ones(64_000_000, np.uint8).nbytes < peak_memory_bytes(CPU)
