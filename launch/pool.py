"""Train several runs at once on this machine, each with its share of it: what `--jobs N` does.

The terminal shows a line when a run begins and one when it ends. Each run writes what it prints itself to a log file
beside its folder, since the lines of several runs would be mixed up on the terminal.
"""

import os
import shlex
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from fashion_ddp.console import say
from fashion_ddp.distributed import signals
from fashion_ddp.report.text import percent
from fashion_ddp.runs.reading import load_run
from launch.fork_server import Start, start_process
from launch.processes import LOOK, LocalRanks, LocalRun
from launch.share import MachineShare

TAIL = 10  # last lines of the log of a run that failed, for the terminal


@dataclass(frozen=True)
class ActiveRun:
    """A run that is being trained."""

    label: str
    folder: Path
    log: Path
    log_start: int  # bytes that the log had from earlier starts
    ranks: LocalRanks

    def report_end(self, code: int) -> None:
        """Print how the run ended."""
        if code == 0:
            summary = load_run(self.folder).summary
            accuracy, seconds = percent(summary["test/accuracy"]), summary["time/total_s"]
            say(f"{self.label} finished: test accuracy {accuracy} %; {seconds:.1f} s from start to end")
        elif code == os.EX_TEMPFAIL:
            say(f"{self.label} stopped, and saved")
        else:
            say(f"{self.label} FAILED with exit code {code}; the end of {self.log}:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        with open(self.log, "rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in [line for line in lines if line.strip()][-TAIL:])


def train(todo: list[LocalRun], share: MachineShare, start: Start = start_process) -> int:
    """Train runs, as many at once as `share` has places for. `start` starts a rank.

    Returns 0 where all finished; 1 where some failed (the others are trained all the same); EX_TEMPFAIL where a signal
    stopped them.
    """
    waiting = deque(enumerate(todo, start=1))
    active: dict[int, ActiveRun] = {}  # by place in share.cards
    codes: dict[str, int] = {}  # exit codes by the name of the run's folder
    at_once = min(len(share.cards), len(todo))
    while active or (waiting and not signals.received()):
        free = [place for place in range(len(share.cards)) if place not in active]
        while free and waiting and not signals.received():
            number, run = waiting.popleft()
            label = f"[{number}/{len(todo)}] {run.folder.name}"
            place = free.pop(0)
            try:
                active[place] = _begin(run, label, share, share.threads[number - 1], place, at_once, start)
            except OSError as error:
                say(f"{label} FAILED: it could not be begun: {error}")
                codes[run.folder.name] = 1
        time.sleep(LOOK)
        for place, one in list(active.items()):
            if (code := one.ranks.poll()) is not None:
                del active[place]
                one.report_end(code)
                codes[one.folder.name] = code
    if waiting or os.EX_TEMPFAIL in codes.values():
        why = "".join(f" ({one.name})" for one in signals.received()[:1])
        say(f"stopped{why}: the same command continues")
        return os.EX_TEMPFAIL
    if failed := [run.folder.name for run in todo if codes[run.folder.name]]:
        say(f"{len(failed)} of {len(todo)} runs failed: {', '.join(failed)}")
    return int(bool(failed))


def log_path(folder: Path) -> Path:
    """Return where a run's log lies: beside its folder, since the run may refuse the folder or rename it."""
    return folder.with_name(f"{folder.name}.log")


def _begin(
    run: LocalRun, label: str, share: MachineShare, threads: int, place: int, at_once: int, start: Start
) -> ActiveRun:
    argv = (*run.argv, "--threads", str(threads))
    cards, log = share.cards[place], log_path(run.folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:  # keep what earlier starts wrote
        log_start = file.tell()
        ranks = LocalRanks(argv, share.ranks, at_once, share.environment(place), file, start)
    where = f" on card {cards}" if cards else ""
    say(f"{label} begins{where}; follow: tail -F {shlex.quote(str(log))}")
    return ActiveRun(label, run.folder, log, log_start, ranks)
