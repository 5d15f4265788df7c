"""torchrun and accelerate launch, started as people start them: what works, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import faults
import pytest
from conftest import CHECKOUT, command

pytestmark = pytest.mark.slow

TRAIN = ("-m", "fashion_ddp.train", "--model", "mlp", "--dataset", "synthetic", "--epochs", "1", "--run-dir", "run")
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node")
FOUR_CARDS = str(CHECKOUT / "launch" / "accelerate_config.yaml")


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "summary.json").read_text())


def test_every_launcher_makes_the_same_run(tmp_path: Path) -> None:
    launchers = {"python": ("python",), "torchrun": (*TORCHRUN, "1"), "accelerate": ("accelerate", "launch", "--cpu")}
    weights, threads = set(), set()
    for name, words in launchers.items():
        (tmp_path / name).mkdir()
        done = command(*words, *TRAIN, "--tracker", "none", cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
        weights.add((tmp_path / name / "run" / "model.safetensors").read_bytes())
        threads.add(summary(tmp_path / name)["threads"])
    assert len(threads) == len(weights) == 1


def test_torchrun_starts_a_killed_rank_again_and_the_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    words = [*faults.SMALL, "--epochs", "8"]
    line = [*TORCHRUN, "2", "--max-restarts", "2", "-m", "fashion_ddp.train", *words]
    for name in ("struck", "whole"):
        (tmp_path / name).mkdir()
    run = tmp_path / "struck" / "run"
    with subprocess.Popen([str(Path(sys.executable).parent / line[0]), *line[1:]], cwd=run.parent) as launcher:
        faults.eventually(lambda: any(run.glob("checkpoints/step-*.pt")))
        os.kill(child(launcher.pid, b"RANK=1"), signal.SIGKILL)
        assert launcher.wait(300) == 0
    assert summary(run.parent)["starts"] == 2
    assert faults.start(2, tmp_path / "whole", words, every_step=False).wait() == [0, 0]
    assert faults.wrong(run.parent, tmp_path / "whole") == []


def child(parent: int, variable: bytes) -> int:
    """The process id of the child whose environment has a variable, as NAME=value."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return next(int(pid) for pid in children if variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def test_the_file_for_four_cards_trains_four_ranks_on_a_cpu_and_one_of_them_records(tmp_path: Path) -> None:
    words = ("accelerate", "launch", "--config_file", FOUR_CARDS, *TRAIN)
    refused = command(*words, cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.count("error: ") == 1 and "--device cpu" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = command(*words, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path)["world_size"] == 4 and summary(tmp_path)["status"] == "finished"
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert done.stdout.count("epoch 1/1") == 1 and "32 32 32 32" in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--cpu", "--num_processes", "2"), ("accelerate launch was asked for several processes", "torchrun")),
        ((), ("ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "accelerate_config.yaml")),  # by the home's default_config.yaml
        (("--cpu", "--mixed_precision", "bf16"), ("ACCELERATE_", "precision 'bf16'")),
    ],
)
def test_what_accelerate_is_asked_for_and_would_not_do_is_refused_by_name(
    flags: tuple[str, ...], said: tuple[str, ...], tmp_path: Path
) -> None:
    done = command("accelerate", "launch", *flags, *TRAIN, cwd=tmp_path)
    assert done.returncode == 1 and f"error: {said[0]}" in done.stderr and said[1] in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_said_once_before_the_launcher_s_own_lines(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    real_data = ("--dataset", "fashion_mnist")
    cases = {
        ("--lr", "-1"): "lr must be greater than 0, got -1.0",
        ("--reduction-shards", "3"): "reduction_shards=3 must be a multiple of the 2 ranks",
        real_data: "python -m fashion_ddp.data",  # found when the ranks have met, as the one before
    }
    for flags, said in cases.items():
        done = command(*TORCHRUN, "2", *TRAIN, *flags, cwd=tmp_path, FASHION_DDP_DATA_DIR=str(tmp_path / "empty"))
        assert done.returncode == 1 and done.stderr.count("error: ") == 1 and said in done.stderr, done.stderr
        assert "fashion_ddp/train.py" not in done.stderr and "terminate called" not in done.stderr
        assert done.stderr.index("error: ") < done.stderr.index("ChildFailedError")
        assert "exitcode: 2" in done.stderr.replace("exitcode  : 2", "exitcode: 2")
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert f"{name}-ubyte.gz" in done.stderr
    assert str(tmp_path / "empty") in done.stderr and [path.name for path in tmp_path.iterdir()] == ["empty"]
