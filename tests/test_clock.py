"""Figures of time are sums and quantiles of what was measured; none is asserted in seconds."""

import time

import numpy as np
import pytest
import torch

from fashion_ddp.clock import StepClock, Timings, peak_memory_bytes

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")


def test_every_step_is_timed_once_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock, durations = StepClock(CPU), [[1.0], [2.0, 3.0, 4.0], [5.0]]
    for window in durations:
        for seconds in window:
            clock.start()
            now += seconds
            clock.stop()
        clock.read()
        now += 100  # an evaluation
    assert clock.seconds == [seconds for window in durations for seconds in window]


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
    steps = [5.0, *np.linspace(0.001, 0.101, 41).tolist()]  # the first is kept apart
    figures = timings([6.0, 2.0], [1.0, 0.5]).of_run(images=1600, ranks=4, steps=steps)
    assert figures["time/train_total_s"] == 8.0 and figures["time/eval_total_s"] == 1.5
    assert figures["throughput/images_per_s"] == 200.0 and figures["throughput/images_per_s_per_rank"] == 50.0
    assert figures["time/first_step_s"] == 5.0
    assert figures["time/step_p50_ms"] == pytest.approx(51) and figures["time/step_p95_ms"] == pytest.approx(96)
    assert 0 < figures["time/startup_s"] <= figures["time/total_s"]  # type: ignore[operator]


@pytest.mark.parametrize("count", [3, 4, 10, 100])
def test_quantiles_lie_among_the_steps(count: int) -> None:
    steps = np.random.default_rng(count).uniform(0.01, 0.02, count).tolist()
    figures = timings([1.0], [1.0]).of_run(images=1, ranks=1, steps=steps)
    expected = np.percentile(1000 * np.array(steps[1:]), [50, 95])
    assert [figures["time/step_p50_ms"], figures["time/step_p95_ms"]] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_of_hardly_any_steps_has_no_quantiles(count: int) -> None:
    figures = timings([1.0], [1.0]).of_run(images=1, ranks=1, steps=[0.5] * count)
    assert figures["time/first_step_s"] == 0.5 and str(figures["time/step_p95_ms"]) == "nan"  # null in summary.json


def test_memory_is_counted_in_bytes() -> None:
    held = np.ones(64_000_000, np.uint8)
    assert held.nbytes < peak_memory_bytes(CPU)
