"""Train one run on this machine: its ranks are children of this process."""

import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from fashion_ddp.config import Config
from fashion_ddp.distributed import rendezvous, signals
from fashion_ddp.runs import claim
from launch.fork_server import Process, Start, start_process

PATIENCE = 30.0  # seconds that ranks get to end after they were asked to
LOOK = 0.05  # seconds between two looks at the ranks


class FailTogether:
    """Watch the processes of one run's ranks: where one fails, ask the others to end, and kill those that do not."""

    def __init__(self, processes: Sequence[Process]):
        self.processes = processes
        self.failed = 0  # exit code of the first process that failed; 0 while none has
        self.kill_at = math.inf

    def poll(self) -> list[int | None]:
        """Return each process's exit code, None while it works. Call it every LOOK seconds."""
        codes = [process.poll() for process in self.processes]
        failures = [code for code in codes if code]
        if failures and not self.failed:
            self.failed = failures[0]
            if self.kill_at == math.inf:
                self.ask_to_end(signal.SIGTERM)
        if time.monotonic() > self.kill_at:
            for process in self.processes:
                process.kill()
        return codes

    def ask_to_end(self, number: signal.Signals) -> None:
        """Send a signal to every process. From now on they have PATIENCE seconds to save and to end."""
        self.kill_at = time.monotonic() + PATIENCE
        for process in self.processes:
            process.send_signal(number)


@dataclass(frozen=True)
class LocalRun:
    """A run that is to be trained on this machine."""

    cfg: Config
    argv: tuple[str, ...]  # the flags of fashion_ddp.train that give this cfg
    reused: bool = False  # finished before, and taken as it is

    @property
    def folder(self) -> Path:
        return claim.folder_of(self.cfg)


class LocalRanks:
    """The ranks of one run, as children of this process. Signals that this process receives go to every rank."""

    def __init__(
        self,
        argv: tuple[str, ...],
        ranks: int,
        at_once: int = 1,
        more: Mapping[str, str] = MappingProxyType({}),
        output: BinaryIO | None = None,
        start: Start = start_process,
    ):
        """Start the ranks.

        `argv`: flags of fashion_ddp.train. `at_once`: how many runs share this machine, for the record. `more`:
        variables of their environment that this process has not, or has otherwise. `output`: where the ranks write;
        None is this process's terminal. `start`: starts each of them.
        """
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        env |= {"FASHION_DDP_LAUNCHER": str(os.getpid()), "FASHION_DDP_SIDE_BY_SIDE": str(at_once)}
        env |= more
        if ranks > 1:
            env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(rendezvous.free_port())}
        self.children: list[Process] = []
        self.together = FailTogether(self.children)
        self.forwarded: set[signal.Signals] = set()
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            # Each has a session of its own, so that Ctrl-C on the terminal reaches it through us and only once.
            with signals.blocked():
                child = start("fashion_ddp.train", argv, env | place, output)
                self.children.append(child)
                signals.children.append(child)

    def wait(self) -> int:
        """Wait until the ranks have ended, and return what `poll` then returns."""
        while (code := self.poll()) is None:
            time.sleep(LOOK)
        return code

    def poll(self) -> int | None:
        """Return None while a rank works; then the exit code of the first rank that failed, or 0.

        For a rank that signal n killed, the code is 128 + n. Call it every LOOK seconds.
        """
        if None not in self.together.poll():
            signals.children = [child for child in signals.children if child not in self.children]
            code = self.together.failed
            return code if code >= 0 else 128 - code
        for number in set(signals.received()) - self.forwarded:
            for child in self.children:
                child.send_signal(number)
            self.forwarded.add(number)
        return None
