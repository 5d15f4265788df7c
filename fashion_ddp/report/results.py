"""Read the runs of a report: each run's folder, and its object in report.json."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fashion_ddp.report import statistics, tutorials
from fashion_ddp.runs.reading import Run, load_run, read_arrays, softmax

ACCURACY, LOSS, IMAGES_PER_S = "test/accuracy", "test/loss", "throughput/images_per_s"
SECONDS = "time/train_and_test_s"  # as the tutorials measure: training, and the pass over the test set after each epoch
TTA = "test_tta/accuracy"  # with test-time augmentation
TOP5, MACRO_F1, CALIBRATION = "test/top5", "test/macro_f1", "test/calibration_error"
MEMORY = "peak_memory_bytes"
BALANCED = "test/balanced_accuracy"  # the mean of the classes' recalls: a rare class counts as much as a common one


@dataclass(frozen=True, eq=False)
class Predictions:
    """A run's predictions for the n images of the test set."""

    labels: np.ndarray  # int64 [n]
    predicted: np.ndarray  # int64 [n]
    confidence: np.ndarray  # float64 [n], the probability of the predicted class

    @classmethod
    def of(cls, labels: np.ndarray, logits: np.ndarray, predicted: np.ndarray) -> "Predictions":
        """Return predictions with the confidence that the logits [n, classes] give them."""
        return cls(labels, predicted, softmax(logits)[np.arange(len(predicted)), predicted])

    @property
    def correct(self) -> np.ndarray:
        """Return whether each prediction is right: bool [n]."""
        return self.predicted == self.labels


@dataclass(frozen=True)
class Result:
    """One run. `record` has the summary's keys and values, and values derived from the rest of the folder."""

    run: Run
    record: dict[str, Any]
    predictions: Predictions | None = None  # None where the run is not finished, or the file is missing

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def model(self) -> str:
        return self.run.config["model"]

    @property
    def recipe(self) -> str:
        """Return the recipe's name, also where a path was given."""
        return Path(self.run.config["recipe"]).stem

    @property
    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from the recipe, without the dataset, which the table's title names."""
        return {name: value for name, value in self.record.get("changed", {}).items() if name != "dataset"}

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    @property
    def synthetic(self) -> bool:
        return self.record["dataset"] == "synthetic"

    @property
    def ranks_and_device(self) -> str:
        """Return the number of ranks and the device: `2 x cpu`."""
        return f"{self.record.get('world_size', '?')} x {self.record.get('device', '?')}"

    @property
    def concurrent_runs(self) -> int:
        """Return the most runs that were trained on its machine at the same time, with itself: 1 if it was alone."""
        return self.record.get("side_by_side", 1)

    @property
    def test_evaluations(self) -> int:
        """Return how often the run evaluated the test set, also where it ran under a version that did not record it."""
        return self.record.get("test_evaluations", sum(row.get(ACCURACY) is not None for row in self.run.metrics))

    @property
    def kept_epoch(self) -> int | None:
        """Return the epoch that validation chose, whose weights and figures these are; None for the last."""
        return self.record.get("kept_epoch")

    @property
    def device(self) -> str:
        """Return the name of the card or the processor. Times are comparable only on equal ones."""
        device = self.record.get("device", "?")
        ranks = self.start.get("ranks") or [{}]
        return (device if device != "cpu" else ranks[0].get("cpu")) or device

    @property
    def classes(self) -> list[str]:
        """Return the classes' names, or their numbers where the run did not record names."""
        return self.record.get("classes") or [str(c) for c in range(len(self.record.get("confusion", ())))]

    @property
    def start(self) -> dict[str, Any]:
        """Return the environment of the run's last start."""
        return self.run.environment[-1] if self.run.environment else {}

    @property
    def data_md5(self) -> dict[str, str]:
        """Return the md5 of the data by file; empty where the run did not record it."""
        return self.start.get("made_by", {}).get("data") or {}

    @property
    def experiment(self) -> str:
        """Return a key that is equal for runs that differ only in the seed and in their results."""
        return json.dumps(
            [self.model, self.run.config["recipe"], self.record["settings"], self.ranks_and_device], sort_keys=True
        )


def own_figures(results: list[Result]) -> list[str]:
    """Return the names of the figures of the test set that the user's own function gave (--metrics)."""
    ours = (ACCURACY, LOSS, TOP5, MACRO_F1, CALIBRATION, BALANCED)
    return list(dict.fromkeys(n for r in results for n in r.record if n.startswith("test/") and n not in ours))


def read_results(folders: list[Path]) -> list[Result]:
    """Read runs. Raises UserError for a folder or file that cannot be read."""
    runs = [load_run(folder) for folder in folders]
    same_name = Counter(run.path.name for run in runs)
    return [_result(run, unique=same_name[run.path.name] == 1) for run in runs]


def _result(run: Run, unique: bool) -> Result:
    config, summary = run.config, run.summary
    path = run.path.relative_to(Path.cwd()) if run.path.is_relative_to(Path.cwd()) else run.path
    record = {
        "name": run.path.name if unique else str(path),
        "path": str(path),
        "status": "no summary",
        **{name: config[name] for name in ("model", "recipe", "seed", "dataset")},
        **summary,
        **run.cost,
        "settings": run.settings().result_settings(),
        "published": None
        if summary.get("changed", True)
        else tutorials.published_figures(config["recipe"], config["model"]),
        "environment": run.environment,
    }
    if record["status"] != "finished":
        return Result(run, record)
    parts = [summary.get("time/train_total_s"), summary.get("time/eval_total_s")]
    record[SECONDS] = None if None in parts else sum(parts)
    saved = read_arrays(run.path / "predictions.safetensors", missing_ok=True)
    if not saved:
        return Result(run, record)
    predictions = Predictions.of(saved["labels"], saved["logits"], saved["predicted"])
    return Result(run, record | _derived(record, saved["logits"], predictions), predictions)


def _derived(record: dict[str, Any], logits: np.ndarray, predictions: Predictions) -> dict[str, Any]:
    """Return counts [true][predicted], F1 and recall of each class from them and, for relu, the dead logits.

    A logit is dead if it is positive for no image of the test set.
    """
    classes = logits.shape[1]
    flat = predictions.labels * classes + predictions.predicted
    counts = np.bincount(flat, minlength=classes**2).reshape(classes, classes)
    recall = counts.diagonal() / np.maximum(counts.sum(axis=1), 1)
    derived: dict[str, Any] = {"confusion": counts.tolist(), "f1_by_class": statistics.f1_by_class(counts).tolist()}
    derived |= {"recall_by_class": recall.tolist(), BALANCED: float(recall.mean())}
    if record["model"] == "relu":
        positive, names = logits > 0, record["classes"]
        derived["positive_by_class"] = positive.mean(
            axis=0
        ).tolist()  # each logit's share of images where it is positive
        derived["dead_classes"] = [names[c] for c in np.flatnonzero(~positive.any(axis=0))]
        derived["never_predicted"] = [names[c] for c in np.flatnonzero(counts.sum(axis=0) == 0)]
        derived["images_without_logit"] = int((~positive.any(axis=1)).sum())
    return derived
