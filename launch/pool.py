"""Several runs at once on this machine, each with its share of it: what `--jobs N` does.

The terminal has a line when a run begins and one when it ends. What the runs say themselves would be a muddle there:
each says it to a file of its own, beside its folder.
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
from fashion_ddp.runs.reading import read_run
from launch.processes import LOOK, Job, Running
from launch.share import Share

SHOWN = 10  # last lines of the log of a run that failed


@dataclass(frozen=True)
class Active:
    """A run that is being trained."""

    label: str
    folder: Path
    log: Path
    before: int  # bytes that the log had from earlier starts
    running: Running

    def end(self, code: int) -> None:
        """Say how it ended."""
        if code == 0:
            summary = read_run(self.folder).summary
            accuracy, seconds = percent(summary["test/accuracy"]), summary["time/total_s"]
            say(f"{self.label} finished: test accuracy {accuracy} %; {seconds:.1f} s from start to end")
        elif code == os.EX_TEMPFAIL:
            say(f"{self.label} stopped, and saved")
        else:
            say(f"{self.label} FAILED with exit code {code}; the end of {self.log}:\n{self._last_words()}")

    def _last_words(self) -> str:
        with open(self.log, "rb") as file:
            file.seek(self.before)
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in [line for line in lines if line.strip()][-SHOWN:])


def train(todo: list[Job], share: Share) -> int:
    """Train runs, as many at once as there are slots. Returns 0: all finished; 1: some failed, and the others went on;
    os.EX_TEMPFAIL."""
    waiting = deque(enumerate(todo, start=1))
    active: dict[int, Active] = {}  # by slot
    codes: dict[str, int] = {}  # by name
    at_once = min(len(share.cards), len(todo))
    while active or (waiting and not signals.received()):
        free = [slot for slot in range(len(share.cards)) if slot not in active]
        while free and waiting and not signals.received():
            number, job = waiting.popleft()
            label = f"[{number}/{len(todo)}] {job.folder.name}"
            slot = free.pop(0)
            try:
                active[slot] = _begin(job, label, share, slot, at_once)
            except OSError as error:
                say(f"{label} FAILED: it could not be begun: {error}")
                codes[job.folder.name] = 1
        time.sleep(LOOK)
        for slot, one in list(active.items()):
            if (code := one.running.poll()) is not None:
                del active[slot]
                one.end(code)
                codes[one.folder.name] = code
    if waiting or os.EX_TEMPFAIL in codes.values():
        why = "".join(f" ({one.name})" for one in signals.received()[:1])
        say(f"stopped{why}: the same command continues")
        return os.EX_TEMPFAIL
    if failed := [job.folder.name for job in todo if codes[job.folder.name]]:
        say(f"{len(failed)} of {len(todo)} runs failed: {', '.join(failed)}")
    return int(bool(failed))


def log_of(folder: Path) -> Path:
    """Where a run's words go: beside its folder, which it may yet find taken, or keep under another name."""
    return folder.with_name(f"{folder.name}.log")


def _begin(job: Job, label: str, share: Share, slot: int, at_once: int) -> Active:
    argv = (*job.argv, "--threads", str(share.threads))
    cards, log = share.cards[slot], log_of(job.folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:  # what earlier starts said stays
        before = file.tell()
        running = Running(argv, share.ranks, at_once, cards, output=file)
    where = f" on card {cards}" if cards else ""
    say(f"{label} begins{where}; follow: tail -F {shlex.quote(str(log))}")
    return Active(label, job.folder, log, before, running)
