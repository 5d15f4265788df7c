"""One run from the command to its folder: what it leaves, and what it does with what is there already."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import forked
from safetensors.torch import load_file
from torchmetrics.functional.classification import multiclass_auroc

from fashion_ddp import data
from fashion_ddp.errors import UserError
from fashion_ddp.models import architectures
from fashion_ddp.runs.reading import load_run
from fashion_ddp.training import metrics

MODULE = "fashion_ddp.train"
TRAIN = (MODULE, "--model", "linear", "--epochs", "1", "--tracker", "none", "--threads", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """The folder that one real run was started in."""
    folder = tmp_path_factory.mktemp("finished")
    done = forked(*TRAIN, "--validation", "1000", "--data-dir", str(data_dir), cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "screen").write_text(done.stdout)
    return folder


def test_a_run_leaves_a_complete_folder(finished: Path) -> None:
    run = load_run(finished / "runs" / "linear-blog-seed42-epochs1-validation1000")
    names = {path.name for path in run.path.iterdir()}
    tensors = {"predictions.safetensors", "examples.safetensors", "model.safetensors"}
    records = {"config.yaml", "environment.json", "metrics.jsonl", "steps.jsonl", "summary.json", "model.txt"}
    assert names == tensors | records | {"checkpoints", "logs"}
    assert run.summary["status"] == "finished" and run.summary["format"] == 1
    [epoch] = run.metrics
    assert epoch["epoch"] == 1 and epoch["step"] == run.steps[-1]["step"] == 461 and 90 <= len(run.steps) <= 100
    for name in ("train/loss", "test/accuracy", "val/accuracy", "time/train_s", "throughput/images_per_s", "lr"):
        assert epoch[name] > 0
    figures = ("time/startup_s", "time/train_total_s", "time/eval_total_s", "time/total_s", "time/first_step_s")
    figures += ("time/step_p50_ms", "time/step_p95_ms", "throughput/images_per_s_per_rank", "peak_memory_bytes")
    for name in (*figures, "parameters", "flops_per_image", "world_size", "threads"):
        assert run.summary[name] > 0, name
    assert run.summary["test/accuracy"] == epoch["test/accuracy"]
    [start] = run.environment
    assert start["made_by"]["torch"] == torch.__version__.partition("+")[0] and len(start["ranks"]) == 1
    assert len(start["made_by"]["data"]) == 4 and len(start["made_by"]["code"]) == 64


MINE = """
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

def more(classes):
    return MetricCollection({"auroc": MulticlassAUROC(classes)})

def by_class(classes):
    return MetricCollection({"auroc": MulticlassAUROC(classes, average=None)})

def taken(classes):
    return MetricCollection({"macro_f1": MulticlassF1Score(classes)})

def alone(classes):
    return MulticlassAUROC(classes)

def broken(classes):
    return MetricCollection({"auroc": MulticlassAUROC(classes + 1)})
"""


def test_figures_of_the_users_own_are_recorded_beside_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    line = (*TRAIN, "--dataset", "synthetic", "--metrics", "mine:more", "--tta", "flip", "--run-dir", "run")
    done = forked(*line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = load_run(tmp_path / "run")
    labels, logits = (torch.from_numpy(run.predictions[name]) for name in ("labels", "logits"))
    expected = multiclass_auroc(logits, labels, num_classes=10).item()
    assert run.metrics[-1]["test/auroc"] == run.summary["test/auroc"] == pytest.approx(expected)
    names = ("top5", "macro_f1", "calibration_error", "auroc")
    assert {f"{part}/{name}" for part in ("test", "test_tta") for name in names} <= set(run.metrics[-1])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gone", "mine has no 'gone'"),
        ("by_class", "auroc must be one number, as with average='macro'"),
        ("taken", "macro_f1 is a figure of ours: give it another name"),
        ("alone", "it must return a torchmetrics MetricCollection, not MulticlassAUROC"),
        ("broken", "metrics mine:broken cannot be used: ValueError: "),
    ],
)
def test_a_function_of_figures_that_cannot_be_used_is_told(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(UserError, match=re.escape(told)):
        metrics.build(f"mine:{name}", 10)


@pytest.mark.quick
def test_figures_of_logits_that_are_not_finite_are_none() -> None:
    figures = metrics.build(None, 3)
    logits, labels = torch.eye(3), torch.arange(3)
    assert metrics.compute(figures, logits, labels)["macro_f1"] == 1
    logits[0, 0] = math.inf
    assert all(map(math.isnan, metrics.compute(figures, logits, labels).values()))


def test_saved_weights_loaded_again_give_the_saved_predictions(finished: Path, data_dir: Path) -> None:
    run = load_run(finished / "runs" / "linear-blog-seed42-epochs1-validation1000")
    d = data.load("fashion_mnist", data_dir)
    saved = load_file(run.path / "predictions.safetensors")
    model = architectures.build(run.settings(), d.image_shape, len(d.classes))
    model.load_state_dict(load_file(run.path / "model.safetensors"))
    with torch.no_grad():
        logits = model(torch.from_numpy(d.test_images) / 255)
    torch.testing.assert_close(logits, saved["logits"])
    assert torch.equal(saved["labels"], torch.from_numpy(d.test_labels))
    accuracy = (saved["predicted"] == saved["labels"]).double().mean().item()
    assert accuracy == run.summary["test/accuracy"]


def test_the_screen_says_what_is_trained_on_what(finished: Path) -> None:
    screen = (finished / "screen").read_text()
    said = ["linear, recipe blog, seed 42", "1 CPU thread each", "cpu; precision fp32", "sgd, lr 0.1", "7,850", "7,960"]
    said += ["59,000 training and 10,000 test images of 1x28x28", "epoch 1/1 | train loss"]
    said += ["128 over all ranks, of which each gets 128; 461 steps an epoch, the last of 120"]
    for words in said:
        assert words in screen


def test_its_config_makes_the_same_run(finished: Path) -> None:
    run = load_run(finished / "runs" / "linear-blog-seed42-epochs1-validation1000")
    again = forked(MODULE, "--config", str(run.path / "config.yaml"), "--run-dir", "again", cwd=finished)
    assert again.returncode == 0, again.stderr
    assert (finished / "again" / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()


def test_a_finished_run_is_left_alone(finished: Path, data_dir: Path) -> None:
    words = (*TRAIN, "--validation", "1000", "--data-dir", str(data_dir))
    folder = finished / "runs" / "linear-blog-seed42-epochs1-validation1000"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = forked(*words, cwd=finished)
    assert again.returncode == 0 and "is finished: nothing to do" in again.stdout
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_check_starts_nothing(tmp_path: Path) -> None:
    done = forked(*TRAIN, "--dataset", "synthetic", "--check-only", cwd=tmp_path)
    assert done.returncode == 0 and "this command would train in runs/linear" in done.stdout
    assert not list(tmp_path.iterdir())


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no data": (("--data-dir", "nowhere"), "t10k-labels-idx1-ubyte.gz"),
    "unwritable": (("--dataset", "synthetic", "--runs-dir", "a_file/runs"), "a_file/runs"),
    "not a run folder": (("--dataset", "synthetic", "--run-dir", "photos"), "photos exists and is no run folder"),
    "no such module": (("--dataset", "synthetic", "--model", "nothing_here:Net"), "no module 'nothing_here'"),
    "wrong shape": (("--dataset", "synthetic", "--model", "mine:Seven"), "must return logits of shape [2, 10]"),
    "too many held out": (("--dataset", "synthetic", "--validation", "12000"), "12000"),
    "no card": (("--dataset", "synthetic", "--device", "cuda"), "--device cpu"),
}


def test_the_test_set_is_opened_once_and_seen_in_several_views(tmp_path: Path, data_dir: Path) -> None:
    words = ("--epochs", "2", "--validation", "50000", "--test-at", "end", "--tta", "flip+shift", "--normalize")
    done = forked(*TRAIN, *words, "--data-dir", str(data_dir), "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = load_run(tmp_path / "run")
    assert ["test/accuracy" in row for row in run.metrics] == [False, True] and run.summary["test_evaluations"] == 1
    assert all("val/accuracy" in row for row in run.metrics)

    d = data.load("fashion_mnist", data_dir)
    model = architectures.build(run.settings(), d.image_shape, len(d.classes))
    model.load_state_dict(load_file(run.path / "model.safetensors"))
    images, labels = torch.from_numpy(d.test_images) / 255, torch.from_numpy(d.test_labels)
    plain, weighted = model(images), []
    for by, weight in ((0, 0.25), (-1, 0.125), (1, 0.125)):
        moved = torch.zeros_like(images)
        inner, outer = slice(max(0, -by), 28 - max(0, by)), slice(max(0, by), 28 + min(0, by))
        moved[..., outer, outer] = images[..., inner, inner]
        weighted += [weight * model(moved), weight * model(moved.flip(-1))]
    torch.testing.assert_close(plain, torch.from_numpy(run.predictions["logits"]))
    torch.testing.assert_close(sum(weighted), torch.from_numpy(run.predictions["logits_tta"]))
    for name, logits in (("test", plain), ("test_tta", sum(weighted))):
        loss = torch.nn.functional.cross_entropy(logits.double(), labels)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        assert run.summary[f"{name}/loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert run.summary[f"{name}/accuracy"] == pytest.approx(accuracy, abs=2e-4)
    assert run.summary["val_tta/accuracy"] > 0.5

    [mean], [std] = (model.get_buffer(name).flatten().tolist() for name in ("input_mean", "input_std"))
    # Of the 10,000 images that are left to train on; nearly those of all.
    every = torch.from_numpy(d.train_images).double() / 255
    assert mean == pytest.approx(every.mean().item(), abs=0.003) and std == pytest.approx(every.std().item(), abs=0.003)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_message_before_any_work(mistake: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").write_text("")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef Seven(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(784, 7))\n"
    )
    before = sorted(tmp_path.rglob("*"))
    flags, words = MISTAKES[mistake]
    done = forked(*TRAIN, *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and words in done.stderr and "Traceback" not in done.stderr
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before


def test_a_user_s_model_trains_and_what_it_breaks_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def Net(shape, classes): return nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(784, classes))\n"
    )
    done = forked(*TRAIN, "--model", "mine:Net", "--dataset", "synthetic", "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Dropout work on each rank's rows alone" in done.stdout
    summary: dict[str, Any] = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rank_invariant"] is False
