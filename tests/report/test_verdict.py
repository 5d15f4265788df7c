"""The verdict says what the data carry and no more: the best only if it is, how sure, and on how many seeds."""

import html
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reports import IMAGES, Report, make_report, make_run
from safetensors.numpy import save_file

from fashion_ddp.report.tables import BEST

pytestmark = pytest.mark.quick

LABELS = np.arange(IMAGES) % 10


def answer(path: Path, predicted: np.ndarray) -> None:
    logits = 9 * np.eye(10, dtype=np.float32)[predicted]
    save_file({"logits": logits, "predicted": predicted, "labels": LABELS}, path / "predictions.safetensors")


def run(path: Path, wrong: range | list[int], model: str, **settings: Any) -> None:
    """A run that takes these images, of all 200, for the next class."""
    predicted = LABELS.copy()
    predicted[list(wrong)] = (predicted[list(wrong)] + 1) % 10
    make_run(path, model=model, summary={"test/accuracy": 1 - len(wrong) / IMAGES}, **settings)
    answer(path, predicted)


def report(runs: Path, **wrong: range) -> Report:
    """Compare the runs that are there, and those of models that get these images wrong."""
    for model, images in wrong.items():
        run(runs / model, images, model)
    return make_report([runs], runs.parent / "report")


def pair(r: Report, first: str, second: str) -> dict[str, Any]:
    return next(p for p in r.json["pairs"] if (p["first"], p["second"]) == (first, second))


def starred(r: Report) -> list[str]:
    return [row[0] for row in r.page.tables[0][1:] if row[0].startswith(BEST)]


def test_the_best_is_named_with_its_lead_interval_p_and_seeds(tmp_path: Path) -> None:
    r = report(tmp_path / "runs", cnn=range(20), mlp=range(60), linear=range(100))
    lead = pair(r, "cnn", "mlp")
    assert lead["difference"] == pytest.approx(0.2) and (lead["only_first"], lead["only_second"]) == (40, 0)
    assert lead["p"] == pytest.approx(2 * 0.5**40) and lead["significant"]
    low, high = (f"{100 * end:.2f}" for end in lead["interval"])
    said = "On 1 seed, cnn is the best of 3: 90.00 % of 200 test images right."
    sure = f"That is 20.00 points (95 % interval {low} to {high}; exact McNemar, Holm: p < 0.0001) more than mlp, "
    sure += "the next. 1 seed each: another seed may change the order."
    assert all(said in text and sure in text for text in (r.text, html.unescape(r.markdown), r.printed))
    assert starred(r) == [f"{BEST}cnn"] and f"| {BEST}cnn |" in r.markdown
    assert [row["best"] for row in r.json["rows"]] == [True, False, False]
    assert r.json["verdicts"] == [{"dataset": "fashion_mnist", "verdict": f"{said} {sure}"}]


def test_a_lead_that_may_be_luck_is_said_to_be_none(tmp_path: Path) -> None:
    r = report(tmp_path / "runs", cnn=range(20), mlp=range(15, 40), linear=range(100))
    p = pair(r, "cnn", "mlp")["p_holm"]
    assert p > 0.05 and not starred(r) and not any(row["best"] for row in r.json["rows"])
    assert "No best can be named: cnn gets most, 90.00 % of 200 test images right." in r.text
    assert "It is not shown to be better than mlp: 2.50 points (95 % interval" in r.text
    assert f"Holm: p = {p:.4f})" in r.text


def test_a_lead_that_is_one_of_many_needs_a_smaller_p(tmp_path: Path) -> None:
    for n in range(3):  # of each 12 images are wrong that the first gets right, and 3 right that it gets wrong
        wrong = [*range(3, 20), *range(100 + 20 * n, 112 + 20 * n)]
        run(tmp_path / "runs" / f"b{n}", wrong, "mlp", lr=0.1 * (n + 2))
    r = report(tmp_path / "runs", cnn=range(20))
    lead = r.json["pairs"][0]
    assert (lead["only_first"], lead["only_second"]) == (12, 3) and lead["p"] < 0.05 < lead["p_holm"]
    assert lead["interval"][0] > 0 and not lead["significant"] and not starred(r)


def test_one_row_is_compared_with_nothing(tmp_path: Path) -> None:
    r = report(tmp_path / "runs", cnn=range(20))
    low, high = (f"{100 * end:.2f}" for end in r.json["rows"][0]["interval"])
    assert "cnn gets 90.00 % of 200 test images right." in r.text
    assert f"95 % interval: {low} to {high} %. It stands alone" in r.text
    assert "1 seed: another seed may change the figure." in r.text and not starred(r)
    assert r.json["pairs"] == []


def test_of_several_seeds_the_weakest_pair_of_runs_counts(tmp_path: Path) -> None:
    for seed, wrong in enumerate((20, 22, 30)):
        run(tmp_path / "runs" / f"a{seed}", range(wrong), model="cnn", seed=seed)
    for seed, wrong in enumerate((45, 60, 62)):
        run(tmp_path / "runs" / f"b{seed}", range(wrong), model="mlp", seed=seed)
    r = report(tmp_path / "runs")
    lead = pair(r, "cnn", "mlp")
    assert (lead["tested"], lead["only_first"], lead["only_second"]) == (9, 15, 0)  # 30 wrong against 45
    assert lead["p"] == pytest.approx(2 * 0.5**15) and starred(r)
    assert "in the weakest of 9 pairs of runs) more than mlp, the next. 3 seeds each." in r.text
    assert ">cnn is the best of 2: 88.00 % of 200 test images right." in r.text
    values = [1 - wrong / IMAGES for wrong in (20, 22, 30)]
    half = 4.302653 * np.std(values, ddof=1) / 3**0.5
    assert r.json["rows"][0]["interval"] == pytest.approx([np.mean(values) - half, np.mean(values) + half], abs=1e-6)


def test_one_seed_that_fails_leaves_no_best(tmp_path: Path) -> None:
    for seed, wrong in enumerate((5, 6, 80)):
        run(tmp_path / "runs" / f"a{seed}", range(wrong), model="cnn", seed=seed)
    r = report(tmp_path / "runs", mlp=range(40))
    assert sorted(r.column("model")) == ["cnn", "mlp"]
    assert r.json["pairs"][0]["p"] == 1 and not starred(r) and "No best can be named:" in r.text
    assert "1 seed of mlp; 3 seeds of cnn: another seed may change the order." in r.text


def test_two_seeds_have_no_interval(tmp_path: Path) -> None:
    for seed in (1, 2):
        run(tmp_path / "runs" / str(seed), range(20 + seed), model="cnn", seed=seed)
    r = report(tmp_path / "runs")
    assert r.json["rows"][0]["interval"] is None and r.column("95 % interval") == ["-"]


def test_other_devices_are_never_ranked_together(tmp_path: Path) -> None:
    run(tmp_path / "runs" / "a", range(20), model="cnn", device="NVIDIA H200")
    r = report(tmp_path / "runs", mlp=range(60))
    assert [row["dataset"] for row in r.json["rows"]] == ["fashion_mnist on NVIDIA H200", "fashion_mnist on cpu"]
    assert r.json["pairs"] == [] and r.text.count("It stands alone") == 2
    assert [len(table) for table in r.page.tables if "parameters" in table[0]] == [2, 2]


def test_a_run_without_predictions_is_ranked_and_said_to_be_untested(tmp_path: Path) -> None:
    run(tmp_path / "runs" / "untested", range(60), model="mlp")
    (tmp_path / "runs" / "untested" / "predictions.safetensors").unlink()
    r = report(tmp_path / "runs", cnn=range(20), linear=range(100))
    assert r.column("model") == ["cnn", "mlp", "linear"] and not starred(r)
    assert "It was not tested against mlp, for lack of predictions on the same images. 1 seed each" in r.text
    assert [(p["first"], p["second"]) for p in r.json["pairs"]] == [("cnn", "linear")]


def test_synthetic_data_gives_no_verdict_on_real_images(tmp_path: Path) -> None:
    run(tmp_path / "runs" / "a", range(20), model="cnn", dataset="synthetic", data={})
    said = "SYNTHETIC data, which says nothing about real images: SYNTHETIC cnn gets 90.00 %"
    assert said in report(tmp_path / "runs").text


def test_a_run_that_answers_one_class_is_named(tmp_path: Path) -> None:
    answer(make_run(tmp_path / "runs" / "a", model="cnn"), np.full(IMAGES, 3))
    assert "a: answers Dress for every image." in report(tmp_path / "runs").text


def test_who_may_have_chosen_by_the_test_set_is_named(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run(runs / "once", range(20), "cnn", lr=0.1, test_at="end")
    run(runs / "other model", range(60), "mlp")
    r = report(runs)
    assert "too high an accuracy" not in r.text and "test set seen" not in r.page.tables[0][0]
    run(runs / "each", range(40), "cnn", lr=0.2)
    r = report(runs)
    assert r.column("test set seen") == ["1 x", "3 x", "3 x"]
    said = "The test set was evaluated more than once in the runs of cnn lr=0.2 and mlp. Who chooses"
    assert all(said in text for text in (r.text, html.unescape(r.markdown), r.printed)), r.printed


def test_what_validation_chose_is_shown(tmp_path: Path) -> None:
    runs, title = tmp_path / "runs", "epoch kept, by validation"
    r = report(runs, mlp=range(40))
    assert title not in r.page.tables[0][0] and "Stopped early" not in r.text and "Epoch kept" not in r.text
    for seed, kept in ((1, 4), (2, 3)):
        summary = {"kept_epoch": kept, "test_evaluations": 1, "stopped_early": f"after epoch {kept + 2}, no better"}
        path, settings = runs / f"cnn {seed}", {"keep": "best", "patience": 2, "validation": 50, "seed": seed}
        make_run(path, model="cnn", skill=4.0, summary=summary, **settings)
    run(runs / "last", range(60), "cnn")
    r = make_report([runs], tmp_path / "second")
    by_row = dict(zip(r.column("test set seen"), r.column(title), strict=True))
    assert by_row == {"1 x": "4, 3", "3 x": "-"} and title in r.printed and f"| {title} |" in r.markdown
    said = "Stopped early: cnn 1 (after epoch 6, no better) and cnn 2 (after epoch 5, no better)."
    assert all(said in text for text in (r.text, html.unescape(r.markdown), r.printed)), r.printed
    assert "Epoch kept: the one of the highest accuracy on the validation set" in r.text


def test_test_time_augmentation_is_shown_beside_the_plain_accuracy(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    title = "accuracy % with test-time augmentation"
    assert title not in report(runs, mlp=range(40)).page.tables[0][0]
    make_run(runs / "cnn", model="cnn", tta="flip", summary={"test_tta/accuracy": 0.985})
    r = make_report([runs], tmp_path / "second")
    assert sorted(r.column(title)) == ["-", "98.50"]
