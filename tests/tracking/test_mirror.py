"""What W&B is told, over all starts of a run, and that nothing that happens to W&B stops or changes training.

Real runs on real ranks; W&B is the real one, or a package that stands in its way: one writes down what it is told,
others do their worst.
"""

import atexit
import json
import math
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import psutil
import pytest
from conftest import _server, command, on_a_terminal
from faults import Fault, Ranks, eventually
from wandb_server import WandbServer

from fashion_ddp.private import TESTED
from fashion_ddp.runs.reading import Run, load_run
from fashion_ddp.tracking import mirror

STEPS = 3 * faults.TINY_STEPS


def _prepared(
    packages: Path | None, limits: dict[str, float], target: Callable[..., None], args: Any, kwargs: Any
) -> None:
    if packages:
        sys.path.insert(0, str(packages))
    for name, value in limits.items():
        setattr(mirror, name, value)
    try:
        target(*args, **kwargs)
    finally:
        atexit._run_exitfuncs()  # as a Python of its own would, and not one that multiprocessing started


# W&B's service may take longer to begin on a busy machine than training grants it: then the run would be offline.
PATIENT = {"INIT_TIMEOUT": 120.0}


def start(
    folder: Path,
    words: Sequence[str] = (),
    strikes: Sequence[Fault] = (),
    packages: Path | None = None,
    limits: dict[str, float] | None = None,
    world_size: int = 1,
    **env: str,
) -> Ranks:
    """Start the tiny run, mirrored to W&B: the one of `packages` where that is given, with other limits of time."""

    def process(target: Callable[..., None], args: Any, kwargs: Any) -> Any:
        return _server.Process(target=_prepared, args=(packages, PATIENT | (limits or {}), target, args, kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "_server", SimpleNamespace(Process=process))
        return faults.start_tiny(world_size, folder, ["--tracker", "auto", *words], strikes, **env)


def whole(folder: Path, *args: Any, **kwargs: Any) -> tuple[Run, list[str]]:
    """A run that must finish; its records, and what it said of W&B."""
    ranks = start(folder, *args, **kwargs)
    assert set(ranks.wait()) == {0}, ranks.printed()
    return finished(folder), wandb_lines(ranks.printed())


def finished(folder: Path, expected: bytes | None = None) -> Run:
    """The finished run in a folder, which has these weights."""
    run = load_run(folder / "run")
    assert run.summary["status"] == "finished"
    assert [row["epoch"] for row in run.metrics] == [1, 2, 3]
    assert [point["step"] for point in run.steps] == list(range(1, STEPS + 1))
    assert expected in (None, weights(folder))
    return run


def weights(folder: Path) -> bytes:
    return (folder / "run" / "model.safetensors").read_bytes()


def wandb_lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("W&B: ")]


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the run that W&B has nothing to do with."""
    folder = tmp_path_factory.mktemp("untracked")
    _, lines = whole(folder, ["--tracker", "none"])
    assert not lines and not (folder / "run" / "wandb").exists()
    return weights(folder)


def inspected(fragment: Path, *words: str) -> str:
    """What W&B says of a folder that it wrote offline."""
    done = command("wandb", "leet", "inspect", "--json", *words, str(fragment), cwd=fragment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def overview_of(fragment: Path) -> dict[str, Any]:
    """What W&B shows of all of it."""
    return json.loads(inspected(fragment, "--summary"))


def records_of(fragment: Path) -> dict[str, list[dict[str, Any]]]:
    """All that W&B has in such a folder, by type."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in map(json.loads, inspected(fragment).splitlines()):
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def logged(fragment: Path) -> list[dict[str, Any]]:
    """The rows that were logged to such a folder."""
    return [record["item"] for record in records_of(fragment)["history"]]


def sorted_out(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows that W&B was told, as points and epochs in their order, without W&B's own entries and without what is shown
    at the end."""
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
    rows = [row for row in rows if "step" in row]
    points, epochs = ([row for row in rows if ("epoch" in row) == of_epoch] for of_epoch in (False, True))
    return sorted(points, key=lambda row: row["step"]), sorted(epochs, key=lambda row: row["epoch"])


def check_told(run: Run, rows: list[dict[str, Any]]) -> None:
    """These rows that W&B was told hold all of the run, each point and epoch once."""
    points = [{"step": p["step"], **{f"step/{k}": p[k] for k in ("loss", "accuracy", "lr")}} for p in run.steps]
    for found, expected in zip(sorted_out(rows), (points, run.metrics), strict=True):
        assert found == [pytest.approx(row) for row in expected]


def check_whole(run: Run, fragment: Path) -> dict[str, Any]:
    """The fragment holds all of the run; its overview."""
    check_told(run, logged(fragment))
    overview = overview_of(fragment)
    assert (overview["state"], overview["exit_code"]) == ("finished", 0)
    assert overview["run_id"] == run.summary["wandb_id"]
    numbers = {k: v for k, v in run.summary.items() if isinstance(v, int | float | str) and k != "step"}
    assert {name: overview["summary"][name] for name in numbers} == pytest.approx(numbers)
    return overview


def test_without_an_account_wandb_mirrors_the_run_offline(tmp_path: Path, untracked: bytes) -> None:
    with WandbServer() as server:
        server.silent.set()
        run, lines = whole(tmp_path, WANDB_PROJECT="mine", WANDB_NAME="ignored", WANDB_BASE_URL=server.url)
    assert server.asked == []  # not to report its own use, either: that would hold up the end behind a firewall
    assert len(lines) == 1 and lines[0].startswith("W&B: offline, in run/wandb; `wandb sync run/wandb/offline-run-*`")
    [fragment] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    overview = check_whole(run, fragment)
    assert (overview["project"], overview["name"]) == ("mine", "run")
    settings = {"model": "cnn", "recipe": "blog", "lr": 0.01, "batch_size": 250, "seed": 42, "world_size": 1}
    settings |= {"gpu": "cpu", "git_commit": run.environment[0]["git_commit"]}
    assert overview["config"] == overview["config"] | settings
    assert not any(isinstance(value, dict | list) for value in overview["config"].values())
    assert run.summary["wandb_mode"] == "offline" and weights(tmp_path) == untracked

    records = records_of(fragment)
    assert records["run"][0]["job_type"] == "train"
    assert "run_group" not in records["run"][0] and "tags" not in records["run"][0]
    assert "memory_percent" in records["stats"][0]["item"]  # system metrics
    kinds = {artifact["type"]: artifact["name"] for artifact in records["artifact"]}
    assert set(kinds) == {"run_table"}  # and no weights


def test_at_the_end_it_shows_tables_figures_and_weights(tmp_path: Path) -> None:
    words = ["--wandb-project", "flagged", "--wandb-group", "a group", "--wandb-tags", "one, two", "--wandb-weights"]
    run, _ = whole(tmp_path, [*words, "--wandb-notes", "why"], WANDB_PROJECT="variable", WANDB_TAGS="three")
    [fragment] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    records = records_of(fragment)
    [told] = records["run"]
    said = {name: told[name] for name in ("project", "run_group", "tags", "notes")}
    assert said == {"project": "flagged", "run_group": "a group", "tags": ["one", "two"], "notes": "why"}

    def table(key: str) -> dict[str, Any]:
        [path] = (fragment / "files" / "media" / "table").glob(f"{key}_[0-9]*.table.json")
        return json.loads(path.read_text())

    predictions, labels = run.predictions["predicted"].tolist(), run.predictions["labels"].tolist()
    shown = table("predictions")
    assert shown["columns"] == ["id", "label", "predicted", "right", "confidence", "image"]
    places = [row[0] for row in shown["data"]]
    assert len(places) == 200 and places == sorted(set(places)) and places[-1] > 300  # of 333, in every run the same
    name = run.summary["classes"].__getitem__
    for at, label, predicted, right, confidence, _ in shown["data"]:
        assert (label, predicted, right) == (name(labels[at]), name(predictions[at]), labels[at] == predictions[at])
        logits = run.predictions["logits"][at].astype(float)
        assert confidence == pytest.approx(math.exp(logits.max()) / sum(map(math.exp, logits)))
    counted = {(true, found): count for true, found, count in table("confusion_matrix_table")["data"]}
    pairs = list(zip(labels, predictions, strict=True))
    assert counted == {(name(i), name(j)): pairs.count((i, j)) for i in range(10) for j in range(10)}
    seconds = dict(table("timings_table")["data"])
    assert sum(seconds.values()) == pytest.approx(run.summary["time/total_s"])
    assert seconds["training"] == run.summary["time/train_total_s"]
    [row] = [row["item"] for row in records["history"] if "prediction_grid.count" in row["item"]]
    assert row["prediction_grid.count"] == 9
    artifacts = {(artifact["type"], artifact["name"]) for artifact in records["artifact"]}
    assert artifacts >= {("model", "run"), ("run_table", f"run-{told['run_id']}-predictions")}
    staged = tmp_path / "run" / "wandb" / "artifacts" / "staging"
    assert weights(tmp_path) in [path.read_bytes() for path in staged.iterdir()]


@pytest.mark.slow
def test_a_sweep_s_id_is_read_back_and_wandbs_own_settings_hold_where_nobody_says_more(tmp_path: Path) -> None:
    (tmp_path / "settings").write_text("[default]\nproject = of the file\nrun_group = of the file\n")
    told_by = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "of-agent", "WANDB_CONFIG_DIR": str(tmp_path)}
    run, _ = whole(tmp_path, ["--wandb-group", "of the flag"], **told_by)
    assert run.summary["wandb_id"] == "of-agent"
    [fragment] = (tmp_path / "run" / "wandb").glob("offline-run-*-of-agent")
    check_whole(run, fragment)
    [told] = records_of(fragment)["run"]
    assert (told["project"], told["run_group"]) == ("of the file", "of the flag")


def service_of(run: Ranks) -> psutil.Process:
    """W&B's service of a run whose rank stands still, or soon will."""
    process = psutil.Process(run.processes[0].pid)
    eventually(lambda: process.status() == psutil.STATUS_STOPPED)
    [service] = [child for child in process.children() if child.name() == "wandb-core"]
    return service


@pytest.mark.slow
def test_the_newest_file_of_a_run_with_many_starts_is_whole(tmp_path: Path, untracked: bytes) -> None:
    def names(folder: str) -> set[str]:
        return {path.name for path in (tmp_path / "run" / "wandb" / folder).glob("offline-run-*")}

    killed_before_it_saved = start(tmp_path, strikes=[Fault("save", "kill")])
    assert killed_before_it_saved.wait() == [-9] and len(names(".")) == 1
    first = load_run(tmp_path / "run").summary["wandb_id"]

    # Killed while its service lives on.
    killed = start(tmp_path, ["--checkpoint-every", "1000"], [Fault("step", "stand still", count=10)])
    service = service_of(killed)
    service.suspend()
    killed.send(signal.SIGKILL)
    assert killed.wait() == [-9]
    try:
        stopped = start(tmp_path, strikes=[Fault("step", "TERM", count=12)])
        assert stopped.wait() == [75], stopped.printed()
        fragments = names(".")
        assert len(fragments) == 1 and len(names("superseded")) == 2
        fragment = tmp_path / "run" / "wandb" / fragments.pop()
        assert overview_of(fragment)["exit_code"] == 1 and len(sorted_out(logged(fragment))[0]) == 12
    finally:
        service.resume()
    eventually(lambda: not service.is_running())  # it notices, and leaves

    run, _ = whole(tmp_path)
    [newest] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    check_whole(run, newest)
    assert len(names("superseded")) == 3 and newest.name not in names("superseded")
    assert run.summary["wandb_id"] == first and run.summary["starts"] == 4
    assert all(name.endswith(first) for name in names("superseded") | {newest.name})
    assert weights(tmp_path) == untracked


@pytest.mark.slow
def test_its_server_has_all_of_a_run_with_many_starts_once(tmp_path: Path, untracked: bytes) -> None:
    with WandbServer() as server:
        stopped = start(tmp_path, strikes=[Fault("step", "TERM", count=10)], **server.env)
        assert stopped.wait() == [75], stopped.printed()
        assert (server.exits, server.preempting) == ([1], [True])
        # What it tells in its last seconds does not arrive.
        killed = start(tmp_path, ["--checkpoint-every", "1000"], [Fault("step", "kill", count=10)], **server.env)
        assert killed.wait() == [-9], killed.printed()
        run, lines = whole(tmp_path, **server.env)
        assert lines == [f"W&B: online at {server.url}/me/fashion_ddp/runs/{run.summary['wandb_id']}"] * 3
        assert len(server.history) == 1 and server.exits == [1, 0]
        check_told(run, server.rows(run.summary["wandb_id"]))
    assert run.summary["wandb_mode"] == "online" and weights(tmp_path) == untracked


@pytest.mark.slow
def test_a_server_that_falls_silent_holds_nothing_up(tmp_path: Path, untracked: bytes) -> None:
    with WandbServer() as server:
        ranks = start(tmp_path, strikes=[Fault("step", "wait", count=10)], limits={"FINISH_TIMEOUT": 2.0}, **server.env)
        eventually(lambda: server.history)
        server.silent.set()
        (tmp_path / "go").touch()
        assert ranks.wait() == [0], ranks.printed()
    assert [line.partition(" ")[2][:7] for line in wandb_lines(ranks.printed())] == ["online ", "did not"]
    finished(tmp_path, untracked)


SCRIBE = """
import atexit, json, os, time, types
def never(*args, **settings):
    while True: time.sleep(3600)
def fail(*args, **settings): raise ConnectionResetError('the service is gone')
def told(*what):
    with open("told.jsonl", "a") as file:
        file.write(json.dumps(what) + "\\n")
class Summary:
    def update(self, figures): told("summary", figures)
    def get(self, name): return None
class Run:
    url, id, summary, starting_step = "https://somewhere", None, Summary(), 0
    def define_metric(self, *names, **axis): pass
    def log(self, row, step, commit):
        assert commit and step >= self.starting_step
        self.starting_step = step + 1
        told("log", row)
        if os.environ["ACCOUNT"] == "yes":
            with open("server.json", "w") as file:
                json.dump(step, file)
    def log_artifact(self, artifact): told("artifact", artifact)
    def mark_preempting(self): told("mark_preempting", None)
    def finish(self, exit_code): told("finish", exit_code)
def Settings(**settings): return settings
def login(prompt, verify): return os.environ["ACCOUNT"] == "yes"
def teardown(): pass
def at_exit(): pass
at_exit.__module__ = "wandb.service"  # as that with which W&B waits for its service when Python ends
def setup():
    known = types.SimpleNamespace(project=os.environ.get("WANDB_PROJECT"), run_job_type=None)
    return types.SimpleNamespace(settings=known)
def init(**settings):
    atexit.register(at_exit)
    told("init", settings)
    Run.id = settings["id"]
    if settings["mode"] == "online" and os.path.exists("server.json"):  # what the server has
        Run.starting_step = json.load(open("server.json")) + 1
    return Run()
def Table(columns, data): return [columns, *data]
def Image(picture, caption=None): return str(picture.size)
class plot:
    def confusion_matrix(**of): return of["class_names"]
    def bar(table, *columns, title): return table
told("import", os.environ["RANK"])
"""


def package(tmp_path: Path, source: str = SCRIBE) -> Path:
    """A folder whose package wandb is this."""
    folder = tmp_path / "packages"
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "__init__.py").write_text(source)
    return folder


class Told:
    """What one start told the scribe."""

    def __init__(self, folder: Path):
        path = folder / "told.jsonl"
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)

    def all(self, name: str) -> list[Any]:
        return [what for called, what in self.lines if called == name]

    @property
    def points(self) -> list[int]:
        return [point["step"] for point in sorted_out(self.all("log"))[0]]

    @property
    def epochs(self) -> list[int]:
        return [row["epoch"] for row in sorted_out(self.all("log"))[1]]


def test_an_online_run_is_told_each_point_once_over_all_starts(tmp_path: Path, untracked: bytes) -> None:
    scribe = package(tmp_path)

    def started(code: int, *words: str, strikes: Sequence[Fault] = (), account: str = "yes") -> Told:
        ranks = start(tmp_path, words, strikes, scribe, ACCOUNT=account)
        assert ranks.wait() == [code], ranks.printed()
        told = Told(tmp_path)
        assert told.all("import") == ["0"] * len(told.all("import"))
        return told

    def steps(first: int, last: int) -> list[int]:
        return list(range(first, last + 1))

    stopped = started(75, strikes=[Fault("step", "TERM", count=10)])
    # It goes on without saving: what it told of steps 11 to 13 is not told again by the next.
    failed = started(1, "--checkpoint-every", "1000", strikes=[Fault("step", "raise", count=4)])
    again = started(75, strikes=[Fault("step", "TERM", count=8)])
    assert (stopped.points, failed.points, again.points) == (steps(1, 10), steps(11, 13), steps(14, 18))
    assert (stopped.epochs, failed.epochs, again.epochs) == ([1], [], [2])
    for told, preempted in ((stopped, [None]), (failed, []), (again, [None])):
        assert (told.all("mark_preempting"), told.all("finish")) == (preempted, [1])
    offline = started(75, strikes=[Fault("step", "TERM", count=2)], account="no")
    assert offline.points == steps(1, 20) and offline.epochs == [1, 2]  # as its file is to be whole
    online = started(75, strikes=[Fault("step", "TERM", count=2)])
    assert online.points == steps(19, 22) and online.epochs == []
    without = started(75, "--tracker", "none", strikes=[Fault("step", "TERM")])
    assert without.lines == []
    last = started(0)
    assert last.points == steps(23, STEPS) and last.epochs == [3] and last.all("finish") == [0]
    assert last.all("summary")[1]["test/accuracy"] == finished(tmp_path).summary["test/accuracy"]

    inits = [told.all("init")[0] for told in (stopped, failed, again, offline, online, last)]
    assert {init["id"] for init in inits} == {finished(tmp_path).summary["wandb_id"]}
    assert [init["mode"] for init in inits] == ["online", "online", "online", "offline", "online", "online"]
    assert {init["resume"] for init in inits if init["mode"] == "online"} == {"allow"}
    # Nothing that nobody said, so that W&B's own settings hold.
    ours = {"project", "job_type", "mode", "id", "resume", "name", "dir", "config", "allow_val_change", "settings"}
    assert [set(init) for init in inits] == [ours] * 6
    assert weights(tmp_path) == untracked

    assert started(0).lines == []  # it is finished: W&B is not even imported


WORST = {
    "missing": "raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')",
    "broken": "raise SyntaxError('two versions of protobuf')",
    "the tables raise": SCRIBE + "Table = fail",
    "everything raises": "def __getattr__(name): raise RuntimeError(f'{name}: no such luck')",
    "every call raises": SCRIBE + "login = Settings = init = teardown = fail",
    "log raises": SCRIBE + "Run.log = fail",
    "the summary raises": SCRIBE + "Summary.update = fail",
    "finish raises": SCRIBE + "Run.finish = teardown = fail",
    "it has no address": SCRIBE + "del Run.url",
    "its import never ends": SCRIBE + "never()",
    "login never ends": SCRIBE + "login = never",
    "init never ends": SCRIBE + "init = never",
    "log never ends": SCRIBE + "Run.log = never",
    "finish never ends": SCRIBE + "Run.finish = never",
    "its teardown never ends": SCRIBE + "teardown = never",
    "it will wait at the end": SCRIBE + "Run.finish = never\nat_exit.__module__ = 'unknown'",
}
FIRST = ("missing", "every call raises", "log never ends", "init never ends")  # the others are slow tests
SOON = {"START_TIMEOUT": 1.0, "FINISH_TIMEOUT": 1.0, "EARLY_FINISH_TIMEOUT": 1.0, "INIT_TIMEOUT": 1.0}


@pytest.mark.parametrize("worst", [w if w in FIRST else pytest.param(w, marks=pytest.mark.slow) for w in WORST])
def test_a_wandb_that_fails_or_hangs_changes_nothing(worst: str, tmp_path: Path, untracked: bytes) -> None:
    ranks = start(tmp_path, packages=package(tmp_path, WORST[worst]), limits=SOON, ACCOUNT="yes")
    assert ranks.wait() == [0] and "Traceback" not in ranks.printed(), ranks.printed()
    finished(tmp_path, untracked)
    lines = wandb_lines(ranks.printed())
    if worst == "it will wait at the end":
        assert f"Tested with wandb {' and '.join(TESTED['wandb'])}: pip install" in lines.pop()
    assert 1 <= len(lines) <= 2, lines


@pytest.mark.slow
def test_a_wandb_that_does_not_keep_up_is_left_in_one_line(tmp_path: Path, untracked: bytes) -> None:
    packages = package(tmp_path, SCRIBE + "Run.log = never")
    limits = {"MAX_PENDING": 10, "EARLY_FINISH_TIMEOUT": 1.0}
    run, lines = whole(tmp_path, packages=packages, limits=limits, ACCOUNT="yes")
    assert len(lines) == 2 and "does not keep up, and is left" in lines[1] and weights(tmp_path) == untracked
    assert run.summary["wandb_mode"] is None  # so that a later start tells it all


@pytest.mark.slow
def test_other_ranks_wait_neither_for_its_start_nor_for_its_end(tmp_path: Path) -> None:
    waits = (
        "def wait(path):\n"
        "    while not os.path.exists(path): time.sleep(0.01)\n"
        "def init(**settings):\n"
        "    wait('run/steps.jsonl')\n"  # that training has begun
        "    return Run()\n"
        "def finish(self, exit_code):\n"
        "    import torch.distributed\n"
        "    told('finish', torch.distributed.is_initialized())\n"
        "    wait('go')\n"
        "Run.finish = finish\n"
    )
    scribe = package(tmp_path, SCRIBE + waits)
    ranks = start(tmp_path, ["--timeout", "8"], packages=scribe, world_size=2, ACCOUNT="no")
    eventually(lambda: ranks.processes[1].exitcode is not None or not ranks.processes[0].is_alive())
    assert ranks.processes[1].exitcode == 0 and ranks.processes[0].is_alive(), ranks.printed()
    (tmp_path / "go").touch()
    assert ranks.wait() == [0, 0], ranks.printed()
    told = Told(tmp_path)
    assert told.all("finish") == [False]  # it has taken leave of the other rank
    assert told.points == list(range(1, STEPS + 1)) and told.all("import") == ["0"]
    assert finished(tmp_path).summary["wandb_mode"] == "offline"


@pytest.mark.parametrize(
    ("number", "at", "said"),
    [
        (signal.SIGKILL, "step", "W&B: stopped (log: "),
        pytest.param(signal.SIGSTOP, "step", "W&B: did not finish in time", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, "end", "W&B: did not finish in time", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "end", "W&B: stopped (", marks=pytest.mark.slow),
    ],
    ids=["killed", "stands still", "stands still at the end", "ended by whoever ends the job"],
)
def test_training_outlives_wandbs_service(
    number: signal.Signals, at: str, said: str, tmp_path: Path, untracked: bytes
) -> None:
    strikes = [Fault(at, "stand still", count=10 if at == "step" else 1)]
    ranks = start(tmp_path, strikes=strikes, limits={"FINISH_TIMEOUT": 3.0})
    service = service_of(ranks)
    try:
        service.send_signal(number)
        if number != signal.SIGSTOP:  # else the run might be done before its service is
            eventually(lambda: service.status() == psutil.STATUS_ZOMBIE)
        ranks.send(signal.SIGCONT)
        assert ranks.wait() == [0], ranks.printed()
    finally:
        if number == signal.SIGSTOP:
            service.kill()
    assert "Traceback" not in ranks.printed() and "Exception" not in ranks.printed(), ranks.printed()
    lines = wandb_lines(ranks.printed())
    assert len(lines) == 2 and lines[1].startswith(said), lines
    finished(tmp_path, untracked)


REFUSED = ["W&B: online failed", "W&B: offline"]


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"WANDB_MODE": "disabled"}, []),
        ({"WANDB_API_KEY": "too-short"}, ["W&B: offline"]),
        ({"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": "http://127.0.0.1:9"}, REFUSED),
        pytest.param({}, REFUSED, marks=pytest.mark.slow),
    ],
    ids=["disabled", "malformed key", "server refuses", "server is silent"],
)
def test_no_network_and_no_key_stop_nothing(
    tmp_path: Path, env: dict[str, str], said: list[str], untracked: bytes
) -> None:
    with WandbServer() as server:
        server.silent.set()
        _, lines = whole(tmp_path, limits={"INIT_TIMEOUT": 2.0}, **(env or server.env))
    assert len(lines) == len(said) and all(map(str.startswith, lines, said)), lines
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*"))) == said.count("W&B: offline")
    assert weights(tmp_path) == untracked


@pytest.mark.slow
def test_no_question_is_asked_on_a_terminal(tmp_path: Path) -> None:
    words = ["--dataset", "synthetic", "--model", "linear", "--epochs", "1", "--device", "cpu", "--run-dir", "run"]
    line = [sys.executable, "-m", "fashion_ddp.train", *words]
    code, shown = on_a_terminal(*line, cwd=tmp_path, WANDB_MODE="online")
    assert code == 0, shown.decode()
    assert load_run(tmp_path / "run").summary["status"] == "finished"
    assert shown.count(b"W&B: offline") == shown.count(b"W&B: online failed") == 1
