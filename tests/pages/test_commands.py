"""Every command that a page shows is run, and every flag is understood.

COMMANDS says how: here, in a copy of the checkout with a finished run, a report, pictures and a data set of one's own
in it; or by the test, or the part of `.ci/run`, that is named; or why nothing can run it. What is added to a command
only makes it short (other data, one epoch, folders of its own). A page marks as ```text what is no command, and as
```console where commands follow a `$`. docs/change.md has a test of its own.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKOUT, command, made_once, need
from PIL import Image

from fashion_ddp.config import cli

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (CHECKOUT / "docs").glob("*.md"))]
PAGES.remove("docs/change.md")
PROGRAMS = ["python", "python3", "make", "accelerate", "torchrun", "sbatch", "srun", "wandb", "pip", "uv", "source"]
PROGRAMS += ["export", "tail", "git", "apt-get"]
RUN = "runs/cnn-blog-seed42"  # the finished run that the pages speak of
PICTURE = {"RUN": RUN, "IMAGE...": "boot.jpg"}
ONE_CASE = "--cases linear-10 --recipes blog"


@dataclass(frozen=True)
class Here:
    """Run it, with `more` behind it (of make: in its ARGS, and `variables` too), other words `instead` of some."""

    more: str = ""
    variables: str = ""
    instead: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class There:
    """What a test does, or .ci/run: the file, and a name or line in it, or the command itself."""

    file: str
    name: str = ""


@dataclass(frozen=True)
class Never:
    """Why nothing runs it."""

    why: str


SLURM, SETUP = "tests/launch/test_slurm.py", "tests/setup/test_setup.py"
LAUNCHERS, POOL = "tests/launch/test_launchers.py", "tests/launch/test_pool.py"
BRIEFLY = "--epochs 1 --tracker none --threads 1"  # more threads, beside other tests, spend the cores on waiting
SMALL = f"--dataset ./mine {BRIEFLY}"
TRAIN = f"{SMALL} --fresh"
SHORT = f"--device cpu {SMALL}"
PROGRAMS_NAMED = [r"accelerate launch( --cpu| --num_processes 2)?", "torchrun -n2", "sbatch --test-only", "wandb sync"]
PROGRAMS_NAMED += [r"nohup python -m \.\.\.", r'python -c "import package\..*', "git pull", r"export( [A-Z0-9_]+=\S+)+"]
PROGRAMS_NAMED += [r"python -m (fashion_ddp\.(train|push|predict)|launch\.submit( --sweep)?)", r"uv python install \S+"]

# The first that matches the whole command counts.
COMMANDS: list[tuple[str, Here | There | Never]] = [
    (r".*--dataset \./clipart .*", There("tests/data/test_openclipart.py", "walk =")),
    # What a reader trains
    (r"python -m fashion_ddp\.train --help", Here()),
    (r"python -m fashion_ddp\.train .*--dataset (synthetic|\./(mine|photos) .*)", Here(BRIEFLY)),
    (r"python -m fashion_ddp\.train .*--init-from pretrained .*", Here(TRAIN, instead={"pretrained": "theirs.pth"})),
    (r"python -m fashion_ddp\.weights( .*)?", There("tests/models/test_library.py", '"fashion_ddp.weights", model')),
    (r"python -m fashion_ddp\.train .*", Here(TRAIN)),
    (r"torchrun .* --max-restarts 2 .*", There(LAUNCHERS, '"--max-restarts", "2"')),
    (r"torchrun .* --model cnn .*", Here(TRAIN)),
    (r"torchrun .* --model linear .*", There(LAUNCHERS, 'TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node")')),
    (r"accelerate launch -m fashion_ddp\.train .*", Here(TRAIN)),
    (r"accelerate launch --config_file .*", There(LAUNCHERS, '"accelerate", "launch", "--config_file", FOUR_CARDS')),
    (r'make compare ARGS="--dataset \./mine --shuffle"', Here(f"--device cpu {BRIEFLY}", "MODELS=cnn")),
    (r'make compare MODELS="linear cnn" RECIPE=lab .*', Here(SHORT, instead={'1 2"': '"'})),  # one seed of three
    # The variable becomes a flag that launch.local understands; what it does is tested in tests/launch.
    (r"make compare (SEEDS|GPUS|JOBS|RANKS|FORCE)=.*", Here(f"{SHORT} --check-only", "MODELS=linear")),
    (r"python -m launch\.local --jobs 4", There(POOL, '"--jobs"')),
    (r"make compare.*", Here(SHORT)),
    # What a reader does with runs and data
    (r"(\w+=\S+ )?python -m fashion_ddp\.(data|compare|predict )\b.*", Here(instead=PICTURE)),
    (r"pip install wandb-workspaces|.* --saved-report", There("tests/tracking/test_push.py", "--saved-report")),
    (r"python -m fashion_ddp\.push runs --watch", There("tests/tracking/test_watch.py", '("--watch", *words)')),
    (r"python -m fashion_ddp\.push .*", Here(env={"WANDB_MODE": "offline"})),
    (r"(accelerate launch|python) -m fashion_ddp\.check", Here()),
    (r"wandb leet inspect.*", There("tests/tracking/test_mirror.py", '"wandb", "leet", "inspect"')),
    (r"wandb login", Never("needs an account; without one: tests/tracking/test_mirror.py")),
    (r"python -m pytest tests/test_gpu\.py", Never("needs an NVIDIA card")),
    (r"python benchmarks/card\.py .*", There("tests/test_card.py", '"benchmarks" / "card.py"')),
    # Setting up
    (r"make setup.*", There(SETUP, "test_make_setup_on_a_fresh_machine")),
    (r"source \.venv/bin/activate", Here("&& python -c 'import fashion_ddp'")),
    (r"pip install -e \.", There(SETUP, "test_make_setup_on_a_fresh_machine")),  # its last step
    (r"pip install \.", There(SETUP, "test_a_wheel_trains")),
    (r"python -m launch\.templates", There(SETUP, '"launch.templates"')),
    (r"export FASHION_DDP_DATA_DIR=\.\./shared/data", Here("&& python -m fashion_ddp.data")),
    (r"apt-get install python3-venv", There(".ci/run", "python3-venv")),
    (r"apt-get install slurmctld .*", There(".ci/run", "slurmctld slurmd slurm-client slurmdbd munge mariadb-server")),
    # A cluster
    (r"python -m launch\.submit --models cnn --gpus-per-node 8", There(SLURM, '"--gpus-per-node", "8"')),
    (r"python -m launch\.submit .*--(gpus-per-node|nodes|sweep) .*", Here("--dry-run --dataset synthetic")),
    (r"python -m launch\.status( cancel .*| resubmit)", There(SLURM, "test_a_cancelled_run_is_saved")),
    (r"python -m launch\.status", Here()),
    (r"(PYTHON=\S+ )?sbatch .*slurm/train\.sbatch .*", There(SLURM, '"slurm" / "train.sbatch"')),
    (r"sbatch --partition=high .*", There("tests/on_slurm.py", "def preempt(")),
    (r"tail -n 1 fashion_ddp-19\.log", Never("shows what the command above it printed")),
    (r"python3 slurm/cluster/cluster\.py (up|down) .*", There(SLURM, "def make_cluster(")),
    # Developing
    (r"make (test|test-all|lint)", There(".ci/run")),
    (r"make test-quick", There(SETUP, '"make", "test-quick"')),
    (r"make soak", Here(variables="N=2")),
    (r"make soak N=500 .*", There("Makefile", "--faults $(N) --seed $(SEED)")),
    (r"make soak-slurm.*", There("Makefile", "tests/soak_slurm.py --faults $(N) --seed $(SEED)")),
    (r"make bench", Here(f"{ONE_CASE} --repeats 1 --epochs 1", f'PARTS="{ONE_CASE}"')),
    (r"make bench-scaling", Here("--cases linear-10 --ranks 1 2 --kinds strong --repeats 1")),
    (r"make lock", Never("asks the registry, and changes the locks")),
    (r"\.venv/bin/pre-commit install", Here()),
    (r"python docs/results\.py > docs/results\.md", Here()),
    (r"python benchmarks/page\.py scaling", Here()),
    (r"python benchmarks/pictures\.py", Here("--only ranks")),
    (r"python benchmarks/(next_steps|speedrun)\.py.*", Never("trains for hours")),
    (r"python benchmarks/streaming\.py", Never("writes 3 GB, and keeps a quiet machine busy for minutes")),
    ("|".join(PROGRAMS_NAMED), Never("a program's name, or stands for something of the reader's")),
]


def text(page: str) -> str:
    return (CHECKOUT / page).read_text()


def fences(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", text(page), flags=re.DOTALL | re.MULTILINE)


def inline(page: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE))


def commands(page: str) -> Iterator[str]:
    """What a page tells people to type: in blocks, and inline where a program is given words."""
    for kind, block in fences(page):
        lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
        if kind == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        elif kind not in ("", "sh", "bash"):
            continue
        yield from (re.sub(r"\s+#\s.*$", "", line).strip() for line in lines)
    for typed in inline(page):
        words = re.sub(r"^([A-Z_]+=\S+ )+", "", typed).split()  # variables before the program
        if len(words) > 1 and words[0] in PROGRAMS:
            yield typed


SHOWN = {typed: page for page in PAGES for typed in commands(page)}
# Without those of docs/slurm.md, which are launch.submit's, and those that name something of the reader's.
FLAGS = {flag for page in PAGES if page != "docs/slurm.md" for flag in inline(page) if re.match(r"--[\w-]+ ", flag)}
FLAGS = {flag for flag in FLAGS if "path/to" not in flag and "package.module" not in flag}


def how(typed: str) -> Here | There | Never | None:
    return next((way for pattern, way in COMMANDS if re.fullmatch(pattern, typed)), None)


@pytest.mark.quick
@pytest.mark.parametrize("typed", SHOWN)
def test_a_command_has_its_test(typed: str) -> None:
    way = how(typed)
    said = f"{SHOWN[typed]} shows `{typed}`, and nothing runs it: add it to COMMANDS in {Path(__file__).name}, with how"
    assert way, f"{said} it is run, the test that runs it, or why none can; mark as ```text what is no command"
    if isinstance(way, There):
        assert (way.name or typed) in (CHECKOUT / way.file).read_text()


@pytest.mark.quick
def test_no_entry_is_left_over() -> None:
    matched = [next((pattern for pattern, _ in COMMANDS if re.fullmatch(pattern, typed)), "") for typed in SHOWN]
    assert {pattern for pattern, _ in COMMANDS} - set(matched) == set()


@pytest.mark.quick
@pytest.mark.parametrize("typed", sorted(FLAGS))
def test_flags_are_understood(typed: str) -> None:
    cli.parse(["--model", "cnn", *shlex.split(typed)])


# --- Run --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def prepared(common: Path) -> Path:
    """A checkout as its reader has it after a while, for all processes of the tests."""
    need("git")
    return made_once(common / "prepared", prepare)


def prepare(place: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout.splitlines():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(CHECKOUT / name, place / name)
    subprocess.run(["git", "init", "--quiet"], cwd=place, check=True)
    (place / ".venv").symlink_to(sys.prefix)
    random = np.random.default_rng(0)
    for folder in (place / "mine" / part / name for part in ("train", "test") for name in ("boot", "shirt")):
        folder.mkdir(parents=True)
        for number in range(20):
            Image.fromarray(random.integers(0, 256, (28, 28), np.uint8)).save(folder / f"{number}.png")
    for folder in (place / "photos" / part / name for part in ("train", "val", "test") for name in ("day", "night")):
        folder.mkdir(parents=True)
        for number in range(10):
            Image.fromarray(random.integers(0, 256, (40 + number, 60, 3), np.uint8)).save(folder / f"{number}.jpg")
    for name in ("boot.jpg", "shirt.png"):
        Image.fromarray(random.integers(0, 256, (60, 40, 3), np.uint8)).save(place / name)
    for line in (
        f"python -m fashion_ddp.train --model cnn --run-dir {RUN} {SMALL}",
        "python -m fashion_ddp.compare runs --out report",
        "python -c 'import torch, torchvision as t; torch.save(t.models.resnet18().state_dict(), \"theirs.pth\")'",
    ):
        typed_in(place, line)


@pytest.fixture
def checkout(prepared: Path, tmp_path: Path, data_dir: Path) -> Path:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "data").symlink_to(data_dir.absolute())
    return Path(shutil.copytree(prepared, tmp_path / "fashion_ddp", symlinks=True))


def typed_in(place: Path, line: str, **env: str) -> str:
    """What a line of shell prints, typed in a folder with its environment active, by someone without settings."""
    (home := place / "home").mkdir(exist_ok=True)
    path = f"{place}/.venv/bin:{os.environ['PATH']}"
    done = command("bash", "-c", line, cwd=place, PATH=path, PYTHONPATH=str(place), HOME=str(home), timeout=800, **env)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def made_short(typed: str, way: Here) -> str:
    for word, other in way.instead.items():
        typed = re.sub(rf"(?<!\S){re.escape(word)}(?!\S)", other, typed)
    if not typed.startswith("make "):
        return f"{typed} {way.more}"
    typed = f"{typed} -o setup {way.variables}"  # the environment is there: make it not
    return typed.replace('ARGS="', f'ARGS="{way.more} ') if "ARGS=" in typed else f'{typed} ARGS="{way.more}"'


@pytest.mark.slow
@pytest.mark.parametrize("typed", [typed for typed in SHOWN if isinstance(how(typed), Here)])
def test_a_command_does_what_it_should(typed: str, checkout: Path, data_dir: Path) -> None:
    way = how(typed)
    assert isinstance(way, Here)
    before = set(checkout.glob("runs/*"))
    typed_in(checkout, made_short(typed, way), FASHION_DDP_DATA_DIR=str(data_dir), **way.env)
    if "--check-only" in way.more:
        assert set(checkout.glob("runs/*")) == before
    elif "fashion_ddp.train --m" in typed or "compare" in typed.split():
        assert set(checkout.glob("runs/*")) > before
        assert all('"status": "finished"' in path.read_text() for path in checkout.glob("runs/*/summary.json"))
    if "compare" in typed:
        assert (checkout / "report" / "report.html").exists()


# README's is executed by test_readme.py.
PYTHON = [(page, block) for page in PAGES[1:] for kind, block in fences(page) if kind == "python"]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page}: {block[:30]!r}" for page, block in PYTHON])
def test_python_of_a_page_runs(page: str, block: str, checkout: Path) -> None:
    (checkout / "snippet.py").write_text(block)
    typed_in(checkout, "python snippet.py")
