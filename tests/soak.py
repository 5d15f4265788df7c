"""Runs struck by faults that are drawn by seed: each must end as if nothing had struck it.

    python tests/soak.py --faults 100 --seed 1      runs, until so many faults have struck
    python tests/soak.py --run 1234567              one run of these again, by the seed that is printed with it

A run of a small cnn is started again and again, and almost every start is struck: at a named point, or after a random
time. At least every third is let come to a save. Between starts its files are damaged now and then. When it has
finished, its weights must equal those of an uninterrupted run bit for bit, and its records must be whole. All is drawn
from the seed, but for what depends on the clock. Exit code 1 where any run went another way.
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faults import TINY_STEPS, Fault, Ranks, start_tiny, wrong

from fashion_ddp.distributed import machine
from fashion_ddp.runs import provenance
from fashion_ddp.runs.reading import load_run

STEPS = 3 * TINY_STEPS
STRUCK = 12  # faults that a run takes before it is left in peace

ADAM, AUGMENTED = ["--lr", "0.01", "--optimizer"], ["--shift", "2", "--flip", "0.5", "--erase", "0.5"]
SGD = [["--optimizer", "sgd", "--lr", "0.1"], ["--optimizer", "momentum", "--lr", "0.02"]]
SETTINGS: list[list[list[str]]] = [[[*ADAM, "adam"], [*ADAM, "adamw"], *SGD], [[], AUGMENTED], [[], ["--batch-norm"]]]
# Points with the count that is drawn for them on average; those that only rank 0 comes to, apart.
ANYWHERE = {"parse": 1, "rendezvous": 1, "load": 1, "claim": 1, "evaluation": 1, "evaluated": 1}
ANYWHERE |= {"step": 5, "forward": 7, "all-reduce": 12, "sync point": 5, "after the sync point": 5}
ON_RANK_0 = {"save": 4, "saved": 4, "append": 5, "results": 1, "end": 1}
ON_RANK_0 |= {"fsync": 20, "before a rename": 10, "after a rename": 10}
ACTIONS = {"kill": 8, "TERM": 3, "INT": 1, "USR1": 1, "USR2": 1, "raise": 3}  # with their weights
SIGNALS = {"kill": signal.SIGKILL, "TERM": signal.SIGTERM}


@dataclass(frozen=True)
class AtTime:
    """A signal from outside, so many seconds after the start, or after a new checkpoint has appeared."""

    action: str
    rank: int | None  # None: all of them
    seconds: float
    after_save: bool

    def __str__(self) -> str:
        whom = "all ranks" if self.rank is None else f"rank {self.rank}"
        return f"{self.action} of {whom} {self.seconds:.2f} s after {'a save' if self.after_save else 'the start'}"

    def kind(self) -> str:
        return f"{self.action} by the clock"


@dataclass
class Soaked:
    """What became of one run."""

    seed: int
    settings: list[str]
    starts: int = 0
    struck: Counter[str] = field(default_factory=Counter)  # by kind and point
    steps: int = 0  # that rank 0 took
    seconds: float = 0.0  # of all starts
    step_seconds: float = 0.0  # the run's median
    history: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def useful(self) -> float:
        """The share of the time that went into steps which count."""
        return STEPS * self.step_seconds / self.seconds


@dataclass
class Soak:
    """Runs in a folder of its own."""

    folder: Path

    def run(self, seed: int, faults: int = STRUCK) -> Soaked:
        """One run, from its first start to its end, struck by so many faults at most."""
        draw = random.Random(seed)
        size = draw.choice([1, 2, 2, 3])
        result = [word for choices in SETTINGS for word in draw.choice(choices)]
        every_step = draw.random() < 0.7
        words = [*result, "--checkpoint-every", draw.choice(["0", "0", "0.2"])]
        points = "at every step" if every_step else "by time"
        soaked = Soaked(seed, [f"{size} ranks", *words, f"sync points {points}"])
        folder = self.folder / str(seed)
        folder.mkdir()
        try:
            reference = self._uninterrupted(size, result)
            while not self._start(soaked, folder, size, words, every_step, faults):
                if soaked.starts > 3 * faults + 10:
                    raise AssertionError("it makes no progress")
            soaked.failures += wrong(folder, reference)
            soaked.steps = len(Ranks(folder, []).noted("steps"))
            soaked.step_seconds = load_run(folder / "run").summary["time/step_p50_ms"] / 1000
        except (AssertionError, pytest.fail.Exception) as error:
            soaked.failures.append(str(error))
        if soaked.failures:
            soaked.history += Ranks(folder, []).printed().splitlines()[-40:]
        return soaked

    def _uninterrupted(self, size: int, words: list[str]) -> Path:
        folder = self.folder / "-".join([str(size), *words])
        if not folder.exists():
            folder.mkdir()
            codes = start_tiny(size, folder, [*words, "--checkpoint-every", "1000"], every_step=False).wait()
            assert codes == [0] * size, f"uninterrupted: {codes}"
        return folder

    def _start(self, soaked: Soaked, folder: Path, size: int, words: list[str], every_step: bool, faults: int) -> bool:
        """Start the run once more, and strike it. Returns whether it is finished."""
        # A generator per start: how far a start came by the clock does not change what the next ones draw.
        draw = random.Random(f"{soaked.seed} {soaked.starts}")
        in_peace = soaked.struck.total() >= faults
        if not in_peace and draw.random() < 0.15 and (harm := damage(draw, folder / "run")):
            soaked.struck[harm] += 1
            soaked.history.append(harm)
        fault = None if in_peace else _draw(draw, size, save_first=soaked.starts % 3 == 2)
        soaked.starts += 1
        before = Ranks(folder, []).noted("struck")
        newest, began = _newest(folder / "run"), time.monotonic()
        run = start_tiny(size, folder, words, [fault] if isinstance(fault, Fault) else [], every_step)
        struck = isinstance(fault, AtTime) and _strike(run, fault, newest)
        codes = run.wait(timeout=180, patience=3)
        soaked.seconds += time.monotonic() - began
        struck = struck or run.noted("struck") != before
        soaked.history.append(f"{fault if struck else f'({fault})'}: {codes}")
        if struck and fault is not None:
            soaked.struck[fault.kind()] += 1
        action = fault.action if struck and fault is not None else None
        status = load_run(folder / "run").summary.get("status") if (folder / "run" / "config.yaml").exists() else None
        _check(soaked, codes, action, isinstance(fault, AtTime), status)
        return codes == [0] * size


def _check(soaked: Soaked, codes: list[int], action: str | None, by_clock: bool, status: str | None) -> None:
    """That a start ended as it should, `action` having struck it."""
    finished, how = all(code == 0 for code in codes), soaked.history[-1]
    orderly = finished or all(code == 75 for code in codes)
    assert 2 not in codes, f"refused to start: {how}"
    assert action is not None or finished, f"ended by itself: {how}"
    told = action in ("TERM", "INT", "USR1", "USR2") and not by_clock  # by the clock it may come before a rank listens
    assert orderly or not told, f"told to stop, and did not: {how}"
    fits = status == ("finished" if finished else "stopped") if orderly else status != "running"
    assert fits, f"status {status}: {how}"


def _draw(draw: random.Random, size: int, save_first: bool) -> Fault | AtTime:
    """What strikes a start; not before its first save, where that is to come first."""
    if draw.random() < 0.25:
        whom = draw.choice([None, *range(size)])
        action, seconds = draw.choice(["kill", "kill", "TERM"]), draw.uniform(0, 0.3 if save_first else 1.5)
        return AtTime(action, whom, seconds, save_first)
    [action] = draw.choices(list(ACTIONS), list(ACTIONS.values()))
    if save_first:
        return Fault("saved", action, 0, _count(draw, 3))
    rank = draw.randrange(size)
    points = ANYWHERE if rank else ANYWHERE | ON_RANK_0
    point = draw.choice(list(points))
    return Fault(point, action, rank, _count(draw, points[point]))


def _count(draw: random.Random, mean: int) -> int:
    return 1 if mean == 1 else 1 + int(draw.expovariate(1 / (mean - 1)))


def _strike(run: Ranks, fault: AtTime, newest: str) -> bool:
    """Send a signal at its time; False where the run ended before."""

    def going() -> bool:
        return any(process.is_alive() for process in run.processes)

    while fault.after_save and going() and _newest(run.folder / "run") == newest:
        time.sleep(0.005)
    limit = time.monotonic() + fault.seconds
    while going() and time.monotonic() < limit:
        time.sleep(0.005)
    if not going():
        return False
    run.send(SIGNALS[fault.action], fault.rank)
    return True


def _newest(run: Path) -> str:
    return max((path.name for path in (run / "checkpoints").glob("step-*.pt")), default="")


def damage(draw: random.Random, run: Path) -> str | None:
    """Damage a file of a run that stands; None where there is none, or it is complete."""
    if not (newest := _newest(run)) or load_run(run).summary.get("status") == "finished":
        return None
    path, kind = run / "checkpoints" / newest, draw.choice(["truncate", "flip", "empty", "half a line"])
    content = path.read_bytes()
    if kind == "half a line":
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"epoch": 1, "step')
        return "half a line in metrics.jsonl"
    if not content:  # damaged before, and not looked at since
        return None
    if kind == "flip":
        at = draw.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
    else:
        path.write_bytes(content[: draw.randrange(len(content)) if kind == "truncate" else 0])
    return f"{kind} the newest checkpoint"


# --- The command ---------------------------------------------------------------------------------------------------


def soak(faults: int, seed: int, folder: Path, say: Callable[[str], object] = print) -> list[Soaked]:
    """Runs by seed until so many faults have struck; `say` is told how each went."""
    draw, runs, soaking = random.Random(seed), [], Soak(folder)
    while sum(run.struck.total() for run in runs) < faults:
        runs.append(soaking.run(draw.randrange(2**31)))
        say(_line(runs[-1]))
    return runs


def _line(run: Soaked) -> str:
    text = f"run {run.seed} ({' '.join(run.settings)}): {run.struck.total()} faults, {run.starts} starts"
    if not run.failures:
        return f"{text}, {run.steps} steps for {STEPS}, {run.useful:.0%} of {run.seconds:.0f} s in steps that count"
    return "\n  ".join(
        [f"FAILED {text}; again: python tests/soak.py --run {run.seed}", *run.failures, "its starts:", *run.history]
    )


def totals(runs: list[Soaked]) -> dict[str, Any]:
    done = [run for run in runs if not run.failures]
    struck = sum((run.struck for run in runs), Counter())
    useful = [run.useful for run in done]
    return {
        "faults": struck.total(),
        "runs": len(runs),
        "starts": sum(run.starts for run in runs),
        "steps_committed": STEPS * len(done),
        "steps_repeated": sum(run.steps - STEPS for run in done),
        "step_time_over_wall_time_median": statistics.median(useful) if useful else None,
        "failures": sum(bool(run.failures) for run in runs),
        "struck": dict(sorted(struck.items())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="runs are made until so many have struck")
    parser.add_argument("--seed", type=int, default=0, help="what everything is drawn from")
    parser.add_argument("--run", type=int, metavar="SEED_OF_RUN", help="one run alone, by its own seed")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    told = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # which complains of ranks that were killed
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        os.environ["TMPDIR"] = folder  # torch leaves some there
        if told.run is None:
            runs = soak(told.faults, told.seed, Path(folder))
        else:
            runs = [Soak(Path(folder)).run(told.run)]
            print(_line(runs[0]), *runs[0].history, sep="\n  ")
    figures = totals(runs)
    print(json.dumps(figures, indent=1))
    if told.out:
        where = {"cpu": machine.cpu_name(), "cores": os.cpu_count(), "system": platform.platform()}
        made = {"versions": provenance.versions(), "git_commit": provenance.git_commit()}
        more = [{"struck": dict(run.struck), "step_time_over_wall_time": run.seconds and run.useful} for run in runs]
        every = [asdict(run) | part for run, part in zip(runs, more, strict=True)]
        record = {"command": sys.argv, **where, **made, **figures, "every_run": every}
        told.out.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
