"""Nothing that is read back runs, no secret is written or shown, and others cannot change a run's files."""

import ast
import hashlib
import io
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, forked

from fashion_ddp import compare, redact

SOURCES = [path for folder in ("fashion_ddp", "launch", "benchmarks") for path in (CHECKOUT / folder).rglob("*.py")]
TRAIN = ["fashion_ddp.train", "--model", "linear", "--dataset", "synthetic", "--epochs", "1", "--device", "cpu"]
TRAIN += ["--threads", "1", "--run-dir", "runs/run"]


@pytest.mark.quick
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_no_source_reads_what_could_run(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        name = ast.unparse(call.func)
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert name not in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"), ast.unparse(call)
        assert name != "torch.load" or given.get("weights_only") == "True", ast.unparse(call)
        assert name not in ("np.load", "numpy.load") or given.get("allow_pickle", "False") == "False"


class Harmful:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one run was started in, with secrets around it and no umask."""
    folder = tmp_path_factory.mktemp("finished")
    before = os.umask(0)
    try:
        done = forked(*TRAIN, cwd=folder, **SECRETS)
        report = forked("fashion_ddp.compare", "runs", cwd=folder, **SECRETS)
    finally:
        os.umask(before)
    assert done.returncode == report.returncode == 0, done.stderr + report.stderr
    (folder / "screen").write_text(done.stdout + done.stderr + report.stdout + report.stderr)
    return folder


def hostile(finished: Path, to: Path, mark: Path) -> Path:
    """A copy of a run, begun and not finished, of which every file that could carry code does."""
    run = to / "runs" / "run"
    run.mkdir(parents=True)
    for path in (finished / "runs" / "run").iterdir():
        if path.is_file():
            (run / path.name).write_bytes(path.read_bytes())
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "stopped"}))
    harm = pickle.dumps(Harmful(mark))
    for name in ("predictions", "examples", "model"):
        (run / f"{name}.safetensors").write_bytes(harm)
    file = io.BytesIO()
    torch.save(Harmful(mark), file)
    (run / "checkpoints").mkdir()
    for step, content in ((50, harm), (94, file.getvalue())):
        (run / "checkpoints" / f"step-{step:09}.pt").write_bytes(content + hashlib.sha256(content).digest())
    return run


def test_a_run_folder_of_somebody_else_runs_nothing(finished: Path, tmp_path: Path) -> None:
    mark = tmp_path / "harmed"
    with pytest.raises(FileExistsError):  # the attack works, where it is let
        pickle.loads(pickle.dumps(Harmful(tmp_path)))
    run = hostile(finished, tmp_path, mark)
    done = forked(*TRAIN, "--tracker", "none", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("cannot be used") == 2, done.stdout + done.stderr
    assert (run / "model.safetensors").read_bytes() == (finished / "runs/run/model.safetensors").read_bytes()
    assert not mark.exists()


@pytest.mark.parametrize("status", ["finished", "stopped"])
def test_a_report_of_somebody_elses_run_runs_nothing(status: str, finished: Path, tmp_path: Path) -> None:
    mark = tmp_path / "harmed"
    run = hostile(finished, tmp_path, mark)
    (run / "summary.json").write_text((finished / "runs/run/summary.json").read_text().replace("finished", status))
    done = forked("fashion_ddp.compare", "runs", cwd=tmp_path)
    assert done.returncode == (2 if status == "finished" else 0) and "Traceback" not in done.stderr
    (run / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{mark}']\n")
    for words in (("fashion_ddp.compare", "runs"), TRAIN, (TRAIN[0], "--config", str(run / "config.yaml"))):
        done = forked(*words, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert not mark.exists()


SECRETS = {
    "WANDB_MODE": "offline",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "HF_TOKEN": "hf_not-to-be-seen-anywhere",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "MY_PASSWORD": "correct horse battery",
}
VALUES = [value.encode() for name, value in SECRETS.items() if name != "WANDB_MODE"]


def holding_secrets(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(value in path.read_bytes() for value in VALUES)]


def test_no_secret_of_the_environment_is_written_or_shown(finished: Path) -> None:
    assert list((finished / "runs/run/wandb").glob("offline-run-*")) and (finished / "report").is_dir()
    assert holding_secrets(finished) == []


def test_a_secret_on_the_command_line_is_refused_and_not_repeated(tmp_path: Path) -> None:
    secret = SECRETS["HF_TOKEN"]
    for words in (("--runs-dir", secret), (f"--api-key={secret}",), ("--api-key", "never-in-the-environment")):
        done = forked(*TRAIN, *words, cwd=tmp_path, **SECRETS)
        assert done.returncode == 2, done.stdout
        assert secret not in done.stdout + done.stderr and "never-in-the-environment" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_a_secret_in_an_error_of_the_users_model_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\nfrom torch import nn\n\n"
        "class Net(nn.Sequential):\n"
        "    passes = 0\n"
        "    def __init__(self, image_shape, classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, classes))\n"
        "    def forward(self, x):\n"
        "        Net.passes += self.training\n"
        "        if Net.passes > int(os.environ['GOOD']):\n"
        "            raise RuntimeError('refused for ' + os.environ['MY_PASSWORD'])\n"
        "        return super().forward(x)\n"
    )
    for good in ("0", "9"):  # before there is a folder, and in the middle of training
        done = forked(*TRAIN[:2], "mine:Net", *TRAIN[3:], "--tracker", "none", cwd=tmp_path, GOOD=good, **SECRETS)
        assert done.returncode != 0 and "refused for ***" in done.stderr, done.stderr
        assert (tmp_path / "runs" / "run").exists() == (good == "9")
        (tmp_path / f"screen {good}").write_text(done.stdout + done.stderr)
    assert (tmp_path / "runs/run/logs/rank0.log").read_text().count("refused for ***")
    assert holding_secrets(tmp_path) == []


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("key hf_not-to-be-seen-anywhere!", "key ***!"),
        ("https://me:hunter22@host/x", "https://me:***@host/x"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_secrets_are_replaced(text: str, hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SSH_KEY_PATH", str(CHECKOUT))  # a path is no secret
    assert redact.redact(text) == hidden and redact.redact(str(CHECKOUT)) == str(CHECKOUT)


def test_others_may_change_nothing_whatever_the_umask(finished: Path) -> None:
    made = [path for name in ("runs", "report") for path in (finished / name, *(finished / name).rglob("*"))]
    assert len(made) > 20
    assert [path for path in made if not path.is_symlink() and path.stat().st_mode & stat.S_IWOTH] == []


@pytest.mark.quick
@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_a_spreadsheet_takes_no_text_for_a_formula(text: str) -> None:
    assert compare._no_formula(text) == f"'{text}" and compare._no_formula(-1.5) == -1.5
    assert compare._no_formula("linear") == "linear"
