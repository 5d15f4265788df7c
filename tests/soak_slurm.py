"""Submitted runs on a real SLURM, struck by faults that are drawn by seed: each must end as if nothing had struck it.

    python tests/soak_slurm.py --faults 100 --seed 1 --out soak_slurm.json    goes on where the file ends
    python tests/soak_slurm.py --run 1234567        one run of these again, by the seed that is printed with it

Several runs are submitted at once to a cluster that is brought up here (as root). While they start, and while they
train, ranks, batch scripts and SLURM's own programs are killed, stopped, told to end, starved of time, disk and nodes.
A run that the cluster disturbs must come back by itself. After what ends a job for good (scancel, a rank or a batch
script that is killed, a full disk) one `launch.status resubmit` must continue it. At its end its weights must equal
those of a run that nothing disturbed bit for bit, its records must be whole, and no step may have been trained twice
but for what a checkpoint could not know. All is drawn from the seed, but for what depends on the clock. Exit code 1
where any run went another way.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conftest import CHECKOUT, command
from faults import lacking, ranks_of, wrong
from on_slurm import FREE, Submitted, on_this_machine, preempt, resumed, set_down, slurm
from soak import damage

from fashion_ddp.distributed import machine
from fashion_ddp.runs import provenance

sys.path.insert(0, str(CHECKOUT / "slurm" / "cluster"))
from cluster import NODES, Cluster, why_impossible

STRUCK = 10  # faults that a run takes before it is left in peace
EPOCHS, PER_EPOCH = 40, 12
STEPS = EPOCHS * PER_EPOCH
PAUSE = 0.1  # seconds of a step
SYNC = 1.0  # seconds from one sync point, where a run may save, to the next
RUNS_DISK = 64  # MB of the file system that holds a run's folder
# It counts its steps: those that are in no checkpoint are trained twice, and nothing else is.
MODEL = """
import os, time
from torch import nn

class Net(nn.Sequential):
    def __init__(self, image_shape, classes):
        super().__init__(nn.Flatten(), nn.Linear(784, classes))

    def forward(self, images):
        if self.training:
            with open(f"steps{os.environ.get('RANK', 0)}", "a") as file:
                file.write(".")
            if not os.path.exists("fast"):
                time.sleep(float(os.environ.get("PAUSE", "0.1")))
        return super().forward(images)
"""
TRAIN = ("--batch-size", "1000", "--epochs", str(EPOCHS), *FREE)
CONTROLLERS_TIME = "%Y-%m-%dT%H:%M:%S"  # as the log of slurmctld has it
SETTINGS = (
    ("--shuffle",),
    ("--shuffle", "--optimizer", "adam", "--lr", "0.01"),
    ("--shuffle", "--optimizer", "momentum", "--lr", "0.02", "--shift", "2", "--flip", "0.5"),
)
SHAPES = ((1, 1), (1, 2), (2, 1), (2, 1))  # nodes, ranks on each


class Disturbed(Submitted):
    """A run that is struck."""

    submitted: str = ""  # when it was last

    @property
    def folder(self) -> Path:
        made = (path for path in self.cwd.glob("runs/[!.]*") if path.is_dir())
        return next(made, self.cwd / "runs" / "none")

    def in_queue(self, job: str = "") -> str:
        """The state in the queue of the run's job, or of another of its jobs; "" where it is not there any more. Waits
        for a controller that is away. One that was killed may have forgotten a job, and give its number to another."""
        line = ["squeue", "-h", "-o", "%T %o", "-j", job or self.job]
        while True:
            done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode == 0 or "Invalid job id" in done.stderr:
                return done.stdout.split()[0] if f"{self.cwd}/" in done.stdout else ""
            time.sleep(1)

    def finished(self) -> bool:
        path = self.folder / "summary.json"
        return path.exists() and json.loads(path.read_text()).get("status") == "finished"

    def steps(self) -> int:
        path = self.cwd / "steps0"
        return path.stat().st_size if path.exists() else 0

    def ranks(self) -> list[int]:
        return ranks_of(self.cwd, "SLURM_PROCID")

    def batch_script(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                if b"slurm_script" in b"".join(words[:2]) and str(self.cwd).encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
        return found


# --- What strikes ----------------------------------------------------------------------------------------------------
# Each function strikes a run, or the cluster with all runs, and returns when the cluster is as it was. It may return a
# word that says what it found; "" where the run was gone already, and nothing was struck.
Strike = Callable[["Campaign", Disturbed, random.Random], str | None]


def requeue(_: "Campaign", run: Disturbed, __: random.Random) -> str | None:
    return None if _tell("scontrol", "requeue", run.job) else ""


def time_is_over(_: "Campaign", run: Disturbed, __: random.Random) -> str | None:
    """As where sbatch's --signal comes: two minutes before the end."""
    return None if _tell("scancel", "--signal=USR2", run.job) else ""


def time_limit(_: "Campaign", run: Disturbed, __: random.Random) -> str | None:
    """By SLURM's own clock, which says so within a minute."""
    shown = _ask("squeue", "-h", "-t", "R", "-o", "%M", "-j", run.job).strip()
    if not shown:
        return ""
    minutes = int(shown.split(":")[-2])
    if not _tell("scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes + 2}"):
        return ""
    before = len(run.starts())
    run.until(lambda: run.in_queue() != "RUNNING" or len(run.starts()) > before or run.finished(), patience=300)
    _tell("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")
    return None


def signal_to_the_script(_: "Campaign", run: Disturbed, draw: random.Random) -> str | None:
    return None if _tell("scancel", draw.choice(["--batch", "--full"]), "--signal=USR2", run.job) else ""


def cancel(_: "Campaign", run: Disturbed, __: random.Random) -> str | None:
    done = run.status("cancel")
    if "it is not clear which of these runs are queued" in done.stderr:
        return ""  # another run's strike keeps SLURM from answering
    assert done.returncode == 0, done.stderr
    return None if f"job {run.job} is cancelled" in done.stdout else ""


def kill_ranks(_: "Campaign", run: Disturbed, draw: random.Random) -> str | None:
    ranks = run.ranks()
    struck = ranks if draw.random() < 0.3 else ranks[:: draw.choice([1, -1])][:1]
    return None if [pid for pid in struck if _signal(pid, signal.SIGKILL)] else ""


def kill_batch_script(_: "Campaign", run: Disturbed, __: random.Random) -> str | None:
    return None if [pid for pid in run.batch_script() if _signal(pid, signal.SIGKILL)] else ""


def stop_ranks(_: "Campaign", run: Disturbed, draw: random.Random) -> str | None:
    ranks = run.ranks()
    struck = [pid for pid in (ranks if draw.random() < 0.5 else ranks[:1]) if _signal(pid, signal.SIGSTOP)]
    time.sleep(draw.uniform(0.5, 4))
    for pid in struck:
        _signal(pid, signal.SIGCONT)
    return None if struck else ""


def suspend(_: "Campaign", run: Disturbed, draw: random.Random) -> str | None:
    if not _tell("scontrol", "suspend", run.job):
        return ""
    time.sleep(draw.uniform(0.5, 4))
    _tell("scontrol", "resume", run.job)
    return None


def full_disk(_: "Campaign", run: Disturbed, draw: random.Random) -> str | None:
    """Nothing can be written into the folder of runs for a while, nor into the logs that lie there."""
    filler = run.cwd / "runs" / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))
    time.sleep(draw.uniform(1, 6))
    filler.unlink()
    return None


def damaged_checkpoint(campaign: "Campaign", run: Disturbed, draw: random.Random) -> str | None:
    """While the job waits to be started again."""
    held = _tell("scontrol", "requeuehold", run.job)
    if not held:
        return ""
    run.until(lambda: run.in_queue() in ("PENDING", "") and not run.ranks())
    found = damage(draw, run.folder) if run.starts() else None
    _tell("scontrol", "release", run.job)
    return found or "nothing to damage"


def controller_away(campaign: "Campaign", run: Disturbed, draw: random.Random) -> str | None:
    """It does not answer while the run is told that its time is over, and later does, or is begun anew."""
    pid = campaign.daemon("slurmctld")
    _signal(pid, signal.SIGSTOP)
    for rank in run.ranks():
        _signal(rank, signal.SIGUSR2)
    time.sleep(draw.uniform(1, 25))
    if draw.random() < 0.5:
        _signal(pid, signal.SIGCONT)
    else:
        campaign.kill_and_start("slurmctld")
    return None


def kill_controller(campaign: "Campaign", run: Disturbed, draw: random.Random) -> str | None:
    campaign.kill_and_start("slurmctld", away=draw.uniform(0, 5))
    return None


def kill_slurmd(campaign: "Campaign", run: Disturbed, draw: random.Random) -> str | None:
    campaign.kill_and_start(f"slurmd-{draw.choice(NODES)}", away=draw.uniform(0, 5))
    return None


def preempted(campaign: "Campaign", run: Disturbed, _: random.Random) -> str | None:
    preempt(run)
    return None


def node_down(campaign: "Campaign", run: Disturbed, _: random.Random) -> str | None:
    set_down(run)
    return None


def drain(campaign: "Campaign", run: Disturbed, draw: random.Random) -> str | None:
    """A job that runs goes on; one that is queued waits."""
    node = draw.choice(NODES)
    _tell("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    time.sleep(draw.uniform(1, 5))
    run.until(lambda: resumed(node))
    return None


# With their weights. What strikes all runs at once is struck when no other one strikes the cluster.
OF_A_RUN: dict[Strike, float] = {requeue: 3, time_is_over: 3, time_limit: 0.5, signal_to_the_script: 2, cancel: 1.5}
OF_A_RUN |= {kill_ranks: 2, kill_batch_script: 1, stop_ranks: 2, suspend: 1.5, full_disk: 1, damaged_checkpoint: 1.5}
OF_THE_CLUSTER: dict[Strike, float] = {controller_away: 1, kill_controller: 1, kill_slurmd: 1.5, preempted: 1.5}
OF_THE_CLUSTER |= {node_down: 1, drain: 0.7}
# After these a job has ended for good, and a person submits it again; after `kill_ranks` only where they had not begun,
# or never trained.
BY_A_PERSON = (cancel, kill_batch_script, full_disk)
# After these a checkpoint may be older than the last step.
ABRUPT = (kill_ranks, kill_batch_script, full_disk, damaged_checkpoint, kill_slurmd, node_down)
ABRUPT += (kill_controller, controller_away)  # one that was killed ends jobs of which it forgot that they had begun


def _tell(*words: str) -> bool:
    """Give a command, and return whether it was obeyed. While a job is being queued again scancel tries for minutes."""
    return subprocess.run(words, check=False, capture_output=True, timeout=600).returncode == 0


def _ask(*words: str) -> str:
    """What a command prints, "" where the controller is away."""
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=120).stdout


def _signal(pid: int, which: signal.Signals) -> bool:
    try:
        os.kill(pid, which)
    except ProcessLookupError:
        return False
    return True


# --- The campaign ----------------------------------------------------------------------------------------------------
@dataclass
class Record:
    """What became of one run."""

    seed: int
    settings: list[str]
    struck: dict[str, int] = field(default_factory=dict)
    starts: int = 0
    by_a_person: int = 0  # how often it was submitted again
    released: int = 0  # how often SLURM held its job, and an operator let it go on
    forgotten: int = 0  # how often a controller that was killed did not know its job any more
    steps_repeated: int = 0
    seconds: float = 0.0
    history: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def struck_by(self, strikes: tuple[Strike, ...]) -> int:
        """How often one of these has struck it."""
        return sum(self.struck[what] for what in self.struck if what.partition(",")[0] in {s.__name__ for s in strikes})


@dataclass
class Campaign:
    cluster: Cluster
    folder: Path
    most: int = STRUCK
    of_cluster: threading.RLock = field(default_factory=threading.RLock)
    of_references: threading.Lock = field(default_factory=threading.Lock)
    at_all_runs: list[Strike] = field(default_factory=list)

    def daemon(self, name: str) -> int:
        return int((self.cluster.dir / f"{name}.pid").read_text())

    def kill_and_start(self, name: str, away: float = 0.0) -> None:
        _signal(self.daemon(name), signal.SIGKILL)
        time.sleep(away)
        program, _, node = name.partition("-")
        words = [program, "-f", str(self.cluster.conf), *(["-N", node] if node else [])]
        subprocess.run(words, check=True, capture_output=True)
        limit = time.monotonic() + 60
        while not _tell("scontrol", "ping"):
            assert time.monotonic() < limit, f"{name} does not come back"
            time.sleep(0.2)

    def run(self, seed: int) -> Record:
        """Submit one run, strike it until it is finished, or was struck so often, and check it."""
        draw, since = random.Random(seed), time.monotonic()
        (nodes, ranks), settings = draw.choice(SHAPES), draw.choice(SETTINGS)
        every = draw.choice(["0", "0", "2"])
        partition = draw.choice(["low", "low", "grace"])
        words = [*settings, "--checkpoint-every", every]
        record = Record(seed, [f"{nodes} x {ranks} ranks", *words, partition])
        cwd, before = self.folder / str(seed), len(self.at_all_runs)
        (cwd / "runs").mkdir(parents=True)
        (cwd / "soaked.py").write_text(MODEL)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={RUNS_DISK}m", "none", str(cwd / "runs")], check=True)
        run = Disturbed(cwd, {})
        try:
            reference = self._reference(nodes * ranks, settings)
            self._submit(run, nodes, ranks, partition, words)
            self._strike_until_finished(run, record, draw)
            of_cluster = sum(strike in ABRUPT for strike in self.at_all_runs[before:])
            self._check(run, record, reference, float(every), of_cluster)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            record.failures.append(f"{type(error).__name__}: {error}"[-3000:])
        record.starts, record.seconds = len(run.starts()), time.monotonic() - since
        if record.failures:
            record.history += [json.dumps(start) for start in run.starts()] + run.log().splitlines()[-60:]
        for job in (run.job, run.report):
            if job and run.in_queue(job):
                _tell("scancel", "--signal=KILL", "--full", job)
                _tell("scancel", job)
        _tell("umount", "-l", str(cwd / "runs"))
        return record

    def _reference(self, ranks: int, settings: tuple[str, ...]) -> Path:
        """The folder of the same run, undisturbed."""
        folder = self.folder / "-".join(["alone", str(ranks), *settings])
        with self.of_references:
            if not folder.exists():
                folder.mkdir()
                (folder / "soaked.py").write_text(MODEL)
                (folder / "fast").touch()
                on_this_machine(folder, ranks, "soaked:Net", *TRAIN, *settings)
                (folder / "run").symlink_to("alone")
        return folder

    def _submit(self, run: Disturbed, nodes: int, ranks: int, partition: str, words: list[str]) -> None:
        shape = ("--nodes", str(nodes), "--ranks-per-node", str(ranks), "--cpus-per-rank", "1")
        line = ("python", "-m", "launch.submit", "--models", "soaked:Net", *shape, "--partition", partition)
        with self.of_cluster:
            run.submitted = time.strftime(CONTROLLERS_TIME)
            run._read(command(*line, *TRAIN, *words, cwd=run.cwd, timeout=300))

    def _strike_until_finished(self, run: Disturbed, record: Record, draw: random.Random) -> None:
        seen = 0  # starts that a strike has met
        while not run.finished() and sum(record.struck.values()) < self.most:
            in_start = draw.random() < 0.4
            wait = draw.uniform(0, 8 if in_start else 3)
            everyone = draw.random() < 0.2
            kinds = OF_THE_CLUSTER if everyone else OF_A_RUN
            [strike] = draw.choices(list(kinds), list(kinds.values()))
            own = random.Random(draw.randrange(2**31))
            when = self._come_to(run, record, seen if in_start else 10**6)
            time.sleep(wait)
            if run.finished():
                break
            seen = len(run.starts())
            if everyone:
                self.at_all_runs.append(strike)
            with self.of_cluster if everyone else contextlib.nullcontext():
                said = strike(self, run, own)
            record.history.append(f"{strike.__name__}, {when}: {'missed' if said == '' else said or 'struck'}")
            if said != "":
                what = f"{strike.__name__}, {when}"
                record.struck[what] = 1 + record.struck.get(what, 0)
        run.hurry()
        while not run.finished():
            self._come_to(run, record, 10**6)
        run.until(lambda: not run.in_queue())

    def _come_to(self, run: Disturbed, record: Record, seen: int) -> str:
        """Wait until the run has begun more starts than were `seen`, or trains, or is finished, and say which.

        Where its job is gone for good, have it submitted again, if that is a person's part.
        """
        steps, limit = run.steps(), time.monotonic() + 900
        while not run.finished():
            assert time.monotonic() < limit, f"nothing happened for 15 minutes:\n{slurm('squeue')}"
            if len(run.starts()) > seen:
                return "in its start"
            if run.steps() > steps + 2:
                return "training"
            if not run.in_queue():
                self._submit_again(run, record)
            self._heal(run, record)
            time.sleep(0.3)
        return "finished"

    def _heal(self, run: Disturbed, record: Record) -> None:
        """Do an operator's part: a controller that was killed forgets what it did last, starts a job twice, drains the
        node and holds the job."""
        # Or the controller forgot that a strike at a node has ended: none is under way where the lock is free.
        drained = re.search("Duplicate jobid|test", _ask("sinfo", "-h", "-R", "-o", "%E"))
        if drained and self.of_cluster.acquire(blocking=False):
            for node in NODES:
                resumed(node)
            self.of_cluster.release()
        if "held" in _ask("squeue", "-h", "-t", "PD", "-o", "%r", "-j", run.job):
            shown = run.status().stdout
            assert f"`scontrol release {run.job}`" in shown, shown
            record.released += _tell("scontrol", "release", run.job)
            record.history.append("released")

    def _submit_again(self, run: Disturbed, record: Record) -> None:
        with self.of_cluster:
            if run.finished() or run.in_queue():
                return
            shown = run.status().stdout
            mine = [start for start in run.starts() if start.get("job") == run.job]
            too_early = record.struck_by((kill_ranks,)) > 0 and (not mine or "given_up" in mine[-1])
            if self._forgotten(run):
                record.forgotten += 1
            elif not too_early:
                record.by_a_person += 1
                assert record.by_a_person <= record.struck_by(BY_A_PERSON), f"it ended, and nobody said so:\n{shown}"
            run.submitted = time.strftime(CONTROLLERS_TIME)
            done = run.status("resubmit")
            assert done.returncode == 0, f"{shown}{done.stdout}{done.stderr}"
            run._read(done)
            record.history.append(f"submitted again: {' / '.join(shown.splitlines()[1:4])}")

    def _forgotten(self, run: Disturbed) -> bool:
        """Whether a controller that was killed had not written down that the run was submitted, as its log says; or
        that another start was to follow the last."""
        lines = (self.cluster.dir / "slurmctld.log").read_text(errors="replace").splitlines()
        since = [line for line in lines if line[1:] >= run.submitted]
        if any(line.endswith(f"Purged files for defunct batch JobId={run.job}") for line in since):
            return True
        again = f"job {run.job} is queued again, and continues there"
        logs = run.cwd.glob(f"runs/.submissions/*/{run.job}_0_log.out")
        recovered = any(f" Recovered JobId={run.job} " in line for line in since)
        return recovered and any(path.read_text().rstrip().endswith(again) for path in logs)

    def _check(self, run: Disturbed, record: Record, reference: Path, every: float, of_cluster: int) -> None:
        """`of_cluster`: strikes at all runs after which a checkpoint may be older than the last step."""
        (run.cwd / "run").symlink_to(run.folder)
        record.failures += wrong(run.cwd, reference)
        steps = [start["step"] for start in run.starts()]
        damaged = any("checkpoint" in line for line in record.history)
        if steps != sorted(steps) and not damaged:
            record.failures.append(f"a saved step was lost: its starts began at {steps}")
        alone = (reference / "steps0").stat().st_size
        starts = len(json.loads((run.folder / "environment.json").read_text()))
        # Each start calls the model as often as the undisturbed one did before it trained.
        record.steps_repeated = run.steps() - STEPS - starts * (alone - STEPS)
        abrupt = record.struck_by(tuple(set(ABRUPT) - set(OF_THE_CLUSTER))) + of_cluster
        between = 2 * (SYNC + every) / PAUSE
        if not damaged and record.steps_repeated > abrupt * between:
            record.failures.append(f"{record.steps_repeated} steps were trained twice, after {abrupt} abrupt ends")


@contextlib.contextmanager
def a_cluster() -> Iterator[Cluster]:
    if why := why_impossible():
        lacking(f"SLURM ({why})")
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="fashion_ddp_soak_", dir="/var/tmp")))
    os.environ["SLURM_CONF"] = str(cluster.conf)
    cluster.up()
    try:
        yield cluster
    finally:
        cluster.down()


def _line(run: Record) -> str:
    text = f"run {run.seed} ({' '.join(run.settings)}): {sum(run.struck.values())} faults, {run.starts} starts"
    if not run.failures:
        resubmitted = f"submitted again {run.by_a_person} times"
        return f"{text}, {run.steps_repeated} steps trained twice, {resubmitted}, {run.seconds:.0f} s"
    again = f"; again: python tests/soak_slurm.py --run {run.seed}"
    return "\n  ".join(
        [f"FAILED {text}{again}", *run.failures, "what struck it, its starts, and its log:", *run.history]
    )


def totals(runs: list[dict[str, Any]]) -> dict[str, Any]:
    struck = sum((Counter(run["struck"]) for run in runs), Counter())
    names = ("starts", "by_a_person", "released", "forgotten", "steps_repeated")
    sums = {name: sum(run[name] for run in runs if not run["failures"]) for name in names}
    failures = sum(bool(run["failures"]) for run in runs)
    return {
        "faults": struck.total(),
        "runs": len(runs),
        "failures": failures,
        **sums,
        "struck": dict(sorted(struck.items())),
    }


def soak(asked: argparse.Namespace, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Runs by seed until so many faults have struck, those in the file included; it is written after each run."""
    out: Path | None = asked.out
    runs: list[dict[str, Any]] = json.loads(out.read_text())["every_run"] if out and out.exists() else []
    draw, known = random.Random(asked.seed), {run["seed"] for run in runs}
    lock = threading.Lock()

    def one_after_another(campaign: Campaign) -> None:
        while True:
            with lock:
                if totals(runs)["faults"] >= asked.faults:
                    return
                seed = draw.randrange(2**31)
            if seed in known:
                continue
            done = campaign.run(seed)
            with lock:
                say(_line(done))
                runs.append(asdict(done) | {"history": done.history if done.failures else []})
                if out:
                    _write(out, runs)

    with tempfile.TemporaryDirectory(prefix="soak", dir="/var/tmp") as folder, a_cluster() as cluster:
        campaign = Campaign(cluster, Path(folder))
        if asked.run is not None:
            one = campaign.run(asked.run)
            say("\n  ".join([_line(one), *one.history]))
            return totals([asdict(one)])
        with ThreadPoolExecutor(asked.at_once) as pool:
            for future in [pool.submit(one_after_another, campaign) for _ in range(asked.at_once)]:
                future.result()
    return totals(runs)


def _write(out: Path, runs: list[dict[str, Any]]) -> None:
    where = {"cpu": machine.cpu_name(), "cores": os.cpu_count(), "system": platform.platform()}
    version = slurm("sinfo", "--version").strip()
    made = {"slurm": version, "versions": provenance.versions(), "git_commit": provenance.git_commit()}
    new = out.with_suffix(".new")
    new.write_text(json.dumps(where | made | totals(runs) | {"every_run": runs}, indent=1) + "\n")
    new.replace(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="runs are made until so many have struck")
    parser.add_argument("--seed", type=int, default=0, help="what everything is drawn from")
    parser.add_argument("--at-once", type=int, default=2, help="runs that are submitted at the same time")
    parser.add_argument("--run", type=int, metavar="SEED_OF_RUN", help="one run alone, by its own seed")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON; where it is there, it is gone on with")
    figures = soak(parser.parse_args())
    print(json.dumps(figures, indent=1))
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
