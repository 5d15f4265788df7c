"""Submitted runs on a real SLURM (slurm/cluster): two nodes that are this machine, preemption, accounting.

Each disturbance ends in the same bits as the run that nothing disturbed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, command
from faults import ranks_of
from on_slurm import (
    FREE,
    NAME,
    SLOW,
    SUBMIT,
    TRAIN,
    Submitted,
    on_this_machine,
    preempt,
    resumed,
    same,
    set_down,
    slurm,
)
from safetensors.torch import load_file
from soak_slurm import Campaign
from test_submit import SLOW_MODEL

from launch import submit

sys.path.insert(0, str(CHECKOUT / "slurm" / "cluster"))
from cluster import Cluster, why_impossible

pytestmark = pytest.mark.slurm

# At the end of a model: after an epoch, rank 1 fails.
BREAKS = """
    def train(self, mode=True):
        if os.environ.get("RANK") == "1" and not mode:
            1 / 0
        return super().train(mode)
"""

# As sitecustomize.py: a rank waits before its first import, and does not listen to signals.
DEAF = """
import os, time
while os.path.exists("deaf") and "SLURM_PROCID" in os.environ:
    open(f"waiting{os.getpid()}", "w").close()
    time.sleep(0.1)
"""


def make_cluster(accounting: bool) -> Iterator[Cluster]:
    if why := why_impossible(accounting):
        (pytest.fail if os.environ.get("FASHION_DDP_REQUIRE_ALL") else pytest.skip)(f"no SLURM can run here: {why}")
    # Not pytest's own folder, which the users of munge and of the database may not enter.
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="fashion_ddp_slurm_", dir="/var/tmp")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        cluster.up(accounting)
        try:
            yield cluster
        finally:
            cluster.down()
            assert not cluster.dir.exists() and cluster.mark not in Path("/etc/hosts").read_text()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from make_cluster(accounting=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("reference")
    (folder / "slow.py").write_text(SLOW_MODEL)
    (folder / "fast").touch()
    return on_this_machine(folder, 2, "slow:Net", *TRAIN)


@pytest.fixture
def run(cluster: Cluster, reference: dict[str, torch.Tensor], tmp_path: Path) -> Submitted:
    """A run that can be submitted."""
    (tmp_path / "slow.py").write_text(SLOW_MODEL)
    return Submitted(tmp_path, reference)


def test_an_array_of_models_on_two_nodes_to_the_report_equals_the_same_runs_here(
    cluster: Cluster, data_dir: Path, tmp_path: Path
) -> None:
    flags = ("--epochs", "1", "--hidden-units", "4", "--batch-size", "1000", "--data-dir", str(data_dir))
    words = ("--models", "linear", "relu", "cnn", "--ranks-per-node", "2", "--tracker", "none")
    done = command(*SUBMIT, *words, *flags, "--wait", cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 runs submitted; job " in done.stdout and "next: python -m launch.status " in done.stdout
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert sorted(run["model"] for run in report["runs"]) == ["cnn", "linear", "relu"]
    assert all(run["status"] == "finished" and run["world_size"] == 4 for run in report["runs"])
    table = command("python", "-m", "launch.status", cwd=tmp_path).stdout
    assert [line.split()[2] for line in table.splitlines()[1:4]] == ["finished"] * 3
    for path in tmp_path.glob("runs/[!.]*/environment.json"):
        [start] = json.loads(path.read_text())
        assert len(start["ranks"]) == 4
    [weights] = tmp_path.glob("runs/cnn-*/model.safetensors")
    same(load_file(weights), on_this_machine(tmp_path, 4, "cnn", *flags))


# --- Disturbed, and continued -----------------------------------------------------------------------------------------
# What happens, in which partition, and whether the job's own script must queue it again.
DISTURBED: dict[str, tuple[Callable[[Submitted], Any], str, bool]] = {
    "preempted": (preempt, "low", False),
    "preempted with grace": (preempt, "grace", True),
    "node set down": (set_down, "low", False),
}


@pytest.mark.parametrize("what", DISTURBED)
def test_a_disturbed_run_continues_to_the_same_bits(what: str, run: Submitted) -> None:
    disturb, partition, by_us = DISTURBED[what]
    run.submit("--partition", partition, "--slurm", "gres=gpu:2", "--device", "cpu")
    run.trained()
    disturb(run)
    run.started(2)
    assert run.reported()
    run.whole()
    assert len(run.starts()) == 2 and f"saved in epoch {run.starts()[1]['step'] // 12 + 1}" in run.log()
    assert (f"job {run.job} is queued again" in run.log()) == by_us
    assert run.ends() == ("1", "0")
    # Of both starts the report has what SLURM counts itself: two nodes, one core and two cards each.
    core_s = [int(line) for line in slurm("sacct", "-n", "-X", "-P", "-D", "-o", "CPUTimeRAW", "-j", run.job).split()]
    [cost] = json.loads((run.cwd / "report" / "report.json").read_text())["runs"]
    assert len(core_s) == cost["cost/starts"] == 2 and cost["cost/complete"] is True
    assert cost["cost/core_hours"] == sum(core_s) / 3600 == cost["cost/card_hours"] / 2
    assert 0 < cost["cost/starting_s"] + cost["cost/training_s"] < sum(core_s) / 2 + 4  # whole seconds, of two starts


def test_a_run_longer_than_its_job_is_continued_by_the_next(run: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAUSE", "0.6")  # 5 minutes in all; the job is told after half a minute to one and a half
    run.submit("--time", "3")
    run.started(2, patience=240)
    assert run.reported()
    run.whole()
    assert "stopped (SIGUSR2)" in run.log()


def is_alive(waiting: Path) -> bool:
    return Path("/proc", waiting.name.removeprefix("waiting")).exists()


def test_ended_in_its_start_again_and_again_it_leaves_at_once_and_is_never_given_up(run: Submitted) -> None:
    run.submit("--slurm", "hold")
    (run.cwd / "wait").touch()  # the model is not built
    (run.cwd / "deaf").touch()
    (run.cwd / "sitecustomize.py").write_text(DEAF)
    assert f"`scontrol release {run.job}` lets it go on" in run.status().stdout
    slurm("scontrol", "release", run.job, run.report)
    run.until(lambda: sum(map(is_alive, run.cwd.glob("waiting*"))) == 2)
    slurm("scancel", "--signal=USR2", run.job)
    run.until(lambda: f"job {run.job} is queued again" in run.log())
    assert not run.starts()
    (run.cwd / "deaf").unlink()
    ways = [("scontrol", "requeue"), ("scancel", "--signal=USR2")] * 3  # by SLURM, and by the script
    for times, way in enumerate(ways, start=1):
        run.until(lambda n=times: len(run.starts()) == n and sum(map(is_alive, run.cwd.glob("waiting*"))) == 2)
        since = time.monotonic()
        slurm(*way, run.job)
        run.until(lambda times=times: "end" in run.starts()[times - 1])
        assert time.monotonic() - since < 10  # not when SLURM kills what does not end
    (run.cwd / "wait").unlink()
    run.hurry()
    assert run.reported()
    run.whole()
    assert [start.get("end") for start in run.starts()] == ["SIGTERM", "SIGUSR2"] * 3 + ["finished"]


def test_a_run_whose_time_is_over_while_the_controller_is_away_is_queued_again(
    cluster: Cluster, run: Submitted
) -> None:
    run.submit()
    run.trained()
    controller = int((cluster.dir / "slurmctld.pid").read_text())
    os.kill(controller, signal.SIGSTOP)
    try:
        for rank in ranks_of(run.cwd, "SLURM_PROCID"):
            os.kill(rank, signal.SIGUSR2)
        run.until(lambda: "not queued again yet" in run.log())
    finally:
        os.kill(controller, signal.SIGCONT)
    run.started(2)
    assert run.reported()
    run.whole()


@pytest.mark.parametrize(("rank", "meanwhile"), [(0, "runs"), (1, "is being signalled")])
def test_a_run_whose_rank_is_killed_comes_back_by_itself(
    rank: int, meanwhile: str, cluster: Cluster, run: Submitted
) -> None:
    run.submit()
    run.trained()
    slurmd = int((cluster.dir / "slurmd-fashion-n1.pid").read_text())
    try:
        if meanwhile == "is being signalled":  # which it stays until the node's slurmd has answered
            os.kill(slurmd, signal.SIGSTOP)
            slurm("scancel", "--batch", "--signal=CONT", run.job)
            assert "JobState=SIGNALING" in slurm("scontrol", "show", "job", run.job)
        os.kill(ranks_of(run.cwd, "SLURM_PROCID")[rank], signal.SIGKILL)
        run.until(lambda: f"job {run.job} is queued again" in run.log())
    finally:
        os.kill(slurmd, signal.SIGCONT)
    run.started(2)
    assert run.reported()
    run.whole()
    assert [start["end"] for start in run.starts()] == ["killed", "finished"] and run.ends() == ("0", "1")


def test_a_run_whose_ranks_are_killed_before_they_train_is_given_up(run: Submitted) -> None:
    run.submit("--slurm", "hold")
    (run.cwd / "wait").touch()  # the model is not built
    slurm("scontrol", "release", run.job, run.report)
    for times in (1, 2):
        run.until(lambda n=times: len(run.starts()) == n and any(map(is_alive, run.cwd.glob("waiting*"))))
        os.kill(ranks_of(run.cwd, "SLURM_PROCID")[1], signal.SIGKILL)
    assert not run.reported()
    shown = run.status().stdout
    assert "given up (FAILED)" in shown and f"ranks of the last 2 starts of job {run.job} were killed before" in shown


def test_a_run_that_fails_by_an_error_of_its_own_is_not_queued_again(run: Submitted) -> None:
    (run.cwd / "slow.py").write_text(SLOW_MODEL + BREAKS)
    run.submit()
    assert not run.reported()
    assert len(run.starts()) == 1 and run.state(run.job) == "FAILED"
    [told] = [line for line in run.status().stdout.splitlines() if "; log: " in line]
    assert "ZeroDivisionError" in Path(told.split("; log: ")[1]).read_text()


def test_a_signal_to_the_batch_script_does_not_end_the_job(run: Submitted) -> None:
    run.submit()
    run.trained()
    slurm("scancel", "--batch", "--signal=USR2", run.job)  # to the script alone: nothing happens
    run.trained(epochs=4)
    slurm("scancel", "--full", "--signal=USR2", run.job)  # to the ranks, too: they save, and it is queued again
    run.started(2)
    assert run.reported()
    run.whole()
    assert len(run.starts()) == 2


def test_of_the_same_command_twice_at_once_one_is_queued_in_any_folder(
    cluster: Cluster, reference: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "10 Läufe $HOME's"
    folder.mkdir()
    (folder / "slow.py").write_text(SLOW_MODEL)
    run = Submitted(folder, reference)
    line = [sys.executable, *SUBMIT[1:], *SLOW]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(line, cwd=folder, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, **pipes) for _ in "12"]
    ended = [(*one.communicate(timeout=200), one.returncode) for one in both]
    [queued], [refused] = ([one for one in ended if one[2] == code] for code in (0, 2))
    run._read(subprocess.CompletedProcess(line, 0, queued[0], queued[1]))
    assert re.search(rf"{NAME} is \w+.* \(job {run.job}\): wait for it", refused[1]), refused
    assert json.loads((run.folder / "job.json").read_text())["job"] == run.job
    assert f" {run.job} " in (shown := run.status().stdout) and re.search(r" (PENDING|RUNNING|CONFIGURING) ", shown)
    run.hurry()
    assert run.reported()
    run.whole()


def test_more_runs_than_an_array_may_have_are_several_and_one_report(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.slurm.max_array_size", lambda: 2)
    words = ("--models", "linear", "--seeds", "0", "1", "2", "--epochs", "1", "--wait")
    assert submit.main([*SUBMIT[3:], *words, *FREE]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [run["seed"] for run in report["runs"]] == [0, 1, 2]
    jobs = [json.loads(path.read_text())["job"] for path in sorted(tmp_path.glob("runs/linear*/job.json"))]
    assert jobs[0].endswith("_0") and jobs[1].endswith("_1") and "_" not in jobs[2]


@pytest.mark.parametrize("seed", [1])
def test_faults_that_a_seed_draws_change_no_bit(seed: int, cluster: Cluster, tmp_path: Path) -> None:
    """A handful of `make soak-slurm`."""
    struck = Campaign(cluster, tmp_path, most=4).run(seed)
    assert not struck.failures, "\n".join([*struck.failures, *struck.history])
    assert sum(struck.struck.values()) >= 2


# --- Ended, and submitted again ---------------------------------------------------------------------------------------
def test_a_cancelled_run_is_saved_and_stays_so_until_it_is_resubmitted(run: Submitted) -> None:
    run.submit()
    run.trained()
    refused = command(*SUBMIT, *SLOW, cwd=run.cwd)
    assert refused.returncode == 2 and f"{NAME} is RUNNING (job {run.job})" in refused.stderr
    shown = run.status().stdout
    assert f" {run.job} " in shown and " RUNNING " in shown and " fashion-n[1-2] " in shown
    assert run.status("cancel").returncode == 0
    assert not run.reported()  # it waits for nothing any more, and says what is missing
    logs = run.cwd.glob(f"runs/.submissions/*/{run.report}_*_log.out")
    assert any("PARTIAL: of 1 runs 1 are not finished" in log.read_text() for log in logs)
    assert run.summary()["status"] == "stopped" and len(run.starts()) == 1
    assert "stopped (CANCELLED" in run.status().stdout
    one_is_left = run.status("resubmit", "--exclude", "fashion-n2")
    assert one_is_left.returncode == 2 and "SLURM would not take these jobs: Requested node" in one_is_left.stderr
    run.resubmit()
    assert run.reported()
    run.whole()
    assert run.starts()[1]["step"] > 0


# --- Not begun --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--partition", "nowhere"), "invalid partition specified: nowhere"),
        (("--gpus-per-node", "8", "--device", "cuda"), "Requested node configuration is not available"),
    ],
)
def test_what_slurm_would_not_take_is_told_before_anything_is_written(
    words: tuple[str, ...], told: str, cluster: Cluster, tmp_path: Path
) -> None:
    done = command("python", "-m", "launch.submit", "--models", "linear", *FREE, *words, cwd=tmp_path)
    assert done.returncode == 2 and told in done.stderr and "What there is: low: 2 x 4 cores" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_in_a_maintenance_runs_are_queued_with_a_warning(cluster: Cluster, run: Submitted) -> None:
    slurm("scontrol", "update", "nodename=fashion-n1", "state=drain", "reason=maintenance")
    try:
        line = ("python", "-m", "launch.submit", *SLOW, "--gpus-per-node", "8", "--device", "cuda")
        refused = command(*line, cwd=run.cwd)
        assert refused.returncode == 2 and "SLURM would not take these jobs: " in refused.stderr
        done = command(*SUBMIT, *SLOW, cwd=run.cwd)
        run._read(done)
        assert "warning: SLURM would start these jobs not before nodes are back " in done.stdout
        assert f" {run.job} " in (shown := run.status().stdout) and " PENDING (" in shown
        slurm("scancel", run.job, run.report)
    finally:
        run.until(lambda: resumed("fashion-n1"))


def test_a_login_node_is_not_trained_on_unless_that_is_meant(cluster: Cluster, tmp_path: Path) -> None:
    line = ("python", "-m", "launch.local", "--models", "linear", *TRAIN, "--check-only")
    done = command(*line, cwd=tmp_path)
    said = "submit these runs with `python -m launch.submit --models linear --recipe blog --seeds 42 --batch-size 1000"
    assert done.returncode == 2 and said in done.stderr and "--force (FORCE=1)" in done.stderr
    assert command(*line, "--force", cwd=tmp_path).returncode == 0
    assert command(*line, cwd=tmp_path, SLURM_JOB_ID="1").returncode == 0  # a job's own machine
    assert command(*line, cwd=tmp_path, SLURM_CONF="/nowhere").returncode == 0  # installed, and no cluster


def test_nodes_that_do_not_find_each_other_say_so(cluster: Cluster, run: Submitted) -> None:
    cluster.name_nodes(False)
    try:
        run.submit()
        assert not run.reported()
    finally:
        cluster.name_nodes(True)
    assert "rank 0's machine 'fashion-n1' is not found by name" in run.log()
    assert run.state(run.job) == "FAILED" and len(run.starts()) == 1


# --- Without Submitit, and without accounting -------------------------------------------------------------------------
def test_a_script_without_submitit_is_requeued_to_the_same_bits(run: Submitted) -> None:
    options = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--output=log")
    script = (str(CHECKOUT / "slurm" / "train.sbatch"), "--model", "slow:Net", "--device", "cpu", *TRAIN)
    environment = f"--export=ALL,PYTHON={sys.executable},PYTHONPATH={CHECKOUT},CHECKOUT={CHECKOUT}"
    run.job = slurm("sbatch", f"--chdir={run.cwd}", environment, *options, *script).split()[-1]
    run.trained()
    slurm("scancel", "--signal=USR1", run.job)  # saved, and queued again by the script
    run.until(lambda: len(run.starts()) == 2)
    slurm("scontrol", "requeue", run.job)  # by SLURM, at a point of its start
    run.started(3)
    run.until(lambda: run.state(run.job) == "COMPLETED")
    run.whole()
    assert f"job {run.job} is queued again" in (run.cwd / "log").read_text()


def test_without_accounting_the_folders_tell_how_it_ended(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_MODEL)
    for _ in make_cluster(accounting=False):
        run = Submitted(tmp_path, {})
        run.submit()
        run.trained()
        slurm("scancel", run.job)
        run.until(lambda: not slurm("squeue", "-h").strip())
        assert " stopped " in (shown := run.status().stdout) and "CANCELLED" not in shown
        run.resubmit()
        run.until(lambda: not slurm("squeue", "-h").strip())
        assert " finished " in run.status().stdout
        [reported] = json.loads((tmp_path / "report" / "report.json").read_text())["runs"]
        assert reported["status"] == "finished"
        assert reported["cost/training_s"] > 0 and "cost/core_hours" not in reported
