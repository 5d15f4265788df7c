"""The run folder: what is in it, and what a crash or a reader at the wrong moment can find."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fashion_ddp.config.layers import make_config
from fashion_ddp.errors import TrainingFailed, UserError
from fashion_ddp.files import write_whole
from fashion_ddp.runs import claim, lock, provenance
from fashion_ddp.runs.folder import RunFolder, to_jsonable
from fashion_ddp.runs.reading import find_runs, load_run

pytestmark = pytest.mark.quick


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A folder that this process works in, as it is right after it was claimed."""
    path = tmp_path / "run"
    held = lock.acquire(path)
    (path / "config.yaml").write_text(make_config({"model": "linear"}).to_yaml())
    return RunFolder(path, lock=held)


def names(path: Path) -> set[str]:
    """What a folder holds, but the lock."""
    return {p.name for p in path.iterdir() if not p.name.startswith(".lock.")}


def test_a_run_reads_back_as_written(folder: RunFolder) -> None:
    assert (run := load_run(folder.path)).summary == {} and run.environment == run.metrics == run.steps == []
    rows: list[dict[str, Any]] = [{"epoch": 1, "loss": 0.1 + 0.2}]
    rows += [{"epoch": 2, "loss": None, "text": "line\u2028break\n"}]
    folder.append("metrics.jsonl", rows[:1])
    folder.append("metrics.jsonl", rows[1:])
    folder.append("steps.jsonl", [])
    folder.write_json("summary.json", {"status": "running"})
    run = load_run(folder.path)
    assert run.metrics == rows and run.steps == [] and run.summary == {"status": "running"}
    assert run.config["model"] == "linear" and run.environment == []


def test_half_a_last_line_is_left_out_and_mended(folder: RunFolder) -> None:
    path = folder.path / "steps.jsonl"
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": None}]
    folder.append("steps.jsonl", rows)
    whole = path.read_bytes()
    for content in [whole[:end] for end in range(len(whole) + 1)] + [whole + b"\x00" * 40, whole + b"\xff\xfe"]:
        path.write_bytes(content)
        left = rows[: content.count(b"\n")]
        assert load_run(folder.path).steps == left
        folder.keep_rows("steps.jsonl", left)
        assert path.read_bytes() == content[: content.rfind(b"\n") + 1]
        folder.append("steps.jsonl", rows[:1])
        assert load_run(folder.path).steps == [*left, rows[0]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", ""),
        ("summary.json", "[]"),
        ("environment.json", "[1,"),
        ("metrics.jsonl", '{"epoch": 1}\n{"epo\n{"epoch": 3}\n'),
        ("steps.jsonl", "\x00\x00\x00\n"),
        ("steps.jsonl", b"\xff\xfe\n"),
        ("summary.json", b"\xff\x80"),
        ("config.yaml", "a: b: c\n"),
        ("config.yaml", "- a\n"),
        ("config.yaml", "\x00"),
        ("config.yaml", "epochs: many\n"),
        ("config.yaml", "lr: 0\n"),
    ],
)
def test_a_damaged_file_is_named(folder: RunFolder, name: str, content: str | bytes) -> None:
    (folder.path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as told:
        load_run(folder.path).settings()
    assert str(folder.path / name) in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("status", ["running", "finished", "stopped", "failed"])
def test_a_run_whose_process_is_gone_was_interrupted(folder: RunFolder, status: str) -> None:
    assert folder.lock is not None
    folder.write_json("summary.json", {"status": status, "epoch": 2})
    assert load_run(folder.path).summary == {"status": status, "epoch": 2}
    folder.lock.release()
    gone = "interrupted" if status == "running" else status
    assert load_run(folder.path).summary == {"status": gone, "epoch": 2}
    assert json.loads((folder.path / "summary.json").read_text())["status"] == status  # reading changes nothing
    assert names(folder.path) == {"config.yaml", "summary.json"}


def test_a_run_that_ends_while_it_is_read_was_not_interrupted(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(path: Path) -> str | None:
        assert folder.lock is not None
        folder.write_json("summary.json", {"status": "finished"})
        folder.lock.release()
        return lock.holder(path)

    folder.write_json("summary.json", {"status": "running"})
    monkeypatch.setattr("fashion_ddp.runs.reading.holder", ends)
    assert load_run(folder.path).summary["status"] == "finished"


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


def test_plain_is_strict_json() -> None:
    value: dict[Any, Any] = {"a": [float("nan"), float("inf"), {"b": (-float("inf"), 1.5, True, None)}], 3: "text"}
    value |= {Path("key"): Path("some/path")}
    assert to_jsonable(value) == {"a": [None, None, {"b": [None, 1.5, True, None]}], "key": "some/path", "3": "text"}
    json.dumps(to_jsonable(value), allow_nan=False)


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        fsync(handle)
        name = os.readlink(f"/proc/self/fd/{handle}")
        done.append((Path(name).name, Path(name).is_dir() or Path(name).read_text()))

    def renamed(source: Path, target: Path) -> None:
        replace(source, target)
        done.append((source.name, target.name))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(tmp_path / "file", "content")
    temporary = done[0][0]
    assert done == [(temporary, "content"), (temporary, "file"), (tmp_path.name, True)] and temporary != "file"


@pytest.mark.parametrize(("code", "fails"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_may_not_know_how_to_sync_a_folder(
    tmp_path: Path, code: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuses_folders(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(code, os.strerror(code))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    with pytest.raises(OSError) if fails else contextlib.nullcontext():
        write_whole(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content" and names(tmp_path) == {"file"}


def test_threads_may_write_one_file_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    contents = [str(n) * 200_000 for n in range(4)]

    def write(content: str) -> None:
        for _ in range(10):
            write_whole(path, content)
            assert path.read_text() in contents

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, contents))  # raises what they raised
    assert names(tmp_path) == {"summary.json"}


def test_lines_that_are_to_stay_are_not_touched(folder: RunFolder) -> None:
    path = folder.path / "steps.jsonl"
    folder.keep_rows("steps.jsonl", [])
    assert not path.exists()
    rows = [{"step": n, "loss": float("nan")} for n in range(5)]
    folder.append("steps.jsonl", rows)
    for keep in (rows, rows[:2], rows[:2], []):
        before = path.stat()
        shorter = path.read_text().count("\n") > len(keep)
        folder.keep_rows("steps.jsonl", keep)
        assert [row["step"] for row in load_run(folder.path).steps] == [row["step"] for row in keep]
        assert (path.stat().st_ino != before.st_ino) == shorter  # replaced whole, or left alone


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("write", ["summary.json", "x" * 100_000]),
        ("append", ["summary.json", [{"text": "x" * 100_000}]]),
        ("make_folder", ["summary.json/checkpoints"]),
    ],
    ids=["write", "append", "make"],
)
def test_what_cannot_be_written_is_told_with_the_way_out(folder: RunFolder, method: str, what: list[Any]) -> None:
    folder.append("summary.json", [{"text": "old"}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # of a file, as a disk that is full
    try:
        with pytest.raises(TrainingFailed) as told:
            getattr(folder, method)(*what)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{folder.path / 'summary.json'}" in str(told.value) and "give the same command again" in str(told.value)
    assert (folder.path / "summary.json").read_text().startswith('{"text": "old"}\n')
    assert names(folder.path) == {"config.yaml", "summary.json"}


COMPUTES = ["config/recipes/blog.yaml", "distributed/world.py", "data/idx.py", "models/batch_norm.py"]
COMPUTES += ["config/config.py", "training/step.py", "train.py", "user_code.py"]
READS = ["report/tables.py", "report/report.css", "tracking/panels.py", "predict.py", "check.py", "push.py"]


@pytest.mark.parametrize("changed", [*COMPUTES, *READS])
def test_a_finished_run_is_outdated_by_what_computes_it_alone(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config({"run_dir": tmp_path / "run"})
    folder = claim.claim(cfg, provenance.made_by(cfg, {}))
    folder.write_json("environment.json", [{"made_by": provenance.made_by(cfg, {})}])
    folder.write_json("summary.json", {"status": "finished", "epochs": cfg.epochs})
    package = shutil.copytree(provenance.PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", package)
    assert claim.check(cfg, provenance.made_by(cfg, {})) == "finished"
    with open(package / changed, "a") as file:
        file.write("\n# a change\n")
    with pytest.raises(claim.Outdated) if changed in COMPUTES else contextlib.nullcontext():
        assert claim.check(cfg, provenance.made_by(cfg, {})) == "finished"


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
    (installed := tmp_path / "environment").mkdir()
    (installed / "file").touch()
    monkeypatch.setattr(provenance, "PACKAGE", installed)
    assert provenance.git_commit() is None  # that of the repository around it says nothing of it
