"""What validation chooses is part of a run: ended anywhere and on any ranks, it keeps and stops as if it never was."""

import json
from pathlib import Path

import pytest
import torch
from faults import Fault, start, summary
from safetensors.torch import load_file
from test_resume import Cut, begin, check_equal, end, interrupted, positions, rows

# Epochs of 6 steps, on 3,000 images.
WORDS = ("--validation", "1000", "--batch-size", "500", "--test-at", "end", "--epochs", "9")
CHOOSING = ("--keep", "best", "--patience", "2", "--tta", "flip")
IMAGES = 4_000

# Good for two epochs, and then wrong: by a buffer that no file of weights holds. Beside it, statistics of each rank's.
SPOILT = """
import torch
from torch import nn

class Spoilt(nn.Sequential):
    def __init__(self, shape, classes, hidden_units):
        super().__init__(nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16), nn.Linear(16, classes))
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, images):
        self.count += self.training
        logits = super().forward(images)
        return logits if self.training or self.count <= 12 else logits.roll(1, 1)
"""


def folder_of(path: Path, name: str) -> Path:
    folder = begin(path, name)
    (folder / "mine.py").write_text(SPOILT)
    return folder


def test_a_run_that_is_ended_keeps_and_stops_as_one_that_was_not(tmp_path: Path) -> None:
    whole, parts, short = (folder_of(tmp_path, name) for name in ("whole", "parts", "short"))
    words = (*WORDS, "--model", "mine:Spoilt", "--ema", "0.3")
    end(start(2, whole, (*words, *CHOOSING), images=IMAGES))
    ends = [
        Cut(Fault("step", "kill", count=8)),
        Cut(Fault("step", "TERM", rank=1, count=8), code=75),  # when the epoch to be kept lies behind
        Cut(Fault("evaluation", "kill", count=2)),  # when the last epoch is trained
        Cut(Fault("results", "kill")),  # when it has decided
    ]
    ranks = interrupted(2, parts, (*words, *CHOOSING), ends, images=IMAGES)
    assert positions(ranks) == [7, 15, 24, 24]
    check_equal(parts, whole)

    found = summary(whole)
    assert (found["kept_epoch"], found["chosen_by"], found["epoch"], found["step"]) == (2, "val/accuracy", 4, 24)
    assert found["stopped_early"] == "after epoch 4, no better validation in 2 epochs"
    epochs = rows(whole, "metrics.jsonl")
    assert not any(name.startswith(("test", "val_tta")) for row in epochs for name in row)
    assert found["val/accuracy"] == max(row["val/accuracy"] for row in epochs) > 0.5 > epochs[-1]["val/accuracy"]
    assert found["test_evaluations"] == 1
    assert found["throughput/images_per_s"] * found["time/train_total_s"] == pytest.approx(4 * 3_000)
    printed = ranks.printed().splitlines()
    assert any(line.startswith("kept epoch 2 of 4, chosen by validation | test loss ") for line in printed)
    assert printed[-1].startswith("finished: 4 epochs in ")

    # As a run of two epochs, which keeps its last.
    end(start(2, short, (*words, "--epochs", "2", "--tta", "flip"), images=IMAGES))
    for name in ("model", "predictions", "examples"):
        one, two = (load_file(f / "run" / f"{name}.safetensors") for f in (whole, short))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
    figures = {name for name in summary(short) if name.startswith(("train/", "val", "test"))}
    assert {name: found[name] for name in figures} == {name: summary(short)[name] for name in figures}

    # More epochs would end there, too.
    for more in ((), ("--epochs", "30")):
        ranks = start(2, parts, (*words, *CHOOSING, *more), images=IMAGES)
        end(ranks)
        assert "is finished, stopped early after epoch 4, no better" in ranks.printed().splitlines()[-1]
    check_equal(parts, whole)


def test_on_other_ranks_it_chooses_the_same(tmp_path: Path) -> None:
    # At such a rate accuracies go up and down. The test set is looked at each epoch, and has no part in it.
    words = (*WORDS, "--test-at", "epoch", "--model", "mlp", "--lr", "1", "--keep", "best", "--patience", "1")
    words += ("--reduction-shards", "12")
    one, two = begin(tmp_path, "one"), begin(tmp_path, "two")
    end(start(1, one, words, images=IMAGES))
    ranks = start(1, two, words, [Fault("step", "kill", count=8)], images=IMAGES)
    assert ranks.wait() == [-9]
    end(start(2, two, words, images=IMAGES))
    found = summary(one)
    kept = rows(one, "metrics.jsonl")[found["kept_epoch"] - 1]
    assert found["kept_epoch"] == found["epoch"] - 1 and found["test_evaluations"] == found["epoch"] + 1
    figures = {name for name in kept if name.startswith(("train/", "val/", "test/"))}
    assert len(figures) > 8 and {name: found[name] for name in figures} == {name: kept[name] for name in figures}
    for folder in (one, two):  # what names the ranks
        path = folder / "run" / "summary.json"
        path.write_text(json.dumps(summary(folder) | {"world_size": 0}))
    check_equal(one, two)
