"""Whose a run folder is: its name, what may change between two starts, and what a kill or another process leaves."""

import dataclasses
import itertools
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_lock import as_nobody, eight, locks

from fashion_ddp.config import Config
from fashion_ddp.config.layers import make_config
from fashion_ddp.errors import UserError
from fashion_ddp.runs import lock, provenance
from fashion_ddp.runs.claim import Outdated, check, claim, folder_of, run_name
from fashion_ddp.runs.folder import RunFolder
from fashion_ddp.runs.reading import load_run

pytestmark = pytest.mark.quick

UNFINISHED, FINISHED = "stopped", "finished"
CHECKPOINT = "step-000000024.pt"
MADE_BY = {"code": "c0de", "python": "3.11", "torch": "2.15", "data": {"train": "md5"}}


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return make_config({"model": "linear", "run_dir": tmp_path / "runs" / "run"})


def leave(cfg: Config, status: str | None = None, checkpoint: str | None = None) -> Path:
    """A run folder as an earlier process left it."""
    folder = claim(cfg, MADE_BY)
    four = {"made_by": MADE_BY, "world_size": 4, "ranks": [{"device": "NVIDIA H200", "threads": 8}] * 4}
    folder.write_json("environment.json", [{"made_by": {"code": "older"}}, four])
    folder.append("metrics.jsonl", [{"epoch": 1}])
    if status:
        folder.write_json("summary.json", {"format": 1, "status": status, "epochs": cfg.epochs})
    if checkpoint:
        folder.make_folder("checkpoints")
        folder.write(f"checkpoints/{checkpoint}", b"state")
    assert folder.lock is not None
    folder.lock.release()
    return folder.path


def held(path: Path) -> set[str]:
    """What a folder holds, but a lock."""
    return {p.name for p in path.iterdir() if not p.name.startswith(".lock")}


def files(path: Path) -> dict[str, bytes]:
    """What the files below a folder hold, but the settings and a lock."""
    found = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".lock", "config.yaml"))]
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "runs/cnn-blog-seed42"),
        ({"recipe": "lab", "epochs": 10, "lr": 0.05}, "runs/cnn-lab-seed42-epochs10-lr0.05"),
        ({"model": "linear", "seed": 7, "runs_dir": "c"}, "c/linear-blog-seed7"),
        ({"run_dir": "a/b", "runs_dir": "c"}, "a/b"),
        ({"recipe": "lab", "epochs": 3, "lr": 0.1, "hidden_units": 10}, "runs/cnn-lab-seed42"),  # the recipe's own
        ({"batch_norm": True, "shuffle": True}, "runs/cnn-blog-seed42-shuffleTrue-batch_normTrue"),
        (
            {"model": "my.net:Net", "model_args": ["dropout=0.2", "depth=3"], "dataset": "../sets/letters"},
            "runs/my.net_Net-blog-seed42-datasetletters-depth3-dropout0.2",
        ),
        ({"threads": 2, "device": "cpu", "micro_batch": 8, "tracker": "none", "data_dir": "d"}, "runs/cnn-blog-seed42"),
    ],
)
def test_name_says_what_distinguishes_the_run(settings: dict[str, Any], name: str) -> None:
    assert folder_of(make_config(settings)) == Path(name)


OTHER_VALUES: dict[str, Any] = {
    "model": "mlp", "recipe": "lab", "seed": 43, "epochs": 4, "batch_size": 64, "shuffle": True, "optimizer": "adamw",
    "lr": 0.30000000000000004, "lr_scaling": "sqrt", "reference_batch": 64, "schedule": "cosine", "warmup_epochs": 0.5,
    "weight_decay": 1e-4, "label_smoothing": 0.1, "clip_norm": 1.0, "shift": 2, "flip": 0.5, "erase": 0.25,
    "random_resized_crop": 0.5,
    "precision": "bf16", "validation": 5000, "hidden_units": 32, "conv_blocks": 3, "batch_norm": True,
    "dataset": "synthetic", "reduction_shards": 12, "init_from": "runs/one", "freeze": ("0", "2"),
    "decay_biases": False, "ema": 0.9, "normalize": True,
    "alternating_flip": True, "cutout": 8, "mixup": 0.2, "cutmix": 1.0, "test_at": "end", "tta": "flip",
    "metrics": "mine:more",
    "image_size": 32, "class_weights": "balanced",
}  # fmt: skip


def test_runs_with_other_results_have_other_names(tmp_path: Path) -> None:
    changes_nothing = set(MAY_CHANGE) | {"run_dir"}
    not_alone = {"model_args", "depth", "dropout", "momentum", "nesterov", "adam_lr", "keep", "patience"}
    not_alone |= {"keep_batch_norm"}
    assert {*OTHER_VALUES, *not_alone} == {field.name for field in dataclasses.fields(Config)} - changes_nothing
    settings: list[dict[str, Any]] = [{}, {"lr": 0.3}, {"model": "my.net:Net"}, {"model": "my.net:Net2"}]
    settings += [{"model": "my.net:Net", "model_args": args} for args in (["a=1"], ["a=2"], ["b=1"], ["a=1", "b=1"])]
    settings += [{"model": "my.net:Net", "lr": 0.3}, {"model": "my.net:Net", "model_args": ["lr=0.3"]}]
    settings += [{"model": "timm:resnet18"} | more for more in ({}, {"keep_batch_norm": True}, {"model_args": ["a=1"]})]
    settings += [{"model": "deep_mlp"} | more for more in ({}, {"depth": 2}, {"dropout": 0.2})]
    settings += [{"model": "my.net:Net", "model_args": ["depth=2"]}, {"optimizer": "momentum", "lr": 0.1}]
    settings += [{"optimizer": "momentum", "lr": 0.1} | more for more in ({"momentum": 0.8}, {"nesterov": True})]
    settings += [{"optimizer": "muon", "lr": 0.1} | more for more in ({}, {"adam_lr": 0.01}, {"momentum": 0.8})]
    settings += [{"validation": 9} | more for more in ({}, {"keep": "best"}, {"patience": 1}, {"patience": 2})]
    settings += [{"dataset": name} for name in ("./mine", "other/yours", "mine:f", "./synthetic", "mnist")]
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
        assert by_name.setdefault(run_name(cfg), identity) == identity
        assert len(run_name(cfg)) <= 80
    assert max(map(len, by_name)) == 80 and len(by_name) > 300


@pytest.mark.parametrize("model", ["pkg.mod:Net", "_" * 200 + ":Net"])
@pytest.mark.parametrize("stem", ["mine", "..", ".hidden", "a b;$c", "\N{SNOWMAN}", "x" * 120])
def test_names_stay_below_the_runs_folder(model: str, stem: str, tmp_path: Path) -> None:
    recipe = tmp_path / f"{stem}.yaml"
    recipe.write_text("all: {lr: 0.1}\n")
    path = folder_of(make_config({"model": model, "recipe": str(recipe), "runs_dir": tmp_path / "runs"}))
    assert path.resolve().parent == (tmp_path / "runs").resolve()
    assert len(path.name) <= 80 and not path.name.startswith((".", "-")) and not set(path.name) & set("/:;$ \n")


def test_recipes_of_one_name_are_told_apart_by_what_they_set_and_may_be_moved(tmp_path: Path) -> None:
    configs = []
    for folder, lr in (("a", 0.5), ("b", 0.25), ("c", 0.5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(f"all: {{lr: {lr}}}\n")
        configs.append(make_config({"recipe": str(tmp_path / folder / "mine.yaml"), "run_dir": tmp_path / "run"}))
    one, other, moved = configs
    leave(one, UNFINISHED)
    with pytest.raises(UserError, match=r"belongs to another run \(lr: 0.5 -> 0.25\)"):
        check(other, MADE_BY)
    assert check(moved, MADE_BY) == "continue"


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_is_new_or_empty_is_taken_with_its_settings(cfg: Config, there: bool) -> None:
    if there:
        folder_of(cfg).mkdir(parents=True)
    assert check(cfg, MADE_BY) == "nothing" and folder_of(cfg).exists() == there
    folder = claim(cfg, MADE_BY)
    assert folder == RunFolder(folder_of(cfg), lock=folder.lock) and held(folder.path) == {"config.yaml"}
    assert folder.lock is not None and locks(folder.path) == [folder.lock.path]
    assert (folder.path / "config.yaml").read_text() == cfg.to_yaml()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_holds_something_else_is_left_alone(cfg: Config, fresh: bool) -> None:
    folder_of(cfg).mkdir(parents=True)
    (folder_of(cfg) / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no run folder: choose another --run-dir"):
        claim(cfg, MADE_BY, fresh=fresh)
    assert list(folder_of(cfg).parent.iterdir()) == [folder_of(cfg)]
    assert (folder_of(cfg) / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, None])
@pytest.mark.parametrize("status", ["running", "stopped", "failed", None])
def test_an_unfinished_run_is_continued_in_its_place(cfg: Config, status: str | None, checkpoint: str | None) -> None:
    path = leave(cfg, status, checkpoint)
    before = files(path)
    assert check(cfg, MADE_BY) == "continue"
    folder = claim(cfg, MADE_BY)
    assert folder == RunFolder(path, finished=False, lock=folder.lock) and lock.holder(path)
    assert files(path) == before and len(list(path.parent.iterdir())) == 1


def test_fresh_keeps_what_is_there_aside(cfg: Config, capsys: pytest.CaptureFixture[str]) -> None:
    path = leave(cfg, "finished")
    for number, status in enumerate(["finished", "running", "stopped", "failed", None], start=1):
        path = path if number == 1 else leave(cfg, status, CHECKPOINT)
        before, aside = files(path), path.with_name(f"{path.name}.{number}")
        assert check(cfg, MADE_BY, fresh=True) == "aside"
        folder = claim(cfg, MADE_BY, fresh=True)
        assert folder.lock is not None and not folder.finished and held(path) == {"config.yaml"}
        folder.lock.check()
        assert files(aside) == before and held(aside) == {*(name.partition("/")[0] for name in before), "config.yaml"}
        assert capsys.readouterr().out == f"kept what {path} held as {aside}\n"
        assert [*aside.glob(".*")] == []  # no lock, for one
        folder.lock.release()
    other = dataclasses.replace(cfg, epochs=9, lr=0.25)  # nor does it matter what it was
    assert not claim(other, {}, fresh=True).finished and path.with_name("run.6").is_dir()


@pytest.mark.parametrize("status", [UNFINISHED, FINISHED])
def test_check_changes_nothing(cfg: Config, status: str) -> None:
    path = leave(cfg, status)
    before, modified = files(path), path.stat().st_mtime_ns
    check(cfg, MADE_BY)
    check(cfg, MADE_BY, fresh=True)
    assert files(path) == before and path.stat().st_mtime_ns == modified and len(list(path.parent.iterdir())) == 1


MAY_CHANGE: dict[str, Any] = {
    "data_on": "host", "cache_dir": Path("there"), "skip_broken": True,
    "data_dir": Path("elsewhere"), "device": "cpu", "threads": 3, "micro_batch": 5, "checkpoint_every": 1.0,
    "timeout": 5.0, "runs_dir": Path("elsewhere"), "tracker": "none", "wandb_project": "p", "wandb_entity": "e",
    "wandb_group": "g", "wandb_tags": "t", "wandb_notes": "n", "wandb_weights": True, "trace": True,
    "cuda_graph": False, "compile": True,
}  # fmt: skip


@pytest.mark.parametrize("status", [UNFINISHED, FINISHED])
@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_changes_no_result_may_change(tmp_path: Path, name: str, status: str) -> None:
    cfg = make_config({"run_dir": tmp_path / "run"})
    leave(cfg, status, CHECKPOINT)
    other = dataclasses.replace(cfg, **{name: MAY_CHANGE[name]})
    assert other != cfg and check(other, MADE_BY) == ("continue" if status == UNFINISHED else "finished")
    if status == UNFINISHED:
        assert load_run(claim(other, MADE_BY).path).settings() == other  # as it goes on


@pytest.mark.parametrize("status", [None, UNFINISHED, FINISHED])
@pytest.mark.parametrize("name", [name for name in OTHER_VALUES if name != "epochs"])
def test_what_changes_the_result_may_not_change(tmp_path: Path, name: str, status: str | None) -> None:
    cfg = make_config({"run_dir": tmp_path / "run"})
    found = files(leave(cfg, status, CHECKPOINT))
    other = dataclasses.replace(cfg, **{name: OTHER_VALUES[name]})
    with pytest.raises(UserError) as told:
        claim(other, MADE_BY, reuse=True)
    assert not isinstance(told.value, Outdated)
    before, after = (provenance.identity(one).get(name) for one in (cfg, other))
    assert f"belongs to another run ({name}: {before} -> {after}): choose another --run-dir" in str(told.value)
    assert "or --fresh to keep it" in str(told.value) and load_run(tmp_path / "run").settings() == cfg
    assert files(tmp_path / "run") == found and [*tmp_path.iterdir()] == [tmp_path / "run"]


def test_a_run_may_be_moved_and_renamed(tmp_path: Path) -> None:
    path = leave(make_config({"run_dir": tmp_path / "here" / "run"}), UNFINISHED, CHECKPOINT)
    there = tmp_path / "there"
    path.rename(there)
    assert check(make_config({"run_dir": there}), MADE_BY) == "continue"


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ({"epochs": 3}, {"epochs": 4}, ""),
        ({"epochs": 3, "warmup_epochs": 1.5}, {"epochs": 30, "warmup_epochs": 1.5}, ""),
        ({"epochs": 3}, {"epochs": 2}, "epochs: 3 -> 2"),
        ({"epochs": 3, "schedule": "cosine"}, {"epochs": 4, "schedule": "cosine"}, "epochs: 3 -> 4"),
        ({"epochs": 3, "schedule": "one_cycle"}, {"epochs": 4, "schedule": "one_cycle"}, "epochs: 3 -> 4"),
        ({"epochs": 3, "schedule": "cosine"}, {"epochs": 4}, "schedule: cosine -> constant"),
        ({"epochs": 3}, {"epochs": 4, "schedule": "cosine"}, "epochs: 3 -> 4; schedule: constant -> cosine"),
        ({"epochs": 3}, {"epochs": 4, "lr": 0.5}, "lr: 0.02 -> 0.5"),
        ({"epochs": 3}, {"epochs": 2, "lr": 0.5, "seed": 1}, "seed: 42 -> 1; epochs: 3 -> 2; lr: 0.02 -> 0.5"),
    ],
)
@pytest.mark.parametrize("status", [UNFINISHED, FINISHED])
def test_only_epochs_may_be_added_where_the_rate_does_not_depend_on_their_number(
    tmp_path: Path, status: str, before: dict[str, Any], now: dict[str, Any], refused: str
) -> None:
    old, new = (make_config({"run_dir": tmp_path / "run"} | given) for given in (before, now))
    leave(old, status, CHECKPOINT)
    if not refused:
        assert check(new, MADE_BY) == "continue" and not claim(new, MADE_BY).finished
        assert load_run(tmp_path / "run").settings() == new
        return
    with pytest.raises(UserError) as told:
        claim(new, MADE_BY)
    assert f"belongs to another run ({refused})" in str(told.value)


def test_more_epochs_do_not_continue_a_run_that_stopped_early(tmp_path: Path) -> None:
    cfg = make_config({"run_dir": tmp_path / "run", "validation": 9, "patience": 2})
    path = leave(cfg, FINISHED, CHECKPOINT)
    longer = dataclasses.replace(cfg, epochs=30)
    assert check(longer, MADE_BY) == "continue"
    for status, means in ((FINISHED, "finished"), (UNFINISHED, "continue")):
        early = {"format": 1, "status": status, "epochs": cfg.epochs, "stopped_early": "after epoch 2"}
        RunFolder(path).write_json("summary.json", early)
        assert check(longer, MADE_BY) == means


CHANGES = [
    ({"code": "other"}, "other source files"),
    ({"torch": "2.16"}, "torch: 2.15 -> 2.16"),
    ({"python": "3.12", "torch": "2.16"}, "python: 3.11 -> 3.12; torch: 2.15 -> 2.16"),
    ({"data": {"train": "other"}}, "other data files"),
    ({"numpy": "3.0"}, "numpy: None -> 3.0"),
]


@pytest.mark.parametrize("case", ["finished", "unfinished", "longer"])
@pytest.mark.parametrize(("changed", "said"), CHANGES)
def test_a_run_of_other_code_stands_or_is_continued_only_when_told(
    cfg: Config, changed: dict[str, Any], said: str, case: str
) -> None:
    path = leave(cfg, UNFINISHED if case == "unfinished" else FINISHED, CHECKPOINT)
    before = files(path)
    cfg = dataclasses.replace(cfg, epochs=5) if case == "longer" else cfg
    was, reuse, then = ("begun", "continues it all the same", "continue")
    if case == "finished":
        was, reuse, then = ("finished", "accepts it", "finished")
    with pytest.raises(Outdated) as told:
        claim(cfg, MADE_BY | changed)
    assert f"was {was} by other code or versions than these ({said})" in str(told.value)
    assert "--fresh keeps it under another name" in str(told.value) and f"--reuse {reuse}" in str(told.value)
    assert files(path) == before and locks(path) == []
    assert check(cfg, MADE_BY | changed, reuse=True) == then
    assert check(cfg, MADE_BY | changed, fresh=True) == "aside"


@pytest.mark.parametrize("checkpoint", [None, f"{CHECKPOINT}.broken", f".{CHECKPOINT}.0123.part"])
def test_where_nothing_is_gone_on_from_other_code_may_begin(cfg: Config, checkpoint: str | None) -> None:
    leave(cfg, UNFINISHED, checkpoint)
    assert check(cfg, MADE_BY | {"code": "other"}) == "continue"


def dies(work: Callable[[], object], below: Path, change: int = 0, size: int = 0) -> int:
    """Do work in a process that is killed right before it changes something below a folder for the n-th time, or else
    within its first write of more than so many bytes. Returns its exit code: 0 where it came to its end."""
    changes = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal changes
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        writes = writes or event in ("os.rename", "os.remove", "os.mkdir", "os.utime", "os.truncate")
        if writes and str(args[0]).startswith(str(below)):
            changes += 1
            if changes == change:
                os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - a file of the test's else, which is to grow
        if change:
            sys.addaudithook(hook)
        else:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("case", ["new", "unfinished", "killed before", "longer", "fresh"])
def test_a_kill_at_any_moment_is_made_good_by_the_next_start(tmp_path: Path, case: str) -> None:
    moments: list[dict[str, int]] = [{"size": size} for size in (0, 10, 300)]
    moments += [{"change": change} for change in range(1, 100)]
    for number, moment in enumerate(moments):
        runs = tmp_path / str(number)
        cfg = make_config({"model": "linear", "run_dir": runs / "run"})
        status = FINISHED if case in ("longer", "fresh") else UNFINISHED
        path = cfg.run_dir or Path()
        before = {} if case == "new" else files(leave(cfg, status, CHECKPOINT))
        if case == "killed before":  # which left a lock, and a file that it was writing
            dies(lambda: lock.acquire(path), runs, change=100)  # noqa: B023
            (path / ".summary.json.0123.part").write_text("{")
        wanted = dataclasses.replace(cfg, epochs=5) if case == "longer" else cfg
        code = dies(lambda: claim(wanted, MADE_BY, fresh=case == "fresh"), runs, **moment)  # noqa: B023
        assert code in (0, -signal.SIGKILL if "change" in moment else -signal.SIGXFSZ)
        aside = path.with_name("run.1")
        folder = claim(wanted, MADE_BY)
        if case != "fresh":
            assert not folder.finished and files(path) == before and not aside.exists()
        elif aside.exists():
            assert not folder.finished and files(path) == {} and files(aside) == before
        else:
            assert folder.finished and files(path) == before
        if not folder.finished:
            assert folder.lock is not None and [*path.glob(".lock.*")] == [folder.lock.path]
            assert [*path.glob(".*.part")] == [] and load_run(path).settings() == wanted
            folder.lock.release()
        if case == "fresh":  # given again, after a kill as after none, it loses nothing
            assert not claim(wanted, MADE_BY, fresh=True).finished and held(path) == {"config.yaml"}
            assert before in [files(p) for p in runs.glob("run.*")] and len(list(runs.iterdir())) <= 3
        if code == 0:
            break
    assert code == 0 and number > 8


@pytest.mark.parametrize("case", ["new", "fresh"])
def test_of_eight_commands_at_once_one_gets_the_run(tmp_path: Path, case: str) -> None:
    cfgs = [make_config({"model": "linear", "run_dir": tmp_path / str(n) / "run"}) for n in range(5)]
    before = [files(leave(cfg, FINISHED, CHECKPOINT)) for cfg in cfgs if case == "fresh"]
    command = dict(zip(map(folder_of, cfgs), cfgs, strict=True))
    got, errors = eight(lambda path: claim(command[path], MADE_BY, fresh=case == "fresh").lock, [*command])
    assert got == [*command] and [error for error in errors if " is in use by " not in error] == []
    for n, path in enumerate(command):
        assert held(path) == {"config.yaml"} and len(locks(path)) == 1
        assert [files(aside) for aside in path.parent.glob("run.*")] == before[n : n + 1]


@pytest.mark.parametrize(
    ("status", "lr", "fresh", "then"),
    [
        (FINISHED, 0.1, False, "finished"),
        (UNFINISHED, 0.5, False, r"belongs to another run \(lr: 0.5 -> 0.1\)"),
        (UNFINISHED, 0.1, True, "aside"),
    ],
)
def test_what_another_process_did_since_the_first_look_counts(
    cfg: Config, status: str, lr: float, fresh: bool, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, acquire, theirs = folder_of(cfg), lock.acquire, dataclasses.replace(cfg, lr=lr)

    def late(folder: Path) -> lock.Lock:
        monkeypatch.undo()
        leave(theirs, status)
        return acquire(folder)

    monkeypatch.setattr(lock, "acquire", late)
    if then in ("finished", "aside"):
        assert claim(cfg, MADE_BY, fresh=fresh).finished == (then == "finished")
        assert path.with_name("run.1").exists() == (len(locks(path)) == 1) == (then == "aside")
        return
    with pytest.raises(UserError, match=then):
        claim(cfg, MADE_BY, fresh=fresh)
    assert locks(path) == [] and load_run(path).settings() == theirs


def test_a_folder_that_cannot_be_written(tmp_path: Path, cfg: Config) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/runs/.*: cannot be written \(Not a directory\): choose another --runs"):
        claim(dataclasses.replace(cfg, run_dir=None, runs_dir=tmp_path / "file" / "runs"), MADE_BY)
    with pytest.raises(UserError, match="file exists and is no run folder"):
        claim(dataclasses.replace(cfg, run_dir=tmp_path / "file"), MADE_BY)


@pytest.mark.parametrize("status", [None, UNFINISHED])
def test_a_folder_that_may_only_be_read(tmp_path: Path, status: str | None) -> None:
    cfg, runs = make_config({"model": "linear", "run_dir": "runs/run"}), tmp_path / "runs"
    runs.mkdir()
    if status:
        leave(dataclasses.replace(cfg, run_dir=runs / "run"), status).chmod(0o555)
    runs.chmod(0o555)
    for fresh in (False, True):
        told = as_nobody(tmp_path, lambda: claim(cfg, MADE_BY, fresh=fresh))  # noqa: B023
        assert told == "UserError: runs/run: cannot be written (Permission denied): choose another --runs-dir"
    if status:
        (runs / "run").chmod(0o000)
        told = as_nobody(tmp_path, lambda: check(cfg, MADE_BY))
        assert told == "UserError: runs/run: cannot be read (Permission denied): choose another --run-dir"
        (runs / "run").chmod(0o755)
    runs.chmod(0o755)
    assert locks(runs / "run") == [] and len(list(runs.iterdir())) == bool(status)


def test_a_full_disk_leaves_no_lock(cfg: Config) -> None:
    path = leave(cfg, UNFINISHED)
    before, limits = files(path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 10, 300):  # bytes that a file may grow to
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(UserError, match=r"run: cannot be written \(File too large\)"):
                claim(cfg, MADE_BY)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert files(path) == before and held(path) == {*before, "config.yaml"} and locks(path) == []
    assert load_run(path).settings() == cfg
