"""The report: its four files agree, rank only what may be ranked, and show everything that they leave out."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reports
from reports import CLASSES, MD5, make_report, make_run, predictions
from safetensors.numpy import save_file

from fashion_ddp import compare
from fashion_ddp.report.tables import BEST
from fashion_ddp.report.text import markdown_text
from fashion_ddp.report.tutorials import FIGURES
from fashion_ddp.runs import lock

MISTAKES = {"nowhere": "nowhere: no run folder there", "damaged": "damaged/predictions.safetensors"}
MISTAKES |= {"runs --ot x": "--ot", "runs --out runs/one/config.yaml": "--out"}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def report(runs: Path) -> Any:
    """Compare these runs, or all."""
    return lambda *some: make_report([*some] or [runs], runs.parent / "report")


def four_models(runs: Path) -> None:
    make_run(runs / "linear-blog-seed42", model="linear", skill=2.5)
    make_run(runs / "relu-blog-seed42", model="relu", skill=2.5, dead=(2, 4, 6))
    make_run(runs / "cnn-blog-seed42", model="cnn", skill=3.5)
    make_run(runs / "mlp-blog-seed42", model="mlp", skill=3.0)


@pytest.mark.quick
def test_four_files_agree(tmp_path: Path, runs: Path, report: Any) -> None:
    four_models(runs)
    r = report()
    assert r.column("model") == ["cnn", "mlp", "linear", "relu"]
    by_model = {run["model"]: run for run in r.json["runs"]}
    scalars = {key for run in r.json["runs"] for key, value in run.items() if not isinstance(value, dict | list)}
    intervals = {row["runs"][0]: row["interval"] for row in r.json["rows"]}
    for row in r.page.tables[0][1:]:
        cells = dict(zip(r.page.tables[0][0], row, strict=True))
        run = by_model[cells["model"].removeprefix(BEST)]
        assert cells["accuracy %"] == f"{100 * run['test/accuracy']:.2f}"
        assert cells["loss"] == f"{run['test/loss']:.4f}"
        assert cells["training time s"] == f"{run['time/train_total_s'] + run['time/eval_total_s']:.2f}"
        assert cells["images/s"] == "13,333" and cells["parameters"] == "7,960" and cells["FLOPs per image"] == "15,880"
        assert cells["ranks x device"] == "1 x cpu" and cells["recipe"] == "blog" and cells["seed"] == "42 (1 seed)"
        assert cells["95 % interval"] == " to ".join(f"{100 * end:.2f}" for end in intervals[run["name"]])
        assert cells["macro F1"] == f"{run['test/macro_f1']:.4f}" and cells["memory MB"] == "805"
        assert cells["calibration error %"] == f"{100 * run['test/calibration_error']:.2f}"
        assert f"| {' | '.join(markdown_text(cell) for cell in row)} |\n" in r.markdown
        printed = [re.split(r" {2,}", line.strip()) for line in r.printed.splitlines()]
        assert any(line[0] == row[0] and set(line) < set(row) for line in printed if len(line) == 10)
        assert json.loads((runs / run["name"] / "summary.json").read_text()).items() <= run.items()
        assert run["path"] == r.csv[run["name"]]["path"] == str(runs / run["name"])
        assert set(r.csv[run["name"]]) == scalars
        assert float(r.csv[run["name"]]["test/accuracy"]) == run["test/accuracy"]
    assert r.printed.splitlines()[-1] == f"report: {tmp_path / 'report' / 'report.html'}"
    for text in (r.text, r.markdown, r.printed):  # each run was alone
        assert "shared" not in text and "at once" not in text


@pytest.mark.quick
def test_confusion_counts_rows_true_columns_predicted(runs: Path, report: Any) -> None:
    run = make_run(runs / "one", model="linear")
    labels = np.array([0, 0, 0, 1, 2, 2])
    predicted = np.array([0, 1, 1, 1, 0, 2])
    logits = np.eye(10, dtype=np.float32)[predicted]
    save_file({"logits": logits, "predicted": predicted, "labels": labels}, run / "predictions.safetensors")
    (run / "examples.safetensors").unlink()  # of other predictions
    counts = np.array(report().runs["one"]["confusion"])
    assert counts.sum() == 6
    assert (counts[0, 0], counts[0, 1], counts[1, 1], counts[2, 0], counts[2, 2]) == (1, 2, 1, 1, 1)


@pytest.mark.quick
def test_seeds_share_a_row_with_mean_and_sample_deviation(runs: Path, report: Any) -> None:
    for seed in (1, 2, 3):
        make_run(runs / f"linear-{seed}", model="linear", seed=seed)
    make_run(runs / "cnn", model="cnn", skill=5.0)
    r = report()
    accuracies = [100 * r.runs[f"linear-{seed}"]["test/accuracy"] for seed in (1, 2, 3)]
    assert len(set(accuracies)) > 1
    mean, std = np.mean(accuracies), np.std(accuracies, ddof=1)
    assert r.column("seed") == ["42 (1 seed)", "1, 2, 3 (3 seeds)"]
    assert r.page.tables[0][0][2:8] == ["accuracy %", "std", "95 % interval", "seed", "loss", "std"]
    assert r.column("accuracy %")[1] == f"{mean:.2f}" and r.column("std") == ["", f"\N{PLUS-MINUS SIGN} {std:.2f}"]
    row = r.json["rows"][1]
    assert row["n"] == 3 and row["runs"] == ["linear-1", "linear-2", "linear-3"]
    assert row["mean"]["test/accuracy"] == pytest.approx(mean / 100)
    assert row["std"]["test/accuracy"] == pytest.approx(std / 100)
    single = r.table_of("run")
    assert [line[0] for line in single[1:]] == ["cnn", "linear-1", "linear-2", "linear-3"]


def test_a_row_holds_only_runs_that_differ_in_the_seed(runs: Path, report: Any) -> None:
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


@pytest.mark.quick
def test_what_all_rows_changed_alike_is_said_once_and_tells_none_apart(runs: Path, report: Any) -> None:
    make_run(runs / "a", model="linear", epochs=2, shuffle=True)
    make_run(runs / "b", model="cnn", epochs=2, shuffle=True)
    make_run(runs / "c", model="cnn", epochs=2, shuffle=True, lr=0.05)
    r = report()
    assert sorted(row["label"] for row in r.json["rows"]) == ["cnn", "cnn lr=0.05", "linear"]
    assert "recipe blog, with epochs=2, shuffle=True; seed 42." in r.text
    assert "blog, epochs=2, shuffle=True, lr=0.05" in r.column("recipe")  # where all of them stand
    make_run(runs / "d", model="linear", epochs=4, shuffle=True)
    assert {"cnn epochs=2", "linear epochs=4"} < {row["label"] for row in report().json["rows"]}


def test_settings_that_are_not_an_own_recipe_s_are_named(tmp_path: Path, runs: Path, report: Any) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("all: {batch_size: 64, lr: 0.3, shift: 2}\n")
    make_run(runs / "a", model="linear", recipe=str(recipe))
    make_run(runs / "b", model="linear", recipe=str(recipe), epochs=1)
    recipe.unlink()  # a report needs run folders only
    assert sorted(report().column("recipe")) == ["mine", "mine, epochs=1"]


@pytest.mark.quick
def test_published_figures_only_beside_the_untouched_recipe(tmp_path: Path, runs: Path, report: Any) -> None:
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
    published = sorted(row[:2] + row[3:6] for row in rows)
    assert published == [["cnn", "blog", "85.63", "0.4067", "17.07"], ["linear", "lab", "~83", "-", "~32"]]
    assert {row[-1] for row in rows} == {"1 x RTX 2080 Ti", "CPU"}
    assert "Published figures stand beside runs with the recipe's own settings only" in r.markdown


@pytest.mark.quick
def test_dead_logits_are_counted_for_relu_alone(runs: Path, report: Any) -> None:
    saved = predictions(0, 2.0, dead=(2, 4, 6), relu=True)
    saved["logits"][:5] = 0
    for model in ("relu", "linear"):
        save_file(saved, make_run(runs / model, model=model) / "predictions.safetensors")
    r = report()
    empty = sum(not any(row) for row in saved["logits"].tolist())
    assert 5 <= empty == r.runs["relu"]["images_without_logit"]
    assert r.runs["relu"]["dead_classes"] == ["Pullover", "Coat", "Shirt"] and "dead_classes" not in r.runs["linear"]
    for text in (html.unescape(r.html), r.markdown):
        assert "relu: 3 of 10 logits are dead (Pullover, Coat, Shirt): never positive on any test image" in text
        assert "Never predicted: Pullover, Coat, Shirt." in text and text.count("logits are dead") == 1
        assert f"On {empty} images every logit is 0" in text


def test_a_relu_class_may_be_alive_and_never_predicted(runs: Path, report: Any) -> None:
    saved = predictions(0, 2.0, dead=(), relu=True)
    saved["predicted"][saved["predicted"] == 3] = 0
    save_file(saved, make_run(runs / "r", model="relu") / "predictions.safetensors")
    r = report()
    assert r.runs["r"]["dead_classes"] == [] and r.runs["r"]["never_predicted"] == ["Dress"]
    assert "relu: 0 of 10 logits are dead (each is positive on some test image). Never predicted: Dress." in r.markdown
    assert "accuracy varies by tens of points with the seed" in r.markdown


@pytest.mark.quick
def test_unfinished_and_failed_runs_are_listed_not_ranked(runs: Path, report: Any) -> None:
    make_run(runs / "bad", model="cnn", status="failed", summary={"error": "TrainingFailed: loss is nan | step 12"})
    r = report()
    assert "None of 1 run is finished" in r.html and r.json["rows"] == [] and "failed" in r.printed
    make_run(runs / "good", model="linear")
    make_run(runs / "halted", model="mlp", status="stopped")
    make_run(runs / "gone", model="relu", status="running")  # killed: no process holds its folder
    going = lock.acquire(make_run(runs / "going", model="relu", status="running"))
    (make_run(runs / "empty", model="linear", seed=7) / "summary.json").unlink()
    r = report()
    going.release()
    assert r.column("model") == ["linear"] and r.column("seed") == ["42 (1 seed)"]
    listed = {row[0]: row for row in r.table_of("status")[1:]}
    statuses = {name: row[4] for name, row in listed.items()}
    ended = {"bad": "failed", "halted": "stopped", "gone": "interrupted", "empty": "no summary"}
    assert statuses == ended | {"going": "running"}
    assert listed["bad"][-1] == "TrainingFailed: loss is nan | step 12"
    assert "loss is nan" in r.markdown and "loss is nan" in r.printed
    assert set(r.runs) == {"good", "bad", "halted", "gone", "going", "empty"}
    assert [row["runs"] for row in r.json["rows"]] == [["good"]]


def test_a_figure_that_is_not_finite_is_said_so_and_ranks_last(runs: Path, report: Any) -> None:
    make_run(runs / "good", model="linear", skill=0.1)
    run = make_run(runs / "nan", model="cnn", summary={"test/loss": None, "test/accuracy": None})
    lines = (run / "steps.jsonl").read_text().splitlines()
    last = json.dumps(json.loads(lines[-1]) | {"loss": None})
    (run / "steps.jsonl").write_text("\n".join([*lines[:-1], last, ""]))
    (run / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "step": 469, "test/accuracy": None}) + "\n")
    r = report()
    assert r.column("model") == ["linear", "cnn"] and r.column("loss")[1] == "not finite"
    assert r.runs["nan"]["test/loss"] is None and r.csv["nan"]["test/loss"] == ""
    assert "NaN" not in (r.out / "report.json").read_text()


def test_other_data_is_another_table(runs: Path, report: Any) -> None:
    make_run(runs / "a", model="linear", skill=1.0)
    make_run(runs / "b", model="cnn", skill=3.0, data=MD5 | {"train-images": "f" * 32})
    make_run(runs / "c", model="mlp", skill=2.0)
    r = report()
    ranked = [table for table in r.page.tables if "parameters" in table[0]]
    assert sorted([row[0].removeprefix(BEST) for row in table[1:]] for table in ranked) == [["cnn"], ["mlp", "linear"]]
    assert "train-images 8d4fb7e6" in r.html and "train-images ffffffff" in r.html


def test_synthetic_is_marked_and_ranked_apart(runs: Path, report: Any) -> None:
    make_run(runs / "a", model="linear", dataset="synthetic", data={}, skill=9.0)
    make_run(runs / "b", model="linear", skill=1.0)
    r = report()
    assert "<title>Partly SYNTHETIC data: " in r.html and "# Partly SYNTHETIC data" in r.markdown
    by_dataset = {row["dataset"]: row for row in r.json["rows"]}
    assert by_dataset["SYNTHETIC data"]["runs"] == ["a"] and by_dataset["fashion_mnist"]["runs"] == ["b"]
    assert "linear SYNTHETIC" in r.printed and "| linear SYNTHETIC |" in r.markdown
    marked = [any("SYNTHETIC" in text for text in figure) for figure in r.page.drawn if figure]
    assert marked == [False] * 3 + [True] * 3  # accuracy, and two learning curves
    assert [line for line in r.printed.splitlines() if line.startswith("SYNTHETIC data, which says nothing")]


@pytest.mark.quick
def test_names_are_escaped_everywhere(runs: Path, report: Any) -> None:
    name = "<script>x&$a$|b"
    make_run(runs / name, model="linear")
    make_run(runs / "again", model="linear")  # alike, so that figures must name the runs
    make_run(runs / "<b>bad", model="cnn", status="failed", summary={"error": "<img src=x>|y"})
    r = report()
    assert r.page.elements.count("script") == 1 and "img" not in r.page.elements and "bad" not in r.page.bold
    cells = [cell for table in r.page.tables for row in table for cell in row]
    assert name in cells and any("<b>bad" in cell for cell in cells)
    assert any(name in text for figure in r.page.drawn for text in figure)
    assert r"| <img src=x>\|y |" in html.unescape(r.markdown)  # a bare | would end the cell
    assert "<b>" not in r.markdown and "<img" not in r.markdown and name in r.runs


def test_the_page_needs_no_other_file_and_is_the_same_each_time(runs: Path, report: Any) -> None:
    four_models(runs)
    r, again = report(), report()
    assert (r.html, r.markdown, r.json) == (again.html, again.markdown, again.json)
    references = [value for name, value in r.page.attributes if name in ("src", "href", "xlink:href", "data", "srcset")]
    assert references and all(value.startswith(("#", "data:")) for value in references)
    assert not re.search(r"@import|url\((?!#)", r.html) and r.page.elements.count("link") == 1  # an empty icon
    assert len(r.html) < 1_000_000 and r.html.lower().count("<!doctype") == 1 and "<?xml" not in r.html
    identifiers = [value for name, value in r.page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    assert {value[1:] for value in references if value.startswith("#")} <= set(identifiers)


def test_other_files_in_the_report_folder_stay(tmp_path: Path, runs: Path, report: Any) -> None:
    make_run(runs / "one", model="linear")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").write_text("mine")
    (tmp_path / "report" / "report.md").write_text("old")
    assert report().markdown != "old"
    written = {"report.html", "report.md", "report.json", "runs.csv"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == written | {"mine.txt"}


def test_runs_of_one_name_in_two_places_are_told_apart(tmp_path: Path, report: Any) -> None:
    paths = [make_run(tmp_path / where / "same", model="linear", seed=s) for s, where in enumerate(("a", "b"))]
    r = report(*paths)
    assert sorted(r.runs) == sorted(map(str, paths))


def test_environment_tells_what_differs_and_what_does_not(runs: Path, report: Any) -> None:
    make_run(runs / "one", model="linear")
    make_run(runs / "two", model="linear", ranks=2)
    r = report()
    (titles, _, other), common = r.page.tables[-2:]
    assert titles == ["run", "world_size", "ranks"] and other == ["two", "2", "2 x host box, device cpu"]
    assert ["made_by/torch", "2.15.0"] in common and ["git_commit", "a" * 12] in common


@pytest.mark.quick
@pytest.mark.parametrize(("words", "said"), MISTAKES.items())
def test_mistakes_end_with_2_and_one_message(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs" / "one", model="linear")
    path = make_run(tmp_path / "damaged", model="linear") / "predictions.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        compare.main(words.split())
    printed = capsys.readouterr()
    assert stop.value.code == 2 and said in printed.err and not printed.out
    assert not (tmp_path / "report").exists()


@pytest.mark.quick
def test_times_that_runs_shared_are_marked_wherever_they_stand(runs: Path, report: Any) -> None:
    make_run(runs / "cnn", model="cnn", skill=5.0, summary={"side_by_side": 1})
    make_run(runs / "linear-1", model="linear", seed=1, summary={"side_by_side": 4})
    make_run(runs / "linear-2", model="linear", seed=2)  # of a folder that does not say: it was alone
    make_run(runs / "mlp", model="mlp", skill=1.0, summary={"side_by_side": 2})
    r = report()
    assert r.column("times shared by") == ["-", "1 or 4 runs", "2 runs"]
    titles, *single = r.table_of("run")
    shared = {line[0]: line[titles.index("times shared by")] for line in single}
    assert shared == {"cnn": "-", "linear-1": "4 runs", "linear-2": "-", "mlp": "2 runs"}
    said = "Times shared by up to 4 runs at once: linear-1 and mlp. Their training time and images/s are no measure of"
    for text in (r.text, r.markdown, r.printed):
        assert text.count(said) == 1
    assert "1 or 4 runs" in r.printed
    ours = [line[-1] for line in r.table_of("hardware") if line[2].startswith("this report")]
    assert ours == ["1 x cpu", "1 x cpu, times shared by 1 or 4 runs"]  # mlp is none of the tutorials'
    axes = {text for figure in r.page.drawn for text in figure if text.startswith("training time")}
    assert axes == {"training time, s (shared by runs at once)"}
    assert {row["label"]: row["side_by_side"] for row in r.json["rows"]} == {"cnn": 1, "linear": 4, "mlp": 2}


def test_heavy_libraries_are_not_imported() -> None:
    heavy = {"torch", "wandb", "torchmetrics", "torchvision"}
    code = f"import sys, fashion_ddp.compare; print(*{heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""


@pytest.mark.quick
def test_classes_of_unlike_size_count_the_same_in_a_figure_of_its_own(
    runs: Path, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "IMAGES", 205)  # of five classes one more
    make_run(runs / "one", model="cnn")
    r = report()
    counts = np.array(r.runs["one"]["confusion"])
    expected = float(np.mean(counts.diagonal() / counts.sum(1)))
    assert expected != r.runs["one"]["test/accuracy"] and r.runs["one"]["test/balanced_accuracy"] == expected
    assert r.column("balanced accuracy %") == [f"{100 * expected:.2f}"]


@pytest.mark.quick
def test_every_other_number_is_that_of_the_json(runs: Path, report: Any) -> None:
    four_models(runs)
    make_run(runs / "linear 2", model="linear", skill=2.4, seed=2)
    r = report()
    pairs = [
        [p["first"], p["second"], f"{100 * p['difference']:.2f}", " to ".join(f"{100 * v:.2f}" for v in p["interval"])]
        + [str(p["only_first"]), str(p["only_second"])]
        + ["< 0.0001" if p[name] < 0.0001 else f"{p[name]:.4f}" for name in ("p", "p_holm")]
        for p in r.json["pairs"]
    ]
    assert r.table_of("p, Holm")[1:] == pairs and len(pairs) == 6
    rows = {row["label"]: row for row in r.json["rows"]}
    titles, *lines = r.table_of("training images")
    assert titles[:3] == ["class", "training images", "test images"] and len(titles) == 3 + 2 * len(rows)
    by_class = [[f"{100 * v:.2f}" for v in row["recall_by_class"]] for row in rows.values()]
    f1 = [[f"{v:.2f}" for v in row["f1_by_class"]] for row in rows.values()]
    figures = [column for pair in zip(by_class, f1, strict=True) for column in pair]
    counts = [[f"{6000 + n:,}" for n in range(10)], ["20"] * 10]
    assert [*zip(*lines, strict=True)] == [*map(tuple, [CLASSES, *counts, *figures])]
    by_run = [r.runs[name]["f1_by_class"] for name in rows["linear"]["runs"]]
    assert len(by_run) == 2 and rows["linear"]["f1_by_class"] == pytest.approx(np.mean(by_run, axis=0))
    assert "balanced accuracy %" not in r.page.tables[0][0]  # which is the accuracy where classes are of one size
    shares = r.runs["relu-blog-seed42"]["positive_by_class"]
    [drawn] = [figure for figure in r.page.drawn if "dead: 0 on every image" in figure]
    assert [text for text in drawn if text.endswith("%")] == [f"{100 * share:.2f} %" for share in shares if share]
    confused = [row[1:] for row in r.markdown_table("true -> predicted") if row[0] == "cnn"]
    counts = np.array(r.runs["cnn-blog-seed42"]["confusion"])
    matrix = next(table for table in r.page.tables if table[0] == ["", *CLASSES])  # of the best row, the cnn
    assert matrix[1:] == [[name, *(str(n or "") for n in row)] for name, row in zip(CLASSES, counts, strict=True)]
    wrong = sorted((counts - np.diag(counts.diagonal())).ravel(), reverse=True)
    assert [int(images) for _, images, _ in confused] == wrong[:5]
    for names, images, share in confused:
        true, predicted = (CLASSES.index(name) for name in names.split(" -> "))
        assert counts[true, predicted] == int(images) and share == f"{100 * int(images) / counts[true].sum():.1f}"
        assert f"{CLASSES[true]} \N{RIGHTWARDS ARROW} {CLASSES[predicted]}" in r.page.bold
        assert f"{images} images, {share} % of {CLASSES[true]}" in r.text
