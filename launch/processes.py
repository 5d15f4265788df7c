"""One run of many on this machine: what is to be made, and its ranks while they work."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fashion_ddp.config import Config
from fashion_ddp.distributed import rendezvous, signals
from fashion_ddp.runs import claim

STOPPED = os.EX_TEMPFAIL  # exit code of what was told to stop, and continues with the same command
PATIENCE = 30.0  # seconds that ranks get to end, once one has
LOOK = 0.05  # seconds between two looks at the ranks


@dataclass(frozen=True)
class Job:
    """One run to be made: its settings, and the command line that gives them."""

    cfg: Config
    argv: tuple[str, ...]
    reused: bool = False

    @property
    def folder(self) -> Path:
        return claim.folder_of(self.cfg)


class Running:
    """The ranks of one run, as children of this process.

    A rank that ends in any other way than finished ends the others. What this process hears is handed on to every rank.
    """

    def __init__(
        self,
        argv: tuple[str, ...],
        ranks: int,
        at_once: int = 1,
        cards: str | None = None,
        output: BinaryIO | None = None,
    ):
        """`at_once`: runs that share this machine, for the record. `cards`: CUDA_VISIBLE_DEVICES; None leaves it as it
        is. `output`: where the ranks write; None is this process's terminal."""
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        env |= {"FASHION_DDP_LAUNCHER": str(os.getpid()), "FASHION_DDP_SIDE_BY_SIDE": str(at_once)}
        if cards is not None:
            env["CUDA_VISIBLE_DEVICES"] = cards
        if ranks > 1:
            env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(rendezvous.free_port())}
        self.children: list[subprocess.Popen[bytes]] = []
        self.first, self.patience = 0, math.inf
        self.handed_on: set[signal.Signals] = set()
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            command = [sys.executable, "-m", "fashion_ddp.train", *argv]
            # In sessions of their own, so that Ctrl-C on the terminal reaches them through us and only once.
            with signals.blocked():
                child = subprocess.Popen(command, env=env | place, stdout=output, stderr=output, start_new_session=True)
                self.children.append(child)
                signals.children.append(child)

    def wait(self) -> int:
        """Until the ranks have ended: what `poll` then says."""
        while (code := self.poll()) is None:
            time.sleep(LOOK)
        return code

    def poll(self) -> int | None:
        """To be called every LOOK seconds. None while a rank works; then the exit code of the first rank that failed,
        else 0; 128 + the number of the signal that killed it."""
        working = None in [child.poll() for child in self.children]  # each is asked, or one that failed went unseen
        codes = [child.returncode for child in self.children if child.returncode]
        if not self.first and codes:
            self.first, self.patience = codes[0], time.monotonic() + PATIENCE
            for child in self.children:
                child.terminate()  # asked first: they save, unless the lost rank already ended them
        if not working:
            signals.children = [child for child in signals.children if child not in self.children]
            return self.first if self.first >= 0 else 128 - self.first
        for number in set(signals.received()) - self.handed_on:
            for child in self.children:
                child.send_signal(number)
            self.handed_on.add(number)
        if time.monotonic() > self.patience:
            for child in self.children:
                child.kill()
        return None
