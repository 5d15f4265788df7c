"""What W&B shows of a run beside its curves: settings to filter by, and at the end tables, figures and weights.

Takes wandb as an argument: tracking.py alone imports it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fashion_ddp.config import Config
from fashion_ddp.runs.folder import to_jsonable
from fashion_ddp.runs.provenance import identity
from fashion_ddp.runs.reading import GRID_SIZE, Run, evenly_spaced, softmax

TABLE = 200  # test images in the table: the same in every run on the same data
BORDER, RIGHT, WRONG = 3, (0, 158, 115), (213, 94, 0)  # pixels; colours that the colour-blind tell apart too
WEIGHTS = ("model.safetensors", "config.yaml", "summary.json", "environment.json", "examples.safetensors")
SHOWN = "shown"  # in the summary that W&B keeps: of which step of a run, or of which report, it has the tables


def config(cfg: Config, summary: dict[str, Any], environment: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's settings, flat, and what else one filters runs by. `summary`: what is known of the run so far."""
    start = environment[-1] if environment else {}
    kept = ("world_size", "threads", "side_by_side", "parameters", "rank_invariant")
    also = {name: summary.get(name) for name in kept}
    also |= {"gpu": summary.get("device"), "git_commit": start.get("git_commit")}
    return to_jsonable(identity(cfg) | also | {"torch": start.get("made_by", {}).get("torch")})


def define_axes(run: Any) -> None:
    """What steps.jsonl has is drawn against the step, what metrics.jsonl has against the epoch."""
    run.define_metric("epoch")
    run.define_metric("step")
    run.define_metric("step/*", step_metric="step")
    for names in ("lr", "train/*", "val/*", "test/*", "time/*", "throughput/*"):
        run.define_metric(names, step_metric="epoch")


def single_values(figures: dict[str, Any]) -> dict[str, Any]:
    """What of a summary W&B's table of runs can hold, under the same names."""
    return {k: to_jsonable(v) for k, v in figures.items() if isinstance(v, int | float | str | bool)}


def show_once(run: Any, mark: Any, figures: Callable[[], dict[str, Any]]) -> None:
    """Log figures, unless W&B's server has those of this mark."""
    if run.summary.get(SHOWN) != mark:
        run.log(figures())
        run.summary.update({SHOWN: mark})


def figures(wandb: Any, run: Run, images: np.ndarray | None) -> dict[str, Any]:
    """The tables and figures of a finished run. `images`: the test set's, uint8 [n, C, H, W]; without them, none are
    shown."""
    logits, predicted, labels = (run.predictions[name] for name in ("logits", "predicted", "labels"))
    names = [str(name) for name in run.summary["classes"]]
    confidence = softmax(logits).max(axis=1)
    columns = ["id", "label", "predicted", "right", "confidence"]
    rows = []
    for at in evenly_spaced(TABLE, len(labels)).tolist():
        true, found = int(labels[at]), int(predicted[at])
        row = [at, names[true], names[found], true == found, float(confidence[at])]
        rows.append(row if images is None else [*row, wandb.Image(_shown(images[at]))])
    shown = {
        "predictions": wandb.Table(columns=columns if images is None else [*columns, "image"], data=rows),
        "confusion_matrix": wandb.plot.confusion_matrix(
            y_true=labels.tolist(), preds=predicted.tolist(), class_names=names, title="Test set"
        ),
        "timings": _bars(wandb, timings(run.summary), ("phase", "seconds"), "Where the time went"),
    }
    if images is not None:
        shown["prediction_grid"] = [
            wandb.Image(
                _framed(images[at], RIGHT if labels[at] == predicted[at] else WRONG),
                caption=f"{names[predicted[at]]}"
                + ("" if labels[at] == predicted[at] else f", is {names[labels[at]]}"),
            )
            for at in evenly_spaced(GRID_SIZE, len(labels)).tolist()
        ]
    return shown


def timings(summary: dict[str, Any]) -> list[tuple[str, float]]:
    """Seconds by phase; together the run's whole time."""
    phases = {"start-up": "time/startup_s", "training": "time/train_total_s", "evaluation": "time/eval_total_s"}
    seconds = {phase: summary.get(name) or 0.0 for phase, name in phases.items()}
    rest = (summary.get("time/total_s") or 0.0) - sum(seconds.values())
    return [*seconds.items(), ("the rest", max(rest, 0.0))]


def _bars(wandb: Any, rows: list[tuple[str, float]], columns: tuple[str, str], title: str) -> Any:
    table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
    return wandb.plot.bar(table, *columns, title=title)


def _shown(image: np.ndarray) -> np.ndarray:
    """An image [C, H, W] as [H, W] or [H, W, C]."""
    return np.moveaxis(image, 0, 2).squeeze()


def _framed(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """An image uint8 [C, H, W] in colour, within a border: [H + 2 b, W + 2 b, 3]."""
    rgb = np.moveaxis(np.broadcast_to(image, (3, *image.shape[1:])) if len(image) == 1 else image[:3], 0, 2)
    height, width, _ = rgb.shape
    framed = np.empty((height + 2 * BORDER, width + 2 * BORDER, 3), np.uint8)
    framed[:] = colour
    framed[BORDER:-BORDER, BORDER:-BORDER] = rgb
    return framed


def weights(wandb: Any, run: Run) -> Any:
    """An artifact of the weights and of what load_run needs to make a model of them."""
    name = re.sub(r"[^\w.-]+", "_", run.path.name)
    artifact = wandb.Artifact(name, type="model", metadata=single_values(run.summary))
    for file in WEIGHTS:
        artifact.add_file(str(run.path / file))
    return artifact


# --- A report ---------------------------------------------------------------------------------------------------

COLUMNS = ["name", "model", "recipe", "seed", "status", "test/accuracy", "test/loss", "parameters", "flops_per_image"]
COLUMNS += ["time/train_and_test_s", "throughput/images_per_s", "world_size", "device", "wandb_id"]


def of_report(wandb: Any, page: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A report's table, figures and page. `runs`: report.json's objects."""
    finished = [run for run in runs if run.get("test/accuracy") is not None and run["status"] == "finished"]
    table = wandb.Table(columns=COLUMNS, data=[[to_jsonable(run.get(name)) for name in COLUMNS] for run in runs])
    bars = [(run["name"], run["test/accuracy"]) for run in sorted(finished, key=lambda run: -run["test/accuracy"])]
    return {
        "runs": table,
        "accuracy": _bars(wandb, bars, ("run", "test/accuracy"), "Accuracy on the test set"),
        "accuracy_against_time": wandb.plot.scatter(
            table, "time/train_and_test_s", "test/accuracy", title="Accuracy against training time"
        ),
        "report": wandb.Html(str(page), inject=False),
    }


def saved_report(reports: Any, place: dict[str, str], group: str, known: str) -> Any:
    """Save a report of W&B's own on the runs of a group, in place of the one that is `known` by its id, if any.

    `reports` is wandb_workspaces.reports.v2; `place` has the entity and the project.
    """
    of_group = f"Metric('Group') == {group!r} and Metric('JobType') == 'train'"
    grid = reports.PanelGrid(
        runsets=[reports.Runset(**place, name=group, filters=of_group)],
        panels=[
            reports.RunComparer(diff_only="split"),
            reports.BarPlot(title="Accuracy on the test set", metrics=["test/accuracy"]),
            reports.LinePlot(title="Training loss", x="step", y=["step/loss"]),
            reports.LinePlot(title="Accuracy on the test set", x="epoch", y=["test/accuracy"]),
            reports.ScatterPlot(title="Accuracy against training time", x="time/train_total_s", y="test/accuracy"),
        ],
    )
    report = reports.Report(**place, title=group, blocks=[grid])
    report.id = known
    return report.save()
