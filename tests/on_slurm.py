"""Runs that are submitted to a real SLURM (slurm/cluster), from their submission to what became of them."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import command
from safetensors.torch import load_file

SUBMIT = ("python", "-m", "launch.submit", "--nodes", "2", "--ranks-per-node", "1", "--cpus-per-rank", "1")
FREE = ("--dataset", "synthetic", "--tracker", "none")
TRAIN = ("--batch-size", "1000", "--epochs", "40", "--checkpoint-every", "0", *FREE)
SLOW = ("--models", "slow:Net", *TRAIN)
NAME = "slow_Net-blog-seed42-epochs40-batch_size1000-datasetsynthetic"


def slurm(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


@dataclass
class Submitted:
    """A run of the slow model (test_submit) on two nodes, from its submission on."""

    cwd: Path
    reference: dict[str, torch.Tensor]  # the weights of the same run, undisturbed
    job: str = ""
    report: str = ""

    @property
    def folder(self) -> Path:
        return self.cwd / "runs" / NAME

    def submit(self, *words: str) -> None:
        self._read(command(*SUBMIT, *SLOW, *words, cwd=self.cwd))

    def resubmit(self) -> None:
        self.hurry()
        self._read(self.status("resubmit"))

    def _read(self, done: subprocess.CompletedProcess[str]) -> None:
        assert done.returncode == 0, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        [self.job] = [line.split()[1] for line in lines if line.startswith("job ")]
        [self.report] = [line.split(" compares ")[0].split()[-1] for line in lines if " compares them " in line]

    def status(self, *words: str) -> subprocess.CompletedProcess[str]:
        return command("python", "-m", "launch.status", *words, cwd=self.cwd)

    def ends(self) -> tuple[str, str]:
        """How many starts were interrupted, and how many failed, as the table of `launch.status` has it."""
        titles, run, *_ = (re.split(" {2,}", line) for line in self.status().stdout.splitlines())
        return run[titles.index("interrupted")], run[titles.index("failed")]

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.cwd.glob(f"runs/.submissions/*/{self.job}_*_log.out")))

    def until(self, holds: Callable[[], Any], patience: float = 120) -> Any:
        """Wait until `holds` returns something true, and return that."""
        limit = time.monotonic() + patience
        while not (value := holds()):
            assert time.monotonic() < limit, f"{slurm('squeue')}\n{self.log()}"
            time.sleep(0.1)
        return value

    def trained(self, epochs: int = 2) -> None:
        path = self.folder / "metrics.jsonl"
        self.until(lambda: path.exists() and path.read_text().count("\n") >= epochs)

    def starts(self) -> list[dict[str, Any]]:
        path = self.folder / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def started(self, times: int, patience: float = 120) -> None:
        """Wait until the job was started so often, the last time from a checkpoint, and let it end."""
        self.until(lambda: len(self.starts()) >= times, patience)
        assert self.starts()[-1]["step"] > 0
        self.hurry()

    def hurry(self) -> None:
        (self.cwd / "fast").touch()

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def state(self, job: str) -> str:
        return slurm("sacct", "-n", "-X", "-P", "-o", "State", "-j", job).strip()

    def reported(self) -> bool:
        """Wait for the comparison. Return whether it was of all runs."""
        self.until(lambda: not slurm("squeue", "-h", "-j", f"{self.job},{self.report}").strip())
        assert (self.cwd / "report" / "report.html").exists()
        self.until(lambda: self.state(self.report) in ("COMPLETED", "FAILED"))
        return self.state(self.report) == "COMPLETED"

    def whole(self) -> None:
        """The run is finished, each of its epochs is recorded once, and its weights are the reference's."""
        assert self.summary()["status"] == "finished", self.log()
        epochs = [json.loads(line)["epoch"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        assert epochs == list(range(1, 41))
        same(load_file(self.folder / "model.safetensors"), self.reference)


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def on_this_machine(folder: Path, ranks: int, model: str, *words: str) -> dict[str, torch.Tensor]:
    """The weights of a run without SLURM."""
    launcher = ("torchrun", "--standalone", "--nproc-per-node", str(ranks))
    flags = ("--model", model, "--threads", "1", "--device", "cpu", "--tracker", "none", "--run-dir", "alone")
    done = command(*launcher, "-m", "fashion_ddp.train", *flags, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "alone" / "model.safetensors")


def preempt(_: Submitted) -> None:
    slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")


def set_down(run: Submitted) -> None:
    slurm("scontrol", "update", "nodename=fashion-n2", "state=down", "reason=test")
    run.until(lambda: resumed("fashion-n2"))


def resumed(node: str) -> bool:
    """Take a node back into service, and return whether it is. That is refused while a job is not yet gone from it, and
    when it is back already."""
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False, capture_output=True)
    shown = subprocess.run(["scontrol", "show", "node", node], check=False, capture_output=True, text=True).stdout
    state = re.search(r"State=(\S+)", shown)
    return state is not None and not re.search("DOWN|DRAIN", state[1])
