"""The ranks of a run and every word between them: the only user of torch.distributed.

Between two sync points ranks exchange gradients (and the statistics of global batch norm) and nothing else. At a sync
point they add up what they recorded, and the host reads it.
"""

import datetime
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from fashion_ddp import machine
from fashion_ddp.config import Config, TrainingFailed, UserError

T = TypeVar("T")

# How long a rank waits for the others before it gives up. A download or a slow file system may hold rank 0 that long.
PATIENCE = datetime.timedelta(minutes=10)


def sum_(tensor: Tensor) -> Tensor:
    """Add a tensor up over the ranks, in place; one rank alone keeps it as it is."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_(grads[0].clone())


def differentiable_sum(tensor: Tensor) -> Tensor:
    """The sum over the ranks, through which gradients flow: each rank's gets the sum of all ranks' gradients."""
    return _Sum.apply(tensor)


@dataclass(frozen=True)
class World:
    """All ranks of the run, as one of them sees it."""

    accelerator: Accelerator
    place: machine.Place
    threads: int

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.world_size

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def device_name(self) -> str:
        """The card's name, or "cpu"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, one after another along a new first dimension: [W, *tensor.shape]."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        every = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(every.unbind(0)), tensor)
        return every

    def share(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        values: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Do work that may fail for a user's mistake on some ranks only: then every rank raises the same UserError."""
        result: list[T] = []
        problem = None
        try:
            result.append(work())
        except UserError as error:
            problem = socket.gethostname(), str(error)
        problems = [p for p in self.share(problem) if p is not None]
        if problems:
            by_host = dict(reversed(problems))  # the first rank of each host speaks for it
            everywhere = len(problems) == self.size and len(set(by_host.values())) == 1
            lines = by_host.values() if everywhere else (f"{host}: {text}" for host, text in by_host.items())
            raise UserError("\n".join(dict.fromkeys(lines)))
        return result[0]

    def first(self, work: Callable[[], T]) -> T:
        """Do work on rank 0 alone, while the others wait; all get its result or raise its UserError."""
        result = self.share(self.together(lambda: [work()] if self.rank == 0 else []))[0]
        return result[0]

    def first_on_machine(self, work: Callable[[], object]) -> None:
        """Do work on the first rank of each machine, for files that each machine has its own of."""
        self.together(lambda: work() if self.place.local_rank == 0 else None)

    def wrap(self, model: nn.Module, ddp: bool = True) -> nn.Module:
        """The model on its device with the run's precision, and, with `ddp`, averaging gradients over the ranks."""
        with warnings.catch_warnings():
            # Later torch has another name for it, which earlier torch does not know.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            return self.accelerator.prepare_model(model, evaluation_mode=not ddp)


# Kept until the process ends, so that DDP's reducer never holds a group's last reference: torch 2.10 would then join
# gloo's threads without letting go of the interpreter's lock, which they may be waiting for.
_groups: list[Any] = []


@contextmanager
def open_world(cfg: Config) -> Iterator[World]:
    """Join the other ranks. Raises UserError where launcher, machine and command do not fit together."""
    here = machine.place()
    device = machine.choose_device(cfg, here)
    threads = machine.threads_per_rank(cfg, here.local_world_size)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # else Accelerate warns, and sets a number of its own
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision={"fp32": "no", "fp64": "no"}.get(cfg.precision, cfg.precision),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            # Buffers are equal on all ranks by construction; broadcasting them would cost a collective per step.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    torch.set_num_threads(threads)
    if dist.is_initialized():
        _groups.append(dist.group.WORLD)
    if accelerator.num_processes != here.world_size:
        raise machine.MachineError(
            f"{here.world_size} ranks were asked for and {accelerator.num_processes} made: "
            f"start them with {machine.TORCHRUN}"
        )
    try:
        yield World(accelerator, here, threads)
    except Exception as error:
        # Behind any other error, other ranks may sit in a collective, and a farewell would wait for them.
        if isinstance(error, UserError | TrainingFailed) and dist.is_initialized():
            dist.destroy_process_group()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


class SyncPoint:
    """Where all ranks meet, about once a second, and the host reads what the device has recorded."""

    def __init__(self, world: World, seconds: float = 1.0):
        self.world, self.seconds = world, seconds
        self.length = 1  # steps in the next window; the first step alone, as it takes far longer than the others
        self.since = time.perf_counter()

    def windows(self, steps: int) -> Iterator[range]:
        """The steps 0 .. steps - 1 of an epoch, cut at the sync points."""
        start = 0
        self.since = time.perf_counter()
        while start < steps:
            window = range(start, min(start + self.length, steps))
            yield window
            start = window.stop

    def __call__(self, rows: Tensor) -> list[list[float]]:
        """Add up the window's rows ([steps, n] float64) over the ranks, in one all-reduce, and read them."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        took = max(time.perf_counter() - self.since, 1e-6)
        proposal = max(1, round(len(rows) * self.seconds / took)) if self.world.rank == 0 else 0
        message = torch.cat([rows.flatten(), rows.new_tensor([proposal])])
        *values, length = sum_(message).tolist()
        self.length, self.since = int(length), time.perf_counter()
        return torch.tensor(values, dtype=torch.float64).view(rows.shape).tolist()
