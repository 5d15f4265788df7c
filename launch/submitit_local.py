"""Run a submission on this machine through Submitit's local or debug executor, one run after another.

Submitit's local executor has no queue, and at Ctrl-C it kills what it started within a second. Here the runs wait for
each other, and Ctrl-C lets the ranks save. `run_all` starts a process for each run: `python -m launch.submitit_local
FOLDER`, which starts the ranks and watches them (`Controller`).
"""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import submitit
from submitit.local import local

from fashion_ddp.console import say
from fashion_ddp.distributed import signals
from fashion_ddp.private import private
from launch import slurm
from launch.processes import FailTogether

if TYPE_CHECKING:  # in `run_all` where they are needed: the controller starts without them, a second sooner
    from fashion_ddp.runs.lock import Lock
    from launch.job import Report
    from launch.sbatch import SubmissionPlan

MINUTE = 60  # seconds


def run_all(plan: "SubmissionPlan", todo: list[Path], report: "Report") -> int:
    """Train the runs in the folders `todo`, then compare. Return the exit code; exit with 1 where a run is missing."""
    from fashion_ddp.runs import lock
    from launch import jobs
    from launch.job import Rank

    signals.listen()
    if plan.submission.executor == "debug":
        with slurm.hide_own_job():
            for folder in todo:
                task = Rank(str(folder), plan.submission.max_restarts, plan.reuse)
                submitit.DebugExecutor(plan.folder).submit(task).result()
        report()
        return 0
    submission_lock = lock.acquire(plan.folder)  # as long as we have it, launch.status shows these runs as queued
    try:
        for folder in todo:
            jobs.write_job_record(folder, plan.folder, "local", str(os.getpid()))
        for number, folder in enumerate(todo, start=1):
            if not signals.received():
                say(f"--- run {number} of {len(todo)}: {folder}")
                _run(plan, folder, submission_lock)
        if received := signals.received():
            say(f"stopped ({received[0].name}): the same command continues")
            return os.EX_TEMPFAIL
        report()
        return 0
    finally:
        submission_lock.release()


def _run(plan: "SubmissionPlan", folder: Path, submission_lock: "Lock") -> None:
    """Run one job to its end. Where this process is asked to stop, ask the job's controller to stop."""
    from fashion_ddp.runs.reading import load_run
    from launch import jobs
    from launch.job import Rank

    with slurm.hide_own_job(), signals.blocked():
        executor = _LocalExecutor(plan)
        job = executor.submit(Rank(str(folder), plan.submission.max_restarts, plan.reuse))
    log = job.paths.stdout
    jobs.write_job_record(folder, plan.folder, "local", str(os.getpid()), log)
    say(f"follow: tail -n +1 -F {shlex.quote(str(log))}")
    process, asked_to_stop = executor.controller, False
    signals.children = [process]
    while process.poll() is None:
        if signals.received() and not asked_to_stop:
            process.terminate()
            asked_to_stop = True
        submission_lock.touch()
        time.sleep(0.1)
    summary = load_run(folder).summary
    status = summary.get("status", "not begun")
    why = "" if status == "finished" else f": {summary.get('error') or 'see its log'}"
    say(f"{status}{why}")


class _LocalExecutor(submitit.LocalExecutor):
    """Submitit's local executor, with our controller, and with the site's shell lines before each rank."""

    controller: subprocess.Popen[bytes]

    def __init__(self, plan: "SubmissionPlan"):
        script = plan.folder / "rank.sh"
        # In a container, Python's parent process is not the process that started it.
        other = plan.site.python or plan.site.container
        launcher = "unset FASHION_DDP_LAUNCHER" if other else "export FASHION_DDP_LAUNCHER=$PPID"
        script.write_text("\n".join(["#!/bin/bash", *plan.setup(), launcher, f'exec {plan.python} "$@"', ""]))
        private(submitit.LocalExecutor, "_submit_command")  # for which ours stands
        super().__init__(plan.folder, max_num_timeout=10**6, python=shlex.join(["bash", str(script)]))
        self.plan = plan
        self.update_parameters(tasks_per_node=plan.submission.ranks, timeout_min=plan.submission.minutes)

    def _submit_command(self, command: str) -> submitit.LocalJob[Any]:
        submission = self.plan.submission
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = visible.split(",") if visible else [str(card) for card in range(submission.gpus_per_node)]
        variables = {
            "NTASKS": submission.ranks,
            "COMMAND": command,
            "TIMEOUT_S": MINUTE * submission.minutes,
            "SIGNAL_DELAY_S": 0,
            "NODEID": 0,
            "JOB_NUM_NODES": 1,
            "WITH_SHELL": "",
        }
        env = {f"SUBMITIT_LOCAL_{name}": str(value) for name, value in variables.items()}
        env |= {"SUBMITIT_STDERR_TO_STDOUT": "1", "SUBMITIT_EXECUTOR": "local"}
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(cards[: submission.gpus_per_node])}
        env |= {"PYTHONPATH": str(self.plan.code), "PYTHONSAFEPATH": "1"}
        # The terminal's Ctrl-C is for this process alone, which passes it on.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            words = [sys.executable, "-m", "launch.submitit_local", str(self.folder)]
            self.controller = subprocess.Popen(words, env=os.environ | env, cwd=self.plan.cwd)
        finally:
            signal.signal(signal.SIGINT, before)
        process = self.controller
        return submitit.LocalJob(self.folder, str(process.pid), list(range(submission.ranks)), process)


class Controller(local.Controller):
    """Start the ranks of one job, watch them to the job's end, and exit with the first rank's code.

    Where a rank fails, Submitit's own controller leaves the others waiting; it kills what still runs a second after the
    job's time is over, and it outlives the process that started it. Here the first failure ends the other ranks, a job
    that reaches its time starts again under the same number, as it would on SLURM, and the ranks are stopped where the
    process that started this one is gone.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.parent = os.getppid()
        self.stopped = self.timed_out = False
        self.forward = private(local.Controller, "_forward_signal")
        for one in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, self._stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)  # signals that came before arrive here

    def start_tasks(self) -> None:
        with signals.blocked():  # until the ranks have handlers
            super().start_tasks()

    def _stop(self, number: int, frame: object = None) -> None:
        self.stopped = True
        self.forward(self, signal.SIGTERM)

    def run(self, max_retry: int = 0) -> None:
        """Start the job until it ends by itself. How often it may start is decided by its first rank."""
        for start in itertools.count():
            os.environ["SLURM_RESTART_COUNT"] = str(start)  # SLURM's own is not in this process's environment
            self.timed_out = False
            try:
                self.start_tasks()
                first = self.wait()[0]
            finally:
                self.kill_tasks()
            continues = first == local.LOCAL_REQUEUE_RETURN_CODE or (self.timed_out and first == os.EX_TEMPFAIL)
            if self.stopped or not continues:
                sys.exit(first)

    def wait(self, freq: int = 20) -> Sequence[int | None]:
        """Wait until every rank has ended, and return their exit codes."""
        ranks, end = FailTogether(self.tasks), time.monotonic() + self.timeout_s
        while None in (codes := ranks.poll()):
            if os.getppid() != self.parent and not self.stopped:
                self._stop(signal.SIGTERM)
            if time.monotonic() >= end and not self.timed_out:
                self.timed_out = True
                ranks.ask_to_end(signal.SIGUSR2)
            time.sleep(1 / freq)
        return codes


if __name__ == "__main__":
    Controller(Path(sys.argv[1])).run()
