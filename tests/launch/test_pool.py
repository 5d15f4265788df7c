"""launch.local --jobs: several runs at once, each with its share of the machine, its log and its true record."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT
from faults import Fault, start_tiny
from gates import LOCAL, Started, gate
from reports import Report
from test_local import EX_TEMPFAIL, SMALL, of, report, until_gone

from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed import machine
from launch import mps
from launch.pool import train
from launch.processes import LocalRanks, LocalRun
from launch.share import MachineShare, assign_cards, divide, visible_cards

TWO_AT_ONCE = [*LOCAL, *SMALL, "--jobs", "2"]
UUIDS = ["GPU-5a1c", "GPU-0b7f", "GPU-9d3e"]
SYNTHETIC = ((1, 28, 28), 10, 12_000)

# A model that fails in the middle of its first epoch: after the estimate and the warm-up, when it has a folder.
BREAKS = """
from torch import nn

class Net(nn.Linear):
    calls = 0
    def __init__(self, image_shape, classes):
        super().__init__(784, classes)
    def forward(self, x):
        Net.calls += 1
        assert Net.calls <= 20, "the user s model broke"
        return super().forward(x.flatten(1))
"""


# --- Who gets what ----------------------------------------------------------------------------------------------
@pytest.mark.quick
@pytest.mark.parametrize(
    ("visible", "count", "jobs", "ranks", "assigned"),
    [
        (None, 4, 4, 1, ["0", "1", "2", "3"]),
        (None, 5, 2, 2, ["0,1", "2,3"]),
        ("1,3", 2, 2, 1, ["1", "3"]),
        ("3, 1", 2, 2, 1, ["3", "1"]),
        (",".join(UUIDS), 3, 3, 1, UUIDS),
        ("2,0,-1,1", 2, 2, 1, ["2", "0"]),  # CUDA looks no further than -1
        (None, 2, 5, 1, ["0", "1", "0", "1", "0"]),  # more runs than cards
        ("7", 1, 3, 1, ["7", "7", "7"]),
        (None, 5, 3, 2, ["0,1", "2,3", "0,1"]),
    ],
)
def test_each_run_has_cards_of_its_own_by_the_names_that_the_user_gave(
    visible: str | None, count: int, jobs: int, ranks: int, assigned: list[str]
) -> None:
    cards = visible_cards(count, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert assign_cards(cards, jobs, ranks) == assigned


@pytest.mark.quick
def test_runs_on_a_cpu_share_its_cores_and_never_have_less_than_a_thread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 12)
    monkeypatch.setattr(machine, "FLOPS_PER_THREAD", 10**6)
    cfg = make_config({"device": "cpu", "model": "linear", "batch_size": 1024})  # a step for any number of threads
    # (jobs, ranks asked for): (ranks, threads). One job gets all that there is.
    expected = {
        (1, 0): (1, 12),
        (4, 1): (1, 3),
        (1, 4): (4, 3),
        (3, 0): (1, 4),
        (3, 2): (2, 2),
        (5, 0): (1, 2),
        (16, 0): (1, 1),
        (8, 4): (4, 1),
    }
    shares = {asked: divide(*asked, cfg, [cfg], SYNTHETIC) for asked in expected}
    assert {asked: (share.ranks, *share.threads) for asked, share in shares.items()} == expected
    assert shares[3, 2].cards == (None, None, None)
    # A small step takes one thread, unless another number is asked for.
    small = make_config({"device": "cpu", "model": "linear", "batch_size": 16})
    capsys.readouterr()
    assert divide(1, 0, cfg, [cfg, small], SYNTHETIC).threads == (12, 1)
    assert capsys.readouterr().out.startswith(
        "2 runs of 1 rank with 1 to 12 CPU threads each, on CPU, 12 cores; about "
    )
    asked = make_config({"device": "cpu", "model": "linear", "threads": 7})
    assert divide(3, 0, asked, [asked], SYNTHETIC).threads == (7,)


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[str | None, ...]]]:
    """The cards, the runs at once and the rank that each process started since the last call saw."""
    (tmp_path / "sitecustomize.py").write_text(
        "import json, os\nwith open(f'{os.getpid()}.json', 'w') as file:\n    json.dump(dict(os.environ), file)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{CHECKOUT}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,GPU-b,0")
    monkeypatch.setenv("FASHION_DDP_SIDE_BY_SIDE", "9")  # of another launcher, above this one

    def seen() -> list[tuple[str | None, ...]]:
        found = []
        for path in tmp_path.glob("*.json"):
            names = ("CUDA_VISIBLE_DEVICES", "FASHION_DDP_SIDE_BY_SIDE", "LOCAL_RANK")
            found.append(tuple(map(json.loads(path.read_text()).get, names)))
            path.unlink()
        return sorted(found)

    return seen


@pytest.mark.quick
def test_runs_at_once_see_cards_of_their_own_and_how_many_they_are(
    surroundings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = ("--no-such-flag",)
    jobs = [LocalRun(make_config({"seed": seed}), refused) for seed in (1, 2)]
    assert train(jobs, MachineShare(2, (1, 1), ("1,3", "GPU-b,0", "2,4"))) == 1
    assert surroundings() == [*(("1,3", "2", rank) for rank in "01"), *(("GPU-b,0", "2", rank) for rank in "01")]
    said = capsys.readouterr().out
    begun = [("[1/2] cnn-blog-seed1", "1,3"), ("[2/2] cnn-blog-seed2", "GPU-b,0")]
    assert re.findall("^(.*) begins on card (.*);", said, re.MULTILINE) == begun
    assert said.endswith("2 of 2 runs failed: cnn-blog-seed1, cnn-blog-seed2\n")
    assert train([*jobs, LocalRun(make_config({"seed": 3}), refused)], MachineShare(1, (1, 1, 1), ("3",))) == 1
    assert surroundings() == [("3", "1", None)] * 3
    # A run that is alone sees what its launcher sees.
    assert LocalRanks(refused, 1).wait() == 2 and surroundings() == [("1,3,GPU-b,0", "1", None)]
    killed = LocalRanks(refused, 1)
    killed.children[0].kill()
    assert killed.wait() == 128 + signal.SIGKILL


@pytest.mark.quick
def test_a_log_that_cannot_be_written_fails_its_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    jobs = [LocalRun(make_config({"runs_dir": tmp_path / at}), ("--no-such-flag",)) for at in ("file", "runs")]
    assert train(jobs, MachineShare(1, (1, 1), (None,))) == 1
    said = capsys.readouterr().out
    assert "[1/2] cnn-blog-seed42 FAILED: it could not be begun: " in said and f"{tmp_path / 'file'}" in said
    assert "2 of 2 runs failed" in said
    assert "--no-such-flag" in (tmp_path / "runs" / "cnn-blog-seed42.log").read_text()


@pytest.mark.quick
def test_mps_is_started_where_it_is_needed_and_nobody_runs_it_and_ended_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def control(script: str) -> None:
        (tmp_path / mps.CONTROL).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / mps.CONTROL).chmod(0o755)

    def asked(needed: bool = True) -> tuple[bool, str, str]:
        """Whether runs are given variables, what the daemon was asked, what is said."""
        with mps.running(needed) as variables:
            found = bool(variables)
        log = tmp_path / "log"
        told = log.read_text() if log.exists() else ""
        log.unlink(missing_ok=True)
        return found, told, capsys.readouterr().out

    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(mps, "PROC", tmp_path)
    assert asked(needed=False) == (False, "", "")
    assert asked() == (False, "", f"{mps.CONTROL} is not installed: runs on the same card take turns\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    control(
        f'echo "$*" $(test -n "$1" || cat) $CUDA_VISIBLE_DEVICES >> {tmp_path}/log; test -d $CUDA_MPS_PIPE_DIRECTORY'
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert asked() == (True, "-d\n quit\n", "runs on the same card share it by MPS, which ends with them\n")
    process = tmp_path / "4711"
    process.mkdir()
    (process / "comm").write_text("nvidia-cuda-mps\n")
    running = (False, "", "runs on the same card share it by the MPS that is running\n")
    assert asked() == running
    (process / "comm").write_text("python\n")
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somebody's")
        assert asked() == running
    control("echo no such luck >&2; exit 1")
    assert asked() == (False, "", f"{mps.CONTROL} did not start (no such luck): runs on the same card take turns\n")


# --- Real runs --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_two_at_once_go_on_when_one_fails_and_the_report_says_that_times_were_shared(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BREAKS)
    words = [*TWO_AT_ONCE, "--models", "linear", "mine:Net", "mlp"]
    with Started(tmp_path, words, gate("sync point", count=2)) as run:
        run.at_gate(2)  # linear stands there still when mlp has come: the two are trained at the same time
        said = run.printed().splitlines()
        assert run.wait() == 1, run.printed()
    assert said[0].startswith("3 runs, 2 at once, of 1 rank with ")
    begun = [next(n for n, line in enumerate(said) if line.startswith(f"[{k}/3]") and "begins" in line) for k in (1, 2)]
    failed = next(n for n, line in enumerate(said) if line.startswith("[2/3] mine_Net-") and "FAILED" in line)
    third = next(n for n, line in enumerate(said) if line.startswith("[3/3] mlp-") and "begins" in line)
    assert begun[0] < begun[1] < failed < third  # it waited for a place
    assert "    AssertionError: the user s model broke" in said[failed:third]  # the log's last lines
    ends = [line for line in run.printed().splitlines() if "finished: test accuracy" in line]
    assert len(ends) == 2 and f"{100 * of(tmp_path, 'mlp')['test/accuracy']:.2f} %" in " ".join(ends)
    assert "1 of 3 runs failed: mine_Net-" in run.printed()
    # What a run says itself stands in its own log, and nowhere else.
    assert "epoch 1/2" not in run.printed() and "Traceback" not in run.printed().partition("[2/3]")[0]
    [log] = tmp_path.glob("runs/mlp-*.log")
    assert log.read_text().count("epoch 1/2 |") == log.read_text().count("epoch 2/2 |") == 1
    assert str(log.relative_to(tmp_path)) in said[third] and "times are shared" in log.read_text()

    assert report(tmp_path) == {"linear": "finished", "mlp": "finished", "mine:Net": "failed"}
    threads = max(1, machine.usable_cores() // 2)
    for model in ("linear", "mlp"):
        kept, [start] = of(tmp_path, model), of(tmp_path, model, "environment")
        assert (kept["side_by_side"], kept["threads"], kept["world_size"]) == (2, threads, 1)
        assert start["side_by_side"] == 2 and kept["timings_mixed"] is False
    shown = Report(tmp_path / "report", run.printed())
    assert shown.column("times shared by") == ["2 runs", "2 runs"]
    for text in (shown.text, shown.markdown, shown.printed):
        assert "Times shared by up to 2 runs at once: all runs." in text


def test_a_run_that_goes_on_beside_others_has_mixed_times_and_keeps_the_mark(tmp_path: Path) -> None:
    stop = [Fault("sync point", "TERM", count=3)]
    assert start_tiny(1, tmp_path, [], stop, FASHION_DDP_SIDE_BY_SIDE="3").wait() == [75]
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert kept["side_by_side"] == 3 and kept["timings_mixed"] is False
    ranks = start_tiny(1, tmp_path)
    assert ranks.wait() == [0] and "beside other runs than before, so its timings are mixed" in ranks.printed()
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert kept["side_by_side"] == 3 and kept["timings_mixed"] is True
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [start["side_by_side"] for start in starts] == [3, 1]


def weights(folder: Path) -> dict[str, bytes]:
    """Of each finished run, by its model."""
    files = sorted(folder.glob("runs/*/model.safetensors"))
    return {path.parent.name.partition("-")[0]: path.read_bytes() for path in files}


@pytest.mark.slow
def test_stopped_side_by_side_and_continued_a_run_has_the_weights_of_one_that_trained_alone(tmp_path: Path) -> None:
    models = ["--models", "linear", "cnn", "mlp", "--hidden-units", "4"]
    alone, stopped = (tmp_path / name for name in ("alone", "stopped"))
    for folder in (alone, stopped):
        folder.mkdir()
    with Started(stopped, [*TWO_AT_ONCE, *models], gate("sync point", count=2), terminal=True) as run:
        run.at_gate(2)
        run.type(b"\x03")
        run.told(2)
        assert run.wait() == EX_TEMPFAIL, run.printed()
    assert run.printed().count("stopped, and saved") == 2 and "Traceback" not in run.printed()
    assert run.printed().count("the same command continues") == run.printed().count("stopped (SIGINT)") == 1
    assert not weights(stopped) and not list(stopped.glob("runs/mlp-*"))  # the third was not begun
    assert [of(stopped, model)["status"] for model in ("linear", "cnn")] == ["stopped"] * 2
    assert not (stopped / "report").exists()
    before = [(log, log.read_text()) for log in stopped.glob("runs/*.log")]
    with Started(stopped, [*TWO_AT_ONCE, *models]) as run:
        assert run.wait() == 0, run.printed()
    assert len(before) == 2 and all(log.read_text().startswith(text) for log, text in before)
    assert all("continued after step" in log.read_text() for log, _ in before)
    assert report(stopped) == dict.fromkeys(("linear", "cnn", "mlp"), "finished")
    assert sorted(weights(stopped)) == ["cnn", "linear", "mlp"]

    threads = str(of(stopped, "cnn")["threads"])
    cnn = ["--models", "cnn", "--hidden-units", "4"]
    with Started(alone, [*LOCAL, *SMALL, *cnn, "--ranks", "1", "--threads", threads]) as run:
        assert run.wait() == 0, run.printed()
    assert (of(stopped, "cnn")["side_by_side"], of(alone, "cnn")["side_by_side"]) == (2, 1)
    assert not list(alone.glob("runs/*.log")) and "epoch 1/2" in run.printed()  # the terminal is its own
    assert weights(alone)["cnn"] == weights(stopped)["cnn"]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_runs_at_once(tmp_path: Path) -> None:
    words = [*TWO_AT_ONCE, "--models", "linear", "mlp", "--ranks", "2"]
    with Started(tmp_path, words, gate("sync point"), terminal=True) as run:
        pids = run.at_gate(4)
        os.kill(pids[0], signal.SIGSTOP)
        run.interrupt_until_it_ends()
        until_gone(run, pids)
        assert run.process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in run.printed()
    assert run.printed().count("interrupt again") == run.printed().count("interrupted twice") == 1
