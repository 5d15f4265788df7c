"""Where the time of a run goes. Every figure is taken when the device has finished what it stands for."""

import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StepClock:
    """How long each step took, without waiting for the device: events on a card, the host's clock on a CPU."""

    def __init__(self, device: torch.device):
        self.on_card = device.type == "cuda"
        self.marks: list[float | torch.cuda.Event] = []
        self.fresh = True  # this process has not read a step
        self.first: float | None = None  # seconds of the run's first step, which holds what is done only once
        self.seconds: list[float] = []  # of the others, without the first of a process that continued the run

    def start(self) -> None:
        """Mark the beginning of a step. Within a window a step begins where the one before ended."""
        if not self.marks:
            self.stop()

    def stop(self) -> None:
        """Mark the end of a step."""
        if self.on_card:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def read(self) -> None:
        """Turn the marks into seconds, at a sync point, where the device has finished. The next window begins."""
        for start, end in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(start, float) and isinstance(end, float):
                self._add(end - start)
            elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                self._add(start.elapsed_time(end) / 1000)
        self.marks = []

    def _add(self, seconds: float) -> None:
        if not self.fresh:
            self.seconds.append(seconds)
        elif self.first is None:
            self.first = seconds
        self.fresh = False

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "seconds": torch.tensor(self.seconds)}

    @staticmethod
    def like(saved: dict[str, Any]) -> dict[str, Any]:
        """Return a state as `state` gives it, of as many steps as a saved one holds."""
        return {"first": 0.0, "seconds": torch.zeros(len(saved["seconds"]))}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting where an earlier process of the run saved."""
        self.first, self.seconds = state["first"], state["seconds"].tolist()


class Timings:
    """The seconds of each phase, "train" and "eval", once per epoch. Those of earlier processes of the run count as far
    as their work was saved."""

    def __init__(self, started: float):
        self.started = started  # time.time() when the command began
        self.startup: float | None = None
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.since = 0.0  # perf_counter() when the current phase began
        self.earlier = {"startup": 0.0, "total": 0.0, "current": 0.0}  # seconds of earlier processes

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Time a phase that ends with a host read of the device's last result."""
        if self.startup is None:
            self.startup = self.earlier["startup"] + time.time() - self.started
        self.since = time.perf_counter() - self.earlier.pop("current", 0.0)
        yield
        self.seconds[phase].append(time.perf_counter() - self.since)

    def total(self) -> float:
        return self.earlier["total"] + time.time() - self.started

    def state(self) -> dict[str, Any]:
        """Return the state, within a phase."""
        current = time.perf_counter() - self.since
        return {"seconds": dict(self.seconds), "startup": self.startup, "total": self.total(), "current": current}

    @staticmethod
    def like(epochs: int) -> dict[str, Any]:
        """Return a state as `state` gives it after so many whole epochs."""
        seconds = dict.fromkeys(("train", "eval"), [0.0] * epochs) if epochs else {}
        return {"seconds": seconds, **dict.fromkeys(("startup", "total", "current"), 0.0)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting where an earlier process of the run saved."""
        self.earlier = {name: state[name] for name in self.earlier}
        self.seconds |= state["seconds"]

    def of_epoch(self, images: int) -> dict[str, float]:
        """Return the last epoch's figures: seconds, and training images per second over all ranks."""
        train, evaluation = self.seconds["train"][-1], self.seconds["eval"][-1]
        return {"time/train_s": train, "time/eval_s": evaluation, "throughput/images_per_s": images / train}

    def of_run(self, images: int, ranks: int, steps: StepClock) -> dict[str, float | None]:
        """Return the figures of the whole run. `images`: how many were trained on in all epochs."""
        train = sum(self.seconds["train"])
        few = len(steps.seconds) < 2
        cuts = [float("nan")] * 19 if few else statistics.quantiles(steps.seconds, n=20, method="inclusive")
        return {
            "time/startup_s": self.startup,
            "time/train_total_s": train,
            "time/eval_total_s": sum(self.seconds["eval"]),
            "time/total_s": self.total(),
            "time/first_step_s": steps.first,
            "time/step_p50_ms": 1000 * cuts[9],
            "time/step_p95_ms": 1000 * cuts[18],
            "throughput/images_per_s": images / train,
            "throughput/images_per_s_per_rank": images / train / ranks,
        }


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this rank took, in bytes: of its card for torch's tensors, which leaves out CUDA and
    NCCL themselves; or of the machine by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
