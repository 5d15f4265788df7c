"""The launchers that people use, started as they start them: what works, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT, command

TRAIN = ("-m", "fashion_ddp.train", "--model", "mlp", "--dataset", "synthetic", "--epochs", "1", "--run-dir", "run")
FOUR_CARDS = str(CHECKOUT / "accelerate_config.yaml")


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "summary.json").read_text())


def test_every_launcher_makes_the_same_run(tmp_path: Path) -> None:
    starters = {
        "python": ("python",),
        "torchrun": ("torchrun", "--standalone", "--nproc-per-node", "1"),
        "accelerate": ("accelerate", "launch", "--cpu"),
    }
    weights, threads = [], []
    for name, words in starters.items():
        (tmp_path / name).mkdir()
        done = command(*words, *TRAIN, "--tracker", "none", cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
        weights.append((tmp_path / name / "run" / "model.safetensors").read_bytes())
        threads.append(summary(tmp_path / name)["threads"])
    assert threads[0] == threads[1] == threads[2]
    assert weights[0] == weights[1] == weights[2]


def test_two_ranks_train_together_and_one_of_them_records(tmp_path: Path) -> None:
    done = command("torchrun", "--standalone", "--nproc-per-node", "2", *TRAIN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path)["world_size"] == 2 and summary(tmp_path)["status"] == "finished"
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert done.stdout.count("epoch 1/1") == 1 and "64 64" in done.stdout


def test_the_file_for_four_cards_trains_four_ranks_when_told_to_on_a_cpu(tmp_path: Path) -> None:
    words = ("accelerate", "launch", "--config_file", FOUR_CARDS, *TRAIN)
    refused = command(*words, cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.count("error: ") == 1 and "--device cpu" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = command(*words, "--device", "cpu", "--tracker", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path)["world_size"] == 4


def test_more_processes_asked_for_than_made_is_refused(tmp_path: Path) -> None:
    done = command("accelerate", "launch", "--cpu", "--num_processes", "2", *TRAIN, cwd=tmp_path)
    assert done.returncode == 1 and "error: accelerate launch was asked for several processes" in done.stderr
    assert "torchrun" in done.stderr and not (tmp_path / "run").exists()


def test_what_a_file_in_the_home_asks_for_is_refused_by_name(tmp_path: Path) -> None:
    done = command("accelerate", "launch", *TRAIN, cwd=tmp_path)  # obeys the home's default_config.yaml
    assert done.returncode == 1 and "error: ACCELERATE_" in done.stderr and "accelerate_config.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dynamo_backend", "inductor"), "dynamo"),
        (("--mixed_precision", "bf16"), "precision 'bf16'"),
    ],
)
def test_launcher_flags_for_something_else_are_refused_by_name(
    flags: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    done = command("accelerate", "launch", "--cpu", *flags, *TRAIN, cwd=tmp_path)
    assert done.returncode == 1 and "error: ACCELERATE_" in done.stderr and words in done.stderr


def test_a_mistake_is_told_once_before_the_launcher_s_own_lines(tmp_path: Path) -> None:
    words = ("torchrun", "--standalone", "--nproc-per-node", "2")
    before = command(*words, *TRAIN, "--lr", "-1", cwd=tmp_path)
    assert before.stderr.count("lr must be greater than 0, got -1.0") == 1
    together = command(*words, *TRAIN, "--reduction-shards", "3", cwd=tmp_path)  # found when the ranks have met
    assert together.stderr.count("error: reduction_shards=3 must be a multiple of the 2 ranks") == 1
    for done in (before, together):
        assert done.returncode == 1 and "fashion_ddp/train.py" not in done.stderr
        assert done.stderr.index("error: ") < done.stderr.index("ChildFailedError")


def test_missing_data_is_told_once_by_all_ranks_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = ("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "fashion_ddp.train", "--model", "mlp")
    for _ in range(3):  # ranks that end at once after a collective: gloo's thread is still at it
        done = command(*words, cwd=tmp_path, FASHION_DDP_DATA_DIR=str(tmp_path / "empty"))
        assert done.returncode == 1 and done.stderr.count("error: ") == 1
        assert "terminate called" not in done.stderr and "exitcode: 2" in done.stderr.replace(
            "exitcode  : 2", "exitcode: 2"
        )
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert f"{name}-ubyte.gz" in done.stderr
    assert "python -m fashion_ddp.data" in done.stderr and str(tmp_path / "empty") in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
