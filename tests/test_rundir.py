"""The run folder: whose it is, what is in it, and what a crash or a reader at the wrong moment can find."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fashion_ddp import provenance, rundir
from fashion_ddp.config import Config, UserError
from fashion_ddp.rundir import RunFolder, check, claim, find_runs, folder_of, plain, read_run, write_whole
from fashion_ddp.settings import make_config

pytestmark = pytest.mark.quick

MADE_BY = {"code": "c0de", "python": "3.11", "torch": "2.15", "data": {"train": "md5"}}


def end_process() -> None:
    """What the end of a process does to the locks that it holds."""
    while rundir._locks:
        rundir._locks.pop().close()


@pytest.fixture(autouse=True)
def one_process_per_test() -> Iterator[None]:
    yield
    end_process()


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return make_config({"model": "linear", "run_dir": tmp_path / "runs" / "run"})


def leave(cfg: Config, status: str | None = None, made_by: dict[str, Any] = MADE_BY) -> Path:
    """A run folder as an earlier process left it."""
    folder = claim(cfg, made_by)
    folder.write_json("environment.json", [{"made_by": {"code": "older"}}, {"made_by": made_by}])
    folder.append("metrics.jsonl", [{"epoch": 1}])
    if status:
        folder.write_json("summary.json", {"format": 1, "status": status})
    end_process()
    return folder.path


def held(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if p.name != ".lock"}


# --- Names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "cnn-blog-seed42"),
        ({"recipe": "lab", "epochs": 10, "lr": 0.05}, "cnn-lab-seed42-epochs10-lr0.05"),
        ({"model": "linear", "seed": 7}, "linear-blog-seed7"),
        ({"recipe": "lab", "epochs": 3, "lr": 0.1, "hidden_units": 10}, "cnn-lab-seed42"),  # the recipe's own
        ({"batch_norm": True, "shuffle": True}, "cnn-blog-seed42-shuffleTrue-batch_normTrue"),
        ({"threads": 2, "device": "cpu", "micro_batch": 8, "tracker": "none", "data_dir": "d"}, "cnn-blog-seed42"),
    ],
)
def test_name_says_what_distinguishes_the_run(settings: dict[str, Any], name: str) -> None:
    cfg = make_config(settings)
    assert rundir.name(cfg) == name and folder_of(cfg) == Path("runs") / name


def test_run_dir_is_the_folder_outright() -> None:
    assert folder_of(make_config({"run_dir": "a/b", "runs_dir": "c"})) == Path("a/b")
    assert folder_of(make_config({"runs_dir": "c"})) == Path("c/cnn-blog-seed42")


OTHER_VALUES: dict[str, Any] = {
    "model": "mlp", "recipe": "lab", "seed": 43, "epochs": 4, "batch_size": 64, "shuffle": True, "optimizer": "adamw",
    "lr": 0.30000000000000004, "lr_scaling": "sqrt", "reference_batch": 64, "schedule": "cosine", "warmup_epochs": 0.5,
    "weight_decay": 1e-4, "label_smoothing": 0.1, "clip_norm": 1.0, "shift": 2, "flip": 0.5, "erase": 0.25,
    "precision": "bf16", "validation": 5000, "hidden_units": 32, "conv_blocks": 3, "batch_norm": True,
    "dataset": "synthetic", "reduction_shards": 12,
}  # fmt: skip


def test_runs_with_other_results_have_other_names(tmp_path: Path) -> None:
    changes_nothing = {"data_dir", "device", "threads", "micro_batch", "runs_dir", "run_dir", "tracker"}
    assert set(OTHER_VALUES) == {field.name for field in dataclasses.fields(Config)} - changes_nothing
    settings: list[dict[str, Any]] = [{}, {"lr": 0.3}, {"model": "my.net:Net"}, {"model": "my.net:Net2"}]
    for count in (1, 2):
        for names in itertools.combinations(OTHER_VALUES, count):
            settings.append({"lr": 0.02} | {name: OTHER_VALUES[name] for name in names})
    long = dict.fromkeys(["shuffle", "batch_norm"], True) | {"label_smoothing": 0.123456, "weight_decay": 0.000123}
    settings += [long | {"warmup_epochs": 0.5, "validation": n} for n in range(1, 30)]
    configs = []
    for chosen in settings:
        try:
            configs.append(make_config(chosen))
        except UserError:  # two that exclude each other
            continue
    assert len(configs) > 300
    by_name: dict[str, dict[str, Any]] = {}
    for cfg in configs:
        identity = provenance.identity(cfg)
        assert by_name.setdefault(rundir.name(cfg), identity) == identity
        assert len(rundir.name(cfg)) <= 80
    assert max(map(len, by_name)) == 80 and len(by_name) > 300


@pytest.mark.parametrize("model", ["pkg.mod:Net", "_" * 200 + ":Net"])
@pytest.mark.parametrize("stem", ["mine", "..", ".hidden", "a b;$c", "\N{SNOWMAN}", "x" * 120])
def test_names_stay_below_the_runs_folder(model: str, stem: str, tmp_path: Path) -> None:
    recipe = tmp_path / f"{stem}.yaml"
    recipe.write_text("all: {lr: 0.1}\n")
    path = folder_of(make_config({"model": model, "recipe": str(recipe), "runs_dir": tmp_path / "runs"}))
    assert path.resolve().parent == (tmp_path / "runs").resolve()
    assert len(path.name) <= 80 and not path.name.startswith((".", "-")) and not set(path.name) & set("/:;$ \n")


def test_recipes_of_one_name_make_runs_that_are_told_apart(tmp_path: Path, cfg: Config) -> None:
    for folder, lr in (("a", 0.5), ("b", 0.25)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(f"all: {{lr: {lr}}}\n")
    one, two = (make_config({"recipe": str(tmp_path / f / "mine.yaml"), "runs_dir": tmp_path}) for f in "ab")
    leave(one, "finished")
    if folder_of(one) == folder_of(two):  # then the second is refused, never taken for the first
        with pytest.raises(UserError, match=r"belongs to another run \(lr: 0.5 -> 0.25\)"):
            check(two, MADE_BY)


# --- Whose folder it is -----------------------------------------------------------------------------------------


def test_a_new_folder_is_made_with_its_settings(cfg: Config) -> None:
    assert check(cfg, MADE_BY) == "nothing"
    folder = claim(cfg, MADE_BY)
    assert folder == RunFolder(cfg.run_dir, finished=False) and held(folder.path) == {"config.yaml"}  # type: ignore[arg-type]
    assert (folder.path / "config.yaml").read_text() == cfg.to_yaml()


def test_an_empty_folder_is_taken(cfg: Config) -> None:
    folder_of(cfg).mkdir(parents=True)
    assert check(cfg, MADE_BY) == "nothing"
    assert not claim(cfg, MADE_BY).finished and held(folder_of(cfg)) == {"config.yaml"}


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_holds_something_else_is_left_alone(cfg: Config, fresh: bool) -> None:
    folder_of(cfg).mkdir(parents=True)
    (folder_of(cfg) / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no run folder: choose another --run-dir"):
        claim(cfg, MADE_BY, fresh=fresh)
    assert list(folder_of(cfg).parent.iterdir()) == [folder_of(cfg)]
    assert (folder_of(cfg) / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("status", ["finished", "stopped", None])
def test_a_folder_of_another_run_is_refused_by_what_differs(cfg: Config, status: str | None) -> None:
    leave(cfg, status)
    other = dataclasses.replace(cfg, epochs=9, lr=0.25, seed=1)
    with pytest.raises(UserError) as told:
        claim(other, MADE_BY)
    assert "belongs to another run (seed: 42 -> 1; epochs: 3 -> 9; lr: 0.1 -> 0.25)" in str(told.value)
    assert "--run-dir" in str(told.value) and "--fresh" in str(told.value)
    assert "config.yaml" in held(folder_of(cfg)) and not list(folder_of(cfg).parent.glob("*.1"))


def test_what_changes_no_result_makes_no_other_run(cfg: Config, tmp_path: Path) -> None:
    leave(cfg, "finished")
    same = dataclasses.replace(cfg, threads=3, device="cpu", micro_batch=5, tracker="none", data_dir=tmp_path)
    assert claim(same, MADE_BY).finished


def test_a_finished_run_is_left_as_it_is(cfg: Config) -> None:
    before = held(leave(cfg, "finished"))
    assert check(cfg, MADE_BY) == "finished"
    assert claim(cfg, MADE_BY).finished and held(folder_of(cfg)) == before
    assert len(list(folder_of(cfg).parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"code": "other"}, "other source files"),
        ({"torch": "2.16"}, "torch: 2.15 -> 2.16"),
        ({"data": {"train": "other"}}, "other data files"),
        ({"numpy": "3.0"}, "numpy: None -> 3.0"),
    ],
)
def test_a_finished_run_of_other_code_stands_only_when_told(cfg: Config, changed: dict[str, Any], said: str) -> None:
    leave(cfg, "finished")
    with pytest.raises(rundir.Outdated) as told:
        check(cfg, MADE_BY | changed)
    assert f"({said})" in str(told.value) and "--reuse" in str(told.value) and "--fresh" in str(told.value)
    assert claim(cfg, MADE_BY | changed, reuse=True).finished


def test_an_unfinished_run_is_kept_aside(cfg: Config, capsys: pytest.CaptureFixture[str]) -> None:
    path = leave(cfg)
    for number, status in enumerate(["running", "stopped", "failed", None], start=1):
        if status:
            RunFolder(path, finished=False).write_json("summary.json", {"status": status})
        assert check(cfg, MADE_BY) == "unfinished"
        before, aside = held(path), path.with_name(f"{path.name}.{number}")
        assert not claim(cfg, MADE_BY).finished
        assert held(path) == {"config.yaml"} and held(aside) == before
        assert capsys.readouterr().out == f"kept what {path} held as {aside}\n"
        end_process()


def test_fresh_keeps_a_finished_run_aside(cfg: Config) -> None:
    path = leave(cfg, "finished")
    assert not claim(cfg, MADE_BY, fresh=True).finished and held(path) == {"config.yaml"}
    assert read_run(path.with_name("run.1")).summary["status"] == "finished"
    end_process()
    other = dataclasses.replace(cfg, epochs=9)
    assert not claim(other, MADE_BY, fresh=True).finished and path.with_name("run.2").is_dir()


def test_check_changes_nothing(cfg: Config) -> None:
    check(cfg, MADE_BY)
    assert not folder_of(cfg).exists()
    before = held(leave(cfg, "stopped"))
    check(cfg, MADE_BY)
    assert held(folder_of(cfg)) == before and len(list(folder_of(cfg).parent.iterdir())) == 1


HOLD = """
import sys
from pathlib import Path
from fashion_ddp import rundir
from fashion_ddp.settings import make_config
rundir.claim(make_config({"model": "linear", "run_dir": Path(sys.argv[1])}), {})
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_never_write_one_folder(cfg: Config) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    words = [sys.executable, "-c", HOLD, str(folder_of(cfg))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for fresh in (False, True):
            with pytest.raises(UserError, match=rf"is in use by process {other.pid} on \S+: wait for it"):
                claim(cfg, MADE_BY, fresh=fresh)
        other.kill()
    assert not claim(cfg, MADE_BY).finished  # whatever ended it, its lock is gone


def test_a_folder_that_cannot_be_written(tmp_path: Path, cfg: Config) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file/runs/.*: cannot be written \(Not a directory\): choose another --runs-dir"
    ):
        claim(dataclasses.replace(cfg, run_dir=None, runs_dir=tmp_path / "file" / "runs"), MADE_BY)
    with pytest.raises(UserError, match="file"):
        claim(dataclasses.replace(cfg, run_dir=tmp_path / "file"), MADE_BY)


@pytest.mark.parametrize("content", ["", "- a\n", "epochs: [\n", "epochs: many\n", "\x00", "lr: 0\n"])
def test_a_damaged_config_is_named(cfg: Config, content: str) -> None:
    path = leave(cfg, "finished")
    (path / "config.yaml").write_text(content)
    with pytest.raises(UserError) as told:
        claim(cfg, MADE_BY)
    assert str(path) in str(told.value) and "\n" not in str(told.value)


# --- Reading ----------------------------------------------------------------------------------------------------


def test_a_run_reads_back_as_written(cfg: Config) -> None:
    folder = claim(cfg, MADE_BY)
    rows: list[dict[str, Any]] = [
        {"epoch": 1, "loss": 0.1 + 0.2},
        {"epoch": 2, "loss": None, "text": "line\u2028break\n"},
    ]
    folder.append("metrics.jsonl", rows[:1])
    folder.append("metrics.jsonl", rows[1:])
    folder.append("steps.jsonl", [])
    folder.write_json("summary.json", {"status": "running"})
    run = read_run(folder.path)
    assert run.metrics == rows and run.steps == [] and run.summary == {"status": "running"}
    assert run.config["model"] == "linear" and run.environment == []


def test_what_was_not_written_yet_is_empty(cfg: Config) -> None:
    run = read_run(claim(cfg, MADE_BY).path)
    assert (run.summary, run.environment, run.metrics, run.steps) == ({}, [], [], [])


def test_a_last_line_cut_short_is_left_out(cfg: Config) -> None:
    folder = claim(cfg, MADE_BY)
    folder.append("steps.jsonl", [{"step": n} for n in range(3)])
    text = (folder.path / "steps.jsonl").read_text()
    for end in range(len(text) + 1):
        (folder.path / "steps.jsonl").write_text(text[:end])
        assert read_run(folder.path).steps == [{"step": n} for n in range(text[:end].count("\n"))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", ""),
        ("summary.json", "[]"),
        ("environment.json", "[1,"),
        ("metrics.jsonl", '{"epoch": 1}\n{"epo\n{"epoch": 3}\n'),
        ("steps.jsonl", "\x00\x00\x00\n"),
        ("config.yaml", "a: b: c\n"),
        ("config.yaml", "- a\n"),
    ],
)
def test_a_damaged_file_is_named(cfg: Config, name: str, content: str) -> None:
    path = leave(cfg, "finished")
    (path / name).write_text(content)
    with pytest.raises(UserError) as told:
        read_run(path)
    assert str(path / name) in str(told.value)


def test_a_later_format_is_refused(cfg: Config) -> None:
    path = leave(cfg, "finished")
    (path / "summary.json").write_text(json.dumps({"format": rundir.FORMAT + 1}))
    with pytest.raises(UserError, match=f"{path} was written by a later version"):
        read_run(path)


def test_a_folder_without_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no config.yaml"):
        read_run(tmp_path)


def test_find_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runs/b", "runs/a", "runs/a/deeper", "alone"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "runs" / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    a, b, alone = (tmp_path / name for name in ("runs/a", "runs/b", "alone"))
    assert find_runs([Path("runs")]) == [a, b]
    assert find_runs([Path("alone"), Path("runs/b"), Path("runs"), tmp_path / "alone"]) == [alone, b, a]
    for nothing in (Path("runs/notes"), Path("nowhere"), Path("alone/config.yaml")):
        with pytest.raises(UserError, match=f"{nothing}: no run folder there"):
            find_runs([Path("runs"), nothing])


# --- Files ------------------------------------------------------------------------------------------------------


def test_plain_is_strict_json() -> None:
    value = {
        "a": [float("nan"), float("inf"), {"b": (-float("inf"), 1.5, True, None)}],
        Path("key"): Path("some/path"),
        3: "text",
    }
    assert plain(value) == {"a": [None, None, {"b": [None, 1.5, True, None]}], "key": "some/path", "3": "text"}
    json.dumps(plain(value), allow_nan=False)


def test_write_whole_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in ("one", b"two\xff", ""):
        write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    code = (
        "import resource, sys; from pathlib import Path; from fashion_ddp.rundir import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_whole(Path(sys.argv[1]), b'x' * 100_000)\n"
        "except OSError: print('failed')"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    done = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True, env=env)
    assert done.stdout == "failed\n" and path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    contents = [json.dumps({"n": n, "filling": "x" * 50_000 * n}) for n in (1, 2, 3)]
    write_whole(path, contents[0])

    def write() -> None:
        for content in 10 * contents:
            write_whole(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(path.read_text())
    assert seen <= set(contents) and len(seen) > 1


def test_the_source_has_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "recipes" / "r.yaml").write_text("r")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    seen = {provenance.code_hash()}
    for name, content in (("a.py", "b"), ("recipes/r.yaml", "s"), ("b.py", ""), ("c.py", "")):
        (tmp_path / name).write_text(content)
        seen.add(provenance.code_hash())
    assert len(seen) == 5
    (tmp_path / "notes.txt").write_text("not code")
    assert provenance.code_hash() in seen


def test_the_commit_tells_of_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_commit() is None
    (tmp_path / "file").write_text("1")
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", *words], check=True, cwd=tmp_path)
    commit = provenance.git_commit()
    assert commit is not None and len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert provenance.git_commit() == f"{commit}+changes"
