"""Run a thread beside training on each rank: it shows that the rank lives, notices a rank that hangs, and keeps a log.

Without it a rank that hangs would hold the others until a collective's time-out, whose message names nobody.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fashion_ddp.distributed import failures, machine, world
from fashion_ddp.distributed.world import World
from fashion_ddp.errors import Stopped, TrainingFailed, UserError
from fashion_ddp.redact import redact
from fashion_ddp.runs.folder import RunFolder

BEAT = 5.0  # seconds between two signs of life
GAVE_UP = ".told"  # in the folder of logs: some rank gave up and has printed the message


class Watchdog(threading.Thread):
    """A thread beside a rank's training, within `with`. Until it gives up it touches no file itself: a file system that
    hangs would stop it, too."""

    def __init__(self, world: World, folder: RunFolder, timeout: float):
        super().__init__(daemon=True)
        self.world, self.folder, self.timeout = world, folder, timeout
        self.beat = min(BEAT, timeout / 8)
        self.logs = folder.path / "logs"
        self.ended = threading.Event()
        self.lost = False  # it ended because another rank had
        self.signing = threading.Thread()

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):  # a machine that does not see the folder: its ranks speak to the terminal
            self.logs.mkdir(exist_ok=True)
            self._log().touch()
            if self.world.rank == 0:
                (self.logs / GAVE_UP).unlink(missing_ok=True)
        self._show_life()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lost = error is not None and world.is_lost_rank(error)
        self.ended.set()
        self.join()
        if self.signing.is_alive():  # it would leave a sign after the last
            self.signing.join(self.beat)
        if error is not None and not isinstance(error, UserError | Stopped):
            self._note("".join(traceback.format_exception(error)))
        with contextlib.suppress(OSError):
            if self.world.rank == 0 and self._folder_is_ours():
                self._sweep()
            elif self.world.rank > 0:
                self._write_sign(ended=error is None or isinstance(error, Stopped))
                if not self._sign(0).exists():  # nobody is left to ask, nor to sweep
                    self._sign(self.world.rank).unlink()
        if self.folder.lock is not None and self.world.rank == 0:
            self.folder.lock.release()

    def run(self) -> None:
        seen, waited = -1, 0.0
        while not self.ended.wait(self.beat):
            if not self.signing.is_alive():
                self.signing = threading.Thread(target=self._show_life, daemon=True)
                self.signing.start()
            now = world.collectives_entered()
            # Counted by beats and not by a clock: a machine that slept, or Ctrl-Z, is no rank that hangs. A rank that
            # took leave of the others may take its time.
            waited = 0.0 if now != seen or now < 0 else waited + self.beat
            seen = now
            if waited >= self.timeout:
                self._give_up(now)
                waited = 0.0

    # --- Signs of life ---------------------------------------------------------------------------------------------

    def _show_life(self) -> None:
        if self.folder.lock is not None and self.world.rank == 0:
            self.folder.lock.touch()
            if not self._folder_is_ours():  # what is there now belongs to another
                return
        with contextlib.suppress(OSError):
            self._write_sign()

    def _write_sign(self, ended: bool = False) -> None:
        sign = self._sign(self.world.rank)
        new = sign.with_name(f"{sign.name}.new")
        entered = -1 if ended else world.collectives_entered()
        new.write_text(json.dumps({"entered": entered, "host": machine.host_name()}))
        os.replace(new, sign)

    def _read_sign(self, rank: int) -> dict[str, Any]:
        """Read a rank's sign of life, with how much older it is than this rank's own. Empty where there is none."""
        try:
            sign = json.loads(self._sign(rank).read_text())
            return sign | {"age": self._sign(self.world.rank).stat().st_mtime - self._sign(rank).stat().st_mtime}
        except (OSError, ValueError):
            return {}

    def _sign(self, rank: int) -> Path:
        return self.logs / f".rank{rank}"

    def _sweep(self) -> None:
        """Remove the signs of life, rank 0's first (see __exit__)."""
        for path in [self._sign(0), *self.logs.glob(".*")]:
            path.unlink(missing_ok=True)

    def _folder_is_ours(self) -> bool:
        """Return whether the folder still belongs to this run."""
        try:
            if self.folder.lock is not None:
                self.folder.lock.check()
            return True
        except OSError:
            return True
        except TrainingFailed:
            return False

    # --- Giving up -------------------------------------------------------------------------------------------------

    def _give_up(self, entered: int) -> None:
        """Name the ranks that are behind, log the stack, and end this rank; unless it goes on after all."""
        last = threading.Timer(6 * self.beat, self._leave_without_files)
        last.daemon = True
        last.start()
        self._dump(f"nothing happened for {self.timeout:g} s; where this rank is:")
        time.sleep(2 * self.beat)  # by then every rank that lives has said where it is
        if world.collectives_entered() != entered or (self.ended.is_set() and not self.lost):
            last.cancel()
            self._note("it went on")
            return
        message = f"{failures.SILENCE} {self.timeout:g} s (--timeout): {self._describe_late_ranks()}"
        if self.world.graphs:
            message += "; its steps are one CUDA graph: --no-cuda-graph shows whether that is what hangs"
        self._note(message)
        if self._is_first_to_give_up():
            where = f"stacks are in {self.logs}; the same command continues from the last checkpoint"
            print(f"error: {message}; {where}", file=sys.stderr, flush=True)
        if self.world.rank == 0:
            with contextlib.suppress(TrainingFailed, OSError, ValueError):
                summary = json.loads((self.folder.path / "summary.json").read_text())
                self.folder.write_json("summary.json", summary | {"status": "failed", "error": message})
            if self.folder.lock is not None:
                self.folder.lock.release()
        # Rank 0 first: it would have a word of its own for ranks that are gone.
        time.sleep((1 if self.world.rank == 0 else 3) * self.beat)
        os._exit(1)

    def _describe_late_ranks(self) -> str:
        """Say in words which ranks the others wait for."""
        signs = [self._read_sign(rank) for rank in range(self.world.size)]
        if not signs[self.world.rank]:
            return f"it is not known where, as {self.logs} cannot be read"
        there = [rank for rank, sign in enumerate(signs) if sign.get("entered") != -1]
        alive = [rank for rank in there if signs[rank] and signs[rank]["age"] < 4 * self.beat]
        ahead = max((signs[rank]["entered"] for rank in alive), default=0)
        behind = [rank for rank in there if rank not in alive or signs[rank]["entered"] < ahead]
        if not behind and len(there) > 1:
            return "no rank is behind the others, so all wait within one operation"
        names = [f"rank {rank} on {signs[rank].get('host', 'an unknown machine')}" for rank in behind or there]
        silent = [" (which does not answer)" if rank not in alive else "" for rank in behind or there]
        return "all wait for " + ", ".join(map("".join, zip(names, silent, strict=True)))

    def _is_first_to_give_up(self) -> bool:
        """Return whether this rank is the first to give up: that one prints the message."""
        try:
            os.close(os.open(self.logs / GAVE_UP, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            return self.world.rank == 0
        return True

    def _leave_without_files(self) -> None:
        if self.world.rank == 0:
            text = f"nothing happened for {self.timeout:g} s (--timeout), and {self.logs} does not answer"
            print(f"error: {text}; the same command continues from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(1)

    # --- The log ---------------------------------------------------------------------------------------------------

    def _log(self) -> Path:
        """Return the path of the log. It is opened for each entry, so that its file system may go away in between."""
        return self.logs / f"rank{self.world.rank}.log"

    def _note(self, text: str) -> None:
        with contextlib.suppress(OSError), open(self._log(), "a") as file:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.world.rank}: {redact(text)}", file=file)

    def _dump(self, text: str) -> None:
        """Write a text and the stack of every thread to the log."""
        self._note(text)
        try:
            with open(self._log(), "a") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            faulthandler.dump_traceback(sys.stderr)
