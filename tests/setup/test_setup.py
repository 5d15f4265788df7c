"""`make setup`: which lock, what the locks hold, and an environment made, repaired and left alone, for real."""

import ast
import json
import os
import pwd
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CHECKOUT

from fashion_ddp.private import TESTED

quick, slow = pytest.mark.quick, pytest.mark.slow
SMALL = ("--dataset", "synthetic", "--epochs", "1", "--tracker", "none")
INSTALL = CHECKOUT / "requirements" / "install.py"
LOCKS = ["newest", "cuda12"]
installer = runpy.run_path(str(INSTALL))
choose, UserError = installer["choose"], installer["UserError"]


def lock(name: str) -> dict[str, str]:
    """A lock's entries by package (there may be one per Python): `name==version ; marker` with its hashes."""
    entries: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", (CHECKOUT / "requirements" / f"{name}.txt").read_text().strip()):
        package = re.split(r"[=\s]", entry)[0]
        entries[package] = entries.get(package, "") + entry + "\n"
    return entries


def versions(entry: str) -> list[str]:
    return sorted(re.findall(r"^[\w.-]+==(\S+)", entry, re.MULTILINE))


@quick
@pytest.mark.parametrize(
    ("driver", "expected"),
    [(None, "newest"), ("", "newest"), ("No devices were found", "newest"), ("580.65.06", "newest")]
    + [("1000.1", "newest"), ("579.99", "cuda12"), (" 525.60.13 ", "cuda12")],
)
def test_the_driver_chooses_the_lock(driver: str | None, expected: str) -> None:
    name, reason = choose(driver)
    assert name == expected
    assert (driver or "driver") in reason


@quick
def test_a_driver_too_old_for_either_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"524\.99 .*525.*LOCK=newest.*--device cpu"):
        choose("524.99")


def bare(home: Path, *programs: str) -> dict[str, str]:
    """The environment of a fresh machine: these programs, an empty home, and how the registry is reached.

    uv's cache is this user's, so that a test downloads what was never downloaded here, and no more.
    """
    (home / "bin").mkdir(exist_ok=True)
    for program in programs:
        found = shutil.which(program)
        assert found, f"{program} is not installed"
        (home / "bin" / program).symlink_to(found)
    registry = r"(PIP_|UV_|SSL_|LANG$|TMPDIR$|FASHION_DDP_REQUIRE_ALL$|(https?|all|no)_proxy$)"
    kept = {name: value for name, value in os.environ.items() if re.match(registry, name, re.IGNORECASE)}
    user = Path(pwd.getpwuid(os.getuid()).pw_dir)
    files = [file for file in (user / ".config/pip/pip.conf", user / ".pip/pip.conf") if file.is_file()]
    settings = {"UV_CACHE_DIR": str(user / ".cache" / "uv"), "PIP_CONFIG_FILE": str(files[0] if files else os.devnull)}
    return settings | kept | {"HOME": str(home), "PATH": str(home / "bin")}


def program(path: Path, lines: str) -> None:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def run(*words: str | Path, env: dict[str, str], cwd: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    line = [str(word) for word in words]
    return subprocess.run(line, check=False, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@quick
@pytest.mark.parametrize(
    ("smi", "module", "expected"),
    [
        ("echo 560.35.03; echo 560.35.03", None, "cuda12: NVIDIA driver 560.35.03 "),
        ("echo 'NVIDIA-SMI has failed'; exit 9", None, "newest: no NVIDIA driver "),
        ("echo 'Driver/library version mismatch'; exit 18", "x86_64 Kernel Module  535.104.05  Sat", "cuda12: "),
        (None, "Open Kernel Module for x86_64  570.86.15  Release Build", "cuda12: NVIDIA driver 570.86.15 "),
        (None, None, "newest: no NVIDIA driver "),
    ],
)
def test_the_driver_is_read_from_the_machine(tmp_path: Path, smi: str, module: str, expected: str) -> None:
    env = bare(tmp_path)
    if smi:
        program(tmp_path / "bin" / "nvidia-smi", smi)
    if module:
        (tmp_path / "version").write_text(f"NVRM version: NVIDIA UNIX {module} Aug 19\nGCC version:  gcc 12.2.0 (x)\n")
    result = run(sys.executable, INSTALL, "--print-lock", "--driver-file", tmp_path / "version", env=env)
    assert result.stdout.startswith(expected), result.stderr
    assert len(result.stdout.splitlines()) == 1


@quick
def test_what_pip_was_told_of_the_registry_uv_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://mirror.example/pypi\ncert = /ca.pem\nfind-links = /wheels\n"
        "extra-index-url =\n    https://a.example\n    https://b.example\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_FIND_LINKS", "/newer")
    told = installer["pip_registry"](sys.executable)
    assert told == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "https://mirror.example/pypi",
        "UV_INDEX": "https://a.example https://b.example",
        "UV_FIND_LINKS": "/newer",
        "SSL_CERT_FILE": "/ca.pem",
    }
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mine.example/simple")
    assert installer["pip_registry"](sys.executable) == {}


@quick
@pytest.mark.parametrize("name", [*LOCKS, "dev", "uv"])
def test_a_lock_names_no_address_and_pins_everything_by_hash(name: str) -> None:
    assert not re.search(r"://|@ |index|find-links", "".join(lock(name).values()))
    for entry in lock(name).values():
        for one in re.split(r"\n(?=\S)", entry.strip()):
            assert re.match(r"[a-z0-9.-]+==\S+ ", one) and "--hash=sha256:" in one, one.splitlines()[0]


@quick
@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_covers_pyproject_and_what_installs_it(name: str) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    wanted, tools = [*project["project"]["dependencies"], "pip", "uv"], project["dependency-groups"]["dev"]
    wanted += project["build-system"]["requires"]
    needed, development = (
        {re.split(r"[<>=!~\[; ]", requirement)[0].lower() for requirement in some} for some in (wanted, tools)
    )
    assert needed <= set(lock(name)) and development <= set(lock("dev"))
    assert not development & set(lock(name))


@quick
def test_the_locks_differ_in_torch_and_cuda_only() -> None:
    newest, cuda12 = map(lock, LOCKS)
    different = {n for n in {*newest, *cuda12} if versions(newest.get(n, "")) != versions(cuda12.get(n, ""))}
    assert all(re.match(r"torch$|torchvision$|triton$|nvidia-|cuda-", name) for name in different), different
    assert versions(cuda12["torch"]) == ["2.10.0"]
    assert versions(newest["uv"]) == versions(lock("uv")["uv"])
    assert all(versions(newest[name]) == versions(entry) for name, entry in lock("dev").items() if name in newest)


@quick
def test_versions_that_messages_call_tested_are_those_of_the_locks() -> None:
    for package, tested in TESTED.items():
        assert {*tested} == {version for name in LOCKS for version in versions(lock(name)[package])}


@quick
def test_make_alone_lists_every_target() -> None:
    text = run("make", env=dict(os.environ)).stdout
    targets = re.findall(r"^([a-z][a-z-]*):(?! quiet)", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) > 5
    assert all(f"make {target} " in text for target in targets if target != "help")


@quick
def test_make_names_an_unknown_target_and_means_the_cards_that_it_is_given() -> None:
    done = run("make", "compre", env=dict(os.environ), cwd=CHECKOUT)
    assert done.returncode == 2 and "error: there is no target 'compre'" in done.stderr
    words = "--no-print-directory", "--dry-run", "-o", "setup", "compare", "GPUS=1,2"
    planned = run("make", *words, env=dict(os.environ), cwd=CHECKOUT).stdout
    assert planned.startswith("CUDA_VISIBLE_DEVICES=1,2 ") and " --device cuda" in planned


@quick
@pytest.mark.parametrize(
    ("goals", "tools"), [("compare", False), ("setup", False), ("setup DEV=1", True), ("compare test", True)]
)
def test_make_installs_the_development_tools_where_they_are_needed(goals: str, tools: bool) -> None:
    words = "--no-print-directory", "--dry-run", *goals.split()
    planned = run("make", *words, env=dict(os.environ), cwd=CHECKOUT).stdout
    assert (" --dev " in planned.splitlines()[0]) == tools


@quick
def test_an_old_python_gets_one_message() -> None:
    ast.parse(INSTALL.read_text(), feature_version=(3, 6))
    old = f"import sys, runpy; sys.version_info = (3, 9, 18); runpy.run_path({str(INSTALL)!r}, run_name='__main__')"
    result = run(sys.executable, "-c", old, env=dict(os.environ))
    assert result.returncode == 2
    assert re.fullmatch(r"error: .* Python 3.11 or newer, .* is 3.9: make setup PYTHON=.*\n", result.stderr)


def refused(tmp_path: Path, *words: str | Path) -> str:
    """The one line with which install.py refuses, having made nothing."""
    env, before = bare(tmp_path), sorted(tmp_path.rglob("*"))
    result = run(sys.executable, INSTALL, "--driver-file", tmp_path / "none", *words, env=env)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return result.stderr


@quick
def test_what_is_refused_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "unknown 'cuda13'; choices: newest, cuda12" in refused(tmp_path, "--lock", "cuda13")

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "mine exists and is no virtual environment" in refused(tmp_path, "--venv", tmp_path / "mine")
    assert "thesis.tex exists and is no" in refused(tmp_path, "--venv", tmp_path / "mine" / "thesis.tex")

    (tmp_path / "other" / "bin").mkdir(parents=True)
    (tmp_path / "other" / "pyvenv.cfg").touch()
    assert "does not run: remove that folder" in refused(tmp_path, "--venv", tmp_path / "other")
    program(tmp_path / "other" / "bin" / "python", "echo 3.10")
    assert re.search(r"other has Python 3.10, and .* is 3\.\d+: ", refused(tmp_path, "--venv", tmp_path / "other"))


@quick
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc, a file system without room, is Linux's")
def test_a_full_disk_is_noticed_before_the_download(tmp_path: Path) -> None:
    assert re.search(r"/proc has 0.0 GB free, \d.\d are needed", refused(tmp_path, "--venv", "/proc/venv"))


@quick
def test_a_python_without_ensurepip_names_the_package(tmp_path: Path) -> None:
    arguments = [str(INSTALL), "--venv", str(tmp_path / "venv"), "--driver-file", str(tmp_path / "none")]
    debian = f"import sys, runpy; sys.modules['ensurepip'] = None; sys.argv = {arguments}; "
    result = run(sys.executable, "-c", debian + "runpy.run_path(sys.argv[0], run_name='__main__')", env=bare(tmp_path))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "apt-get install python3-venv" in result.stderr


class Small:
    """A tree with our installer and three small packages in place of the real locks."""

    def __init__(self, root: Path) -> None:
        self.root, self.venv = root / "tree", root / "venv"
        (self.root / "requirements").mkdir(parents=True)
        for name in ("install.py", "uv.txt"):
            shutil.copy(INSTALL.with_name(name), self.root / "requirements")
        self.write_lock("newest", "iniconfig")
        self.write_lock("cuda12", "pluggy")
        self.write_lock("dev", "execnet")
        build = 'build-system = { requires = ["setuptools"], build-backend = "setuptools.build_meta" }\n'
        (self.root / "pyproject.toml").write_text(build + '[project]\nname = "small"\nversion = "1"\n')
        # Copies, because a hard link into uv's cache would carry what a test breaks into every other environment.
        self.env = bare(root) | {"UV_LINK_MODE": "copy"}

    def write_lock(self, name: str, *packages: str) -> None:
        real = lock("newest") | lock("dev")
        entries = [real[package] for package in ("pip", "setuptools", "uv", *packages)]
        (self.root / "requirements" / f"{name}.txt").write_text("".join(entries))

    def setup(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        base = Path(sys.executable).resolve()
        install = self.root / "requirements" / "install.py"
        return run(base, install, "--venv", self.venv, "--driver-file", "none", *words, env=self.env | env)

    def ready(self, *words: str, **env: str) -> str:
        result = self.setup(*words, **env)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == f"source {self.venv}/bin/activate"
        return result.stdout

    def has(self, *modules: str) -> bool:
        code = "".join(f"import {module};" for module in modules)
        return run(self.venv / "bin" / "python", "-c", code, env=self.env).returncode == 0

    def module(self, name: str) -> Path:
        return next(self.venv.glob(f"lib/python*/site-packages/{name}")) / "__init__.py"


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return Small(tmp_path)


@slow
def test_an_environment_is_made_kept_and_repaired(small: Small) -> None:
    assert "GB to download" in small.ready().splitlines()[0]
    assert small.has("iniconfig", "setuptools")
    assert small.ready().startswith("Nothing to do.")
    assert small.setup("--quiet").stdout == ""

    shutil.rmtree(small.module("iniconfig").parent)
    assert small.ready().startswith("Up to")
    assert small.has("iniconfig")

    # Killed in the middle of an installation, which leaves a package that is there by name only.
    uv = small.venv / "bin" / "uv"
    uv.unlink()
    program(uv, f"/bin/rm {small.module('iniconfig')}\nkill -9 $PPID")
    small.write_lock("newest", "iniconfig", "pluggy")
    assert small.setup().returncode == -9
    small.ready()
    assert small.module("iniconfig").exists()

    (small.venv / "bin" / "python").unlink()
    (small.venv / "bin" / "python").symlink_to("/nowhere/python3.11")
    small.ready()
    assert small.has("iniconfig")

    small.venv = small.venv.rename(small.venv.with_name("moved"))
    small.ready()
    assert run(small.venv / "bin" / "pip", "--version", env=small.env).returncode == 0


@slow
def test_a_lock_stays_until_another_is_asked_for_and_development_tools_stay_with_either(small: Small) -> None:
    small.ready("--lock", "cuda12")
    assert small.has("pluggy") and not small.has("execnet")
    assert small.ready("--dev").startswith("Development tools for ") and small.has("pluggy", "execnet")
    assert small.ready().startswith("Nothing to do.")
    assert "Lock newest" in small.ready("--lock", "newest")
    assert small.has("iniconfig", "execnet") and not small.has("pluggy")


@slow
def test_an_environment_of_the_users_loses_nothing(small: Small) -> None:
    subprocess.run([Path(sys.executable).resolve(), "-m", "venv", "--without-pip", small.venv], check=True)
    mine = next(small.venv.glob("lib/python*/site-packages")) / "mine"
    info = mine.with_name("mine-1.dist-info")
    mine.mkdir()
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (info / "RECORD").write_text("mine/__init__.py,,\nmine-1.dist-info/METADATA,,\n")
    (mine / "__init__.py").touch()
    small.ready("--dev")
    small.ready("--lock", "cuda12")
    assert small.has("iniconfig", "pluggy", "execnet", "mine")
    shutil.rmtree(small.module("pluggy").parent)
    small.ready()
    assert small.has("iniconfig", "pluggy", "mine")
    (small.venv / "bin" / "python").unlink()
    assert "remove that folder" in small.setup().stderr
    assert (mine / "__init__.py").exists()


@slow
def test_without_a_network_it_says_so_and_keeps_what_works(small: Small) -> None:
    away = dict.fromkeys(("PIP_INDEX_URL", "UV_DEFAULT_INDEX"), "http://127.0.0.1:9/simple")
    away |= dict.fromkeys(("UV_INDEX", "UV_FIND_LINKS", "PIP_FIND_LINKS"), "") | {"PIP_NO_CACHE_DIR": "1"}
    away |= dict.fromkeys(("PIP_RETRIES", "UV_HTTP_RETRIES"), "0") | {"PIP_CONFIG_FILE": os.devnull}
    away |= {"UV_CACHE_DIR": str(small.root / "empty")}
    failed = small.setup(**away)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: the installation failed, ")
    small.ready()

    small.write_lock("newest", "iniconfig", "pluggy")
    failed = small.setup(**away)
    assert failed.returncode == 2 and "127.0.0.1" in failed.stderr  # the installer's own message
    assert small.has("iniconfig")
    small.write_lock("newest", "iniconfig")
    assert small.ready(**away).startswith("Nothing to do.")


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A copy of the checkout as a clone would have it; gone afterwards, with the gigabytes installed in it."""
    anywhere = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "*.egg-info", "wandb")

    def made_here(folder: str, names: list[str]) -> set[str]:
        return anywhere(folder, names) | ({"runs", "data"} if Path(folder) == CHECKOUT else set())

    yield Path(shutil.copytree(CHECKOUT, tmp_path / "tree", ignore=made_here))
    shutil.rmtree(tmp_path / "tree")


# Quick tests of what calls torch most: steps, graphs, optimizers, checkpoints, evaluation, models, ranks. What else is
# tested does not change with torch, but for the installer's own tests, which go on in the newer environment.
OF_TORCH = ["tests/training", "tests/models", "tests/distributed"]


@slow
@pytest.mark.timeout(1800)
def test_make_setup_on_a_fresh_machine_with_the_older_torch_which_passes_the_tests_of_what_calls_it(
    tree: Path, tmp_path: Path, data_dir: Path
) -> None:
    """The other lock is the environment's that runs this, made by the same command."""
    env = bare(tmp_path, "make", "sed")
    made = run("make", "setup", "LOCK=cuda12", f"PYTHON={Path(sys.executable).resolve()}", env=env, cwd=tree)
    assert made.returncode == 0, made.stderr
    assert "GB to download" in made.stdout.splitlines()[0]
    assert made.stdout.splitlines()[-1] == "source .venv/bin/activate"
    again = run("make", "setup", env=env, cwd=tree)
    assert again.stdout.splitlines() == ["Nothing to do. Activate it:", "source .venv/bin/activate"]
    assert versions(lock("cuda12")["torch"])[0] == torch_of(tree, env)
    compared = run("make", "compare", "MODELS=linear", f"ARGS={' '.join(SMALL)}", env=env, cwd=tree)
    assert compared.returncode == 0 and (tree / "report" / "report.html").exists(), compared.stderr
    tools = [tree / ".venv" / "bin" / name for name in ("pytest", "mypy", "ruff", "pre-commit")]
    assert not any(tool.exists() for tool in tools)

    env |= {"PATH": os.environ["PATH"], "FASHION_DDP_DATA_DIR": str(data_dir)}
    tested = run("make", "test-quick", f"TESTS={' '.join(OF_TORCH)}", env=env, cwd=tree)
    assert tested.returncode == 0, tested.stdout[-4000:] + tested.stderr[-4000:]
    assert re.search(r" \d{2,} passed", tested.stdout) and all(tool.exists() for tool in tools)


def torch_of(tree: Path, env: dict[str, str]) -> str:
    python = tree / ".venv" / "bin" / "python"
    return run(python, "-c", "import torch; print(torch.__version__)", env=env, cwd=tree).stdout.strip().split("+")[0]


@slow
def test_a_wheel_trains_compares_and_submits_where_no_checkout_is(tree: Path, tmp_path: Path) -> None:
    """In an environment that has the packages of this one, and of this project the wheel alone."""
    env, folder, python = bare(tmp_path), tmp_path / "elsewhere", tmp_path / "venv" / "bin" / "python"

    def done(*words: str | Path) -> str:
        result = run(*words, env=env, cwd=folder)
        assert result.returncode == 0, result.stderr
        return result.stdout

    folder.mkdir()
    done(sys.executable, "-m", "venv", "--without-pip", python.parent.parent)
    done(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", tree)
    [wheel] = folder.glob("*.whl")
    done(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    [packages] = python.parent.parent.glob("lib/python*/site-packages")
    # Python reads no .pth files in a folder that is named in one, so the checkout of the other environment stays away.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    found = done(python, "-c", "import fashion_ddp, launch, torch; print(fashion_ddp.__path__, launch.__path__)")
    assert found == f"['{packages}/fashion_ddp'] ['{packages}/launch']\n"

    done(python, "-m", "launch.local", "--models", "linear", *SMALL)
    assert (folder / "report" / "report.html").exists()
    [run_folder] = (folder / "runs").glob("*/summary.json")
    assert json.loads(run_folder.read_text())["status"] == "finished"

    assert "--site site.yaml" in done(python, "-m", "launch.templates")
    assert (folder / "accelerate_config.yaml").read_bytes() == (tree / "launch" / "accelerate_config.yaml").read_bytes()
    site = (folder / "site.yaml").read_text().replace("# python: ", "python: ")
    (folder / "site.yaml").write_text(site)
    assert "site.yaml is there already" in done(python, "-m", "launch.templates")
    shown = done(python, "-m", "launch.submit", "--models", "cnn", *SMALL, "--site", "site.yaml", "--dry-run")
    assert "\nsrun " in shown and " /path/to/venv/bin/python -u -m " in shown  # the file is as it was changed
