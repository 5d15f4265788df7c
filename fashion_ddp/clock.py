"""Where the time of a run goes. Every figure is taken when the device has finished what it stands for."""

import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepClock:
    """How long each step took, without waiting for the device: events on a card, the host's clock on a CPU."""

    def __init__(self, device: torch.device):
        self.on_card = device.type == "cuda"
        self.marks: list[float | torch.cuda.Event] = []
        self.seconds: list[float] = []  # by step, the process's first step first

    def start(self) -> None:
        """A step begins; within a window, where the one before ended."""
        if not self.marks:
            self.stop()

    def stop(self) -> None:
        """A step ends."""
        if self.on_card:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def read(self) -> None:
        """At a sync point, where the device has finished: turn marks into seconds, and begin the next window."""
        for start, end in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(start, float) and isinstance(end, float):
                self.seconds.append(end - start)
            elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                self.seconds.append(start.elapsed_time(end) / 1000)
        self.marks = []


class Timings:
    """The seconds of each phase: "train" and "eval", once per epoch."""

    def __init__(self, started: float):
        self.started = started  # time.time() when the process began
        self.startup: float | None = None
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Time a phase that ends with a host read of the device's last result."""
        if self.startup is None:
            self.startup = time.time() - self.started
        start = time.perf_counter()
        yield
        self.seconds[phase].append(time.perf_counter() - start)

    def of_epoch(self, images: int) -> dict[str, float]:
        """The last epoch's figures: seconds, and training images per second over all ranks."""
        train, evaluation = self.seconds["train"][-1], self.seconds["eval"][-1]
        return {"time/train_s": train, "time/eval_s": evaluation, "throughput/images_per_s": images / train}

    def of_run(self, images: int, ranks: int, steps: list[float]) -> dict[str, float | None]:
        """The run's figures. `images`: trained on in all; `steps`: seconds of each step, of which the first is kept
        apart, as it holds what is done only once."""
        train = sum(self.seconds["train"])
        cuts = statistics.quantiles(steps[1:], n=20, method="inclusive") if len(steps) > 2 else [float("nan")] * 19
        return {
            "time/startup_s": self.startup,
            "time/train_total_s": train,
            "time/eval_total_s": sum(self.seconds["eval"]),
            "time/total_s": time.time() - self.started,
            "time/first_step_s": steps[0],
            "time/step_p50_ms": 1000 * cuts[9],
            "time/step_p95_ms": 1000 * cuts[18],
            "throughput/images_per_s": images / train,
            "throughput/images_per_s_per_rank": images / train / ranks,
        }


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank took: of the card by torch, or of the machine by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
