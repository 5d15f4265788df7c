"""What many runs on this machine will take: ranks, threads, cards, and about how long."""

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

Sizes = tuple[tuple[int, int, int], int, int]  # of the data: (C, H, W), classes, training images


@dataclass(frozen=True)
class Share:
    """What of this machine each run has, of those that are trained at once."""

    ranks: int
    threads: int  # CPU threads of each rank
    cards: tuple[str | None, ...]  # by slot: CUDA_VISIBLE_DEVICES of the run that is in it; None: as it is for us


def announce_apart(jobs: int, asked: int, cfg: Config, todo: list[Config], sizes: Sizes) -> Share:
    """`announce`, in a process of its own: torch in this one would hold memory of a card while the runs need it."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_answer, args=(there, jobs, asked, cfg, todo, sizes))
    resource_tracker.ensure_running()  # it comes with the first process, and would let go of what is held
    # For good: the child does not listen. The terminal's Ctrl-C is for this process, which remembers it.
    with signals.blocked():
        child.start()
    there.close()
    signals.children = [child]
    try:
        answer = here.recv()
    except EOFError:
        child.join()
        raise TrainingFailed(f"looking at this machine ended with exit code {child.exitcode}") from None
    child.join()
    if isinstance(answer, UserError):
        raise answer
    return answer


def _answer(asker: Connection, jobs: int, asked: int, cfg: Config, todo: list[Config], sizes: Sizes) -> None:
    try:
        answer: Share | UserError = announce(jobs, asked, cfg, todo, sizes)
    except UserError as error:
        answer = error
    with contextlib.suppress(OSError):  # the asker was killed
        asker.send(answer)


def announce(jobs: int, asked: int, cfg: Config, todo: list[Config], sizes: Sizes) -> Share:
    """Say what will run on what, and about how long. Returns what each run has of the machine.

    `jobs`: runs at once. `asked`: ranks of each, 0 for as many as fit the machine, or one where several runs share it.
    `cfg`: any of the runs, for their device and threads.
    """
    import torch

    kind = machine.choose_device(cfg, machine.RankPlacement())
    cards, cores = torch.cuda.device_count() if kind == "cuda" else 0, machine.usable_cores()
    ranks = asked or (1 if jobs > 1 else cards or min(4, cores))
    machine.choose_device(cfg, machine.RankPlacement(world_size=ranks, local_world_size=ranks))
    dealt = deal(visible_cards(cards), jobs, ranks) if cards and jobs > 1 else [None] * jobs
    # By `jobs`, however many runs there are or are left: a run's bits depend on its threads, and a run that continues
    # alone must end in those that it would have had among the others. More ranks than cores are not refused: with one
    # thread each they take turns, and of 3 runs on 2 cores none is idle, where 2 and then 1 would leave one so.
    share = Share(ranks, machine.threads_per_rank(cfg, ranks * jobs), tuple(dealt))
    if not todo:
        return share
    on = f"{cards} x {torch.cuda.get_device_name(0)}" if cards else f"CPU, {cores} cores"
    each = f"{pluralize(ranks, 'rank')} with {pluralize(share.threads, 'CPU thread')} each"
    seconds = [_estimate(cfg, kind, ranks, share.threads, sizes) for cfg in todo]
    at_once = jobs if cards else min(jobs, max(1, cores // (ranks * share.threads)))
    whole = max(sum(seconds) / at_once, *seconds)
    took = f"about {whole / 60:.0f} min" if whole > 90 else f"about {whole:.0f} s"
    beside = f", {jobs} at once," if jobs > 1 else ""
    say(f"{pluralize(len(todo), 'run')}{beside} of {each}, on {on}; {took}")
    return share


def visible_cards(count: int, env: Mapping[str, str] = os.environ) -> list[str]:
    """The cards that torch counts, by the names that CUDA_VISIBLE_DEVICES has for them: numbers, or UUIDs."""
    named = env.get("CUDA_VISIBLE_DEVICES")
    # Of a list CUDA takes what stands before the first name that is none of a card.
    return [name.strip() for name in named.split(",")][:count] if named else [str(n) for n in range(count)]


def deal(cards: Sequence[str], jobs: int, ranks: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES for each of so many runs at once: cards of its own, one per rank, in the order given."""
    if jobs * ranks > len(cards):
        fit = len(cards) // ranks
        raise UserError(
            f"jobs={jobs} of {pluralize(ranks, 'rank')} each need {pluralize(jobs * ranks, 'NVIDIA card')}, and there "
            f"are {len(cards)}: give --jobs {fit} (JOBS={fit}), or --device cpu to train without them"
        )
    return [",".join(cards[at : at + ranks]) for at in range(0, jobs * ranks, ranks)]


def _estimate(cfg: Config, kind: str, ranks: int, threads: int, sizes: Sizes) -> float:
    """About how many seconds a run takes: from a few training steps of its model, on black images."""
    import torch
    from torch.nn.functional import cross_entropy

    from fashion_ddp.models import architectures

    image_shape, classes, count = sizes
    torch.set_num_threads(threads)
    model = architectures.build(cfg, image_shape, classes).to(kind)
    rows = -(-cfg.batch_size // ranks)
    images = torch.zeros(rows, *image_shape, dtype=next(model.parameters()).dtype, device=kind)
    labels = torch.zeros(rows, dtype=torch.long, device=kind)
    took = []
    for _ in range(4):
        start = time.perf_counter()
        cross_entropy(model(images), labels).backward()
        labels.sum().item()  # waits for a card
        took.append(time.perf_counter() - start)
    steps = cfg.epochs * count / cfg.batch_size
    start_up, rest_of_a_step = 8.0, 0.001  # seconds: imports on a quiet machine; all-reduce, update, bookkeeping
    return start_up + steps * (1.15 * min(took) + rest_of_a_step)
