"""A submission run on this machine, through Submitit's local or debug executor, one run after another.

Submitit's local executor has no queue, and at Ctrl-C kills what it started within a second. Here runs wait for each
other, and Ctrl-C lets the ranks save. Its job is seen through by launch/controller.py.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import submitit

from fashion_ddp.console import say
from fashion_ddp.distributed import signals
from fashion_ddp.runs import lock
from fashion_ddp.runs.reading import load_run
from launch import jobs, slurm
from launch.controller import STOPPED
from launch.job import Rank, Report
from launch.sbatch import Plan

MINUTE = 60  # seconds


def run_all(plan: Plan, todo: list[Path], report: Report) -> int:
    """Run what is to be done, and the report. Returns the exit code; the report leaves with 1 where it is partial."""
    signals.listen()
    if plan.asked.executor == "debug":
        with slurm.outside_of_a_job():
            for folder in todo:
                task = Rank(str(folder), plan.asked.max_restarts, plan.reuse)
                submitit.DebugExecutor(plan.base).submit(task).result()
        report()
        return 0
    held = lock.acquire(plan.base)  # while it is held, these runs are queued
    try:
        for folder in todo:
            jobs.note(folder, plan.base, "local", str(os.getpid()))
        for number, folder in enumerate(todo, start=1):
            if not signals.received():
                say(f"--- run {number} of {len(todo)}: {folder}")
                _run(plan, folder, held)
        if told := signals.received():
            say(f"stopped ({told[0].name}): the same command continues")
            return STOPPED
        report()
        return 0
    finally:
        held.release()


def _run(plan: Plan, folder: Path, held: lock.Lock) -> None:
    """Run one job to its end, handing on what this process is told."""
    with slurm.outside_of_a_job(), signals.blocked():
        executor = _Local(plan)
        job = executor.submit(Rank(str(folder), plan.asked.max_restarts, plan.reuse))
    log = job.paths.stdout
    jobs.note(folder, plan.base, "local", str(os.getpid()), log)
    say(f"follow: tail -n +1 -F {shlex.quote(str(log))}")
    process, told = executor.controller, False
    signals.children = [process]
    while process.poll() is None:
        if signals.received() and not told:
            process.terminate()
            told = True
        held.touch()
        time.sleep(0.1)
    summary = load_run(folder).summary
    status = summary.get("status", "not begun")
    why = "" if status == "finished" else f": {summary.get('error') or 'see its log'}"
    say(f"{status}{why}")


class _Local(submitit.LocalExecutor):
    """Submitit's local executor, with our controller, and the shell of the site around each rank."""

    controller: subprocess.Popen[bytes]

    def __init__(self, plan: Plan):
        script = plan.base / "rank.sh"
        # Where Python is a container's, its parent is not whom it was started by.
        launcher = "unset FASHION_DDP_LAUNCHER" if plan.site.python else "export FASHION_DDP_LAUNCHER=$PPID"
        script.write_text("\n".join(["#!/bin/bash", *plan.setup(), launcher, f'exec {plan.python} "$@"', ""]))
        super().__init__(plan.base, max_num_timeout=10**6, python=shlex.join(["bash", str(script)]))
        self.plan = plan
        self.update_parameters(tasks_per_node=plan.asked.ranks, timeout_min=plan.asked.time)

    def _submit_command(self, command: str) -> submitit.LocalJob[Any]:
        asked = self.plan.asked
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = named.split(",") if named else [str(card) for card in range(asked.gpus_per_node)]
        variables = {
            "NTASKS": asked.ranks,
            "COMMAND": command,
            "TIMEOUT_S": MINUTE * asked.time,
            "SIGNAL_DELAY_S": 0,
            "NODEID": 0,
            "JOB_NUM_NODES": 1,
            "WITH_SHELL": "",
        }
        env = {f"SUBMITIT_LOCAL_{name}": str(value) for name, value in variables.items()}
        env |= {"SUBMITIT_STDERR_TO_STDOUT": "1", "SUBMITIT_EXECUTOR": "local"}
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(cards[: asked.gpus_per_node])}
        env |= {"PYTHONPATH": str(self.plan.code), "PYTHONSAFEPATH": "1"}
        # The terminal's Ctrl-C is for this process alone, which hands it on.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            words = [sys.executable, "-m", "launch.controller", str(self.folder)]
            self.controller = subprocess.Popen(words, env=os.environ | env, cwd=self.plan.cwd)
        finally:
            signal.signal(signal.SIGINT, before)
        process = self.controller
        return submitit.LocalJob(self.folder, str(process.pid), list(range(asked.ranks)), process)
