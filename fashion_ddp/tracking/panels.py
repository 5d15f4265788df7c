"""Make what W&B shows of a run beside its curves: settings to filter by, and at the end tables, figures and weights.

Functions take the wandb module as an argument, because mirror.py alone imports it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fashion_ddp.config import Config
from fashion_ddp.runs.folder import to_jsonable
from fashion_ddp.runs.provenance import identity
from fashion_ddp.runs.reading import Run, evenly_spaced, softmax

TABLE_LIMIT = 10_000  # rows that W&B draws of a table; a matrix has one for each cell
TABLE_SIZE = 200  # test images in the table: the same in every run on the same data
BORDER, RIGHT, WRONG = 3, (0, 158, 115), (213, 94, 0)  # pixels; colours that colour-blind people can tell apart
WEIGHTS = ("model.safetensors", "config.yaml", "summary.json", "environment.json", "examples.safetensors")
TABLES_LOGGED = "shown"  # key in W&B's summary: the step of the run, or the report, whose tables W&B has


def run_config(cfg: Config, summary: dict[str, Any], environment: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a run's settings, flat, and other values to filter runs by. `summary`: what is known of it so far."""
    start = environment[-1] if environment else {}
    kept = ("world_size", "threads", "side_by_side", "parameters", "rank_invariant")
    also = {name: summary.get(name) for name in kept}
    also |= {"gpu": summary.get("device"), "git_commit": start.get("git_commit")}
    return to_jsonable(identity(cfg) | also | {"torch": start.get("made_by", {}).get("torch")})


def define_axes(run: Any) -> None:
    """Draw values of steps.jsonl against the step, and values of metrics.jsonl against the epoch."""
    run.define_metric("epoch")
    run.define_metric("step")
    run.define_metric("step/*", step_metric="step")
    for names in ("lr", "train/*", "val/*", "test/*", "val_tta/*", "test_tta/*", "time/*", "throughput/*"):
        run.define_metric(names, step_metric="epoch")


def single_values(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a summary that W&B's table of runs can hold: numbers, text and truth values."""
    return {k: to_jsonable(v) for k, v in figures.items() if isinstance(v, int | float | str | bool)}


def log_once(run: Any, version: Any, figures: Callable[[], dict[str, Any]], place: int | None = None) -> None:
    """Log figures, unless W&B's server already has those of this version. `place`: theirs in the history; else the
    next."""
    if run.summary.get(TABLES_LOGGED) != version:
        run.log(figures(), step=place, commit=True)
        run.summary.update({TABLES_LOGGED: version})


def run_figures(wandb: Any, run: Run, images: np.ndarray | None) -> dict[str, Any]:
    """Return the tables and figures of a finished run.

    `images` are the test set's, uint8 [n, C, H, W]; None for tables without images.
    """
    from PIL import ImageOps  # not at the top: a run without W&B needs no pictures

    from fashion_ddp.thumbnail import thumbnail

    logits, predicted, labels = (run.predictions[name] for name in ("logits", "predicted", "labels"))
    names = [str(name) for name in run.summary["classes"]]
    confidence = softmax(logits).max(axis=1)
    columns = ["id", "label", "predicted", "right", "confidence"]
    rows = []
    for n in evenly_spaced(TABLE_SIZE, len(labels)).tolist():
        true, guess = int(labels[n]), int(predicted[n])
        row = [n, names[true], names[guess], true == guess, float(confidence[n])]
        rows.append(row if images is None else [*row, wandb.Image(thumbnail(images[n]))])
    figures = {
        "predictions": wandb.Table(columns=columns if images is None else [*columns, "image"], data=rows),
        "timings": _bars(wandb, phase_times(run.summary), ("phase", "seconds"), "Where the time went"),
    }
    if len(names) ** 2 <= TABLE_LIMIT:
        figures["confusion_matrix"] = wandb.plot.confusion_matrix(
            y_true=labels.tolist(), preds=predicted.tolist(), class_names=names, title="Test set"
        )
    grid = run.arrays("examples.safetensors").get("grid_ids")
    if images is not None and grid is not None:
        figures["prediction_grid"] = [
            wandb.Image(
                ImageOps.expand(
                    thumbnail(images[n]).convert("RGB"), BORDER, RIGHT if labels[n] == predicted[n] else WRONG
                ),
                caption=f"{names[predicted[n]]}" + ("" if labels[n] == predicted[n] else f", is {names[labels[n]]}"),
            )
            for n in grid.tolist()
        ]
    return figures


def phase_times(summary: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the seconds of each phase; together they are the run's whole time."""
    phases = {"start-up": "time/startup_s", "training": "time/train_total_s", "evaluation": "time/eval_total_s"}
    seconds = {phase: summary.get(name) or 0.0 for phase, name in phases.items()}
    rest = (summary.get("time/total_s") or 0.0) - sum(seconds.values())
    return [*seconds.items(), ("the rest", max(rest, 0.0))]


def _bars(wandb: Any, rows: list[tuple[str, float]], columns: tuple[str, str], title: str) -> Any:
    table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
    return wandb.plot.bar(table, *columns, title=title)


def weights_artifact(wandb: Any, run: Run) -> Any:
    """Return an artifact with the weights, and with the files that load_run needs to build the model."""
    name = re.sub(r"[^\w.-]+", "_", run.path.name)
    artifact = wandb.Artifact(name, type="model", metadata=single_values(run.summary))
    for file in WEIGHTS:
        artifact.add_file(str(run.path / file))
    return artifact


# --- A report ---------------------------------------------------------------------------------------------------

COLUMNS = ["name", "model", "recipe", "seed", "status", "test/accuracy", "test/loss", "parameters", "flops_per_image"]
COLUMNS += ["time/train_and_test_s", "throughput/images_per_s", "world_size", "device", "wandb_id"]


def report_figures(wandb: Any, page: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a report's table, figures and page. `runs` are the objects in report.json."""
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


def save_report(reports: Any, project: dict[str, str], group: str, known_id: str) -> Any:
    """Save a report of W&B's own on the runs of a group, and return it. A report with the id `known_id` is replaced.

    `reports` is the module wandb_workspaces.reports.v2; `project` has the keys "entity" and "project".
    """
    of_group = f"Metric('Group') == {group!r} and Metric('JobType') == 'train'"
    grid = reports.PanelGrid(
        runsets=[reports.Runset(**project, name=group, filters=of_group)],
        panels=[
            reports.RunComparer(diff_only="split"),
            reports.BarPlot(title="Accuracy on the test set", metrics=["test/accuracy"]),
            reports.LinePlot(title="Training loss", x="step", y=["step/loss"]),
            reports.LinePlot(title="Accuracy on the test set", x="epoch", y=["test/accuracy"]),
            reports.ScatterPlot(title="Accuracy against training time", x="time/train_total_s", y="test/accuracy"),
        ],
    )
    report = reports.Report(**project, title=group, blocks=[grid])
    report.id = known_id
    return report.save()
