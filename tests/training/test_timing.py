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


def test_every_step_is_timed_once_and_nothing_else(advance: Callable[[float], None]) -> None:
    clock = StepClock(CPU)
    assert clock.first is None
    take_steps(clock, [[1.0], [2.0, 3.0, 4.0], [5.0]], advance)
    assert clock.first == 1.0 and clock.seconds == [2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("windows", [[[1.0], [2.0, 3.0]], [[1.0, 2.0, 3.0]], [[1.0]]])
def test_a_process_that_continues_adds_its_steps_but_the_first(
    windows: list[list[float]], advance: Callable[[float], None]
) -> None:
    clock = StepClock(CPU)
    take_steps(clock, windows, advance)
    before = clock.seconds[:]
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


def timings(train: list[float], evaluation: list[float]) -> Timings:
    measured = Timings(started=time.time() - 1)
    with measured.measure("train"):
        pass
    measured.seconds["train"], measured.seconds["eval"] = train, evaluation
    return measured


def test_figures_of_an_epoch_are_the_last_ones() -> None:
    row = timings([9.0, 2.0], [3.0, 0.5]).of_epoch(images=600)
    assert row == {"time/train_s": 2.0, "time/eval_s": 0.5, "throughput/images_per_s": 300.0}


def test_figures_of_the_run_are_over_all_of_it() -> None:
    steps = steps_of([5.0, *np.linspace(0.001, 0.101, 41).tolist()])  # the first is kept apart
    figures = timings([6.0, 2.0], [1.0, 0.5]).of_run(images=1600, ranks=4, steps=steps)
    assert figures["time/train_total_s"] == 8.0 and figures["time/eval_total_s"] == 1.5
    assert figures["throughput/images_per_s"] == 200.0 and figures["throughput/images_per_s_per_rank"] == 50.0
    assert figures["time/first_step_s"] == 5.0
    assert figures["time/step_p50_ms"] == pytest.approx(51) and figures["time/step_p95_ms"] == pytest.approx(96)
    assert 0 < figures["time/startup_s"] <= figures["time/total_s"]  # type: ignore[operator]


@pytest.mark.parametrize("count", [3, 4, 10, 100])
def test_quantiles_lie_among_the_steps(count: int) -> None:
    steps = np.random.default_rng(count).uniform(0.01, 0.02, count).tolist()
    expected = np.percentile(1000 * np.array(steps[1:]), [50, 95])
    for clock in (steps_of(steps), saved_and_restored(steps_of(steps))):
        figures = timings([1.0], [1.0]).of_run(images=1, ranks=1, steps=clock)
        assert [figures["time/step_p50_ms"], figures["time/step_p95_ms"]] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_of_hardly_any_steps_has_no_quantiles(count: int) -> None:
    figures = timings([1.0], [1.0]).of_run(images=1, ranks=1, steps=steps_of([0.5] * count))
    assert figures["time/first_step_s"] == 0.5 and str(figures["time/step_p95_ms"]) == "nan"  # null in summary.json


def test_the_seconds_of_all_processes_are_added_up(advance: Callable[[float], None]) -> None:
    """Three processes: the first saves 3 s into its second epoch and is killed later, the second 2 s further on."""
    first = Timings(started=time.time())
    advance(10)  # start-up
    with first.measure("train"):
        advance(5)
    with first.measure("eval"):
        advance(1)
    with first.measure("train"):
        advance(3)
        state = saved(first.state())
        advance(50)  # lost: no checkpoint holds it
    assert state["total"] == 19

    advance(1000)  # between two processes
    second = Timings(started=time.time())
    second.restore(state)
    advance(20)
    with second.measure("train"):
        advance(2)
        state = saved(second.state())
        advance(50)

    third = Timings(started=time.time())
    third.restore(state)
    advance(30)
    with third.measure("train"):
        advance(4)
    assert third.of_epoch(images=900) | {"time/eval_s": 1} == {
        "time/train_s": 3 + 2 + 4, "time/eval_s": 1, "throughput/images_per_s": 100,
    }  # fmt: skip
    with third.measure("eval"):
        advance(1.5)
    with third.measure("train"):  # an epoch of its own owes nothing to the processes before
        advance(6)
    with third.measure("eval"):
        advance(1)
    figures = third.of_run(images=1, ranks=1, steps=steps_of([1.0]))
    assert third.seconds == {"train": [5, 9, 6], "eval": [1, 1.5, 1]}
    assert figures["time/startup_s"] == 10 + 20 + 30
    assert figures["time/train_total_s"] == 20 and figures["time/eval_total_s"] == 3.5
    assert figures["time/total_s"] == 19 + (20 + 2) + (30 + 4 + 1.5 + 6 + 1)


def test_memory_is_counted_in_bytes() -> None:
    held = np.ones(64_000_000, np.uint8)
    assert held.nbytes < peak_memory_bytes(CPU)
