"""What a report knows of one run: its folder, and its object in report.json."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fashion_ddp.errors import UserError
from fashion_ddp.report import published
from fashion_ddp.rundir import Run, read_run

ACCURACY, LOSS, IMAGES_PER_S = "test/accuracy", "test/loss", "throughput/images_per_s"
SECONDS = "time/train_and_test_s"  # the tutorials' clock: training, and the pass over the test set after each epoch


@dataclass(frozen=True)
class Result:
    """One run. `record` holds the summary's keys and values, and what is derived from the rest of the folder."""

    run: Run
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def model(self) -> str:
        return self.run.config["model"]

    @property
    def recipe(self) -> str:
        """The recipe's name, also where a path was given."""
        return Path(self.run.config["recipe"]).stem

    @property
    def changed(self) -> str:
        """The settings that are not the recipe's own, as text; the dataset is the table's."""
        changed = self.record.get("changed", {})
        return ", ".join(f"{name}={value}" for name, value in changed.items() if name != "dataset")

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    @property
    def synthetic(self) -> bool:
        return self.record["dataset"] == "synthetic"

    @property
    def place(self) -> str:
        """Ranks x device."""
        return f"{self.record.get('world_size', '?')} x {self.record.get('device', '?')}"

    @property
    def start(self) -> dict[str, Any]:
        """The environment that the run was last started in."""
        return self.run.environment[-1] if self.run.environment else {}

    @property
    def data_md5(self) -> dict[str, str]:
        """By file; empty where the run has no record of it."""
        return self.start.get("made_by", {}).get("data") or {}

    @property
    def experiment(self) -> str:
        """Equal for runs that differ in nothing but the seed and what they came to."""
        return json.dumps([self.model, self.run.config["recipe"], self.record["settings"], self.place], sort_keys=True)


def read_results(folders: list[Path]) -> list[Result]:
    """Raises UserError for a folder or file that cannot be read."""
    runs = [read_run(folder) for folder in folders]
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
        "settings": run.settings().result_settings(),
        "published": None
        if summary.get("changed", True)
        else published.FIGURES.get((config["recipe"], config["model"])),
        "environment": run.environment,
    }
    if record["status"] == "finished":
        parts = [summary.get("time/train_total_s"), summary.get("time/eval_total_s")]
        record[SECONDS] = None if None in parts else sum(parts)
        record |= _predicted(run)
    return Result(run, record)


def _predicted(run: Run) -> dict[str, Any]:
    """What predictions.safetensors adds: counts [true][predicted] and, for relu, the dead logits.

    A logit is dead that is positive for no image of the test set.
    """
    path = run.path / "predictions.safetensors"
    if not path.exists():
        return {}
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it or remove the run") from None
    logits, predicted, labels = (saved[name] for name in ("logits", "predicted", "labels"))
    classes = logits.shape[1]
    counts = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    added: dict[str, Any] = {"confusion": counts.tolist()}
    if run.config["model"] == "relu":
        positive, names = logits > 0, run.summary["classes"]
        added["dead_classes"] = [names[c] for c in np.flatnonzero(~positive.any(axis=0))]
        added["never_predicted"] = [names[c] for c in np.flatnonzero(counts.sum(axis=0) == 0)]
        added["images_without_logit"] = int((~positive.any(axis=1)).sum())
    return added
