"""Runs and reports for tests: run folders made through the writers that the trainer uses, with small random
predictions and pictures; and a report's four files, read."""

import contextlib
import csv
import html
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from fashion_ddp import compare
from fashion_ddp.config.layers import make_config, recipe_changes
from fashion_ddp.report.tables import BEST
from fashion_ddp.runs.folder import RunFolder
from fashion_ddp.training import metrics

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
MD5 = {"train-images": "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "test-labels": "bb300cfdad3c16e7a12a480ee83cd310"}
IMAGES = 200


def predictions(seed: int, skill: float, dead: tuple[int, ...], relu: bool) -> dict[str, np.ndarray]:
    """Random logits with the right class raised by `skill`; dead classes are 0 throughout."""
    random = np.random.default_rng(seed)
    labels = np.arange(IMAGES, dtype=np.int64) % len(CLASSES)
    logits = random.normal(size=(IMAGES, len(CLASSES))).astype(np.float32)
    logits[np.arange(IMAGES), labels] += skill
    if relu:
        logits = np.maximum(logits, 0)
        logits[:, list(dead)] = 0
    return {"logits": logits, "predicted": logits.argmax(axis=1), "labels": labels}


def examples(saved: dict[str, np.ndarray], model: str, seed: int) -> dict[str, np.ndarray]:
    """What artifacts.py keeps to be drawn: random pictures, those of the first ten wrong images among them."""
    random = np.random.default_rng(seed)
    wrong = np.flatnonzero(saved["predicted"] != saved["labels"])[:10]
    grid = np.arange(9) * IMAGES // 9
    ids = np.union1d(grid, wrong)
    pictures = random.integers(0, 256, size=(25 + len(ids), 1, 28, 28), dtype=np.uint8)
    kept = {"samples": pictures[:25], "sample_labels": np.arange(25) % len(CLASSES), "grid_ids": grid}
    kept |= {"test_ids": ids, "test_images": pictures[25:], "image": pictures[25], "image_label": np.array(0)}
    if model == "cnn":
        kept |= {"maps.10.Conv2d": random.normal(size=(10, 14, 14)).astype(np.float32)}
        kept |= {"maps.2.MaxPool2d": random.normal(size=(10, 7, 7)).astype(np.float32)}
    return kept


def make_run(
    path: Path,
    *,
    status: str = "finished",
    skill: float = 2.0,
    dead: tuple[int, ...] = (),
    data: dict[str, str] = MD5,
    ranks: int = 1,
    device: str = "cpu",
    summary: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A run folder as the trainer leaves it: finished, or ended after its first epoch with `status`."""
    cfg = make_config(settings)
    finished = status == "finished"
    saved = predictions(cfg.seed, skill, dead, cfg.model == "relu")
    accuracy = float((saved["predicted"] == saved["labels"]).mean())
    logits, labels = (torch.from_numpy(saved[name]) for name in ("logits", "labels"))
    given = metrics.compute(metrics.build(None, len(CLASSES)), logits, labels)
    figures = {f"test/{name}": value for name, value in given.items()}
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(cfg.to_yaml())
    folder = RunFolder(path, finished)
    made_by = {"code": "c0de" * 16, "python": "3.11.2", "torch": "2.15.0", "data": data}
    start: dict[str, Any] = {"started": "2026-11-21T12:00:00+00:00", "command": ["train.py", "--model", cfg.model]}
    start |= {"made_by": made_by, "git_commit": "a" * 40, "world_size": ranks}
    start |= {"ranks": [{"host": "box", "device": device}] * ranks}
    folder.write_json("environment.json", [start])
    last: dict[str, Any] = {}
    for epoch in range(1, (cfg.epochs if finished else 1) + 1):
        rows = []
        for step in range((epoch - 1) * 469 + 5, epoch * 469 + 1, 5):
            loss = 0.4 + 1.8 * np.exp(-step / 150) + 0.05 * np.sin(step * 0.7 + cfg.seed)
            rows.append({"epoch": epoch, "step": step, "loss": loss, "accuracy": 0.8, "lr": cfg.lr})
        folder.append("steps.jsonl", rows)
        last = {"epoch": epoch, "step": 469 * epoch, "lr": cfg.lr, "train/loss": loss, "train/accuracy": 0.8}
        if cfg.test_at != "end" or epoch == cfg.epochs:
            last |= {"test/loss": 0.47 + 0.1 / epoch, "test/accuracy": accuracy - 0.02 * (cfg.epochs - epoch)} | figures
        last |= {"time/train_s": 4.5, "time/eval_s": 0.25, "throughput/images_per_s": 13333.3}
        folder.append("metrics.jsonl", [last])
    known: dict[str, Any] = {"format": 1, "status": status, "model": cfg.model, "recipe": cfg.recipe, "seed": cfg.seed}
    known |= {"world_size": ranks, "rank_invariant": True, "dataset": cfg.dataset, "classes": CLASSES}
    known |= {"training_images_by_class": [6000 + n for n in range(len(CLASSES))]}
    known |= {"changed": recipe_changes(cfg), "device": device, "epochs": cfg.epochs, "parameters": 7960, **last}
    if finished:
        known |= {"time/train_total_s": 13.5 + cfg.seed / 100, "time/eval_total_s": 0.75, "flops_per_image": 15880}
        known |= {"peak_memory_bytes": 805_000_000}
        save_file(saved, path / "predictions.safetensors")
        save_file(examples(saved, cfg.model, cfg.seed), path / "examples.safetensors")
        (path / "model.txt").write_text("  layer  output  parameters\n  Flatten  784  0\n")
    folder.write_json("summary.json", known | (summary or {}))
    return path


def submitted(run: Path, accounted: bool = True, **figures: Any) -> Path:
    """Write into a run's folder what it cost on a cluster, as its launcher does."""
    cost = {"gathered": "2026-12-01T05:46:45+00:00", "starts": 2, "untimed_starts": 0, "starting_s": 90.0}
    cost |= {"training_s": 6000.0, "repeated_steps": 47, "repeated_s": 30.0}
    if accounted:
        cost |= {"complete": True, "queued_s": 600, "core_hours": 20.5, "card_hours": 5.25}
    RunFolder(run).write_json("cost.json", {f"cost/{name}": value for name, value in (cost | figures).items()})
    return run


class Page(HTMLParser):
    """Tables as the text of their cells, the words of each figure, and every attribute and element."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.drawn: list[list[str]] = []  # the words in each figure
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.bold: list[str] = []  # the words in <b>
        self.within: set[str] = set()  # the elements that are open
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "svg":
            self.drawn.append([])
        self.within.add(tag)

    def handle_endtag(self, tag: str) -> None:
        self.within.discard(tag)

    def handle_data(self, data: str) -> None:
        if self.within & {"td", "th"}:
            self.tables[-1][-1][-1] += data
        if "b" in self.within:
            self.bold.append(data)
        if "svg" in self.within and data.strip():
            self.drawn[-1].append(data)


class Report:
    """What one command wrote and printed."""

    def __init__(self, out: Path, printed: str):
        self.out, self.printed = out, printed
        self.json = json.loads((out / "report.json").read_text())
        self.runs = {run["name"]: run for run in self.json["runs"]}
        self.markdown = (out / "report.md").read_text()
        self.html = (out / "report.html").read_text()
        self.text = html.unescape(self.html)
        self.page = Page(self.html)
        self.csv = {row["name"]: row for row in csv.DictReader(io.StringIO((out / "runs.csv").read_text()))}

    def column(self, title: str, table: int = 0) -> list[str]:
        """The cells below a title in one of the page's tables."""
        titles, *rows = self.page.tables[table]
        return [row[titles.index(title)].removeprefix(BEST) for row in rows]

    def markdown_table(self, title: str) -> list[list[str]]:
        """The rows of report.md's first table that has the column."""
        tables = [part.splitlines() for part in html.unescape(self.markdown).split("\n\n") if part.startswith("| ")]
        lines = next(table for table in tables if title in table[0])
        return [line[2:-2].split(" | ") for line in lines[2:]]

    def table_of(self, title: str) -> list[list[str]]:
        """The first table that has the column."""
        return next(table for table in self.page.tables if title in table[0])


def make_report(runs: list[Path], out: Path) -> Report:
    """Compare runs, or folders of them."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        compare.main([*map(str, runs), "--out", str(out)])
    return Report(out, printed.getvalue())
