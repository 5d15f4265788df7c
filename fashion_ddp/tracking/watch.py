"""Bring runs to W&B while they are being trained: from a machine that has a network and sees their folders.

Each run has a process of its own that brings it, so that a slow upload holds up no other run. Its end, however it
comes, loses nothing: the next one asks W&B's server what it has. Training knows nothing of it.
"""

import contextlib
import io
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fashion_ddp.console import say
from fashion_ddp.distributed import failures, signals
from fashion_ddp.errors import Stopped, TrainingFailed, UserError, pluralize
from fashion_ddp.runs import lock
from fashion_ddp.runs.reading import Run, find_runs, load_run, read_summary
from fashion_ddp.tracking.upload import NotPushed, push, why_left_out

LOOK_EVERY = 15.0  # seconds between two looks at the folders, and between two tries where W&B cannot be reached
ENDED_AT_ONCE = 4  # runs that are not being trained and are brought at the same time
STOP_TIMEOUT = 45.0  # seconds that the processes get to end by themselves
GIVEN_UP, TRY_AGAIN = 2, os.EX_TEMPFAIL  # exit codes of a process that brought no run


@dataclass(frozen=True)
class Found:
    """A run to bring, as it was found."""

    summary: dict[str, Any]
    trained: bool


@dataclass(frozen=True)
class Child:
    """A process that brings a run, and what it says: lines, and at the end the summary that it brought."""

    run: Found
    process: BaseProcess
    channel: Connection


class Watch:
    """The runs in some folders, brought to W&B until all are over."""

    def __init__(self, paths: Sequence[Path], settings: dict[str, Any]):
        """`settings` win over those of the runs."""
        self.paths, self.settings = paths, settings
        self.runs: list[Path] = []
        self.waiting: dict[Path, Found] = {}  # to be brought, in this order
        self.children: dict[Path, Child] = {}
        self.brought: dict[Path, dict[str, Any]] = {}  # the summary with which each was brought, or given up
        self.given_up: set[Path] = set()
        self.last_words: dict[Path, str] = {}  # how the last line on each began

    def run(self) -> int:
        """Watch until all runs are over. Returns their number.

        Raises UserError for a path where nothing is, NotPushed where runs were given up, Stopped for a signal.
        """
        for path in self.paths:
            if not path.exists():
                find_runs([path])  # says so
        signals.listen()
        resource_tracker.ensure_running()  # its start would unblock signals for the first child
        where = ", ".join(map(str, self.paths))
        say(f"watches {where} until all runs have ended: looks every {LOOK_EVERY:g} s, also whether W&B is there again")
        next_look = 0.0
        try:
            while True:
                if reason := signals.reason(signals.stop_requests()):
                    raise Stopped(None, reason)
                if time.monotonic() >= next_look:
                    self._look()
                    if self.runs and all(map(self._is_over, self.runs)):
                        break
                    next_look = time.monotonic() + LOOK_EVERY
                self._start_children()
                self._hear()
        finally:
            self._stop_children()
        if self.given_up:
            n = f"{len(self.given_up)} of {pluralize(len(self.runs), 'run')}"
            raise NotPushed(f"{n} could not be brought to W&B, as was said above; the same command goes on")
        return len(self.runs)

    def _look(self) -> None:
        """Find the runs, and those among them that are to be brought."""
        found: list[Path] = []
        for path in self.paths:
            with contextlib.suppress(UserError, OSError):  # there is none yet, or the file system is away for a while
                found += find_runs([path])
        self.runs = list(dict.fromkeys(found))
        if not self.runs:
            self._say(Path(), "there is no run folder yet: waits for one")
        self.waiting.clear()
        for path in self.runs:
            try:
                if path not in self.children and (run := self._find(path)):
                    self.waiting[path] = run
            except UserError as error:
                self._say(path, f"error: {error}")
                self.given_up.add(path)
            except OSError:  # see above
                pass

    def _find(self, path: Path) -> Found | None:
        """Return the run in a folder; None where it need not be brought, or cannot be yet."""
        summary = read_summary(path)
        if summary == self.brought.get(path):
            if not self._is_over(path):
                self._say(path, f"{path} is {summary['status']}: waits for it to go on")
            return None
        self.given_up.discard(path)
        if why := why_left_out(load_run(path), watching=True):
            self._say(path, f"{path} {why}: waits")
            return None
        return Found(summary, trained=lock.holder(path) is not None)

    def _is_over(self, path: Path) -> bool:
        over = path in self.given_up or is_over(self.brought.get(path, {}))
        return over and path not in self.children and path not in self.waiting

    def _say(self, path: Path, text: str) -> None:
        """Say something of a run, unless it is what was said last of this or another one: a network that is away is so
        for all, in every round."""
        beginning = ": ".join(text.split(": ")[:2])  # W&B's own reasons go on with the run, or the number of attempts
        if beginning not in self.last_words.values():
            say(text)
        self.last_words[path] = beginning

    # --- Processes --------------------------------------------------------------------------------------------------

    def _start_children(self) -> None:
        """Start a process for each run that waits; of runs that are not being trained for some at once."""
        room = ENDED_AT_ONCE - sum(not child.run.trained for child in self.children.values())
        for path, run in list(self.waiting.items()):
            room -= not run.trained
            if run.trained or room >= 0:
                del self.waiting[path]
                self._start_child(path, run)

    def _start_child(self, path: Path, run: Found) -> None:
        context = multiprocessing.get_context("spawn")  # W&B's package has state of its own, and threads
        ours, its = context.Pipe(duplex=False)
        process = context.Process(target=_bring, args=(path, self.settings, LOOK_EVERY, its))
        with signals.blocked():
            process.start()
        its.close()
        signals.children.append(process)
        self.children[path] = Child(run, process, ours)

    def _hear(self) -> None:
        """Say what processes say, within a second, and learn how those that ended did."""
        wait([one for child in self.children.values() for one in (child.process.sentinel, child.channel)], timeout=1.0)
        for path, child in list(self.children.items()):
            code = child.process.exitcode  # before its last words are read
            with contextlib.suppress(EOFError, OSError):
                while child.channel.poll():
                    said = child.channel.recv()
                    if isinstance(said, str):
                        self._say(path, said)
                    else:
                        self.brought[path] = said
            if code is not None:
                signals.children.remove(child.process)
                del self.children[path]
                if code in (1, GIVEN_UP):  # it has said why
                    self.given_up.add(path)
                    self.brought[path] = child.run.summary

    def _stop_children(self) -> None:
        for child in self.children.values():
            child.process.terminate()
        limit = time.monotonic() + STOP_TIMEOUT
        while self.children:
            self._hear()
            if time.monotonic() > limit:
                for child in self.children.values():
                    child.process.kill()


def is_over(summary: dict[str, Any]) -> bool:
    """Return whether a run goes on no more: a cluster starts one again that was stopped, or whose ranks were lost."""
    failed = summary.get("status") == "failed" and not failures.lost_ranks(summary.get("error", ""))
    return failed or summary.get("status") == "finished"


class _Lines(io.TextIOBase):
    """Standard output of a process that brings a run: a channel to the process that says it."""

    def __init__(self, channel: Connection):
        self.channel, self.turn = channel, threading.Lock()

    def write(self, text: str) -> int:
        if line := text.strip("\n"):
            self.send(line)
        return len(text)

    def send(self, what: Any) -> None:
        with self.turn:
            self.channel.send(what)


def _bring(path: Path, settings: dict[str, Any], look_every: float, channel: Connection) -> None:
    """Bring one run to W&B, in a process of its own."""
    os.environ["FASHION_DDP_LAUNCHER"] = str(os.getppid())  # this process ends with it, and is no terminal's own
    signals.listen()
    lines = _Lines(channel)
    with contextlib.redirect_stdout(lines):
        try:
            trainer = lock.holder(path)
            readings = _readings(path, trainer, look_every) if trainer else None
            lines.send(push(path, settings, readings))
        except UserError as error:
            say(f"error: {error}")
            sys.exit(GIVEN_UP)
        except (NotPushed, TrainingFailed, Stopped, OSError):  # another process has it, W&B or the files are away ...
            sys.exit(TRY_AGAIN)


def _readings(path: Path, trainer: str, look_every: float) -> Iterator[Run]:
    """Yield what is in a run folder, again and again while this process works in it, and once more when it has ended.

    Raises Stopped where this process is told to stop.
    """
    trained = True
    while trained:
        limit = time.monotonic() + look_every
        while time.monotonic() < limit:
            if reason := signals.reason(signals.stop_requests()):
                raise Stopped(None, reason)
            time.sleep(min(1.0, look_every))
        try:
            trained_now = lock.holder(path) == trainer  # before it is read: the last reading is of what has ended
            run = load_run(path)
        except OSError:  # the file system is away for a while
            continue
        yield run
        trained = trained_now
