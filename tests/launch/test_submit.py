"""Submitting many runs: what is refused before anything is queued, what SLURM would be given, and Submitit's local and
debug executors for real. A real SLURM is test_slurm.py's."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reports
import yaml
from conftest import CHECKOUT, command, need
from faults import ranks_of
from gates import Started

from fashion_ddp import data
from fashion_ddp.config import cli
from fashion_ddp.distributed import failures
from fashion_ddp.errors import UserError
from fashion_ddp.private import TESTED
from fashion_ddp.runs import claim, provenance
from launch import job, sbatch, site, slurm, snapshot, starts, status, submission, submit, sweep

quick = pytest.mark.quick
SMALL = ["--dataset", "synthetic", "--epochs", "1", "--tracker", "none"]
LINEAR = ["--models", "linear", *SMALL]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, on a machine without SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    monkeypatch.delenv("FASHION_DDP_DATA_DIR", raising=False)
    return tmp_path


Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(here: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """Call a command's main in this process: its exit code, and what it printed."""

    def call(main: Callable[[list[str]], int], *words: str) -> tuple[int, str, str]:
        try:
            code: Any = main(list(words))
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return call


def options(script: str) -> list[str]:
    """What a script tells sbatch, but for where the log is."""
    return [option for option in re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE) if "output" not in option]


# --- What would be submitted ------------------------------------------------------------------------------------------
@quick
def test_a_dry_run_shows_what_sbatch_would_get_without_slurm_and_writes_nothing(here: Path, said: Said) -> None:
    words = ["--models", "linear", "cnn", "--seeds", "0", "1", "--nodes", "2", "--gpus-per-node", "4", "--time", "8"]
    words += ["--cpus-per-rank", "3", "--partition", "gpu", "--account", "team", "--slurm", "qos=long", "exclusive"]
    code, out, err = said(submit.main, *words, "--at-once", "2", *SMALL, "--dry-run")
    assert (code, err, list(here.iterdir())) == (0, "", [])
    settings, runs_, comparison = out.split("--- sbatch, for ")
    expected = [(model, seed) for model in ("linear", "cnn") for seed in (0, 1)]
    assert re.findall(r"^--- (.*)$", settings, re.MULTILINE) == [
        f"{here}/runs/{model}-blog-seed{seed}-epochs1-datasetsynthetic" for model, seed in expected
    ]
    shown = [yaml.safe_load(text.partition("\n")[2]) for text in settings.split("--- ")[1:]]
    of_runs = [(one["model"], one["seed"], one["device"], one["threads"]) for one in shown]
    assert of_runs == [(*each, "cuda", 3) for each in expected]
    assert runs_.startswith("4 runs\n#!/bin/bash\n")
    common = ["account=team", f"chdir={here}", "ntasks-per-node=4", "open-mode=append", "partition=gpu", "qos=long"]
    words = "array=0-3%2 cpus-per-task=3 exclusive gpus-per-node=4 job-name=fashion_ddp nodes=2 requeue time=8"
    [base] = re.findall("^#SBATCH --output=(.*)/%A_%a_0_log.out$", runs_, re.MULTILINE)
    assert Path(base).parent == here / "runs" / ".submissions"
    common.append(f"comment={Path(base).name}")  # by which the jobs are known in the queue
    assert options(runs_) == sorted([*common, *words.split(), "signal=USR2@120"])
    srun = f"srun --unbuffered --output {base}/%A_%a_%t_log.out --kill-on-bad-exit=1 --wait=180 --cpus-per-task=3"
    program = f"--export=ALL {sys.executable} -u -m submitit.core._submit {base}"
    assert re.findall("^srun .*$", runs_, re.MULTILINE) == [f"{srun} {program}"]
    assert f'export PYTHONSAFEPATH=1 PYTHONPATH={base}/code:{here}"${{PYTHONPATH:+:$PYTHONPATH}}"' in runs_
    common[2] = "ntasks-per-node=1"
    words = "cpus-per-task=1 dependency=afterany:JOB job-name=fashion_ddp-report kill-on-invalid-dep=yes nodes=1"
    assert options(comparison) == sorted([*common, *words.split(), "mem=2G", "requeue", "signal=USR2@90", "time=30"])


@quick
@pytest.mark.parametrize(
    ("words", "memory"),  # of the runs, and of the comparison
    [
        ((), (["mem=6G"], ["mem=2G"])),
        (("--mem-per-rank", "1500M"), (["mem=4500M"], ["mem=2G"])),
        (("--mem-per-rank", "1500"), (["mem=4500M"], ["mem=2G"])),
        (("--slurm", "mem-per-cpu=3G"), (["mem-per-cpu=3G"], ["mem-per-cpu=3G"])),
        (("--slurm", "exclusive"), ([], ["mem=2G"])),
        (("--site", "site.yaml"), (["mem-per-cpu=1G"], ["mem-per-cpu=1G"])),
        (("--site", "site.yaml", "--mem-per-rank", "4G"), (["mem=12G"], ["mem=2G"])),
    ],
)
def test_a_job_asks_for_the_memory_of_its_ranks(
    here: Path, said: Said, words: tuple[str, ...], memory: tuple[list[str], list[str]]
) -> None:
    (here / "site.yaml").write_text("slurm: {mem-per-cpu: 1G}")
    code, out, err = said(submit.main, *LINEAR, "--ranks-per-node", "3", *words, "--dry-run")
    assert code == 0, err
    scripts = out.split("--- sbatch, for ")[1:]
    assert [[o for o in options(script) if o.startswith("mem")] for script in scripts] == [*memory]


def test_a_dry_run_needs_no_cluster_where_its_commands_are_installed(tmp_path: Path) -> None:
    need("sbatch")
    words = ("python", "-m", "launch.submit", *LINEAR, "--gpus-per-node", "4", "--dry-run")
    done = command(*words, cwd=tmp_path, SLURM_CONF="/dev/null")
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", []) and "--- sbatch, for" in done.stdout


@quick
@pytest.mark.parametrize(
    ("other", "told"),
    [(None, "has no _make_sbatch_string,"), (lambda command: "", "makes the text for sbatch otherwise")],
)
def test_a_submitit_with_other_private_names_is_told_with_the_version_that_was_tested(
    other: Callable[..., str] | None, told: str, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    if other:
        monkeypatch.setattr(sbatch.submitit_slurm, "_make_sbatch_string", other)
    else:
        monkeypatch.delattr(sbatch.submitit_slurm, "_make_sbatch_string")
    code, _, err = said(submit.main, *LINEAR, "--dry-run")
    [tested] = TESTED["submitit"]
    assert code == 2 and err.count("\n") == 1 and re.match(rf"error: submitit \S+ {told}", err)
    assert err.endswith(f". Tested with submitit {tested}: pip install 'submitit=={tested}'\n")


@quick
def test_a_single_run_is_no_array_and_a_short_job_is_told_in_time(said: Said) -> None:
    _, out, _ = said(submit.main, *LINEAR, "--time", "1", "--dry-run")
    assert "--array" not in out and "#SBATCH --signal=USR2@30\n" in out and "%j_0_log.out" in out
    assert "--gpus-per-node" not in out


@quick
def test_paths_with_spaces_and_relative_ones_are_the_jobs_own(here: Path, said: Said) -> None:
    (folder := here / "my work").mkdir()
    os.chdir(folder)  # `here` goes back
    (folder / "mine.yaml").write_text("all: {lr: 0.3}\n")
    _, out, _ = said(submit.main, *LINEAR, "--recipe", "mine.yaml", "--data-dir", "da ta", "--dry-run")
    shown = yaml.safe_load(out.split("--- ")[1].partition("\n")[2])
    assert shown["recipe"] == str(folder / "mine.yaml") and shown["lr"] == 0.3
    assert shown["data_dir"] == str(folder / "da ta") and shown["runs_dir"] == str(folder / "runs")
    assert f"-m submitit.core._submit '{folder}/runs/.submissions/" in out
    setup = next(line for line in out.splitlines() if line.startswith("export PYTHONSAFEPATH"))
    line = ["/bin/bash", "-c", f'{setup}; printf "%s" "$PYTHONPATH"']
    first, *rest = subprocess.check_output(line, text=True, env={"PYTHONPATH": "/o ld:/x"}).split(":")
    assert first.startswith(f"{folder}/runs/.submissions/") and rest == [str(folder), "/o ld", "/x"]


@quick
def test_a_sweep_is_every_combination_of_its_values_a_user_s_model_s_arguments_too() -> None:
    sweep_ = ("lr=0.1,0.2", "batch-norm=true,false", "model-args=depth=1,depth=2")
    asked = submission.Submission(models=("mine:net",), sweep=sweep_, executor="local")
    runs = [one.run for one in submission.commands(asked, ["--validation", "500", *SMALL], [])]
    assert [(one.lr, one.batch_norm, one.model_args) for one in runs] == [
        (lr, batch_norm, (depth,))
        for lr in (0.1, 0.2)
        for batch_norm in (True, False)
        for depth in ("depth=1", "depth=2")
    ]
    assert {one.validation for one in runs} == {500}


# --- What is refused, before anything is queued or written ------------------------------------------------------------
BAD = {
    "--nodes 0": "nodes must be at least 1",
    "--max-restarts -1": "max_restarts must be at least 0",
    "--gpus-per-node 4 --ranks-per-node 2": "a rank has one card",
    "--nodes 2 --executor local": "uses this machine only",
    "--ranks-per-node 2 --executor debug": "trains one rank, in this process, not 2",
    "--model cnn": "--models",
    "--seed 3": "--seeds",
    "--config x.yaml": "--recipe mine.yaml",
    "--check-only": "--dry-run",
    "--epoch 3": "did you mean --epochs?",
    "--epochs 0": "epochs must be greater than 0",
    "--seeds 1 2 --run-dir x": "--run-dir names one folder, and these are 2 runs",
    "--device cuda": "give --gpus-per-node",
    "--device cpu --gpus-per-node 2": "leave one out",
    "--ranks-per-node 2 --reduction-shards 3": "must be a multiple of the 2 ranks",
    "--sweep lr": "expected name=value,value",
    "--sweep lt=1,2": "did you mean 'lr'?",
    "--sweep threads=1,2": "not a setting that changes a result",
    "--sweep lr=0.1,0.2 lr=0.3 --validation 5": "given twice",
    "--sweep lr=0.1,0.2 --lr 0.3 --validation 5": "given twice",
    "--sweep lr=0.1,x --validation 5": "lr must be a number, got 'x'",
    "--sweep shuffle=yes,no --validation 5": "must be true or false, got 'yes'",
    "--sweep lr=0.1,1e-1 --validation 5": "two of the runs would have the same folder",
    "--sweep lr=0.1,0.2": "--validation 5000",
    "--slurm nodes=2": "give --nodes",
    "--slurm output=x": "launch.status must know where the log is",
    "--slurm gpus-per-task=1": "use --gpus-per-node",
    "--slurm =3": "expected an option of sbatch",
    "--site nope.yaml": "nope.yaml: cannot be read",
    "--mem-per-rank 4GB": "mem_per_rank: a number with K, M, G or T, as in 4G; got '4GB'",
    "--out file/report": "file is no folder that can be written",
    "--models mine:Net": "there is no module 'mine'",
    "--models wrong:Net": "must return logits of shape [2, 10]",
    "--dataset fashion_mnist --data-dir nope": "nope (from --data-dir)",
    "": "sbatch is not here",
}


@quick
@pytest.mark.parametrize(("words", "told"), BAD.items(), ids=lambda value: value[:50])
def test_bad_input_is_told_once_and_leaves_nothing(here: Path, said: Said, words: str, told: str) -> None:
    (here / "file").write_text("")
    (here / "wrong.py").write_text("from torch import nn\n\ndef Net(image_shape, classes):\n    return nn.Flatten()\n")
    code, out, err = said(submit.main, *LINEAR, *words.split())
    assert code == 2 and told in err and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert {path.name for path in here.iterdir()} - {"__pycache__"} == {"file", "wrong.py"}


@quick
def test_a_users_package_with_data_in_it_is_not_copied(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("big/__init__.py", "big/sub/net.py", "big/.git/objects", "big/weights"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("x = 1\n" * 20)
    monkeypatch.setattr(snapshot, "LARGEST", 500)
    snapshot.take(here / "code", ["big.sub.net:Net", "linear", "torch:nn", "fashion_ddp.models.architectures:cnn"])
    copied = {str(path.relative_to(here / "code")) for path in (here / "code").rglob("*") if path.is_file()}
    others = sorted(name for name in copied if not name.startswith(("fashion_ddp/", "launch/")))
    assert others == ["GIT_COMMIT", "big/__init__.py", "big/sub/net.py", "big/weights"]
    assert "fashion_ddp/config/recipes/blog.yaml" in copied and "launch/job.py" in copied
    assert not any("__pycache__" in name for name in copied)
    monkeypatch.setattr(snapshot, "LARGEST", 300)
    with pytest.raises(UserError, match="holds no data"):
        snapshot.user_packages(["big.sub.net:Net"])


# --- The site file ----------------------------------------------------------------------------------------------------
SITE = """
setup: ["module load cuda/12.8", 'source "/my env/bin/activate"']
python: /my/venv/bin/python
runs_dir: $SCRATCH/runs
environment: {WANDB_MODE: offline, OMP_PLACES: "a b"}
slurm: {qos: normal, partition: batch, mail_type: FAIL, requeue: false, gres: "gpu:4", exclusive: true}
report: {partition: login, mail-type: false}
"""


@quick
def test_a_site_file_shapes_the_jobs_and_the_commands_own_words_win(
    here: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "site.yaml").write_text(SITE)
    monkeypatch.setenv("FASHION_DDP_SITE", "site.yaml")
    monkeypatch.setenv("SCRATCH", str(here / "scratch"))
    code, out, _ = said(submit.main, *LINEAR, "--partition", "fast", "--slurm", "qos=high", "--dry-run")
    assert code == 0
    runs_, comparison = out.split("--- sbatch, for ")[1:]
    assert out.startswith(f"--- {here}/scratch/runs/linear-")
    assert {*options(runs_)} >= {"partition=fast", "qos=high", "mail-type=FAIL", "gres=gpu:4", "exclusive"}
    assert not any(option.startswith("requeue") for option in options(runs_))
    setup = 'module load cuda/12.8\nsource "/my env/bin/activate"\n'
    assert f"# setup\ntrap : USR1 USR2\n{setup}export WANDB_MODE=offline\nexport OMP_PLACES='a b'\n" in runs_
    assert " /my/venv/bin/python -u -m submitit.core._submit " in runs_
    assert {*options(comparison)} >= {"partition=login", "qos=high"}
    assert not any(option.startswith(("mail-type", "gres", "exclusive")) for option in options(comparison))
    # The user's own variable says it better than the group's file.
    monkeypatch.setenv("FASHION_DDP_RUNS_DIR", str(here / "own"))
    assert said(submit.main, *LINEAR, "--dry-run")[1].startswith(f"--- {here}/own/linear-")
    assert said(submit.main, *LINEAR, "--runs-dir", "flag", "--dry-run")[1].startswith(f"--- {here}/flag/linear-")


@quick
@pytest.mark.parametrize(
    ("runtime", "srun"),
    [
        (
            "pyxis",
            (
                "--container-image=/img --container-mounts=/scratch:/scratch,{0}:{0} --container-workdir={0} "
                "--container-env=PYTHONSAFEPATH,PYTHONPATH,WANDB_MODE python3 -u"
            ),
        ),
        ("apptainer", "apptainer exec --nv --bind /scratch,{0} --pwd {0} /img python3 -u"),
    ],
)
def test_the_ranks_and_the_comparison_run_in_a_container(here: Path, said: Said, runtime: str, srun: str) -> None:
    container = f"container: {{image: /img, runtime: {runtime}, mounts: [/scratch, /scratch/below]}}"
    (here / "site.yaml").write_text(f"{container}\nenvironment: {{WANDB_MODE: offline}}\n")
    flags = ("--gpus-per-node", "2", "--out", "not/there/yet", "--site", "site.yaml", "--dry-run")
    flags += ("--data-dir", str(here / "data"))
    code, out, err = said(submit.main, *LINEAR, *flags)
    assert code == 0, err
    for script in out.split("--- sbatch, for ")[1:]:
        assert f" {srun.format(here)} -m submitit.core._submit {here}/runs/.submissions/" in script
        assert ('export APPTAINERENV_PYTHONPATH="$PYTHONPATH"' in script) == (runtime == "apptainer")
    code, _, err = said(submit.main, *LINEAR, "--site", "site.yaml", "--executor", "local", "--dry-run")
    assert (code, "pyxis's, which is a part of srun" in err) == ((2, True) if runtime == "pyxis" else (0, False))
    (here / "a,b").mkdir()
    code, _, err = said(submit.main, *LINEAR, *flags, "--runs-dir", "a,b")
    assert code == 2 and f"{here}/a,b: a folder with a comma or a colon cannot be mounted" in err


@quick
def test_the_site_file_that_is_shown_is_valid(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    example = CHECKOUT / "launch" / "site.yaml"
    assert said(submit.main, *LINEAR, "--site", str(example), "--dry-run")[0] == 0
    # And so it is with every line in use.
    text = re.sub(r"^# (\w+: )", r"\1", example.read_text(), flags=re.MULTILINE)
    Path("site.yaml").write_text(text)
    assert yaml.safe_load(text).keys() == {field.name for field in dataclasses.fields(site.Site)}
    monkeypatch.setenv("USER", "me")
    assert site.read_site(Path("site.yaml")).runs_dir == "/scratch/me/runs"
    Path("empty.yaml").write_text("setup:\n  # - module load x\nslurm:\n")
    assert site.read_site(Path("empty.yaml")) == site.Site()  # a key without a value is left out


@quick
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("set_up: []", "site.yaml:1: unknown key 'set_up'; did you mean 'setup'?"),
        ("\nsetup: module load x", "site.yaml:2: setup must be a list of lines of shell"),
        ("setup: [module: load]", "site.yaml:1: setup must be a list of lines of shell"),
        ("python: 3", "site.yaml:1: python must be text, got 3"),
        ("container: x.sif", "site.yaml:1: container must hold image, runtime and, as you like, mounts"),
        ("container: {runtime: pyxis}", "site.yaml:1: container.image must be text, as the runtime takes it, got None"),
        ("container:\n  image: x\n  runtime: podman", "site.yaml:3: container.runtime must be pyxis or apptainer"),
        ("container: {image: x, runtime: pyxis, mounts: [a]}", "site.yaml:1: container must be an absolute path"),
        ("container: {tool: x}", "site.yaml:1: container.tool: there is no such key; image, runtime, mounts"),
        ("runs_dir: runs", "site.yaml:1: runs_dir must be an absolute path"),
        ("runs_dir: /a/$NOT_SET_ANYWHERE", "site.yaml:1: runs_dir must be an absolute path, with variables that are"),
        ("environment: [A=1]", "site.yaml:1: environment must hold `name: value` lines"),
        ("environment:\n  A: true", "site.yaml:2: environment.A must be text or a number, got True: put it in quotes"),
        ("environment:\n  A-B: 1", "site.yaml:2: environment.A-B is not a valid name of a variable"),
        ("environment:\n  WANDB_API_KEY: abc", "site.yaml:2: environment.WANDB_API_KEY would be written"),
        ("slurm:\n  mem: [1]", "site.yaml:2: slurm.mem must be text or a number, got [1]"),
        ("slurm:\n  qos: a\n  ntasks: 4", "site.yaml:3: slurm.ntasks is set by launch.submit itself: give --ranks-per"),
        ("slurm: {error: x}", "site.yaml:1: slurm.error cannot be chosen"),
        ("report:\n  array: 1", "site.yaml:2: report.array is set by launch.submit itself"),
        ("slurm: {", "not valid YAML"),
        ("- a", "expected `name: value` lines"),
    ],
)
def test_a_mistake_in_a_site_file_is_told_with_its_line(here: Path, said: Said, text: str, told: str) -> None:
    (here / "site.yaml").write_text(text)
    code, _, err = said(submit.main, *LINEAR, "--site", "site.yaml", "--dry-run")
    assert code == 2 and told in err and err.count("\n") == 1
    assert "abc" not in err


# --- What is there already --------------------------------------------------------------------------------------------
def make_run(here: Path, name: str = "linear", status: str | None = None, **note: str) -> Path:
    """A run's folder as a submission leaves it, with this status."""
    argv = ["--model", name, "--device", "cpu", "--threads", "2", *SMALL, "--seed", "42", "--recipe", "blog"]
    cfg = cli.parse(argv).run
    folder = here / claim.folder_of(cfg)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.to_yaml())
    if status:
        epoch = {"epoch": 1, "step": 94, "test/accuracy": 0.5, "throughput/images_per_s": 1234.5}
        (folder / "metrics.jsonl").write_text(json.dumps(epoch) + "\n")
        (folder / "summary.json").write_text(json.dumps({"format": 1, "status": status, "epochs": 1, **epoch}))
        made_by = provenance.made_by(cfg, data.load(cfg.dataset).md5)
        start = {"made_by": made_by, "ranks": [{"host": "node7"}, {"host": "node8"}]}
        (folder / "environment.json").write_text(json.dumps([start]))
    if note:
        known = {"user": "me", "host": "login", "log": "/logs/1", "submission": str(here / "sub"), "job": "12_3"}
        (folder / "job.json").write_text(json.dumps(known | note))
    return folder


def pretend(folder: Path, **made_by: str) -> None:
    """Record that other code or versions made a run."""
    [start] = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps([start | {"made_by": start["made_by"] | made_by}]))


@quick
def test_a_finished_run_is_taken_as_it_is_and_one_by_other_code_is_refused(here: Path, said: Said) -> None:
    folder = make_run(here, status="finished")
    before = sorted(path.name for path in folder.iterdir())
    code, out, err = said(submit.main, *LINEAR)
    assert (code, err) == (0, "") and "taken as it is" in out and "python -m fashion_ddp.compare" in out
    pretend(folder, code="other")
    code, _, err = said(submit.main, *LINEAR)
    assert code == 2 and "finished by other code" in err and "--fresh" in err and "--reuse" in err
    assert said(submit.main, *LINEAR, "--reuse")[0] == 0
    # With another Python, as of a container, this one's versions say nothing.
    pretend(folder, code=provenance.code_hash(), torch="1.0")
    assert "torch: 1.0 -> " in said(submit.main, *LINEAR)[2]
    (here / "site.yaml").write_text("container: {image: x.sif, runtime: apptainer}")
    assert said(submit.main, *LINEAR, "--site", "site.yaml")[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == before


@quick
def test_a_folder_in_which_a_launcher_noted_a_start_and_no_more_is_free(here: Path) -> None:
    cfg = cli.parse(["--model", "linear", *SMALL]).run
    folder = claim.folder_of(cfg)
    folder.mkdir(parents=True)
    for name in ("starts.jsonl", ".meet-7_0-0"):
        (folder / name).touch()
    assert claim.check(cfg, {}) == "nothing"
    (folder / "other").touch()
    with pytest.raises(UserError, match="is no run folder"):
        claim.check(cfg, {})


@quick
def test_a_run_whose_job_cannot_be_asked_for_is_not_submitted_twice(here: Path, said: Said) -> None:
    folder = make_run(here, status="stopped", executor="slurm")
    code, _, err = said(submit.main, *LINEAR)
    assert code == 2 and "it is not clear whether its job 12_3 is still queued: squeue is not here" in err
    for verb in ("cancel", "resubmit"):
        code, _, err = said(status.main, verb, "runs")
        assert code == 2 and "it is not clear which of these runs are queued: squeue is not here" in err
    code, out, _ = said(status.main, str(folder))
    assert code == 0 and "stopped, or queued" in out and "squeue is not here" in out


@quick
def test_status_tells_what_the_folders_know(here: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make_run(here, "linear", "finished", executor="slurm")
    early = {
        "status": "finished",
        "test/accuracy": 0.75,
        "stopped_early": "after epoch 1, no better",
    }  # of that it kept
    (linear / "summary.json").write_text(json.dumps(early))
    failed = make_run(here, "relu", "failed", executor="local", job="999999")
    (failed / "summary.json").write_text(json.dumps({"status": "failed", "error": "it broke"}))
    (failed / "starts.jsonl").write_text("{}\n{}\n{}\n")
    make_run(here, "mlp", executor="local")
    broken = make_run(here, "cnn", "stopped")
    (broken / "metrics.jsonl").write_text("no json\n")
    monkeypatch.setenv("FASHION_DDP_RUNS_DIR", "runs")
    code, out, err = said(status.main)
    assert (code, err) == (0, "")
    settings = "-blog-seed42-epochs1-datasetsynthetic"
    assert [" ".join(line.split()) for line in out.splitlines()[1:5]] == [
        f"cnn{settings} - damaged 0/? - - - - - -",
        f"linear{settings} 12_3 finished 1/1 75.00 1,234 0 0 node7, node8 -",
        f"mlp{settings} 12_3 not begun 0/1 - - 0 0 - -",
        f"relu{settings} 999999 failed 1/1 50.00 1,234 2 1 node7, node8 -",
    ]
    assert f"linear{settings}: stopped early after epoch 1, no better\n" in out
    assert f"relu{settings}: it broke; log: /logs/1" in out and "python -m launch.status resubmit" in out


@quick
@pytest.mark.parametrize(
    ("said_by_rank_1", "error", "told"),
    [
        ("", "nothing happened for 60 s (--timeout): all wait for rank 1 on node8 (which does not answer)", "node8"),
        ("error: rank 1 on node8: NCCL failed with ncclUnhandledCudaError: no device", failures.LOST_RANK, "node8"),
        ("error: node8: --device cuda, but torch finds no NVIDIA card: check", "node8: no card", "node8"),
        ("Traceback\nRuntimeError: CUDA error: uncorrectable ECC error encountered", failures.LOST_RANK, "node8"),
        ("Traceback\nRuntimeError: CUDA error: device-side assert triggered", failures.LOST_RANK, ""),
        ("Traceback\nValueError: it broke", failures.LOST_RANK, ""),
    ],
)
def test_status_names_the_node_that_may_be_at_fault(
    here: Path, said: Said, said_by_rank_1: str, error: str, told: str
) -> None:
    folder = make_run(here, "relu", "failed", executor="local", job="999999")
    (folder / "summary.json").write_text(json.dumps({"status": "failed", "error": error}))
    record = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps(record | {"log": str(here / "7_0_0_log.out")}))
    (here / "7_0_0_log.out").write_text(f"error: {failures.LOST_RANK}\n")
    (here / "7_0_1_log.out").write_text(f"{said_by_rank_1}\n")
    code, out, err = said(status.main, "runs")
    assert (code, err) == (0, "")
    assert [line.split("`")[1] for line in out.splitlines() if "may be at fault" in line] == [
        f"resubmit --exclude {node}" for node in [told] if node
    ]


@quick
def test_resubmit_says_what_it_cannot_do(here: Path, said: Said) -> None:
    make_run(here, "linear", "finished")
    assert said(status.main, "resubmit")[:2] == (0, "nothing to do: every run is finished, or queued\n")
    assert said(status.main, "cancel")[:2] == (0, "none of these runs waits or runs\n")
    make_run(here, "mlp", "failed")
    assert "not submitted by launch.submit" in said(status.main, "resubmit")[2]
    make_run(here, "relu", "failed", executor="local")
    code, _, err = said(status.main, "resubmit", "runs/relu-blog-seed42-epochs1-datasetsynthetic")
    assert code == 2 and "submission.json cannot be used" in err and "submit these runs anew" in err
    assert "no run folder there" in said(status.main, "elsewhere")[2]
    assert "--exclude goes with resubmit" in said(status.main, "cancel", "--exclude", "n1")[2]


@quick
def test_folders_that_other_machines_do_not_see_are_named(here: Path) -> None:
    table = here / "mounts"
    entries = ["/dev/a / ext4 rw 0 0", f"server:/x {here}/shared nfs4 rw 0 0", f"tmpfs {here}/sha\\040red tmpfs rw 0 0"]
    entries += [f"server:/y {here}/shared/deep lustre rw 0 0", "none /empty xfs rw 0 0", "s:/z /empty nfs rw 0 0"]
    table.write_text("\n".join(entries) + "\n")
    folders = [here / name for name in ("a", "shared/runs", "sha red/runs", "shared/deep")] + [Path("/empty/x")]
    assert sbatch.local_folders(folders, table) == [f"{here}/a (ext4)", f"{here}/sha red/runs (tmpfs)"]
    assert sbatch.local_folders(folders, here / "none") == []


@quick
def test_what_slurm_told_a_job_is_not_told_to_those_it_submits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/conf")
    monkeypatch.setenv("SLURM_NTASKS", "7")
    with slurm.hide_own_job():
        assert os.environ["SLURM_NTASKS"] == "7"  # someone's own: this is no job
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    with slurm.hide_own_job():
        assert "SLURM_NTASKS" not in os.environ and "SLURM_JOB_ID" not in os.environ
        assert os.environ["SLURM_CONF"] == "/conf"
    assert os.environ["SLURM_NTASKS"] == "7"


# --- On this machine, for real ----------------------------------------------------------------------------------------
SUBMIT = (sys.executable, "-m", "launch.submit", "--executor", "local", "--threads", "1")
TWO_RANKS = ("--ranks-per-node", "2")


def summaries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/summary.json"))]


@pytest.mark.slow
def test_a_sweep_runs_here_to_its_ranked_report(tmp_path: Path) -> None:
    (folder := tmp_path / "swept runs").mkdir()
    words = (*SUBMIT, *TWO_RANKS, *LINEAR, "--sweep", "lr=0.001,0.1", "--validation", "1000")
    done = command(*words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(one["status"], one["world_size"], one["threads"]) for one in summaries(folder)] == [("finished", 2, 1)] * 2
    assert len(json.loads((folder / "report" / "report.json").read_text())["runs"]) == 2
    table = done.stdout.partition("The sweep, by val/accuracy")[2].splitlines()
    assert [("lr=0.001" in line) for line in table[2:]] == [False, True]
    assert (folder / "report" / "sweep.md").read_text().count("lr=0.001") == 1
    [made] = (folder / "runs" / ".submissions").iterdir()
    assert (made / "code" / "fashion_ddp" / "train.py").exists() and not list(made.glob(".lock*"))
    table = command("python", "-m", "launch.status", cwd=folder).stdout
    assert table.count("finished") == 2 and "resubmit" not in table
    # Nothing is left to do, and the comparison is made again.
    again = command(*words, cwd=folder)
    assert again.returncode == 0 and again.stdout.count("taken as it is") == 2 and "The sweep" in again.stdout
    assert "--- run " not in again.stdout


@quick
def test_a_comparison_with_a_run_that_failed_is_made_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [reports.make_run(tmp_path / status, status=status, model="linear") for status in ("finished", "failed")]
    with pytest.raises(SystemExit) as end:
        job.Report((*map(str, runs), str(tmp_path / "gone")), str(tmp_path / "out"))()
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert "PARTIAL: of 3 runs 2 are not finished: failed (failed), gone (removed)" in said
    compared = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]
    assert [run["status"] for run in compared] == ["finished", "failed"]


@quick
def test_a_sweep_is_ranked_by_the_validation_set_over_all_seeds(tmp_path: Path) -> None:
    points = [(0.001, 1, 0.75), (0.001, 2, 0.95), (0.1, 1, 0.8), (0.1, 2, 0.8)]
    folders = [tmp_path / f"{lr}-{seed}" for lr, seed, _ in points]
    for folder, (lr, seed, accuracy) in zip(folders, points, strict=True):
        reports.make_run(folder, summary={"val/accuracy": accuracy}, model="linear", lr=lr, seed=seed)
    table = sweep.ranking(sweep.read_results(folders))
    assert table is not None
    assert table.titles == ["", "what", "n", "val/accuracy %", "std", "val/loss", "test/accuracy %"]
    best, other = (row[:5] for row in table.rows)
    assert best == ["1", "linear lr=0.001", "2", "85.00", "14.14"] and other == ["2", "linear", "2", "80.00", "0.00"]


@quick
def test_a_job_whose_starts_lead_nowhere_is_given_up_and_a_new_one_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(of: str, step: int, end: str = "SIGUSR2", most: int = 100) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", of)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / f"step-{step:08}.pt").touch()
        starts.Starts(tmp_path).begin(most)
        if end:
            starts.Starts(tmp_path).end(end)

    for step in (0, 10, 10, 10):
        start("7", step)
    for end in ("SIGTERM", ""):  # preempted, or killed: however often, that is no failure of the run
        for _ in range(6):
            start("7", 10, end)
    for _ in range(4):
        start("7", 10)
    with pytest.raises(
        UserError, match="the time of the last 4 starts of job 7 ran out before they had trained a step"
    ):
        start("7", 10)
    start("7", 20)
    with pytest.raises(UserError, match=r"started 21 times by job 7: given up \(--max-restarts 20\)"):
        start("7", 30, most=20)
    start("8", 20)
    assert [start["job"] for start in starts.Starts(tmp_path).read()] == [*"7" * 21, "8"]


@quick
def test_a_disk_that_fills_up_leaves_nothing_behind_and_is_told_in_one_line(
    here: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(to: Path, names: list[str]) -> None:
        to.mkdir()
        raise shutil.Error([(f"source/{n}", f"{to}/{n}", "[Errno 28] No space left on device") for n in range(100)])

    monkeypatch.setattr(snapshot, "take", full)
    code, _, err = said(submit.main, *LINEAR, "--executor", "local")
    assert code == 2 and "cannot be written ([Errno 28] No space left on device): choose another --runs-dir" in err
    assert len(err) < 300 and not [path for path in here.rglob("*") if path.name not in ("runs", ".submissions")]


@quick
@pytest.mark.parametrize("queued", [False, True])
def test_folders_go_where_nothing_was_queued_and_stay_where_a_job_may_be(
    queued: bool, here: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise (sbatch.PartlyQueued if queued else UserError)("SLURM did not take them")

    monkeypatch.setattr(submit, "_check_with_slurm", lambda *_: None)
    monkeypatch.setattr(sbatch, "submit", refused)
    code, _, err = said(submit.main, *LINEAR)
    assert (code, err) == (2, "error: SLURM did not take them\n")
    assert (
        len(list(here.glob("runs/linear*/config.yaml"))) == len(list(here.glob("runs/.submissions/*/code"))) == queued
    )
    assert queued or not list(here.iterdir())


@quick
def test_a_path_that_slurm_would_read_as_a_pattern_is_refused(here: Path, said: Said) -> None:
    code, _, err = said(submit.main, *LINEAR, "--runs-dir", "50%j", "--dry-run")
    assert code == 2 and "choose a --runs-dir without %" in err and not list(here.iterdir())


@quick
@pytest.mark.parametrize(
    ("time", "minutes"), [("90", 90), ("1:30:00", 90), ("00:00:30", 1), ("2-12:00:00", 3600), ("0-00:59:01", 60)]
)
def test_a_time_is_written_as_slurm_has_it(time: str, minutes: int) -> None:
    assert submission.Submission(time=time).minutes == minutes


@quick
@pytest.mark.parametrize("time", ["0", "1h", "1:30", "1:60:00", "", "-5", "1.5"])
def test_another_time_is_told_in_one_line(time: str, said: Said) -> None:
    code, _, err = said(submit.main, *LINEAR, f"--time={time}", "--dry-run")
    assert code == 2 and err.count("\n") == 1 and ("HH:MM:SS" in err or "at least 1" in err)


@quick
def test_starts_that_hardly_train_are_told_from_their_seconds() -> None:
    slow = {"end": "SIGUSR2", "starting_s": 58.0, "trained_s": 1.0}
    told = "the last 3 starts whose time ran out spent 174 s starting and 3 s training: submit it anew with a longer "
    assert starts.advice([{}, slow, slow, {"end": "SIGTERM", "starting_s": 9.0, "trained_s": 0.0}, slow]).startswith(
        told
    )
    assert starts.advice([slow, *[slow | {"trained_s": 90.0}] * 3]) == starts.advice([{}, {"step": 3}]) == ""


@quick
def test_a_start_that_was_ended_from_outside_is_no_failure() -> None:
    def start(job: str, end: str = "") -> dict[str, str]:
        return {"job": job} | ({"end": end} if end else {})

    stopped = [start("7_0", end) for end in ("SIGTERM", "SIGUSR2", "SIGINT", "the launcher died")]
    assert starts.count_ends(stopped, over=True) == (4, 0)
    # Killed at once: the same job began again, as after a lost node; another one, because the first was over.
    assert starts.count_ends([start("7_0"), start("7_0"), start("9", "finished")], over=False) == (1, 1)
    assert starts.count_ends([start("7_0", "failed"), start("9")], over=False) == (0, 1)  # and it runs now
    assert starts.count_ends([start("7_0", "SIGTERM"), start("7_0")], over=True) == (1, 1)


@quick
def test_a_start_that_was_killed_is_timed_by_what_it_wrote(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder = make_run(here, "linear", "running")
    record = starts.Starts(folder)
    record.begin(9)
    began = time.time()
    (folder / "steps.jsonl").write_text('{"step": 40}\n{"step": 80}\n{"step": 1')  # it was killed while it wrote
    os.utime(folder / "environment.json", (began + 100, began + 100))
    os.utime(folder / "steps.jsonl", (began + 400, began + 400))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-60.pt").touch()
    record.begin(9)
    first, second = record.read()
    assert (first["trained_s"], second["step"], second["repeats"]) == (300.0, 60, 20)
    assert first["starting_s"] >= 100 and "end" not in first
    record._write([first, second | {"time": time.strftime(starts.TIME_FORMAT, time.localtime(began + 200))}])
    record.begin(9)  # the second wrote nothing: it was killed while it started
    assert "trained_s" not in record.read()[1] and starts.count_ends(record.read(), over=False) == (2, 0)


# A rank that ends in one way when it is asked to, in another when its time is over, and at its third start by itself.
RANK = """
import os, signal, sys, time
rank, start = os.environ["SUBMITIT_LOCAL_GLOBALID"], os.environ["SLURM_RESTART_COUNT"]
print(rank, start, os.environ["SUBMITIT_LOCAL_JOB_ID"], flush=True)
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))  # at once: at Python's end a second signal would kill it
signal.signal(signal.SIGUSR2, lambda *_: os._exit(75))
signal.pthread_sigmask(signal.SIG_SETMASK, ())
if sys.argv[1] == "fails" and rank == "1":
    sys.exit(3)
time.sleep(0 if start == "2" else 60)
"""


def controller(folder: Path, what: str, seconds: int) -> tuple[subprocess.Popen[bytes], Callable[[], list[str]]]:
    """Start a job of two such ranks. Return its process, and a function that tells what they have printed."""
    (folder / "rank.py").write_text(RANK)
    variables = {"NTASKS": 2, "COMMAND": f"{sys.executable} rank.py {what}", "TIMEOUT_S": seconds, "WITH_SHELL": ""}
    env = {f"SUBMITIT_LOCAL_{name}": str(value) for name, value in variables.items()}
    env |= {"SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0", "SUBMITIT_STDERR_TO_STDOUT": "1"}
    words = [sys.executable, "-m", "launch.submitit_local", str(folder / "logs")]
    process = subprocess.Popen(words, cwd=folder, env=os.environ | env)
    logs = [folder / "logs" / f"{process.pid}_{rank}_log.out" for rank in (0, 1)]
    return process, lambda: [log.read_text() if log.exists() else "" for log in logs]


@quick
def test_a_rank_that_fails_ends_the_others_that_wait(tmp_path: Path) -> None:
    process, printed = controller(tmp_path, "fails", seconds=100)
    assert process.wait(timeout=25) == 7  # the first rank's
    assert printed() == [f"{rank} 0 {process.pid}\n" for rank in (0, 1)]


@quick
def test_a_job_whose_time_is_over_begins_again_under_its_number(tmp_path: Path) -> None:
    process, printed = controller(tmp_path, "waits", seconds=1)
    assert process.wait(timeout=60) == 0
    assert printed() == ["".join(f"{rank} {start} {process.pid}\n" for start in (0, 1, 2)) for rank in (0, 1)]


@quick
def test_a_job_that_is_told_to_end_does_not_begin_again(tmp_path: Path) -> None:
    process, printed = controller(tmp_path, "waits", seconds=100)
    while not all(printed()):
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=25) == 7
    assert [text.count("\n") for text in printed()] == [1, 1]


# A model whose steps take a tenth of a second or $PAUSE, until a file says otherwise: time enough to be disturbed.
SLOW_MODEL = """
import os, time
from torch import nn

class Net(nn.Sequential):
    def __init__(self, image_shape, classes):
        super().__init__(nn.Flatten(), nn.Linear(784, classes))
        while os.path.exists("wait"):
            open(f"waiting{os.getpid()}", "w").close()
            time.sleep(0.1)

    def forward(self, images):
        if self.training and not os.path.exists("fast"):
            time.sleep(float(os.environ.get("PAUSE", "0.1")))
        return super().forward(images)
"""
SLOW = (*SUBMIT, "--models", "slow:Net", *SMALL, "--batch-size", "1000", "--epochs", "40")
RUN = "runs/slow_Net-blog-seed42-epochs40-batch_size1000-datasetsynthetic"


class Submitted(Started):
    """A submission of the slow model that runs here."""

    def __init__(self, folder: Path, *words: str):
        (folder / "slow.py").write_text(SLOW_MODEL)
        super().__init__(folder, [*SLOW, *words])

    def wait_for_an_epoch(self) -> None:
        path = self.folder / RUN / "metrics.jsonl"
        self.until(lambda: path.exists() and "\n" in path.read_text())


def finished_after_two_starts(folder: Path) -> None:
    """The run is finished, each of its epochs recorded once, and its second start continued the first."""
    epochs = [json.loads(line)["epoch"] for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    assert summaries(folder)[0]["status"] == "finished" and epochs == list(range(1, 41))
    steps = [json.loads(line)["step"] for line in (folder / RUN / "starts.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and steps[0] == 0 < steps[1]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_continues(tmp_path: Path) -> None:
    with Submitted(tmp_path, *TWO_RANKS) as run:
        run.wait_for_an_epoch()
        os.killpg(run.process.pid, signal.SIGINT)  # as the terminal does: to every process that was started
        assert run.wait() == 75, run.printed()
    assert summaries(tmp_path)[0]["status"] == "stopped" and not ranks_of(tmp_path)
    assert "the same command continues" in run.printed() and not (tmp_path / "report").exists()
    (tmp_path / "fast").touch()
    with Submitted(tmp_path, *TWO_RANKS) as run:
        assert run.wait() == 0, run.printed()
    finished_after_two_starts(tmp_path)


@pytest.mark.slow
def test_a_submission_here_is_seen_refused_twice_cancelled_and_resubmitted_from_another_shell(tmp_path: Path) -> None:
    with Submitted(tmp_path, "--seeds", "42", "43") as run:
        run.wait_for_an_epoch()
        shown = command("python", "-m", "launch.status", cwd=tmp_path).stdout
        assert [line.split()[2] for line in shown.splitlines()[1:3]] == ["running", "waiting"], shown
        assert f"follow {Path(RUN).name}: tail -n +1 -F {tmp_path}/runs/.submissions/" in shown
        for name, state in ((RUN, "running"), (RUN.replace("seed42", "seed43"), "waiting")):
            refused = command(*SLOW, "--seeds", name.partition("seed")[2][:2], cwd=tmp_path)
            assert refused.returncode == 2 and f"{name} is {state} (process " in refused.stderr, refused.stderr
        (elsewhere := tmp_path / "elsewhere").mkdir()
        runs = str(tmp_path / "runs")
        cancelled = command("python", "-m", "launch.status", "cancel", runs, cwd=elsewhere)
        assert f"process {run.process.pid}, with 2 runs, was asked to end" in cancelled.stdout
        assert run.wait() == 75 and not ranks_of(tmp_path)
    (tmp_path / "fast").touch()
    (tmp_path / "slow.py").write_text("raise SyntaxError")  # the copy of it is what counts
    done = command("python", "-m", "launch.status", "resubmit", runs, cwd=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one["status"] for one in summaries(tmp_path)] == ["finished"] * 2
    finished_after_two_starts(tmp_path)
    assert len(json.loads((tmp_path / "report" / "report.json").read_text())["runs"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["the command", "the controller"])
def test_ranks_save_and_end_when_what_started_them_is_killed(tmp_path: Path, killed: str) -> None:
    with Submitted(tmp_path) as run:
        run.wait_for_an_epoch()
        controller = int(Path(f"/proc/{ranks_of(tmp_path)[0]}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(run.process.pid if killed == "the command" else controller, signal.SIGKILL)
        run.until(lambda: not ranks_of(tmp_path))
        assert summaries(tmp_path)[0]["status"] == "stopped"


@pytest.mark.slow
def test_what_is_edited_after_the_submission_changes_nothing(tmp_path: Path) -> None:
    for package in ("fashion_ddp", "launch"):
        shutil.copytree(CHECKOUT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fast").touch()
    (tmp_path / "mine.yaml").write_text("all: {lr: 0.1}\n")
    with Submitted(tmp_path, "--recipe", "mine.yaml") as run:
        run.until(lambda: list(tmp_path.glob("runs/.submissions/*/submission.json")))
        for name in ("slow.py", "fashion_ddp/training/step.py", "fashion_ddp/train.py", "launch/job.py"):
            (tmp_path / name).write_text("raise RuntimeError('edited')\n")
        (tmp_path / "mine.yaml").write_text("all: {lr: 0.5}\n")
        run.wait()
    [folder] = tmp_path.glob("runs/slow*")
    [start] = json.loads((folder / "environment.json").read_text())
    assert start["made_by"]["code"] == provenance.code_hash()
    [summary] = summaries(tmp_path)
    assert summary["status"] == "finished" and summary["lr"] == 0.1


@pytest.mark.slow
def test_debug_trains_in_this_process_and_fresh_keeps_what_was_there(tmp_path: Path) -> None:
    words = ("python", "-m", "launch.submit", *LINEAR, "--executor", "debug")
    for fresh in ((), ("--fresh",)):
        done = command(*words, *fresh, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "epoch 1/1" in done.stdout
    assert "kept what " in done.stdout
    assert [one["status"] for one in summaries(tmp_path)] == ["finished"] * 2


@quick
def test_nodes_are_read_as_sinfo_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = (
        "n1|idle|64|gpu:a100:4(S:0-1)\nn2|drained*|64|gpu:4,nvme:1\nn3|mixed|128|(null)\nn4|down|8|gpu:a:2,gpu:b:1\n"
    )
    monkeypatch.setattr(slurm, "run_checked", lambda *words: shown + shown if "--partition=a,b" in words else "")
    assert slurm.nodes() == []
    expected = [("n1", True, 64, 4), ("n2", False, 64, 4), ("n3", True, 128, 0), ("n4", False, 8, 3)]
    assert slurm.nodes("a,b") == [slurm.Node(*node) for node in expected]


RUNS, PREEMPTED = "JobState=RUNNING PreemptTime=None", "JobState=RUNNING PreemptTime=2026-12-01T07:00:00"
SIGNALLED = [state.replace("RUNNING", "SIGNALING") for state in (RUNS, PREEMPTED)]  # which a slow slurmd prolongs
ENDING = "JobState=COMPLETING PreemptTime=None"


@quick
@pytest.mark.parametrize(
    ("word", "code", "job", "answer", "ends", "told"),
    [
        ("begun", 0, RUNS, "", 0, ""),  # finished
        ("begun", 137, RUNS, "", 0, "is queued again"),
        ("begun", 137, SIGNALLED[0], "", 0, "is queued again"),
        ("begun", 137, ENDING, "", 137, "killed"),  # SLURM did it, and knows what is next
        ("", 1, RUNS, "", 1, ""),  # an error of its own
        ("killed", 127, RUNS, "", 127, ""),  # of the start before: this one did not begin
        ("SIGUSR2", 0, RUNS, "", 0, "is queued again"),
        ("", 140, RUNS, "", 0, "is queued again"),  # of the signal that says so: no rank listened yet
        ("begun", 138, RUNS, "", 0, "is queued again"),  # another rank did not
        ("SIGTERM", 140, RUNS, "", 0, "is queued again"),  # so srun ended this one
        ("", 143, PREEMPTED, "", 0, "is queued again"),
        ("", 143, RUNS, "", 143, ""),  # srun ended it, because of another's error
        ("SIGTERM", 0, RUNS, "", 75, ""),
        ("SIGTERM", 0, PREEMPTED, "", 0, "is queued again"),
        ("SIGTERM", 0, SIGNALLED[1], "", 0, "is queued again"),
        ("SIGTERM", 0, SIGNALLED[0], "", 75, ""),
        ("SIGTERM", 143, RUNS, "", 0, "is queued again"),  # srun ended it, because another rank was killed
        ("SIGTERM", 0, ENDING, "", 75, ""),
        ("SIGINT", 0, RUNS, "", 75, ""),
        ("SIGUSR1", 0, RUNS, "Requested operation is presently disabled", 75, "not queued again: Requested operation"),
        ("SIGUSR1", 0, RUNS, "Unable to contact slurm controller", 75, "not queued again: Unable to contact"),
    ],
)
@pytest.mark.parametrize("strict", ["", "set -euo pipefail; "])
def test_the_batch_script_queues_a_job_again_where_that_is_right(
    word: str, code: int, job: str, answer: str, ends: int, told: str, strict: str, tmp_path: Path
) -> None:
    """The decision alone, with a scontrol that only answers: tests/launch/test_slurm.py has the real one. As SLURM may,
    it has the job's processes ended before it answers that the job is queued again."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/bash\nif [ "$1" = show ]; then echo "{job}"; exit; fi\n'
        f'kill -TERM 0\nsleep 0.1\necho "{answer}"\nexit {int(answer != "")}\n'
    )
    scontrol.chmod(0o755)
    if word:
        (tmp_path / "again").write_text(word)
    script = CHECKOUT / "launch" / "requeue.sh"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "0"}
    env["FASHION_DDP_AGAIN"] = str(tmp_path / "again")
    line = ["bash", "-c", f"{strict}code={code}; . '{script}'"]
    done = subprocess.run(line, env=env, check=False, capture_output=True, text=True, start_new_session=True)
    assert (done.returncode, done.stderr) == (ends, "") and told in done.stdout and bool(told) == bool(done.stdout)
    left = (tmp_path / "again").read_text().strip() if (tmp_path / "again").exists() else ""
    assert left == ("killed" if "killed" in done.stdout and "queued again" in told else "")
    assert ("killed" in done.stdout) == (word in ("begun", "SIGTERM") and code in (137, 143))
