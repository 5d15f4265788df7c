"""Make the virtual environment or bring it up to date: what `make setup` runs.

    python3 requirements/install.py [--venv .venv] [--lock newest|cuda12] [--dev] [--print-lock]

It gets one of two locks (pinned versions with hashes), chosen by the NVIDIA driver, and this project, editable; with
--dev also the development tools, of which dev.txt is the lock, and which it then keeps. An environment made here is
kept equal to its locks. One that the user made gets the locks' packages and loses none.
Standard library only, in syntax that Python 3.6 parses, so that an old Python gets a message and no traceback.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

if sys.version_info < (3, 11):  # noqa: UP036 - whoever reads this message has just such a Python
    message = "error: fashion_ddp needs Python 3.11 or newer, and {} is {}.{}: make setup PYTHON=python3.12, or newer"
    print(message.format(sys.executable, *sys.version_info), file=sys.stderr)
    sys.exit(2)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
STAMP = ".fashion_ddp.json"  # in the environment: what was installed, with an empty key while that is going on
# Per lock: the CUDA of its torch, GB to download, GB on disk (Linux on x86-64 with Python 3.11; less elsewhere).
LOCKS = {"newest": ("13", 3.1, 5.8), "cuda12": ("12.8", 4.3, 7.5)}
DEV = "0.04 GB to download, 0.1 GB on disk"  # more, for the development tools
FAILED = """the installation failed, its own message is above. It needs a network (behind a proxy HTTPS_PROXY, for a \
mirror UV_DEFAULT_INDEX or pip's index-url) and room on disk (VENV, UV_CACHE_DIR). `make setup` goes on from here"""


class UserError(ValueError):
    """Something the user can mend: its text says what is wrong, where, and how to fix it. Exit code 2."""


# --- Which lock -------------------------------------------------------------------------------------------------


def installed_driver(file: str) -> str | None:
    """The NVIDIA driver's version, from nvidia-smi or else from the kernel module's own file; None without one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True, timeout=60).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):  # not installed, or it cannot reach the cards
        text = Path(file).read_text() if Path(file).is_file() else ""
        return next(iter(re.findall(r"\s(\d+\.[\d.]+)\s", text)), None)


def choose(driver: str | None) -> tuple[str, str]:
    """The lock for a driver's version (None: no driver), and why.

    Raises UserError for a driver on which neither lock's torch can use the cards.
    """
    if driver is None:
        return "newest", "no NVIDIA driver here (for cards elsewhere with driver 525 to 579, LOCK=cuda12)"
    number = re.match(r"\s*(\d+)\.", driver)
    if not number:
        return "newest", f"nvidia-smi gives {driver!r} as driver (if it is one of 525 to 579, LOCK=cuda12)"
    if int(number[1]) >= 580:
        return "newest", f"NVIDIA driver {driver} is 580 or newer"
    if int(number[1]) >= 525:
        return "cuda12", f"NVIDIA driver {driver} is older than 580, which CUDA 13 needs"
    raise UserError(
        f"NVIDIA driver {driver} is too old for either lock: update it to 525 or newer (better: 580 or newer), "
        "or go on without the cards: make setup LOCK=newest, and train with --device cpu"
    )


# --- The environment --------------------------------------------------------------------------------------------------


def read_stamp(folder: Path) -> dict[str, Any]:
    """What the last installation in an environment wrote down; `ours` where it was made here.

    Raises UserError for a folder that holds something else.
    """
    if (folder / STAMP).is_file() and (folder / STAMP).stat().st_size:
        return json.loads((folder / STAMP).read_text())
    theirs = (folder / "pyvenv.cfg").is_file()
    if not theirs and os.path.lexists(folder) and not (folder.is_dir() and set(os.listdir(folder)) <= {STAMP}):
        raise UserError(f"{folder} exists and is no virtual environment: name another folder, make setup VENV=...")
    return {"ours": not theirs, "folder": str(folder), "lock": "", "dev": False, "key": "", "packages": []}


def python_version(folder: Path) -> str:
    """Of the environment, such as 3.11; empty where its Python does not run."""
    command = [str(folder / "bin" / "python"), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def packages(folder: Path) -> list[str]:
    """What lies in site-packages. One less than was installed is damage, one more is the user's own."""
    files = (folder / "lib" / f"python{PYTHON}" / "site-packages").glob("*")
    return sorted(file.name for file in files if file.name != "__pycache__")


def files_of(lock: str, dev: bool) -> list[Path]:
    """The files of pinned versions that an environment is made from."""
    return [HERE / f"{name}.txt" for name in (lock, *["dev"] * dev)]


def key_of(lock: str, dev: bool) -> str:
    """Changes whenever something is to be installed."""
    parts = [str(ROOT), *(file.read_text() for file in (*files_of(lock, dev), ROOT / "pyproject.toml"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def is_whole(folder: Path, stamp: dict[str, Any]) -> bool:
    """Whether the last installation came to its end, and all of it is still there and where it was."""
    complete = stamp["key"] and set(stamp["packages"]) <= set(packages(folder))
    return bool(complete and stamp["folder"] == str(folder) and python_version(folder))


def check_python(folder: Path, ours: bool) -> None:
    """Raise UserError for an environment that this Python cannot bring up to date."""
    found = python_version(folder)
    if found and found != PYTHON:
        raise UserError(
            f"{folder} has Python {found}, and {sys.executable} is {PYTHON}: leave PYTHON out to keep the environment, "
            "or name another, make setup VENV=..."
        )
    if not found and not ours:
        raise UserError(f"the Python in {folder} does not run: remove that folder, or make setup VENV=...")


def announce(folder: Path, lock: str, why: str, old_lock: str) -> None:
    """Say what is going to be installed and how much it is. Raises UserError where the disk is too full for it."""
    cuda, download, disk = LOCKS[lock]
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free / 1e9
    print(f"Up to {download} GB to download; {disk} GB on disk in {folder}, {free:.1f} GB free there.")
    print(f"Lock {lock} (torch for CUDA {cuda}): {why}.", flush=True)
    if lock != old_lock and free < disk:
        raise UserError(f"{existing} has {free:.1f} GB free, {disk} are needed: make room, or make setup VENV=...")


def create(folder: Path) -> None:
    """A new environment in place of whatever is left of an old one."""
    with_pip = importlib.util.find_spec("ensurepip") is not None
    if not with_pip and not shutil.which("uv"):
        raise UserError(
            f"{sys.executable} has no ensurepip, which a virtual environment needs: install it "
            "(Debian, Ubuntu: apt-get install python3-venv), or install uv"
        )
    for old in set(folder.iterdir()) - {folder / STAMP}:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    venv.create(folder, symlinks=True, with_pip=with_pip)


def pip_registry(python: str) -> dict[str, str]:
    """pip's package sources as uv's variables: uv reads none of pip's settings, and many machines have only those."""
    names = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS"}
    if {*names.values(), "UV_INDEX_URL", "UV_CONFIG_FILE"} & set(os.environ):
        return {}
    listing = subprocess.run([python, "-m", "pip", "config", "list"], check=False, capture_output=True, text=True)
    names["cert"] = "SSL_CERT_FILE"
    found = re.findall(r"^(global|install|:env:)\.([\w-]+)='(.+)'$", listing.stdout, re.MULTILINE)
    found.sort(key=lambda setting: setting[0] == ":env:")  # the environment wins, as in pip
    settings = {names[name]: value.replace("\\n", " ").strip() for _, name, value in found if name in names}
    # Like pip, take a version from whichever source has it, not from the first that knows the name: hashes decide.
    return settings | {"UV_INDEX_STRATEGY": "unsafe-best-match"} if settings else {}


def install(folder: Path, locks: list[Path], ours: bool, repair: bool) -> None:
    """Bring an environment to the locks and this project into it, with uv, which is fetched where it is absent."""
    python = str(folder / "bin" / "python")
    uv = shutil.which("uv", path=folder / "bin") or shutil.which("uv")
    if uv is None:
        subprocess.run([python, "-m", "ensurepip"], check=False, capture_output=True)  # uv venv leaves pip out
        fetch = ["install", "--quiet", "--disable-pip-version-check", "--require-hashes"]
        subprocess.run([python, "-m", "pip", *fetch, "--requirement", str(HERE / "uv.txt")], check=True)
        uv = str(folder / "bin" / "uv")
    environment = pip_registry(python) | os.environ
    environment.pop("UV_TORCH_BACKEND", None)  # would look for other builds of torch than the lock's
    # Of a user's own environment, sync would remove what the locks do not have.
    if ours:
        to_lock = ["sync", "--require-hashes", *map(str, locks)]
    else:
        to_lock = ["install", "--require-hashes", *(["--reinstall"] if repair else [])]
        to_lock += [word for file in locks for word in ("--requirements", str(file))]
    for what in (to_lock, ["install", "--no-deps", "--no-build-isolation", "--quiet", "--editable", str(ROOT)]):
        subprocess.run([uv, "pip", *what, "--python", python], check=True, env=environment)


def setup(folder: Path, asked: str, dev: bool, driver_file: str) -> bool:
    """Make the environment or bring it up to date; False where nothing was to do. Raises UserError."""
    stamp = read_stamp(folder)
    check_python(folder, stamp["ours"])
    # An environment keeps its lock, because on a cluster machines with and without a driver share it.
    lock = asked or stamp["lock"]
    lock, why = (lock, "as asked for" if asked else "as before") if lock else choose(installed_driver(driver_file))
    dev = dev or stamp.get("dev", False)
    if is_whole(folder, stamp) and stamp["key"] == key_of(lock, dev):
        return False
    if is_whole(folder, stamp) and stamp["key"] == key_of(lock, dev=False):
        print(f"Development tools for {folder}: up to {DEV}.", flush=True)
    else:
        announce(folder, lock, why, stamp["lock"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / STAMP, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        stamp = read_stamp(folder)  # again: another process may have been at work until now
        dev = dev or stamp.get("dev", False)
        whole, key = is_whole(folder, stamp), key_of(lock, dev)
        if not whole or stamp["key"] != key:
            before, new = packages(folder), stamp | {"folder": str(folder), "lock": lock, "dev": dev, "key": ""}
            (folder / STAMP).write_text(json.dumps(new))
            try:
                if stamp["ours"] and not whole:
                    create(folder)
                install(folder, files_of(lock, dev), stamp["ours"], repair=bool(stamp["lock"]) and not whole)
            except subprocess.CalledProcessError:
                if packages(folder) == before:  # it touched nothing, as without a network: what was whole still is
                    (folder / STAMP).write_text(json.dumps(stamp))
                raise
            (folder / STAMP).write_text(json.dumps(new | {"key": key, "packages": packages(folder)}))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the virtual environment or bring it up to date.")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="its folder (default: .venv)")
    parser.add_argument("--lock", default="", help="newest or cuda12 (default: by the NVIDIA driver)")
    parser.add_argument("--dev", action="store_true", help="with the development tools, which it then keeps")
    parser.add_argument("--quiet", action="store_true", help="say nothing when there is nothing to do")
    parser.add_argument("--print-lock", action="store_true", help="say which lock this machine gets, and stop")
    parser.add_argument("--driver-file", default="/proc/driver/nvidia/version", help=argparse.SUPPRESS)
    args = parser.parse_args()
    start = time.monotonic()
    try:
        if args.lock and args.lock not in LOCKS:
            raise UserError(f"LOCK: unknown {args.lock!r}; choices: {', '.join(LOCKS)}")
        if args.print_lock:
            print(": ".join(choose(installed_driver(args.driver_file))))
            return
        changed = setup(args.venv.resolve(), args.lock, args.dev, args.driver_file)
    except subprocess.CalledProcessError:
        message = FAILED
    except (UserError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; `make setup` goes on from here"
    else:
        if changed or not args.quiet:
            print(f"Ready in {time.monotonic() - start:.0f} s." if changed else "Nothing to do.", "Activate it:")
            print(f"source {args.venv}/bin/activate")
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
