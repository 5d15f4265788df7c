"""Run folders brought to W&B: to as much of its server as a run talks to, and into a file for `wandb sync`."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import faults
import pytest
import yaml
from conftest import CHECKOUT, forked
from faults import Fault
from test_mirror import check_told, logged, overview_of, records_of
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb_server import WandbServer

from fashion_ddp.config import cli
from fashion_ddp.config.layers import make_config
from fashion_ddp.runs import lock
from fashion_ddp.runs.reading import evenly_spaced, load_run
from launch.submission import common_wandb_group


@pytest.fixture
def runs(tmp_path: Path, uninterrupted: Path) -> Path:
    """A folder with a finished run that W&B knows nothing of, as versions made it that gave those no id for W&B."""
    run = shutil.copytree(uninterrupted / "run", tmp_path / "runs" / "one")
    summary = json.loads((run / "summary.json").read_text())
    del summary["wandb_id"]
    (run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return tmp_path / "runs"


def push(*words: Any, cwd: Path, code: int = 0, **env: str) -> str:
    """What the command said, which ended with this exit code."""
    done = forked("fashion_ddp.push", *map(str, words), cwd=cwd, **env)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_push_may_be_repeated(runs: Path, tmp_path: Path) -> None:
    """A run made without W&B, and a report; a second push tells nothing again."""
    compared = forked("fashion_ddp.compare", "runs", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    before = files(runs / "one")
    with WandbServer() as server:
        words = ["runs", "--report", "report", "--group", "these", "--weights"]
        assert push(*words, cwd=tmp_path, **server.env).endswith("pushed: 1 run, and report\n")
        run = load_run(runs / "one")
        name = run.summary["wandb_id"]
        of_report = json.loads((tmp_path / "report" / "wandb.json").read_text())["wandb_id"]
        check_told(run, server.rows(run.summary["wandb_id"]))
        for id, expected in ((name, ("one", "train", "these")), (of_report, ("report", "report", "these"))):
            assert tuple(server.told[id][key] for key in ("displayName", "jobType", "groupName")) == expected
        config = json.loads(server.told[name]["config"])
        settings = {"model": "cnn", "seed": 42, "world_size": 2}
        assert {key: config[key]["value"] for key in settings} == settings
        assert json.loads(server.summaries[name])["test/accuracy"] == run.summary["test/accuracy"]
        assert server.exits == [0, 0]
        made = list(server.artifacts)
        tables = [("run_table", f"run-{name}-predictions"), ("run_table", f"run-{of_report}-runs")]
        assert set(made) >= {("model", "one"), *tables}
        lines = {key: len(rows) for key, rows in server.history.items()}

        push(*words, cwd=tmp_path, **server.env)
        assert {key: len(rows) for key, rows in server.history.items()} == lines
        assert set(server.artifacts[len(made) :]) <= {("model", "one")}  # which it knows by its digest
    after = files(runs / "one")
    old, new = json.loads(before.pop("summary.json")), json.loads(after.pop("summary.json"))
    assert before == after and new == old | {"wandb_id": name}
    assert not (Path.home() / ".local").exists()  # where W&B would stage


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.slow
def test_a_run_that_goes_on_is_told_from_the_last_row_that_the_server_has(runs: Path, tmp_path: Path) -> None:
    run = runs / "one"
    whole = files(run)
    whole["summary.json"] = json.dumps(json.loads(whole["summary.json"]) | {"wandb_id": "a"}).encode()
    stopped = {"status": "stopped", "wandb_id": "a", "epoch": 1, "step": 8}  # of the last epoch, not of the last point
    (run / "summary.json").write_text(json.dumps(stopped))
    for name, rows in (("steps.jsonl", 13), ("metrics.jsonl", 1)):
        (run / name).write_bytes(b"".join(whole[name].splitlines(keepends=True)[:rows]))
    with WandbServer() as server:
        push("runs", cwd=tmp_path, **server.env)
        assert len(server.rows("a")) == 14
        for name, content in whole.items():
            (run / name).write_bytes(content)
        push("runs", cwd=tmp_path, **server.env)
        check_told(load_run(run), server.rows("a"))


@pytest.mark.slow
def test_an_unfinished_run_goes_into_a_file_for_wandb_sync(tmp_path: Path) -> None:
    ranks = faults.start_tiny(1, tmp_path, [], [Fault("step", "TERM", count=10)])
    assert ranks.wait() == [75], ranks.printed()
    push("run", "--notes", "stopped", "--project", "there", cwd=tmp_path, WANDB_MODE="offline")
    run = load_run(tmp_path / "run")
    [fragment] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    check_told(run, logged(fragment))
    overview = overview_of(fragment)
    assert (overview["exit_code"], overview["project"], overview["run_id"]) == (1, "there", run.summary["wandb_id"])
    assert records_of(fragment)["run"][0]["notes"] == "stopped"
    assert run.status == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": "http://127.0.0.1:9"}])
def test_without_an_account_or_a_server_it_says_so_once_and_loses_nothing(
    env: dict[str, str], runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "one", runs / "two")
    said = push("runs", cwd=tmp_path, code=1, **env)
    assert said.count("W&B: ") == 1 and "W&B: online failed (" in said and (env or "wandb login" in said)
    assert said.endswith("could not be brought to W&B; 0 of 2 runs done, and the same command goes on\n"), said
    assert not list((runs / "one").glob("wandb/offline-run-*"))
    run = load_run(runs / "one")
    assert run.status == "finished"
    with WandbServer() as server:
        push("runs", cwd=tmp_path, **server.env)
        assert run.summary["wandb_id"] in server.told  # under the name that it had been given
        check_told(run, server.rows(run.summary["wandb_id"]))


@pytest.mark.slow
def test_a_report_of_wandbs_own_is_saved_and_replaced(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    forked("fashion_ddp.compare", "runs", cwd=tmp_path)
    words = ["runs", "--report", "report", "--group", "it's", "--saved-report"]
    with WandbServer() as server:
        for _ in range(2):
            assert "W&B: report at http" in push(*words, cwd=tmp_path, **server.env)
        first, second = server.reports
    assert (first["id"], second["id"]) == (None, "Vmlldzox") and first["projectName"] == "fashion_ddp"
    [grid] = [block for block in json.loads(first["spec"])["blocks"] if block["type"] == "panel-grid"]
    [shown] = grid["metadata"]["runSets"]
    filters = {(each["key"]["name"], each["value"]) for each in shown["filters"]["filters"]}
    assert filters == {("group", "it's"), ("jobType", "train")}


def test_what_cannot_be_pushed_is_said(runs: Path, tmp_path: Path) -> None:
    assert "nowhere: no run folder there" in push("nowhere", cwd=tmp_path, code=2)
    assert "report holds no report" in push("runs", "--report", "report", cwd=tmp_path, code=2)
    (tmp_path / "report").mkdir()
    for name, content in (("report.html", ""), ("report.json", '{"runs": []}')):
        (tmp_path / "report" / name).write_text(content)
    words = ["runs", "--report", "report", "--saved-report"]
    assert "none in common: give --group" in push(*words, cwd=tmp_path, code=2)
    if importlib.util.find_spec("wandb_workspaces") is None:
        assert "pip install wandb-workspaces" in push(*words, "--group", "g", cwd=tmp_path, code=2)
    held = lock.acquire(runs / "one")
    try:
        said = push("runs", cwd=tmp_path)
    finally:
        held.release()
    assert "one is being trained (" in said and said.endswith("pushed: 0 runs\n")
    assert "wandb_id" not in load_run(runs / "one").summary


@pytest.mark.quick
def test_runs_of_a_comparison_share_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def configs(**settings: Any) -> list[Any]:
        return [make_config({"model": m, "seed": seed} | settings) for m in ("linear", "cnn") for seed in (0, 1)]

    assert common_wandb_group(configs()) == "blog"
    assert common_wandb_group(configs(recipe="lab", epochs=7)) == "lab-epochs7"
    swept = [make_config({"model": "cnn", "lr": lr, "validation": 5000}) for lr in (0.1, 0.2)]
    assert common_wandb_group(swept) == "blog-validation5000"
    assert common_wandb_group(configs(wandb_group="mine")) is None
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    assert common_wandb_group(configs()) is None


@pytest.mark.quick
def test_the_examples_sweep_makes_valid_commands() -> None:
    sweep = yaml.safe_load((CHECKOUT / "examples" / "sweep.yaml").read_text())
    assert sweep["command"][-1] == "${args_no_boolean_flags}"
    values = {name: of.get("values", [of.get("value")]) for name, of in sweep["parameters"].items()}
    for at in range(max(map(len, values.values()))):
        point = {name: {"value": each[at % len(each)]} for name, each in values.items()}
        cfg = cli.parse(create_sweep_command_args({"args": point})["args_no_boolean_flags"]).run
        assert {name: getattr(cfg, name) for name in point} == {name: of["value"] for name, of in point.items()}
    assert sweep["metric"]["name"] == "val/accuracy" and values["validation"] != [0]


@pytest.mark.quick
def test_tables_hold_the_same_images_of_every_run() -> None:
    assert evenly_spaced(200, 10_000).tolist() == list(range(0, 10_000, 50))
    assert evenly_spaced(200, 7).tolist() == list(range(7)) and evenly_spaced(9, 0).tolist() == []
