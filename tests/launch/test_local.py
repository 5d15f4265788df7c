"""launch.local: many runs on this machine and their comparison; what is refused, what fails, and what is stopped."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import command
from gates import LOCAL, Started, gate, living

EX_TEMPFAIL = 75
SMALL = [
    "--dataset",
    "synthetic",
    "--device",
    "cpu",
    "--tracker",
    "none",
    "--epochs",
    "2",
    "--checkpoint-every",
    "1000",
]
ONE = [*LOCAL, "--models", "mlp", *SMALL, "--ranks", "2"]
TWO = [*LOCAL, "--models", "linear", "mlp", *SMALL, "--ranks", "2"]


def summary(folder: Path, model: str) -> dict[str, Any]:
    [path] = folder.glob(f"runs/{model}-*/summary.json")
    return json.loads(path.read_text())


def saved(folder: Path, model: str) -> list[int]:
    return sorted(int(p.stem.removeprefix("step-")) for p in folder.glob(f"runs/{model}-*/checkpoints/*"))


def steps(folder: Path, model: str) -> list[int]:
    [path] = folder.glob(f"runs/{model}-*/steps.jsonl")
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def report(folder: Path) -> dict[str, str]:
    """The status of each model's run as the report says."""
    runs = json.loads((folder / "report" / "report.json").read_text())["runs"]
    return {run["model"]: run["status"] for run in runs}


def test_local_stops_continues_compares_and_takes_finished_runs_as_they_are(tmp_path: Path) -> None:
    with Started(tmp_path, TWO, gate("sync point", word="mlp")) as run:
        run.at_gate(2)
        run.process.send_signal(signal.SIGTERM)
        run.told(2)
        assert run.wait() == EX_TEMPFAIL, run.printed()
    assert "2 runs of" in run.printed() and "about" in run.printed()
    assert run.printed().count("stopped (") == run.printed().count("the same command continues") == 1
    assert summary(tmp_path, "mlp")["status"] == "stopped" and saved(tmp_path, "mlp") == [1]
    [made] = tmp_path.glob("runs/linear-*/summary.json")
    content = made.read_bytes()
    (tmp_path / "screen").unlink()
    with Started(tmp_path, TWO) as run:
        assert run.wait() == 0, run.printed()
    assert "1 run of" in run.printed() and "continued after step 1" in run.printed()
    assert run.printed().count("taken as it is") == 1 and made.read_bytes() == content
    assert "report.html" in run.printed().splitlines()[-1]
    assert report(tmp_path) == {"linear": "finished", "mlp": "finished"}
    assert len(list((tmp_path / "runs").iterdir())) == 2  # nothing was kept aside


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--sedes", "1"), "unknown flag --sedes; did you mean --seeds?"),
        (("--models",), "models and seeds need at least one value each"),
        (("--models", "linaer"), "did you mean 'linear'?"),
        (("--ranks", "-1"), "ranks must be at least 0"),
        (("--jobs", "0"), "jobs must be at least 1, got 0"),
        (("--seeds", "1", "1"), "two of the runs would have the same folder, runs/linear-blog-seed1"),
        (("--lr", "-1"), "lr must be greater than 0"),
    ],
)
def test_local_refuses_a_mistake_before_any_run(flags: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = command("python", "-m", "launch.local", "--dataset", "synthetic", *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr
    assert not list(tmp_path.iterdir())


def test_local_ends_the_other_ranks_when_one_fails(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\nfrom torch import nn\n\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, image_shape, classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, classes))\n"
        "    def forward(self, x):\n"
        "        if self.training and os.environ.get('RANK') == '1':\n"
        "            raise RuntimeError('rank 1 broke')\n"
        "        return super().forward(x)\n"
    )
    words = ("python", "-m", "launch.local", "--models", "mine:Net", "linear", "--ranks", "2", "--dataset", "synthetic")
    done = command(*words, "--tracker", "none", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 1 and "rank 1 broke" in done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    statuses = {run["model"]: run["status"] for run in report["runs"]}
    assert statuses["linear"] == "finished" and statuses.get("mine:Net") != "finished"


def until_gone(run: Started, pids: list[int]) -> None:
    run.until(lambda: not any(living(pid) for pid in pids))


def ranks_of(launcher: int) -> list[int]:
    """The ranks that a launcher has, as soon as they are what they are to be."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in children if b"fashion_ddp.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_ranks_save_and_end_when_local_is_killed_and_the_same_command_continues(tmp_path: Path) -> None:
    for ranks in (1, 2):
        with Started(tmp_path, [*ONE, "--ranks", str(ranks)], gate("sync point")) as run:
            pids = run.at_gate(ranks)
            run.process.kill()
            run.process.wait()
            run.let_through()
            until_gone(run, pids)
        assert summary(tmp_path, "mlp")["error"].startswith("stopped (the launcher died)")
        assert max(saved(tmp_path, "mlp")) == ranks  # one more step than the time before
    with Started(tmp_path, ONE) as run:
        assert run.wait() == 0
    assert steps(tmp_path, "mlp") == list(range(1, 2 * 94 + 1))


@pytest.mark.slow
def test_nothing_is_left_when_local_is_killed_while_it_estimates(tmp_path: Path) -> None:
    with Started(tmp_path, ONE, gate("torch", program="spawned")) as run:
        pids = run.at_gate()
        run.process.kill()
        run.process.wait()
        run.let_through()
        until_gone(run, pids)
    assert "Traceback" not in run.printed() and not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [
        gate("fashion_ddp.runs.claim", program="launch.local"),
        gate("load", program="launch.local"),
        gate("torch", program="spawned"),
        gate("sync point"),
    ],
    ids=["import", "data", "estimate", "run"],
)
def test_ctrl_c_stops_local_wherever_it_is(where: list[Any], tmp_path: Path) -> None:
    with Started(tmp_path, ONE, where, terminal=True) as run:
        run.at_gate()
        run.type(b"\x03")
        run.until(lambda: "interrupted: ends when all is saved" in run.printed())
        if where[0] == "fashion_ddp.train":
            run.told(2)
        assert run.wait() == EX_TEMPFAIL, run.printed()
    assert "Traceback" not in run.printed() and run.printed().count("interrupted") == 1
    assert run.printed().count("stopped (SIGINT)") == run.printed().count("the same command continues") == 1
    assert (tmp_path / "runs").exists() == (where[0] == "fashion_ddp.train")


@pytest.mark.slow
def test_ctrl_c_stops_local_though_the_reader_of_its_words_is_gone(tmp_path: Path) -> None:
    line = f"trap : INT; {' '.join(ONE)} 2>&1 | tee log; exit ${{PIPESTATUS[0]}}"
    with Started(tmp_path, ["bash", "-c", line], gate("load", program="launch.local"), terminal=True) as run:
        run.at_gate()
        run.type(b"\x03")
        run.told()
        assert run.wait() == EX_TEMPFAIL, run.printed()
    assert run.printed().split() == ["^C"] and (tmp_path / "log").read_text() == ""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_local_at_once_with_all_its_ranks(tmp_path: Path) -> None:
    with Started(tmp_path, ONE, gate("sync point"), terminal=True) as run:
        pids = run.at_gate(2)
        os.kill(pids[1], signal.SIGSTOP)
        run.interrupt_until_it_ends()
        until_gone(run, pids)
        assert run.process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in run.printed()
    assert run.printed().count("interrupt again") == run.printed().count("interrupted twice") == 1


@pytest.mark.slow
def test_local_told_between_two_runs_begins_no_other_and_told_in_the_report_finishes_it(tmp_path: Path) -> None:
    with Started(tmp_path, TWO, gate("end", word="linear")) as run:  # on rank 0, when all is done but for the summary
        run.at_gate()
        run.process.send_signal(signal.SIGUSR2)
        run.told()
        assert run.wait() == EX_TEMPFAIL, run.printed()
    assert "stopped (SIGUSR2) before run 2 of 2: the same command continues" in run.printed()
    assert summary(tmp_path, "linear")["status"] == "finished" and not list(tmp_path.glob("runs/mlp-*"))
    with Started(tmp_path, TWO, gate("fashion_ddp.compare:write", program="launch.local")) as run:
        run.at_gate()
        run.process.send_signal(signal.SIGUSR1)
        run.told()
        assert run.wait() == 0, run.printed()
    assert report(tmp_path) == {"linear": "finished", "mlp": "finished"}


@pytest.mark.slow
def test_ranks_under_a_storm_of_signals_from_their_first_moment_to_their_last_stop_in_order(tmp_path: Path) -> None:
    storm = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2)
    with Started(tmp_path, ONE) as run:
        while run.process.poll() is None:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                for pid in ranks_of(run.process.pid):
                    for number in storm:
                        os.kill(pid, number)
            time.sleep(0.001)
        assert run.process.returncode == EX_TEMPFAIL, run.printed()
    assert summary(tmp_path, "mlp")["error"].startswith("stopped (SIGTERM)") and saved(tmp_path, "mlp") == [1]
    assert "Traceback" not in run.printed()


@pytest.mark.slow
def test_local_goes_on_with_the_next_run_when_a_rank_is_killed(tmp_path: Path) -> None:
    with Started(
        tmp_path, [*LOCAL, "--models", "mlp", "linear", *SMALL, "--ranks", "2"], gate("sync point", word="mlp")
    ) as run:
        ranks = run.at_gate(2)
        os.kill(ranks[0], signal.SIGKILL)
        assert run.wait() == 1, run.printed()
        assert not any(living(pid) for pid in ranks)
    assert report(tmp_path)["linear"] == "finished" and report(tmp_path)["mlp"] in ("failed", "interrupted")


@pytest.mark.slow
def test_local_fails_without_a_report_where_every_run_failed_before_it_has_a_folder(tmp_path: Path) -> None:
    with Started(tmp_path, ONE, gate("load")) as run:
        os.kill(run.at_gate(2)[0], signal.SIGKILL)
        assert run.wait() == 1, run.printed()
    assert not (tmp_path / "runs").exists() and not (tmp_path / "report").exists()
    assert "no run folder" not in run.printed()
