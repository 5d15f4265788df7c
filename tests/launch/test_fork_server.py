"""launch.fork_server: processes that start at once, and are as separate as any other."""

import ctypes
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fashion_ddp.distributed import signals
from launch import fork_server
from launch.fork_server import ForkedProcess, ForkServer, Process, start_process

PR_GET_CHILD_SUBREAPER = 37

# A module that says what its process is, and ends as it is told.
TELLS = """
import json, os, random, signal, sys
began_with = sorted(name for name in sys.modules if name.split(".")[0] in ("fashion_ddp", "launch"))
had_torch = "torch" in sys.modules
import numpy, torch
print(json.dumps({
    "version": 1, "main": __name__, "argv": sys.argv[1:], "word": os.environ.get("WORD"), "home": os.environ["HOME"],
    "folder": os.getcwd(), "session": os.getsid(0), "pid": os.getpid(), "parent": os.getppid(), "path": sys.path[0],
    "draws": [random.random(), numpy.random.rand(), float(torch.rand(()))],
    "began_with": began_with, "had_torch": had_torch, "threads": len(os.listdir("/proc/self/task")),
    "no_card": torch.cuda._is_in_bad_fork() or torch.cuda.is_initialized(),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "name": open("/proc/self/cmdline").read().replace("\\0", " ").strip(),
}))
print("to stderr", file=sys.stderr)
sys.stdout.flush()
if sys.argv[-1] == "abort":
    os.abort()
sys.exit(int(sys.argv[-1]))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture
def tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts the module that tells about its process, with words; what it told, and how it ended."""
    (tmp_path / "tells.py").write_text(TELLS)
    monkeypatch.chdir(tmp_path)

    def start(start: Any, *words: str) -> tuple[dict[str, Any], int, Process]:
        with open("output", "wb") as output:
            process = start("tells", words, {**os.environ, "WORD": "a word"}, output)
        code = process.wait()
        told, error = Path("output").read_text().splitlines()
        assert error == "to stderr"
        return json.loads(told), code, process

    return start


def test_a_forked_process_is_as_separate_as_one_that_python_started(server: ForkServer, tells: Any) -> None:
    forked, code, process = tells(server.start, "--a flag", "7")
    fresh, fresh_code, other = tells(start_process, "--a flag", "7")
    assert isinstance(process, ForkedProcess) and code == fresh_code == 7
    assert forked.pop("had_torch") is True and fresh.pop("had_torch") is False
    assert (forked["pid"], fresh["pid"]) == (process.pid, other.pid)
    for told in (forked, fresh):
        assert told.pop("session") == told.pop("pid") and told.pop("parent") == os.getpid()
        assert told.pop("threads") == 1 or told is fresh  # nothing ran beside the server when it forked
        told.pop("threads", None)
    assert len({*forked.pop("draws"), *fresh.pop("draws"), *tells(server.start, "0")[0]["draws"]}) == 9
    assert forked.pop("name").replace("'", "") == fresh.pop("name")
    assert forked == fresh and forked["blocked"] == sorted(signals.SIGNALS) and not forked["began_with"]
    assert ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(flag := ctypes.c_int(-1))) == 0
    assert flag.value == 0  # the orphans of a run are nobody's again


def test_it_reads_anew_what_was_changed_and_ends_as_it_ended(server: ForkServer, tells: Any) -> None:
    assert tells(server.start, "0")[0]["version"] == 1
    Path("tells.py").write_text(TELLS.replace('"version": 1', '"version": 22'))
    told, code, _ = tells(server.start, "abort")
    assert told["version"] == 22 and code == -signal.SIGABRT
    killed = server.start("http.server", ["0"], os.environ)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    killed.send_signal(signal.SIGTERM)  # it has ended: nobody gets this
    assert tells(server.start, "0")[1] == 0


@pytest.mark.slow
def test_a_package_that_was_installed_is_loaded_by_a_new_server_and_without_one_processes_start_too(
    tells: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "site-packages"
    packages.mkdir()
    monkeypatch.setattr("site.getsitepackages", lambda: [str(packages)])
    with ForkServer() as server:
        first = server._server
        assert first and isinstance(tells(server.start, "0")[2], ForkedProcess) and server._server is first
        (packages / "torch-99.dist-info").mkdir()
        assert isinstance(tells(server.start, "0")[2], ForkedProcess)
        assert server._server is not first and first.returncode is not None
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)  # who could not be the parent
            assert not isinstance(tells(server.start, "0")[2], ForkedProcess)
        server._begin()
        assert isinstance(tells(server.start, "0")[2], ForkedProcess) and server._server
        server._server.kill()
        told, code, process = tells(server.start, "3")
        assert code == 3 and not told["had_torch"] and not isinstance(process, ForkedProcess)


# Each of the packages that a server is to load: it leaves a folder, it is broken, it never ends.
PACKAGES = {"leaves": "import atexit, tempfile as t\nfolder = t.TemporaryDirectory()\natexit.register(folder.cleanup)"}
PACKAGES |= {"broken": "import leaves, nowhere", "endless": "import time\ntime.sleep(1000)"}
USES = """
import os, sys
assert "leaves" in sys.modules and not {"broken", "endless"} & set(sys.modules), sys.modules
import leaves, tempfile
with tempfile.TemporaryDirectory() as own:
    pass
assert os.path.isdir(leaves.folder.name) and not os.path.exists(own)
print(leaves.folder.name)
"""


def test_what_a_package_leaves_is_kept_for_all_and_one_that_does_not_load_is_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {**PACKAGES, "uses": USES}.items():
        (tmp_path / f"{name}.py").write_text(text)
    site = "import launch.fork_server as one; one.LIMIT = 1; one.LOADED = ()"
    (tmp_path / "quickly.py").write_text(f"{site}; one.main()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fork_server, "LOADED", ())
    monkeypatch.setattr(fork_server, "MODULE", "quickly")
    folders = []
    with ForkServer(PACKAGES) as server:
        for _ in range(2):
            with open("output", "wb") as output:
                assert server.start("uses", [], os.environ, output).wait() == 0, Path("output").read_text()
            folders.append(Path("output").read_text().strip())
        assert folders[0] == folders[1]
    assert not Path(folders[0]).exists()


def test_it_ends_with_who_asked_for_it(tmp_path: Path) -> None:
    words = "import os, time; from launch.fork_server import ForkServer; server = ForkServer()\n"
    words += "print(server._server.pid, flush=True); time.sleep(0.5); os._exit(1)"
    (tmp_path / "asks.py").write_text(words)
    with open(tmp_path / "pid", "wb") as output:
        assert start_process("asks", [], {**os.environ, "PYTHONPATH": str(tmp_path)}, output).wait() == 1
    pid = int((tmp_path / "pid").read_text())
    signal.alarm(60)
    try:
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            pass
    finally:
        signal.alarm(0)
