"""Divide this machine among many runs: ranks, threads, cards; and say about how long the runs will take."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fashion_ddp.config import Config, cli
from fashion_ddp.console import say
from fashion_ddp.distributed import machine, signals
from fashion_ddp.errors import TrainingFailed, UserError, pluralize
from launch.fork_server import Start, start_process

CONTEXT = 7 * 10**8  # bytes of a card that a process takes for CUDA itself, on the safe side

DataShape = tuple[tuple[int, int, int], int, int]  # (C, H, W) of an image, classes, training images


@dataclass(frozen=True)
class MachineShare:
    """What each of the runs that train at once gets of this machine."""

    ranks: int
    threads: tuple[int, ...]  # CPU threads of each rank, by run
    cards: tuple[str | None, ...]  # of each run: its CUDA_VISIBLE_DEVICES; None leaves it as it is in this process
    runs_per_card: int = 1
    variables: dict[str, str] = field(default_factory=dict)  # of every run's environment, beside those of this process

    def environment(self, place: int) -> dict[str, str]:
        """Return a run's own variables: which cards it trains on, how many runs share each, and `variables`."""
        cards, runs = self.cards[place], self.runs_per_card
        variables = self.variables | ({} if cards is None else {"CUDA_VISIBLE_DEVICES": cards})
        return variables | ({"FASHION_DDP_RUNS_PER_CARD": str(runs)} if runs > 1 else {})


def divide_in_subprocess(
    jobs: int,
    ranks: int,
    any_run: Sequence[str],
    todo: Sequence[Sequence[str]],
    shape: DataShape,
    start: Start = start_process,
) -> MachineShare:
    """Call `divide` in a process of its own: torch in this one would hold a card's memory while the runs need it.

    `any_run`, `todo`: the runs' flags of fashion_ddp.train. `start`: starts the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "asked.json"
        file.write_text(json.dumps([jobs, ranks, any_run, todo, shape]))
        child = start("launch.share", [str(file)], os.environ)  # Ctrl-C is for this process, which remembers it
        signals.children = [child]
        code = child.wait()
        if not file.with_name("answer.json").exists():
            raise TrainingFailed(f"looking at this machine ended with exit code {code}")
        answer = json.loads(file.with_name("answer.json").read_text())
    if "refused" in answer:
        raise UserError(answer["refused"])
    return MachineShare(**answer | {name: tuple(answer[name]) for name in ("threads", "cards")})


def main(file: Path) -> None:
    """Write the answer to what `divide_in_subprocess` asked beside its file."""
    jobs, ranks, any_run, todo, shape = json.loads(file.read_text())
    try:
        configs = [cli.parse(flags).run for flags in [any_run, *todo]]
        answer = asdict(divide(jobs, ranks, configs[0], configs[1:], shape))
    except UserError as error:
        answer = {"refused": str(error)}
    file.with_name("answer.json").write_text(json.dumps(answer))


def divide(jobs: int, ranks: int, cfg: Config, todo: list[Config], shape: DataShape) -> MachineShare:
    """Decide what each run gets of this machine. Print that, and about how long the runs in `todo` will take.

    `jobs`: runs at once. `ranks`: of each run; 0 takes the fastest: one per card, and one on a CPU or where several
    runs share the machine. `cfg`: any of the runs, for their device and threads. Raises UserError where the machine
    does not have what is asked for.
    """
    import torch

    kind = machine.choose_device(cfg, machine.RankPlacement())
    cards, cores = torch.cuda.device_count() if kind == "cuda" else 0, machine.usable_cores()
    ranks = ranks or (cards if cards and jobs == 1 else 1)
    machine.choose_device(cfg, machine.RankPlacement(world_size=ranks, local_world_size=ranks))
    cards_of_runs: list[str | None] = [None] * jobs
    per_card = 1
    if cards and jobs > 1:
        cards_of_runs = [*assign_cards(visible_cards(cards), jobs, ranks)]
        per_card = max(cards_of_runs.count(one) for one in cards_of_runs)
    # Divide by `jobs`, however many runs there are or are left: a run's bits depend on its threads, and a run that
    # continues alone must end in the bits that it would have had among the others. More ranks than cores are not
    # refused: with one thread each they take turns. Of 3 runs on 2 cores no core is idle, where 2 runs and then 1 would
    # leave one so.
    most = machine.threads_per_rank(cfg, ranks * jobs)
    tried = [_try_steps(cfg, kind, ranks, most, per_card, shape) for cfg in todo]
    share = MachineShare(ranks, tuple(threads for threads, _ in tried), tuple(cards_of_runs), per_card)
    if not todo:
        return share
    on = f"{cards} x {torch.cuda.get_device_name(0)}" if cards else f"CPU, {cores} cores"
    low, high = min(share.threads), max(share.threads)
    each = f"{pluralize(ranks, 'rank')} with {f'{low} to ' if low < high else ''}{pluralize(high, 'CPU thread')} each"
    seconds = [one for _, one in tried]
    at_once = jobs if cards else min(jobs, max(1, cores // (ranks * most)))
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
    """Return the CUDA_VISIBLE_DEVICES of each of `jobs` runs: one card per rank, in the order given, and from the first
    again when there is none left. `ranks` is at most the number of cards."""
    places = [",".join(cards[at : at + ranks]) for at in range(0, len(cards) - ranks + 1, ranks)]
    return [places[job % len(places)] for job in range(jobs)]


def _try_steps(cfg: Config, kind: str, ranks: int, most: int, per_card: int, shape: DataShape) -> tuple[int, float]:
    """Return the CPU threads of each rank of a run, and its duration in seconds as a few training steps of its model on
    black images tell.

    `kind`: cpu or cuda. `most`: threads that there are for a rank. `per_card`: runs that share a card. Raises UserError
    where the run has no room on a card that it shares.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from fashion_ddp.models import architectures, describe

    image_shape, classes, count = shape
    if kind == "cuda":  # what the run before took is none of this one's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = architectures.build(cfg, image_shape, classes)
    rows = -(-cfg.batch_size // (cfg.reduction_shards or ranks))
    rows = min(cfg.micro_batch or rows, rows)
    threads = most
    if kind == "cpu":
        threads = machine.threads_for_step(cfg, most, describe.flops_per_image(model, image_shape), rows)
    torch.set_num_threads(threads)
    model.to(kind)
    images = torch.zeros(rows, *image_shape, dtype=next(model.parameters()).dtype, device=kind)
    labels = torch.zeros(rows, dtype=torch.long, device=kind)
    durations = []
    for _ in range(4):
        start = time.perf_counter()
        cross_entropy(model(images), labels).backward()
        labels.sum().item()  # waits for a card
        durations.append(time.perf_counter() - start)
    if per_card > 1:
        free, total = torch.cuda.mem_get_info()
        room = free + torch.cuda.memory_reserved()
        weights = sum(parameter.nbytes for parameter in model.parameters())
        # The optimizer keeps up to two numbers for each weight; a graph has what a step takes a second time.
        needed = CONTEXT + 2 * torch.cuda.max_memory_reserved() + 2 * weights
        if needed * per_card > room:
            fit = max(1, room // needed)
            raise UserError(
                f"a run of {cfg.model} takes about {needed / 1e9:.1f} GB of a card, where {per_card} are to "
                f"share {room / 1e9:.1f} GB that are free of {total / 1e9:.1f} GB: {pluralize(fit, 'run')} per card "
                "fit, so give a smaller --jobs (JOBS=)"
            )
    steps = cfg.epochs * count / cfg.batch_size
    start_up, rest_of_a_step = 2.0, 0.001  # seconds: all but training, in a forked process; update and bookkeeping
    passes = -(-cfg.batch_size // (ranks * rows))
    return threads, start_up + steps * (1.15 * passes * min(durations) + rest_of_a_step)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
