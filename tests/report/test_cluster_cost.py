"""What runs cost on a cluster: the report shows what their folders tell of it, and what that leaves out."""

from pathlib import Path

import pytest
from reports import make_report, make_run, submitted

pytestmark = pytest.mark.quick


def test_a_row_has_the_sum_over_its_submitted_runs(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed in (0, 1):
        submitted(make_run(runs / f"cnn-{seed}", model="cnn", seed=seed, skill=4.0), core_hours=1.5 + seed)
    make_run(runs / "cnn-2", model="cnn", seed=2, skill=4.0)  # not submitted
    submitted(make_run(runs / "linear", model="linear"), card_hours=None, energy_j=1.8e6)
    submitted(make_run(runs / "failed", model="mlp", status="failed"), starts=1, complete=False)
    r = make_report([runs], tmp_path / "report")
    titles, *lines = r.table_of("queued min")
    assert titles == ["row", "runs", "starts"] + [
        f"{name} min" if name[-1] in "dg" else name
        for name in ("core hours", "card hours", "queued", "starting", "training", "repeated", "energy kWh")
    ]
    times = ["20.00", "3.00", "200.00", "1.00"]
    assert lines[0] == ["cnn", "2", "4", "4.00", "10.50", *times, "-"]
    assert lines[1] == ["linear", "1", "2", "20.50", "-", "10.00", "1.50", "100.00", "0.50", "0.50"]
    assert lines[2][:3] == ["failed (failed)", "1", "1"] and r.markdown_table("queued min") == lines
    for said in (
        "Together 7 starts and 45.00 core hours, as of 2026-12-01 05:46 UTC; a row of several seeds is their sum.",
        "The accounting did not have all starts of 1 run to their ends.",
        "This cluster's accounting counts no cards",
        "Not counted: the comparison's own job",
    ):
        assert said in r.text and said in r.markdown
    assert "did not answer" not in r.text and "left no times" not in r.text
    assert r.runs["linear"]["cost/core_hours"] == float(r.csv["linear"]["cost/core_hours"]) == 20.5


def test_without_accounting_it_has_what_the_runs_recorded(tmp_path: Path) -> None:
    submitted(make_run(tmp_path / "runs" / "one", model="linear"), accounted=False, untimed_starts=1)
    r = make_report([tmp_path / "runs"], tmp_path / "report")
    assert r.table_of("starting min") == [
        ["row", "runs", "starts", "starting min", "training min", "repeated min"],
        ["linear", "1", "2", "1.50", "100.00", "0.50"],
    ]
    assert "SLURM's accounting did not answer for 1 run: of these it is what they recorded." in r.text
    assert "1 start left no times" in r.text and "core hours," not in r.text


def test_runs_that_were_not_submitted_have_no_word_of_it(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "one", model="linear")
    r = make_report([tmp_path / "runs"], tmp_path / "report")
    assert not any("luster" in text for text in (r.text, r.markdown, r.printed))
