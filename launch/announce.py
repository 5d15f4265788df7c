"""What many runs on this machine will take: ranks, threads, cards, and about how long."""

import contextlib
import multiprocessing
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

from fashion_ddp import machine, stop
from fashion_ddp.config import Config
from fashion_ddp.console import say
from fashion_ddp.errors import TrainingFailed, UserError, counted

Sizes = tuple[tuple[int, int, int], int, int]  # of the data: (C, H, W), classes, training images


def announce_apart(asked: int, cfg: Config, todo: list[Config], sizes: Sizes) -> int:
    """`announce`, in a process of its own: torch in this one would hold memory of a card while the runs need it."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_answer, args=(there, asked, cfg, todo, sizes))
    resource_tracker.ensure_running()  # it comes with the first process, and would let go of what is held
    with stop.held():  # for good: it does not listen; the terminal's Ctrl-C is for this process, which remembers it
        child.start()
    there.close()
    stop.children = [child]
    try:
        answer = here.recv()
    except EOFError:
        child.join()
        raise TrainingFailed(f"looking at this machine ended with exit code {child.exitcode}") from None
    child.join()
    if isinstance(answer, UserError):
        raise answer
    return answer


def _answer(asker: Connection, asked: int, cfg: Config, todo: list[Config], sizes: Sizes) -> None:
    try:
        answer: int | UserError = announce(asked, cfg, todo, sizes)
    except UserError as error:
        answer = error
    with contextlib.suppress(OSError):  # the asker was killed
        asker.send(answer)


def announce(asked: int, cfg: Config, todo: list[Config], sizes: Sizes) -> int:
    """Say what will run on what, and about how long. Returns the ranks of each run.

    `asked`: ranks, 0 for as many as fit the machine; `cfg`: any of the runs, for their device and threads.
    """
    import torch

    kind = machine.choose_device(cfg, machine.Place())
    cards, cores = torch.cuda.device_count() if kind == "cuda" else 0, machine.usable_cores()
    ranks = asked or cards or min(4, cores)
    machine.choose_device(cfg, machine.Place(world_size=ranks, local_world_size=ranks))
    threads = machine.threads_per_rank(cfg, ranks)
    if not todo:
        return ranks
    on = f"{cards} x {torch.cuda.get_device_name(0)}" if cards else f"CPU, {cores} cores"
    each = f"{counted(ranks, 'rank')} with {counted(threads, 'CPU thread')} each"
    seconds = sum(_estimate(cfg, kind, ranks, threads, sizes) for cfg in todo)
    took = f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {seconds:.0f} s"
    say(f"{counted(len(todo), 'run')} of {each}, on {on}; {took}")
    return ranks


def _estimate(cfg: Config, kind: str, ranks: int, threads: int, sizes: Sizes) -> float:
    """About how many seconds a run takes: from a few training steps of its model, on black images."""
    import torch
    from torch.nn.functional import cross_entropy

    from fashion_ddp import models

    image_shape, classes, count = sizes
    torch.set_num_threads(threads)
    model = models.build(cfg, image_shape, classes).to(kind)
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
