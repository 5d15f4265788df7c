"""Count a submitted run's starts, and know of each where it began, how it ended, and where its time went.

A start that the cluster ended (preempted, its node lost) is no failure of the run, however often it happens. One whose
time ran out, or whose ranks were killed, before it had trained a step is: the next would do the same.
"""

import contextlib
import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fashion_ddp.console import say
from fashion_ddp.distributed import machine, signals
from fashion_ddp.errors import UserError, pluralize
from fashion_ddp.files import write_whole
from launch import slurm

FILE = "starts.jsonl"  # in a run's folder
MOST_IDLE = 4  # starts in a row whose time ran out before they had trained a step, before the run is given up
MOST_KILLED = 2  # the same, of starts whose ranks were killed
KILLED = "killed"  # how such a start ended
TIME_RAN_OUT = ("SIGUSR1", "SIGUSR2")  # sbatch's --signal asks for one of them ahead of the end
FINISHED, FAILED = "finished", "failed"  # how a start ended that nobody stopped
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S"  # of a start's time, by its machine's clock


@dataclass(frozen=True)
class Starts:
    """The starts of the run in a folder. Rank 0 writes them."""

    folder: Path

    def read(self) -> list[dict[str, Any]]:
        """Return what is known of each start, from the first on; nothing of one whose line is damaged."""
        return _objects(self.folder / FILE)

    def begin(self, most: int, killed: bool = False) -> None:
        """Record at which step this start begins; and of the one before if its ranks were `killed`.

        Raises UserError after `most` starts of this job, or where its time ran out, or its ranks were killed, again and
        again before it had trained a step.
        """
        starts, step, job = self.read(), self._saved_step(), _own_job()
        if killed and starts:
            starts[-1] |= {"end": KILLED}
        mine = [start for start in starts if start.get("job") == job]
        if len(mine) > most:
            self._give_up(starts, f"started {len(mine)} times by job {job}: given up (--max-restarts {most})")
        last = mine[-MOST_KILLED:]
        if len(last) == MOST_KILLED and all(one["step"] == step and one.get("end") == KILLED for one in last):
            self._give_up(
                starts,
                f"ranks of the last {MOST_KILLED} starts of job {job} were killed before they had trained a step: "
                "given up; where the log names the memory, submit it anew with a larger --mem-per-rank",
            )
        last = mine[-MOST_IDLE:]
        if len(last) == MOST_IDLE and all(one["step"] == step and one.get("end") in TIME_RAN_OUT for one in last):
            self._give_up(
                starts,
                f"the time of the last {MOST_IDLE} starts of job {job} ran out before they had trained a step: "
                "given up; submit it anew with a longer --time",
            )
        if too_slow := advice(starts):
            say(f"warning: {self.folder}: {too_slow}")
        if starts:
            starts[-1] |= self.seconds(starts[-1])
        repeats = max(0, self._recorded_step() - step)  # steps that this start trains again
        now = time.strftime(TIME_FORMAT)
        nodes = os.environ.get("SLURM_JOB_NODELIST") or machine.host_name()
        self._write([*starts, {"job": job, "step": step, "repeats": repeats, "time": now, "nodes": nodes}])

    def _give_up(self, starts: list[dict[str, Any]], why: str) -> NoReturn:
        self._write([*starts[:-1], starts[-1] | {"given_up": why}])
        raise UserError(f"{self.folder}: {why}")

    def end(self, how: str) -> None:
        """Record how this start ended, and the seconds that it spent on starting and on training. `how`: a signal's
        name, another reason to stop, FINISHED or FAILED."""
        starts, now = self.read(), time.time()
        if starts:
            began = signals.training_since()
            spent = {
                "starting_s": round((began or now) - BORN, 1),
                "trained_s": round(now - began if began else 0.0, 1),
            }
            with contextlib.suppress(OSError):  # a full disk must not keep the job from being queued again
                self._write([*starts[:-1], starts[-1] | {"end": how} | spent])

    def seconds(self, last: dict[str, Any]) -> dict[str, float]:
        """Return the seconds that the run's last start spent on starting and on training; {} where nothing tells them.

        Of one that was killed before it could record them: until the run's folder says that training was about to
        begin, and from then to its last record of a step.
        """
        if "trained_s" in last:
            return {name: last[name] for name in ("starting_s", "trained_s")}
        try:
            began = time.mktime(time.strptime(last["time"], TIME_FORMAT))
            ready, recorded = ((self.folder / name).stat().st_mtime for name in ("environment.json", "steps.jsonl"))
        except (KeyError, ValueError, OSError):
            return {}
        if ready < began:  # of the start before: this one was killed while it started
            return {}
        return {"starting_s": round(ready - began, 1), "trained_s": round(max(0.0, recorded - ready), 1)}

    def _recorded_step(self) -> int:
        """Return the last step that the run recorded. A killed process may have left half a line."""
        return max((point.get("step", 0) for point in _objects(self.folder / "steps.jsonl")[-2:]), default=0)

    def _saved_step(self) -> int:
        found = self.folder.glob("checkpoints/step-*.pt")
        return max((int(path.stem.removeprefix("step-")) for path in found), default=0)

    def _write(self, starts: list[dict[str, Any]]) -> None:
        write_whole(self.folder / FILE, "".join(json.dumps(start) + "\n" for start in starts))


def _objects(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines, {} for a damaged line; none for a missing file."""
    return [_object(line) for line in path.read_text(errors="replace").splitlines()] if path.exists() else []


def _object(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        return {}


BORN = time.time()  # of this process, nearly


def _own_job() -> str:
    return slurm.own_job_id() or os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")


def advice(starts: list[dict[str, Any]]) -> str:
    """Return what to say where a run's last starts spent more time on starting than on training; "" where they did not.
    `starts`: as `Starts.read` returns them."""
    ended = [start for start in starts if start.get("end") in TIME_RAN_OUT][-3:]
    starting, training = (sum(start[name] for start in ended) for name in ("starting_s", "trained_s"))
    if not ended or starting <= training:
        return ""
    those = f"the last {pluralize(len(ended), 'start')} whose time ran out"
    return f"{those} spent {starting:.0f} s starting and {training:.0f} s training: submit it anew with a longer --time"


def count_ends(starts: list[dict[str, Any]], over: bool) -> tuple[int, int]:
    """Return how many starts were ended from outside, and how many failed: by an error of the run's own, or because
    ranks of it were killed.

    `over`: the last start is over and did not finish the run. One that could not record its end was lost from outside
    where SLURM started the same job again, as it does when a node fails.
    """
    interrupted = failed = 0
    for start, following in itertools.zip_longest(starts, starts[1:]):
        how = start.get("end")
        if how is None and following is not None:
            how = "lost" if following.get("job") == start.get("job") else FAILED
        elif how is None and over:
            how = FAILED
        failed += how in (FAILED, KILLED)
        interrupted += how not in (FAILED, KILLED, FINISHED, None)
    return interrupted, failed
