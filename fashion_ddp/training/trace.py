"""A trace of a few steps of each rank, for ui.perfetto.dev, chrome://tracing or TensorBoard."""

import os
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch.profiler import profile

from fashion_ddp.config import Config
from fashion_ddp.console import say
from fashion_ddp.distributed.world import World
from fashion_ddp.runs.folder import RunFolder

SKIPPED, STEPS = 10, 5  # the first steps of a process are not like the others


class Trace:
    """A recorder of a few steps, within `with`: call `step` after each step. Does nothing where no trace is asked for.

    The file is logs/trace-step<its first step>-rank<rank>.json: a start that continues the run writes another one.
    """

    def __init__(self, cfg: Config, world: World, folder: RunFolder, done: int):
        self.world = world
        self.path = folder.path / "logs" / f"trace-step{done + SKIPPED + 1}-rank{world.rank}.json"
        self.profiler: profile | None = None
        if cfg.trace:
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it would tell of its own start and end
            from torch import profiler  # takes a while

            plan = profiler.schedule(wait=SKIPPED - 2, warmup=2, active=STEPS, repeat=1)
            self.profiler = profiler.profile(schedule=plan, on_trace_ready=self._write)

    def __enter__(self) -> Self:
        if self.profiler is not None:
            self.profiler.__enter__()
        return self

    def step(self) -> None:
        """Note that a step has ended."""
        if self.profiler is not None:
            self.profiler.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.profiler is not None:
            self.profiler.__exit__(kind, error, trace)

    def _write(self, profiler: "profile") -> None:
        try:
            profiler.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:  # no reason to stop training
            say(f"warning: no trace: {self.path} cannot be written ({error})")
            return
        if self.world.rank == 0:
            say(f"trace of {STEPS} steps: {self.path} (ui.perfetto.dev and chrome://tracing open it)")
