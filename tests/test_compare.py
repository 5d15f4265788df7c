"""The report: its four files agree, rank only what may be ranked, and show everything that they leave out.

The run folders are made here through the writers that the trainer uses, with small random predictions.
"""

import csv
import html.parser
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import need
from safetensors.numpy import save_file

from fashion_ddp import compare, lock
from fashion_ddp.report.published import FIGURES
from fashion_ddp.report.tables import markdown_text
from fashion_ddp.rundir import RunFolder
from fashion_ddp.settings import changed, make_config

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
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(cfg.to_yaml())
    folder = RunFolder(path, finished)
    made_by = {"code": "c0de" * 16, "python": "3.11.2", "torch": "2.15.0", "data": data}
    start: dict[str, Any] = {
        "started": "2026-11-21T12:00:00+00:00",
        "command": ["train.py", "--model", cfg.model],
        "made_by": made_by,
    }
    start |= {"git_commit": "a" * 40, "world_size": ranks, "ranks": [{"host": "box", "device": device}] * ranks}
    folder.write_json("environment.json", [start])
    last: dict[str, Any] = {}
    for epoch in range(1, (cfg.epochs if finished else 1) + 1):
        first = (epoch - 1) * 469
        steps = [first + s for s in range(5, 470, 5)]
        losses = [0.4 + 1.8 * np.exp(-s / 150) + 0.05 * np.sin(s * 0.7 + cfg.seed) for s in steps]
        rows = [
            {"epoch": epoch, "step": s, "loss": v, "accuracy": 0.8, "lr": cfg.lr}
            for s, v in zip(steps, losses, strict=True)
        ]
        folder.append("steps.jsonl", rows)
        last = {"epoch": epoch, "step": 469 * epoch, "lr": cfg.lr, "train/loss": losses[-1], "train/accuracy": 0.8}
        last |= {"test/loss": 0.47 + 0.1 / epoch, "test/accuracy": accuracy - 0.02 * (cfg.epochs - epoch)}
        last |= {"time/train_s": 4.5, "time/eval_s": 0.25, "throughput/images_per_s": 13333.3}
        folder.append("metrics.jsonl", [last])
    known: dict[str, Any] = {"format": 1, "status": status, "model": cfg.model, "recipe": cfg.recipe, "seed": cfg.seed}
    known |= {"world_size": ranks, "rank_invariant": True, "dataset": cfg.dataset, "classes": CLASSES}
    known |= {"changed": changed(cfg), "device": device, "epochs": cfg.epochs, "parameters": 7960, **last}
    if finished:
        known |= {"time/train_total_s": 13.5 + cfg.seed / 100, "time/eval_total_s": 0.75, "flops_per_image": 15880}
        save_file(saved, path / "predictions.safetensors")
    folder.write_json("summary.json", known | (summary or {}))
    return path


class Page(html.parser.HTMLParser):
    """Tables as the text of their cells, the words of each figure, and every attribute and element."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.drawn: list[list[str]] = []  # the words in each figure
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.in_cell = self.in_figure = False
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
            self.in_cell = True
        elif tag == "svg":
            self.drawn.append([])
            self.in_figure = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")
        self.in_figure = self.in_figure and tag != "svg"

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.tables[-1][-1][-1] += data
        if self.in_figure and data.strip():
            self.drawn[-1].append(data)


class Report:
    """What one command wrote and printed."""

    def __init__(self, out: Path, printed: str):
        self.out, self.printed = out, printed
        self.json = json.loads((out / "report.json").read_text())
        self.runs = {run["name"]: run for run in self.json["runs"]}
        self.markdown = (out / "report.md").read_text()
        self.html = (out / "report.html").read_text()
        self.page = Page(self.html)
        self.csv = {row["name"]: row for row in csv.DictReader(io.StringIO((out / "runs.csv").read_text()))}

    def column(self, title: str, table: int = 0) -> list[str]:
        """The cells below a title in one of the page's tables."""
        titles, *rows = self.page.tables[table]
        return [row[titles.index(title)] for row in rows]

    def table_of(self, title: str) -> list[list[str]]:
        """The first table that has the column."""
        return next(table for table in self.page.tables if title in table[0])


@pytest.fixture
def report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Compare everything in tmp_path / "runs"."""

    def run(*arguments: str) -> Report:
        compare.main([*(arguments or [str(tmp_path / "runs")]), "--out", str(tmp_path / "report")])
        return Report(tmp_path / "report", capsys.readouterr().out)

    return run


def four_models(runs: Path) -> None:
    make_run(runs / "linear-blog-seed42", model="linear", skill=2.5)
    make_run(runs / "relu-blog-seed42", model="relu", skill=2.5, dead=(2, 4, 6))
    make_run(runs / "cnn-blog-seed42", model="cnn", skill=3.5)
    make_run(runs / "mlp-blog-seed42", model="mlp", skill=3.0)


@pytest.mark.quick
def test_four_files_agree(tmp_path: Path, report: Any) -> None:
    four_models(tmp_path / "runs")
    r = report()
    assert r.column("model") == ["cnn", "mlp", "linear", "relu"]
    by_model = {run["model"]: run for run in r.json["runs"]}
    for row in r.page.tables[0][1:]:
        cells = dict(zip(r.page.tables[0][0], row, strict=True))
        run = by_model[cells["model"]]
        assert cells["accuracy %"] == f"{100 * run['test/accuracy']:.2f}"
        assert cells["loss"] == f"{run['test/loss']:.4f}"
        assert cells["training time s"] == f"{run['time/train_total_s'] + run['time/eval_total_s']:.2f}"
        assert cells["images/s"] == "13,333" and cells["parameters"] == "7,960" and cells["FLOPs per image"] == "15,880"
        assert cells["ranks x device"] == "1 x cpu" and cells["seed"] == "42" and cells["recipe"] == "blog"
        assert f"| {' | '.join(markdown_text(cell) for cell in row)} |\n" in r.markdown
        assert any(re.split(r" {2,}", line.strip()) == row for line in r.printed.splitlines())
        assert float(r.csv[run["name"]]["test/accuracy"]) == run["test/accuracy"]
    assert r.printed.splitlines()[-1] == f"report: {tmp_path / 'report' / 'report.html'}"


def test_json_keeps_the_summary_and_csv_its_scalars(tmp_path: Path, report: Any) -> None:
    run = make_run(tmp_path / "runs" / "one", model="linear")
    r = report()
    summary = json.loads((run / "summary.json").read_text())
    assert {key: r.runs["one"][key] for key in summary} == summary
    scalars = {key for key, value in r.runs["one"].items() if not isinstance(value, dict | list)}
    assert set(r.csv["one"]) == scalars
    assert r.runs["one"]["path"] == str(run) and r.csv["one"]["path"] == str(run)


@pytest.mark.quick
def test_confusion_counts_rows_true_columns_predicted(tmp_path: Path, report: Any) -> None:
    run = make_run(tmp_path / "runs" / "one", model="linear")
    labels = np.array([0, 0, 0, 1, 2, 2])
    predicted = np.array([0, 1, 1, 1, 0, 2])
    logits = np.eye(10, dtype=np.float32)[predicted]
    save_file({"logits": logits, "predicted": predicted, "labels": labels}, run / "predictions.safetensors")
    counts = np.array(report().runs["one"]["confusion"])
    assert counts.sum() == 6
    assert (counts[0, 0], counts[0, 1], counts[1, 1], counts[2, 0], counts[2, 2]) == (1, 2, 1, 1, 1)


def test_confusion_figure_has_the_counts_and_class_names(tmp_path: Path, report: Any) -> None:
    make_run(tmp_path / "runs" / "one", model="linear")
    r = report()
    drawn = r.page.drawn[-1]
    counts = [n for row in r.runs["one"]["confusion"] for n in row if n]
    assert sorted(int(t) for t in drawn if t.isdigit()) == sorted(counts) and sum(counts) == IMAGES
    assert all(drawn.count(name) == 2 for name in CLASSES)


@pytest.mark.quick
def test_seeds_share_a_row_with_mean_and_sample_deviation(tmp_path: Path, report: Any) -> None:
    for seed in (1, 2, 3):
        make_run(tmp_path / "runs" / f"linear-{seed}", model="linear", seed=seed)
    make_run(tmp_path / "runs" / "cnn", model="cnn", skill=5.0)
    r = report()
    accuracies = [100 * r.runs[f"linear-{seed}"]["test/accuracy"] for seed in (1, 2, 3)]
    assert len(set(accuracies)) > 1
    mean, std = np.mean(accuracies), np.std(accuracies, ddof=1)
    assert r.column("seed") == ["42", "1, 2, 3 (n=3)"]
    assert r.page.tables[0][0][3:7] == ["accuracy %", "std", "loss", "std"]
    assert r.column("accuracy %")[1] == f"{mean:.2f}" and r.column("std") == ["", f"\N{PLUS-MINUS SIGN} {std:.2f}"]
    row = r.json["rows"][1]
    assert row["n"] == 3 and row["runs"] == ["linear-1", "linear-2", "linear-3"]
    assert row["mean"]["test/accuracy"] == pytest.approx(mean / 100)
    assert row["std"]["test/accuracy"] == pytest.approx(std / 100)
    single = r.table_of("run")
    assert [line[0] for line in single[1:]] == ["cnn", "linear-1", "linear-2", "linear-3"]


def test_a_row_holds_only_runs_that_differ_in_the_seed(tmp_path: Path, report: Any) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "a", model="linear", seed=1)
    make_run(runs / "b", model="linear", seed=2, lr=0.05)
    make_run(runs / "c", model="linear", seed=3, recipe="lab")
    make_run(runs / "d", model="linear", seed=4, ranks=2)
    make_run(runs / "e", model="linear", seed=1)  # the same seed again
    make_run(runs / "f", model="linear", seed=5, threads=2)  # no other experiment: beside a or e
    r = report()
    assert sorted(sorted(row["runs"]) for row in r.json["rows"]) == [["a", "f"], ["b"], ["c"], ["d"], ["e"]]
    labels = [row["label"] for row in r.json["rows"]]
    assert len(set(labels)) == 5 and any("lr=0.05" in label for label in labels)
    assert "blog, lr=0.05" in r.column("recipe")


def test_settings_that_are_not_an_own_recipe_s_are_named(tmp_path: Path, report: Any) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("all: {batch_size: 64, lr: 0.3, shift: 2}\n")
    make_run(tmp_path / "runs" / "a", model="linear", recipe=str(recipe))
    make_run(tmp_path / "runs" / "b", model="linear", recipe=str(recipe), epochs=1)
    recipe.unlink()  # a report needs run folders only
    assert sorted(report().column("recipe")) == ["mine", "mine, epochs=1"]


@pytest.mark.quick
def test_published_figures_only_beside_the_untouched_recipe(tmp_path: Path, report: Any) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "own", model="cnn")
    make_run(runs / "longer", model="cnn", epochs=4)
    make_run(runs / "shifted", model="cnn", shift=2)
    make_run(runs / "new model", model="mlp")
    make_run(runs / "synthetic", model="cnn", dataset="synthetic", data={})
    make_run(runs / "lab", model="linear", recipe="lab")
    other = tmp_path / "blog.yaml"
    other.write_text("all: {batch_size: 128}\n")
    make_run(runs / "namesake", model="linear", recipe=str(other))
    r = report()
    assert {name for name, run in r.runs.items() if run["published"]} == {"own", "lab"}
    assert r.runs["own"]["published"] == FIGURES["blog", "cnn"]
    rows = [row for row in r.table_of("source")[1:] if "this report" not in row[2]]
    assert sorted(row[:2] + row[3:6] for row in rows) == [
        ["cnn", "blog", "85.63", "0.4067", "17.07"],
        ["linear", "lab", "~83", "-", "~32"],
    ]
    assert {row[-1] for row in rows} == {"1 x RTX 2080 Ti", "CPU"}
    assert "Published figures stand beside runs with the recipe's own settings only" in r.markdown


@pytest.mark.quick
def test_dead_logits_are_counted_for_relu_alone(tmp_path: Path, report: Any) -> None:
    saved = predictions(0, 2.0, dead=(2, 4, 6), relu=True)
    saved["logits"][:5] = 0
    for model in ("relu", "linear"):
        save_file(saved, make_run(tmp_path / "runs" / model, model=model) / "predictions.safetensors")
    r = report()
    empty = sum(not any(row) for row in saved["logits"].tolist())
    assert 5 <= empty == r.runs["relu"]["images_without_logit"]
    assert r.runs["relu"]["dead_classes"] == ["Pullover", "Coat", "Shirt"] and "dead_classes" not in r.runs["linear"]
    for text in (html.unescape(r.html), r.markdown):
        assert "relu: 3 of 10 logits are dead (Pullover, Coat, Shirt): never positive on any test image" in text
        assert "Never predicted: Pullover, Coat, Shirt." in text and text.count("logits are dead") == 1
        assert f"On {empty} images every logit is 0" in text


def test_a_relu_class_may_be_alive_and_never_predicted(tmp_path: Path, report: Any) -> None:
    saved = predictions(0, 2.0, dead=(), relu=True)
    saved["predicted"][saved["predicted"] == 3] = 0
    save_file(saved, make_run(tmp_path / "runs" / "r", model="relu") / "predictions.safetensors")
    r = report()
    assert r.runs["r"]["dead_classes"] == [] and r.runs["r"]["never_predicted"] == ["Dress"]
    assert "relu: 0 of 10 logits are dead (positive for no test image). Never predicted: Dress." in r.markdown
    assert "relu: its accuracy varies by tens of points with the seed" in r.markdown


@pytest.mark.quick
def test_unfinished_and_failed_runs_are_listed_not_ranked(tmp_path: Path, report: Any) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "good", model="linear")
    make_run(runs / "bad", model="cnn", status="failed", summary={"error": "TrainingFailed: loss is nan | step 12"})
    make_run(runs / "halted", model="mlp", status="stopped")
    make_run(runs / "gone", model="relu", status="running")  # killed: no process holds its folder
    going = lock.take(make_run(runs / "going", model="relu", status="running"))
    (make_run(runs / "empty", model="linear", seed=7) / "summary.json").unlink()
    r = report()
    going.release()
    assert r.column("model") == ["linear"] and r.column("seed") == ["42"]
    listed = {row[0]: row for row in r.table_of("status")[1:]}
    statuses = {name: row[4] for name, row in listed.items()}
    ended = {"bad": "failed", "halted": "stopped", "gone": "interrupted", "empty": "no summary"}
    assert statuses == ended | {"going": "running"}
    assert listed["bad"][-1] == "TrainingFailed: loss is nan | step 12"
    assert "loss is nan" in r.markdown and "loss is nan" in r.printed
    assert set(r.runs) == {"good", "bad", "halted", "gone", "going", "empty"}
    assert [row["runs"] for row in r.json["rows"]] == [["good"]]


def test_no_finished_run(tmp_path: Path, report: Any) -> None:
    make_run(tmp_path / "runs" / "bad", model="cnn", status="failed")
    r = report()
    assert "None of 1 run is finished" in r.html and r.json["rows"] == [] and "failed" in r.printed


def test_a_figure_that_is_not_finite_is_said_so_and_ranks_last(tmp_path: Path, report: Any) -> None:
    make_run(tmp_path / "runs" / "good", model="linear", skill=0.1)
    run = make_run(tmp_path / "runs" / "nan", model="cnn", summary={"test/loss": None, "test/accuracy": None})
    lines = (run / "steps.jsonl").read_text().splitlines()
    (run / "steps.jsonl").write_text(
        "\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | {"loss": None})]) + "\n"
    )
    (run / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "step": 469, "test/accuracy": None}) + "\n")
    r = report()
    assert r.column("model") == ["linear", "cnn"] and r.column("loss")[1] == "not finite"
    assert r.runs["nan"]["test/loss"] is None and r.csv["nan"]["test/loss"] == ""
    assert "NaN" not in (r.out / "report.json").read_text()


def test_other_data_is_another_table(tmp_path: Path, report: Any) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "a", model="linear", skill=1.0)
    make_run(runs / "b", model="cnn", skill=3.0, data=MD5 | {"train-images": "f" * 32})
    make_run(runs / "c", model="mlp", skill=2.0)
    r = report()
    ranked = [table for table in r.page.tables if "parameters" in table[0]]
    assert sorted([row[0] for row in table[1:]] for table in ranked) == [["cnn"], ["mlp", "linear"]]
    assert "train-images 8d4fb7e6" in r.html and "train-images ffffffff" in r.html


def test_synthetic_is_marked_and_ranked_apart(tmp_path: Path, report: Any) -> None:
    make_run(tmp_path / "runs" / "a", model="linear", dataset="synthetic", data={}, skill=9.0)
    make_run(tmp_path / "runs" / "b", model="linear", skill=1.0)
    r = report()
    assert "<title>Partly SYNTHETIC data: " in r.html and "# Partly SYNTHETIC data" in r.markdown
    by_dataset = {row["dataset"]: row for row in r.json["rows"]}
    assert by_dataset["SYNTHETIC data"]["runs"] == ["a"] and by_dataset["fashion_mnist"]["runs"] == ["b"]
    assert "linear SYNTHETIC" in r.printed and "| linear SYNTHETIC |" in r.markdown
    marked = [any("SYNTHETIC" in text for text in figure) for figure in r.page.drawn]
    assert len(marked) == 6 and marked == [False] * 3 + [True] * 3


@pytest.mark.quick
def test_names_are_escaped_everywhere(tmp_path: Path, report: Any) -> None:
    name = "<script>x&$a$|b"
    make_run(tmp_path / "runs" / name, model="linear")
    make_run(tmp_path / "runs" / "again", model="linear")  # alike, so that figures must name the runs
    make_run(tmp_path / "runs" / "<b>bad", model="cnn", status="failed", summary={"error": "<img src=x>|y"})
    r = report()
    assert "script" not in r.page.elements and "img" not in r.page.elements and "b" not in r.page.elements
    assert name in [cell for table in r.page.tables for row in table for cell in row]
    assert any(name in text for figure in r.page.drawn for text in figure)
    assert r"| <img src=x>\|y |" in html.unescape(r.markdown)  # a bare | would end the cell
    assert "<b>" not in r.markdown and "<img" not in r.markdown and name in r.runs


def test_the_page_needs_no_other_file(tmp_path: Path, report: Any) -> None:
    four_models(tmp_path / "runs")
    r = report()
    references = [value for name, value in r.page.attributes if name in ("src", "href", "xlink:href", "data", "srcset")]
    assert references and all(value.startswith("#") for value in references)
    assert not re.search(r"@import|url\((?!#)", r.html) and not {"link", "script", "img"} & set(r.page.elements)
    assert len(r.html) < 1_000_000 and r.html.lower().count("<!doctype") == 1 and "<?xml" not in r.html
    identifiers = [value for name, value in r.page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    assert {value[1:] for value in references} <= set(identifiers)


def test_same_runs_same_report(tmp_path: Path, report: Any) -> None:
    four_models(tmp_path / "runs")
    first, second = report(), report()
    assert (first.html, first.markdown, first.json) == (second.html, second.markdown, second.json)


def test_other_files_in_the_report_folder_stay(tmp_path: Path, report: Any) -> None:
    make_run(tmp_path / "runs" / "one", model="linear")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").write_text("mine")
    (tmp_path / "report" / "report.md").write_text("old")
    assert report().markdown != "old"
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        *("report.html", "report.md", "report.json", "runs.csv", "mine.txt")
    }


def test_runs_of_one_name_in_two_places_are_told_apart(tmp_path: Path, report: Any) -> None:
    paths = [make_run(tmp_path / where / "same", model="linear", seed=s) for s, where in enumerate(("a", "b"))]
    r = report(*map(str, paths))
    assert sorted(r.runs) == sorted(map(str, paths))


def test_environment_tells_what_differs_and_what_does_not(tmp_path: Path, report: Any) -> None:
    make_run(tmp_path / "runs" / "one", model="linear")
    make_run(tmp_path / "runs" / "two", model="linear", ranks=2)
    r = report()
    differing, common = r.page.tables[-2:]
    assert differing[0] == ["run", "world_size", "ranks"]
    assert differing[2] == ["two", "2", "2 x host box, device cpu"]
    assert ["made_by/torch", "2.15.0"] in common and ["git_commit", "a" * 12] in common


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no run folder there"),
        (["runs", "--ot", "x"], "--ot"),
        (["runs", "--out", "runs/one/config.yaml"], "--out"),
    ],
)
def test_mistakes_end_with_2_and_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    make_run(tmp_path / "runs" / "one", model="linear")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        compare.main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and said in printed.err and not printed.out
    assert not (tmp_path / "report").exists()


def test_unreadable_predictions_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(tmp_path / "one", model="linear") / "predictions.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path / "one"), "--out", str(tmp_path / "report")])
    assert stop.value.code == 2 and str(path) in capsys.readouterr().err


def test_heavy_libraries_are_not_imported() -> None:
    code = (
        "import sys, fashion_ddp.compare; print(*{'torch', 'wandb', 'torchmetrics', 'torchvision'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.slow
def test_a_browser_shows_the_tables(tmp_path: Path, report: Any) -> None:
    need("chromium")
    four_models(tmp_path / "runs")
    page = (report().out / "report.html").as_uri()
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    dom = subprocess.run([*browser, "--dump-dom", page], capture_output=True, text=True, check=True, timeout=120).stdout
    assert Page(dom).tables == Page(report().html).tables and dom.count("<svg") == 9
    picture = tmp_path / "page.png"
    subprocess.run([*browser, f"--screenshot={picture}", page], capture_output=True, check=True, timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG")
