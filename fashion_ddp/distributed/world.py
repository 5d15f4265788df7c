"""The ranks of a run and every word between them: the only user of torch.distributed.

Between two sync points (sync.py) ranks exchange gradients (and the statistics of global batch norm) and nothing else.
"""

import datetime
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fashion_ddp.config import Config
from fashion_ddp.distributed import failures, machine, precision, rendezvous, signals, tuning
from fashion_ddp.errors import CommandFailed, Stopped, TrainingFailed, UserError
from fashion_ddp.private import private

T = TypeVar("T")

CONNECTING = 20.0, 120.0  # seconds at least and at most, whatever --timeout says, for ranks that have met to connect
LATER = 30.0  # seconds after a run's own watch at which torch gives up waiting: the watch knows what to say
POLL = 0.2  # seconds between two looks whether work that takes long is done

_entered = 0


def entering_collective() -> None:
    """Count a collective that this rank is about to enter, or a backward pass that holds one."""
    global _entered
    _entered += 1


def collectives_entered() -> int:
    """Return the number of collectives entered; -1 after leaving. The rank with the lower number is behind."""
    return _entered


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place, and return it. A single rank keeps it as it is."""
    entering_collective()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@dataclass(frozen=True)
class World:
    """All ranks of the run, as one of them sees it."""

    accelerator: Accelerator
    place: machine.RankPlacement
    graphs: list[torch.cuda.CUDAGraph] = field(default_factory=list)

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
    def threads(self) -> int:
        """Return how many CPU threads share this rank's work."""
        return torch.get_num_threads()

    @property
    def device_name(self) -> str:
        """Return the card's name, or "cpu"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def card_memory(self) -> tuple[int, int]:
        """Return the free and all bytes of this rank's card; of this run's share, where several runs share it."""
        free, total = torch.cuda.mem_get_info(self.device)
        share = total // machine.runs_per_card()
        return min(free, share - torch.cuda.memory_reserved(self.device)), share

    @property
    def backend(self) -> str | None:
        """Return what carries tensors between the ranks, as torch names it; None for a process without a group."""
        group = dist.group.WORLD
        if group is None:
            return None
        name = type(private(group, "_get_backend")(self.device)).__name__
        return f"{name}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if self.device.type == "cuda" else name

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return every rank's tensor, by rank, along a new first dimension: [W, *tensor.shape]."""
        entering_collective()
        if self.size == 1:
            return tensor.unsqueeze(0)
        every = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(every.unbind(0)), tensor)
        return every

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's value, by rank."""
        entering_collective()
        values: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        dist.all_gather_object(values, value)
        return values

    def first_of_ranks(self, value: T | None) -> T | None:
        """Return, on every rank, the value of the first rank that has one. A collective."""
        return next((one for one in self.all_gather_object(value) if one is not None), None)

    def raise_together(self, work: Callable[[], T]) -> T:
        """Do work on every rank. Where it raises UserError or TrainingFailed on any rank, raise the same on all."""
        result: list[T] = []
        problem = None
        try:
            result.append(work())
        except (UserError, TrainingFailed) as error:
            problem = machine.host_name(), str(error), isinstance(error, UserError)
        problems = [p for p in self.all_gather_object(problem) if p is not None]
        if problems:
            by_host = {host: text for host, text, _ in reversed(problems)}  # the first rank of each host speaks for it
            everywhere = len(problems) == self.size and len(set(by_host.values())) == 1
            lines = by_host.values() if everywhere else (f"{host}: {text}" for host, text in by_host.items())
            raise (UserError if problems[0][2] else TrainingFailed)("\n".join(dict.fromkeys(lines)))
        return result[0]

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Do work on rank 0 while the others wait. All return its result, or raise its error."""
        result: list[Any] = self.raise_together(lambda: [work()] if self.rank == 0 else [None])
        if self.size > 1:
            entering_collective()
            dist.broadcast_object_list(result, device=self.device)
        return result[0]

    def on_first_rank_of_each_machine(self, work: Callable[[], object]) -> None:
        """Do work on the first rank of each machine, for files that each machine has for itself."""
        self.raise_together(lambda: work() if self.place.local_rank == 0 else None)

    def once_per_machine(self, work: Callable[[Callable[[], None]], T]) -> T:
        """Do work that may take hours on the first rank of each machine, and return its result to this machine's ranks.

        The others ask again and again: a collective gives up after --timeout. `work` is given a function to call
        often, which ends it when any rank is asked to stop. Raises Stopped then, on every rank.
        """
        stop = threading.Event()

        def between() -> None:
            if stop.is_set():
                raise CancelledError

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work, between) if self.place.local_rank == 0 else None
            reason: str | None = None
            busy = True
            try:
                while busy:
                    asked = signals.reason(signals.stop_requests())
                    states = self.all_gather_object((future is not None and not future.done(), asked))
                    busy = any(one for one, _ in states)
                    reason = reason or next((asked for _, asked in states if asked), None)
                    if reason:
                        stop.set()
                    if busy:
                        time.sleep(POLL)
            finally:
                stop.set()  # where another rank is lost, too
        if reason:
            raise Stopped("its cache", reason)
        result: list[Any] = self.raise_together(lambda: [None] if future is None else [future.result()])
        return self.all_gather_object(result[0])[self.rank - self.place.local_rank]

    def wrap(self, model: nn.Module, ddp: bool = True) -> nn.Module:
        """Let Accelerate put the model on its device, in the run's precision, and, with `ddp`, wrap it in
        DistributedDataParallel, which averages gradients over the ranks of a process group."""
        with warnings.catch_warnings():
            # Later torch has another name for it, which earlier torch does not know.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            model = self.accelerator.prepare_model(model, evaluation_mode=not ddp)
            if ddp and dist.is_initialized() and not isinstance(model, DistributedDataParallel):
                # Accelerate leaves a single rank on a card unwrapped: then it would not show what several do.
                devices = [self.device] if self.device.type == "cuda" else None
                keywords = self.accelerator.ddp_handler.to_kwargs()
                model = DistributedDataParallel(model, device_ids=devices, **keywords)
        if isinstance(model, DistributedDataParallel) and self.device.type == "cuda":
            # For statistics of its own DDP waits for the card in its first ten passes, and then in every hundredth.
            private(model, "_set_ddp_runtime_logging_sample_rate")(2**31 - 1)
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within, a model that `wrap` returned leaves gradients on their rank: backward passes add to them."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def release_graphs(self) -> None:
        """Release recorded CUDA graphs. NCCL waits for them when it ends, and would wait forever."""
        while self.graphs:
            self.graphs.pop().reset()

    def leave(self) -> None:
        """Disconnect from the other ranks, so that nothing after this can make them wait."""
        global _entered
        _entered = -1
        self.release_graphs()
        if dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(0.05)  # gloo's thread has yet to drop the last call's tensors; at Python's end it would abort


def is_lost_rank(error: BaseException) -> bool:
    """Return whether an error means that another rank is gone. That rank's own message says why."""
    if failures.nccl_words(error) is not None:
        return False
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def explain(error: BaseException) -> str | None:
    """Return in words what an error of NCCL or of a card means, or that another rank is gone; None for others."""
    if isinstance(error, UserError | CommandFailed | Stopped):
        return None
    if (full := failures.explain_full_card(error)) is not None:
        return full
    if (words := failures.nccl_words(error)) is not None:
        return f"NCCL failed with {words}"
    return failures.LOST_RANK if is_lost_rank(error) else None


def _is_first_to_say_it() -> bool:
    """Return whether no other rank failed before: several may find the same error, and one message is enough."""
    try:
        return not dist.is_initialized() or private(dist.distributed_c10d, "_get_default_store")().add("failed", 1) == 1
    except (RuntimeError, UserError):  # it is gone, with rank 0 or the launcher that kept it; or torch has no such name
        return False


# Kept until the process ends, so that DDP's reducer never holds a group's last reference: torch 2.10 would then join
# gloo's threads without letting go of the interpreter's lock, which they may be waiting for. One for each run so far.
_groups: list[Any] = []


@contextmanager
def open_world(cfg: Config) -> Iterator[World]:
    """Join the other ranks. Raises UserError where launcher, machine and command do not fit together or ranks do not
    meet, TrainingFailed where another one ends before its time."""
    here = machine.read_placement()
    joined = False
    try:
        with _join(cfg, here) as world:
            joined = True
            yield world
    except Exception as error:
        if isinstance(error, dist.DistError) and (plain := rendezvous.explain_failure(error, here)):
            raise plain from error
        if (means := explain(error)) is None:
            raise
        if is_lost_rank(error) and (asked := signals.asked_as_training_began()):
            raise Stopped(None, asked) from error
        if is_lost_rank(error) or not _is_first_to_say_it():
            raise TrainingFailed(f"{failures.LOST_RANK}; {failures.CONTINUES}") from error
        if not joined and (words := failures.nccl_words(error)):
            raise failures.explain_joining(words, here.rank) from error
        place = f"rank {here.rank} on {machine.host_name()}"
        raise failures.RankFailed(f"{place}: {means}; {failures.CONTINUES}") from error


@contextmanager
def _join(cfg: Config, here: machine.RankPlacement) -> Iterator[World]:
    global _entered
    device = machine.choose_device(cfg, here)
    threads = machine.threads_per_rank(cfg, here.local_world_size)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # else Accelerate warns, and sets a number of its own
    tuning.keep_freed_memory()
    if device == "cpu" and here.world_size > 1:
        tuning.schedule_as_batch()
    rendezvous.wait_for_rank_zero(here)
    if _groups:
        _meet_again(cfg, device)
    _entered = 0
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=precision.mixed_precision(cfg.precision),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=cfg.timeout + LATER)),
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
    world = World(accelerator, here)
    with _card(cfg, accelerator) if device == "cuda" else nullcontext():
        with failures.time_limit(here.rank, "the first exchange", min(max(cfg.timeout, CONNECTING[0]), CONNECTING[1])):
            float(all_reduce(torch.zeros((), device=world.device)))  # ranks connect: what prevents it is told at once
        try:
            yield world
        except (UserError, TrainingFailed, Stopped):
            world.leave()  # not behind any other error: other ranks may sit in a collective, and it would wait for them
            raise
        finally:
            world.release_graphs()
        world.leave()


def _meet_again(cfg: Config, device: str) -> None:
    """Make the process group of a further run of this process, where Accelerate makes that of the first.

    The ranks meet at the same place, where the addresses of the group before are still read by their names.
    """
    limit = datetime.timedelta(seconds=cfg.timeout + LATER)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
    store = dist.PrefixStore(f"run{len(_groups)}", store)
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)


@contextmanager
def _card(cfg: Config, accelerator: Accelerator) -> Iterator[None]:
    """Use a card as the run asks for, within."""
    # Accelerate hands this number to DDP as the card's, which is another where a rank sees its own card only.
    if accelerator.device.index is not None:
        accelerator.state.local_process_index = accelerator.device.index
    if (runs := machine.runs_per_card()) > 1:  # one that takes more than its share fails alone
        torch.cuda.set_per_process_memory_fraction(1 / runs)
    torch.cuda.reset_peak_memory_stats(accelerator.device)  # of an earlier run of this process
    # On the default stream nothing can be recorded as a graph.
    with precision.products(cfg.precision), torch.cuda.stream(torch.cuda.Stream()):
        yield
