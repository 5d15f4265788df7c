"""What Submitit's local executor starts for a job: it starts the ranks, and sees them through.

Submitit's own leaves the others waiting where one rank fails, kills what is not ready a second after its time is over,
and lives on without whoever started it. Here the first failure ends the others, asked first; a job that reaches its
time begins again, as SLURM would have it, under the same number; and the ranks are told when the starter is gone.
"""

import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from submitit.local import local

from fashion_ddp.distributed import signals

STOPPED = os.EX_TEMPFAIL  # exit code of a first rank that was told to stop, and saved
PATIENCE = 30.0  # seconds that ranks get to end, once one has failed or their time is over


class Controller(local.Controller):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.parent = os.getppid()
        self.stopped = self.timed_out = False
        for one in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, self._stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)  # what came until now comes now

    def start_tasks(self) -> None:
        with signals.blocked():  # until the ranks listen
            super().start_tasks()

    def _stop(self, number: int, frame: object = None) -> None:
        self.stopped = True
        self._forward_signal(signal.SIGTERM)

    def run(self, max_retry: int = 0) -> None:
        """Until the job is at its end, however often it starts: a rank counts that, and gives up."""
        for start in itertools.count():
            os.environ["SLURM_RESTART_COUNT"] = str(start)  # SLURM's own is hidden from this process
            self.timed_out = False
            try:
                self.start_tasks()
                first = self.wait()[0]
            finally:
                self.kill_tasks()
            to_go_on = first == local.LOCAL_REQUEUE_RETURN_CODE or (self.timed_out and first == STOPPED)
            if self.stopped or not to_go_on:
                sys.exit(first)

    def wait(self, freq: int = 20) -> Sequence[int | None]:
        end, patience = time.monotonic() + self.timeout_s, math.inf
        while None in (codes := [task.poll() for task in self.tasks]):
            now = time.monotonic()
            if os.getppid() != self.parent and not self.stopped:
                self._stop(signal.SIGTERM)
            if now >= end and not self.timed_out:
                self.timed_out, patience = True, now + PATIENCE
                self._forward_signal(signal.SIGUSR2)
            if patience == math.inf and any(codes):
                patience = now + PATIENCE
                self._forward_signal(signal.SIGTERM)
            if now >= patience:
                self._forward_signal(signal.SIGKILL)
            time.sleep(1 / freq)
        return codes


if __name__ == "__main__":
    Controller(Path(sys.argv[1])).run()
