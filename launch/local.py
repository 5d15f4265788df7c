"""Train many runs on this machine, one after another on all that it has, and compare them. What `make compare` does.

    python -m launch.local --models linear relu mlp cnn --recipe blog --seeds 42
    python -m launch.local --models cnn --seeds 0 1 2 --epochs 10       further flags are those of fashion_ddp.train

A finished run of the same settings, code and versions is taken as it is. Exit code 0: all finished; 1: some failed,
and the report says which; 2: nothing was started, because something must be mended first.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from fashion_ddp import cli, compare, data, machine, provenance, rundir
from fashion_ddp.config import Config, UserError, counted, fail, nearest

Sizes = tuple[tuple[int, int, int], int, int]  # of the data: (C, H, W), classes, training images


@dataclass(frozen=True)
class Comparison:
    """Which runs to make and compare. Any further flag is one of fashion_ddp.train, for all of them."""

    models: tuple[str, ...] = ("linear", "relu", "mlp", "cnn")
    """Architectures to train."""
    recipe: str = "blog"
    """Set of training settings: blog, lab, or the path of a YAML file."""
    seeds: tuple[int, ...] = (42,)
    """Each architecture is trained once per seed."""
    ranks: int = 0
    """Ranks of each run; 0 takes one per card, or on a CPU one per core up to four."""
    out: Path = Path("report")
    """Folder of the report."""


@dataclass(frozen=True)
class Job:
    """One run to be made: its settings, and the command line that gives them."""

    cfg: Config
    argv: tuple[str, ...]
    reused: bool = False


def main(argv: list[str] | None = None) -> int:
    try:
        comparison, flags = tyro.cli(Comparison, prog="python -m launch.local", args=argv, return_unknown_args=True)
        _check(comparison, flags)
        flags += _synthetic_if_there_is_no_data(_job(comparison, comparison.models[0], comparison.seeds[0], flags).cfg)
        jobs = [_job(comparison, model, seed, flags) for model in comparison.models for seed in comparison.seeds]
        first = jobs[0].cfg
        dataset = data.load(first.dataset, first.data_dir)
        jobs = [_reuse_or_retrain(job, provenance.made_by(dataset.md5)) for job in jobs]
        # In a process of its own: torch in this one would hold memory of a card while the runs need it.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            sizes = dataset.image_shape, len(dataset.classes), len(dataset.train_labels)
            ranks = pool.submit(_announce, comparison, jobs, sizes).result()
        if "--check-only" in flags:
            return 0
    except UserError as error:
        fail(error, 2)
    failed = 0
    todo = [job for job in jobs if not job.reused]
    for number, job in enumerate(todo, start=1):
        print(f"\n--- run {number} of {len(todo)}", flush=True)
        code = run(job.argv, ranks)
        if code in (2, 128 + signal.SIGINT, 128 + signal.SIGTERM):
            return code
        failed += code != 0
    print()
    folders = [str(folder) for job in jobs if (folder := rundir.folder_of(job.cfg)).exists()]
    compare.main([*folders, "--out", str(comparison.out)])
    return int(failed > 0)


def _check(comparison: Comparison, flags: list[str]) -> None:
    """What tyro leaves to us: ranges, and flags that neither we nor fashion_ddp.train know."""
    if comparison.ranks < 0:
        raise UserError(f"ranks must be at least 0, got {comparison.ranks}")
    if not comparison.models or not comparison.seeds:
        raise UserError("models and seeds need at least one value each")
    known = [field.name for kind in (Comparison, cli.Command, Config) for field in dataclasses.fields(kind)]
    for flag in (word.partition("=")[0] for word in flags if word.startswith("--")):
        name = flag.removeprefix("--").replace("-", "_")
        if name.removeprefix("no_") not in known:
            raise UserError(f"unknown flag {flag}; {nearest(name, known)}")


def _job(comparison: Comparison, model: str, seed: int, flags: list[str]) -> Job:
    argv = ["--model", model, "--recipe", comparison.recipe, "--seed", str(seed), *flags]
    return Job(cli.parse(argv).run, tuple(argv))


def _synthetic_if_there_is_no_data(cfg: Config) -> list[str]:
    """Flags to add: none, or synthetic data where neither files nor a network are there and none were named."""
    named = cfg.data_dir or os.environ.get("FASHION_DDP_DATA_DIR")
    if cfg.dataset == "synthetic" or named or data.locate(cfg.dataset, None):
        return []
    try:
        data.fetch(cfg.dataset)
        return []
    except UserError as error:
        line = "*" * 100
        print(f"{line}\nSYNTHETIC DATA: the real data could not be found or fetched, so this shows that the machine")
        print(f"works, and nothing about the models. {error}\n{line}", flush=True)
        return ["--dataset", "synthetic"]


def _reuse_or_retrain(job: Job, made_by: dict) -> Job:
    """Whether the job's run is there already; where other code finished it, it is kept aside and made again."""
    if "--fresh" in job.argv:
        return job
    try:
        reuse = "--reuse" in job.argv
        return Job(job.cfg, job.argv, reused=rundir.check(job.cfg, made_by, reuse=reuse) == "finished")
    except rundir.Outdated:
        return Job(job.cfg, (*job.argv, "--fresh"))


def _announce(comparison: Comparison, jobs: list[Job], sizes: Sizes) -> int:
    """Say what will run on what, and about how long. Returns the ranks of each run."""
    import torch

    cfg = jobs[0].cfg
    kind = machine.choose_device(cfg, machine.Place())
    cards, cores = torch.cuda.device_count() if kind == "cuda" else 0, machine.usable_cores()
    ranks = comparison.ranks or cards or min(4, cores)
    machine.choose_device(cfg, machine.Place(world_size=ranks, local_world_size=ranks))
    threads = machine.threads_per_rank(cfg, ranks)
    for folder in (rundir.folder_of(job.cfg) for job in jobs if job.reused):
        print(f"{folder}: finished before, with the same settings, code and versions: taken as it is")
    todo = [job.cfg for job in jobs if not job.reused]
    if not todo:
        return ranks
    on = f"{cards} x {torch.cuda.get_device_name(0)}" if cards else f"CPU, {cores} cores"
    each = f"{counted(ranks, 'rank')} with {counted(threads, 'CPU thread')} each"
    print(f"{counted(len(todo), 'run')} of {each}, on {on}; ", end="")
    seconds = sum(_estimate(cfg, kind, ranks, threads, sizes) for cfg in todo)
    print(f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {seconds:.0f} s", flush=True)
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


def run(argv: tuple[str, ...], ranks: int) -> int:
    """Train one run on so many ranks of this machine. Returns the exit code of the first rank that failed, else 0.

    A rank that fails ends the others. SIGINT and SIGTERM are handed on to every rank, once.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    if ranks > 1:
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    children = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        command = [sys.executable, "-m", "fashion_ddp.train", *argv]
        # In sessions of their own, so that Ctrl-C on the terminal reaches them through us and only once.
        children.append(subprocess.Popen(command, env=env | place, start_new_session=True))
    with _handing_on(children) as received:
        failed = 0
        while any(child.poll() is None for child in children):
            codes = [child.returncode for child in children if child.returncode]
            if codes and not failed:
                failed = codes[0]
                _end(children)
            time.sleep(0.05)
    failed = failed or next((child.returncode for child in children if child.returncode), 0)
    return 128 + received[0] if received else abs(failed)


@contextlib.contextmanager
def _handing_on(children: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Hand SIGINT and SIGTERM on to the children; yields the signals as they come."""
    received: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(children: list[subprocess.Popen], patience: float = 10.0) -> None:
    """End what still runs: asked first, then killed."""
    for child in children:
        child.terminate()
    deadline = time.monotonic() + patience
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
