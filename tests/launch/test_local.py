"""launch.local: many runs on this machine and their comparison; what is refused, what fails, and what is stopped."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from gates import LOCAL, Started, gate, living
from reports import make_run

from fashion_ddp.config.layers import make_config
from launch import local, processes

EX_TEMPFAIL = 75
SMALL = ["--dataset", "synthetic", "--device", "cpu", "--tracker", "none", "--epochs", "2", "--checkpoint-every", "999"]
ONE = [*LOCAL, "--models", "mlp", *SMALL, "--ranks", "2"]
TWO = [*LOCAL, "--models", "linear", "mlp", *SMALL, "--ranks", "2"]


def of(folder: Path, model: str, name: str = "summary") -> Any:
    """The content of a JSON file of a model's run."""
    [path] = folder.glob(f"runs/{model}-*/{name}.json")
    return json.loads(path.read_text())


def saved(folder: Path, model: str) -> list[int]:
    return sorted(int(p.stem.removeprefix("step-")) for p in folder.glob(f"runs/{model}-*/checkpoints/*"))


def report(folder: Path) -> dict[str, str]:
    """The status of each model's run as the report says."""
    return {run["model"]: run["status"] for run in json.loads((folder / "report/report.json").read_text())["runs"]}


def test_local_stops_continues_compares_and_takes_finished_runs_as_they_are(tmp_path: Path) -> None:
    with Started(tmp_path, TWO, gate("sync point", word="mlp")) as run:
        run.at_gate(2)
        run.process.send_signal(signal.SIGTERM)
        run.told(2)
        assert run.wait() == EX_TEMPFAIL, run.printed()
    assert "2 runs of" in run.printed() and "about" in run.printed()
    assert run.printed().count("stopped (") == run.printed().count("the same command continues") == 1
    assert of(tmp_path, "mlp")["status"] == "stopped" and saved(tmp_path, "mlp") == [1]
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


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """In an empty folder, what launch.local says to flags that it refuses."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str) -> str:
        with pytest.raises(SystemExit) as end:
            local.main([*flags])
        assert end.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.mark.quick
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
def test_local_refuses_a_mistake_before_any_run(refused: Any, flags: tuple[str, ...], said: str) -> None:
    error = refused("--dataset", "synthetic", *flags)
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not list(Path().iterdir())


@pytest.mark.quick
def test_a_login_node_of_a_cluster_is_refused_with_the_command_for_the_cluster(refused: Any) -> None:
    Path("sinfo").write_text("#!/bin/sh\n")
    Path("sinfo").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.getcwd(), prepend=os.pathsep)
        error = refused("--models", "linear", "--jobs", "3", "--dataset", "synthetic")
    [line] = re.findall(r"`python -m launch.submit (.*?)`", error)
    assert line == "--models linear --recipe blog --seeds 42 --at-once 3 --dataset synthetic"


@pytest.mark.quick
def test_a_rank_that_fails_ends_the_others_and_kills_those_that_do_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    deaf = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; exec sleep 60"], stdout=subprocess.PIPE)
    assert deaf.stdout and deaf.stdout.readline()
    ranks = processes.FailTogether([subprocess.Popen(["sleep", "60"]), deaf, subprocess.Popen(["sh", "-c", "exit 3"])])
    while None in (codes := ranks.poll()):
        time.sleep(0.01)
    assert codes == [-signal.SIGTERM, -signal.SIGKILL, 3] and ranks.failed == 3


@pytest.mark.quick
@pytest.mark.parametrize(
    ("status", "code", "flags", "reused", "fresh"),
    [
        ("finished", "this", (), True, False),
        ("finished", "other", (), False, True),  # kept aside, and trained anew
        ("finished", "other", ("--reuse",), True, False),
        ("finished", "this", ("--fresh",), False, True),
        ("stopped", "this", (), False, False),
    ],
)
def test_a_run_that_is_there_is_taken_trained_anew_or_continued(
    status: str, code: str, flags: tuple[str, ...], reused: bool, fresh: bool, tmp_path: Path
) -> None:
    cfg = make_config({"run_dir": tmp_path / "run"})
    make_run(cfg.run_dir, status=status, data={}, run_dir=cfg.run_dir)
    [start] = json.loads((tmp_path / "run" / "environment.json").read_text())
    made_by = start["made_by"] | ({"code": "other"} if code == "other" else {})
    run = local._reuse_or_retrain(processes.LocalRun(cfg, flags), made_by)
    assert (run.reused, "--fresh" in run.argv) == (reused, fresh)


ESTIMATE = gate("fashion_ddp.models.architectures", program="launch.share")


def until_gone(run: Started, pids: list[int]) -> None:
    run.until(lambda: not any(living(pid) for pid in pids))


@pytest.mark.slow
def test_ranks_save_and_end_when_local_is_killed_and_the_same_command_continues(tmp_path: Path) -> None:
    with Started(tmp_path, ONE, gate("sync point")) as run:
        pids = run.at_gate(2)
        run.process.kill()
        run.process.wait()
        run.let_through()
        until_gone(run, pids)
    assert of(tmp_path, "mlp")["error"].startswith("stopped (the launcher died)") and saved(tmp_path, "mlp") == [1]
    with Started(tmp_path, ONE) as run:
        assert run.wait() == 0
    [path] = tmp_path.glob("runs/mlp-*/steps.jsonl")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, 2 * 94 + 1))


@pytest.mark.slow
def test_nothing_is_left_when_local_is_killed_while_it_estimates(tmp_path: Path) -> None:
    with Started(tmp_path, ONE, ESTIMATE) as run:
        pids = run.at_gate()
        run.process.kill()
        run.process.wait()
        run.let_through()
        until_gone(run, pids)
    assert "Traceback" not in run.printed() and not (tmp_path / "runs").exists()


GATES = {"import": gate("fashion_ddp.runs.claim", program="launch.local"), "data": gate("load", program="launch.local")}
GATES |= {"estimate": ESTIMATE, "run": gate("sync point")}


@pytest.mark.slow
@pytest.mark.parametrize("where", GATES)
def test_ctrl_c_stops_local_wherever_it_is(where: str, tmp_path: Path) -> None:
    with Started(tmp_path, ONE, GATES[where], terminal=True) as run:
        run.at_gate()
        run.type(b"\x03")
        run.until(lambda: "interrupted: ends when all is saved" in run.printed())
        if where == "run":
            run.told(2)
        assert run.wait() == EX_TEMPFAIL, run.printed()
    assert "Traceback" not in run.printed() and run.printed().count("interrupted") == 1
    assert run.printed().count("stopped (SIGINT)") == run.printed().count("the same command continues") == 1
    assert (tmp_path / "runs").exists() == (where == "run")


@pytest.mark.slow
def test_local_told_between_two_runs_begins_no_other_and_told_in_the_report_finishes_it(tmp_path: Path) -> None:
    with Started(tmp_path, TWO, gate("end", word="linear")) as run:  # on rank 0, when all is done but for the summary
        run.at_gate()
        run.process.send_signal(signal.SIGUSR2)
        run.told()
        assert run.wait() == EX_TEMPFAIL, run.printed()
    assert "stopped (SIGUSR2) before run 2 of 2: the same command continues" in run.printed()
    assert of(tmp_path, "linear")["status"] == "finished" and not list(tmp_path.glob("runs/mlp-*"))
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
                children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
                ranks = [pid for pid in children if b"fashion_ddp.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
                for pid, number in itertools.product(ranks, storm):
                    os.kill(int(pid), number)
            time.sleep(0.001)
        assert run.process.returncode == EX_TEMPFAIL, run.printed()
    assert of(tmp_path, "mlp")["error"].startswith("stopped (SIGTERM)") and saved(tmp_path, "mlp") == [1]
    assert "Traceback" not in run.printed()


@pytest.mark.slow
def test_local_goes_on_with_the_next_run_when_a_rank_is_killed(tmp_path: Path) -> None:
    words = [*LOCAL, "--models", "mlp", "linear", *SMALL, "--ranks", "2"]
    with Started(tmp_path, words, gate("sync point", word="mlp")) as run:
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
