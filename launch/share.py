"""Divide this machine among many runs: ranks, threads, cards; and say about how long the runs will take."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

from fashion_ddp.config import Config
from fashion_ddp.console import say
from fashion_ddp.distributed import machine, signals
from fashion_ddp.errors import TrainingFailed, UserError, pluralize

DataShape = tuple[tuple[int, int, int], int, int]  # (C, H, W) of an image, classes, training images


@dataclass(frozen=True)
class MachineShare:
    """What each of the runs that train at once gets of this machine."""

    ranks: int
    threads: int  # CPU threads of each rank
    cards: tuple[str | None, ...]  # of each run: its CUDA_VISIBLE_DEVICES; None leaves it as it is in this process


def divide_in_subprocess(jobs: int, ranks: int, cfg: Config, todo: list[Config], shape: DataShape) -> MachineShare:
    """Call `divide` in a process of its own: torch in this one would hold a card's memory while the runs need it."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_divide_and_send, args=(sender, jobs, ranks, cfg, todo, shape))
    resource_tracker.ensure_running()  # else the first process starts it, and signals are unblocked meanwhile
    # The child never unblocks them. The terminal's Ctrl-C is for this process, which remembers it.
    with signals.blocked():
        child.start()
    sender.close()
    signals.children = [child]
    try:
        answer = receiver.recv()
    except EOFError:
        child.join()
        raise TrainingFailed(f"looking at this machine ended with exit code {child.exitcode}") from None
    child.join()
    if isinstance(answer, UserError):
        raise answer
    return answer


def _divide_and_send(
    sender: Connection, jobs: int, ranks: int, cfg: Config, todo: list[Config], shape: DataShape
) -> None:
    try:
        answer: MachineShare | UserError = divide(jobs, ranks, cfg, todo, shape)
    except UserError as error:
        answer = error
    with contextlib.suppress(OSError):  # the process that asked was killed
        sender.send(answer)


def divide(jobs: int, ranks: int, cfg: Config, todo: list[Config], shape: DataShape) -> MachineShare:
    """Decide what each run gets of this machine. Print that, and about how long the runs in `todo` will take.

    `jobs`: runs at once. `ranks`: of each run; 0 takes as many as fit the machine, or one where several runs share it.
    `cfg`: any of the runs, for their device and threads. Raises UserError where the machine does not have what is asked
    for.
    """
    import torch

    kind = machine.choose_device(cfg, machine.RankPlacement())
    cards, cores = torch.cuda.device_count() if kind == "cuda" else 0, machine.usable_cores()
    ranks = ranks or (1 if jobs > 1 else cards or min(4, cores))
    machine.choose_device(cfg, machine.RankPlacement(world_size=ranks, local_world_size=ranks))
    cards_of_runs = assign_cards(visible_cards(cards), jobs, ranks) if cards and jobs > 1 else [None] * jobs
    # Divide by `jobs`, however many runs there are or are left: a run's bits depend on its threads, and a run that
    # continues alone must end in the bits that it would have had among the others. More ranks than cores are not
    # refused: with one thread each they take turns. Of 3 runs on 2 cores no core is idle, where 2 runs and then 1 would
    # leave one so.
    share = MachineShare(ranks, machine.threads_per_rank(cfg, ranks * jobs), tuple(cards_of_runs))
    if not todo:
        return share
    on = f"{cards} x {torch.cuda.get_device_name(0)}" if cards else f"CPU, {cores} cores"
    each = f"{pluralize(ranks, 'rank')} with {pluralize(share.threads, 'CPU thread')} each"
    seconds = [_estimate_seconds(cfg, kind, ranks, share.threads, shape) for cfg in todo]
    at_once = jobs if cards else min(jobs, max(1, cores // (ranks * share.threads)))
    total = max(sum(seconds) / at_once, *seconds)
    duration = f"about {total / 60:.0f} min" if total > 90 else f"about {total:.0f} s"
    beside = f", {jobs} at once," if jobs > 1 else ""
    say(f"{pluralize(len(todo), 'run')}{beside} of {each}, on {on}; {duration}")
    return share


def visible_cards(count: int, env: Mapping[str, str] = os.environ) -> list[str]:
    """Return the names (numbers or UUIDs) of the `count` cards that torch sees, as CUDA_VISIBLE_DEVICES gives them."""
    names = env.get("CUDA_VISIBLE_DEVICES")
    # CUDA stops reading the list at the first name that is no card's.
    return [name.strip() for name in names.split(",")][:count] if names else [str(n) for n in range(count)]


def assign_cards(cards: Sequence[str], jobs: int, ranks: int) -> list[str]:
    """Return the CUDA_VISIBLE_DEVICES of each of `jobs` runs: one card per rank, in the order given.

    Raises UserError where there are too few cards.
    """
    if jobs * ranks > len(cards):
        fit = len(cards) // ranks
        raise UserError(
            f"jobs={jobs} of {pluralize(ranks, 'rank')} each need {pluralize(jobs * ranks, 'NVIDIA card')}, and there "
            f"are {len(cards)}: give --jobs {fit} (JOBS={fit}), or --device cpu to train without them"
        )
    return [",".join(cards[at : at + ranks]) for at in range(0, jobs * ranks, ranks)]


def _estimate_seconds(cfg: Config, kind: str, ranks: int, threads: int, shape: DataShape) -> float:
    """Estimate a run's duration from a few training steps of its model on black images. `kind`: cpu or cuda."""
    import torch
    from torch.nn.functional import cross_entropy

    from fashion_ddp.models import architectures

    image_shape, classes, count = shape
    torch.set_num_threads(threads)
    model = architectures.build(cfg, image_shape, classes).to(kind)
    rows = -(-cfg.batch_size // ranks)
    images = torch.zeros(rows, *image_shape, dtype=next(model.parameters()).dtype, device=kind)
    labels = torch.zeros(rows, dtype=torch.long, device=kind)
    durations = []
    for _ in range(4):
        start = time.perf_counter()
        cross_entropy(model(images), labels).backward()
        labels.sum().item()  # waits for a card
        durations.append(time.perf_counter() - start)
    steps = cfg.epochs * count / cfg.batch_size
    start_up, rest_of_a_step = 8.0, 0.001  # seconds: imports on a quiet machine; all-reduce, update, bookkeeping
    return start_up + steps * (1.15 * min(durations) + rest_of_a_step)
