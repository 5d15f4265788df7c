"""What is said on the terminal, and to whom it does not matter: a run goes on, and its exit code stays."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT

pytestmark = pytest.mark.quick

SAYS = """
import sys
from pathlib import Path
from fashion_ddp.console import fail, say
for number in range(500):
    say(f"line {number} " + 200 * "x")
Path(sys.argv[1]).write_text("went on")
sys.exit(75)
"""
FAILS = "from fashion_ddp.console import fail; fail(ValueError('the reason'), 2)"


def shell(line: str, code: str, *words: object, **env: str) -> tuple[int, str]:
    """The exit code of a program in a shell's line, where it is "$@", and what the line printed."""
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))} | env
    command = ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}", "bash", sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, check=False, env=surroundings, stdout=-1, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


READERS = ['"$@" | head -n 1', '"$@" 2>&1 | head -n 1', '"$@" | true', '"$@" > /dev/full', '"$@" >&-', '"$@" >&- 2>&-']


@pytest.mark.parametrize("line", READERS)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_run_goes_on_without_anyone_who_reads(line: str, unbuffered: str, tmp_path: Path) -> None:
    code, printed = shell(line, SAYS, tmp_path / "file", PYTHONUNBUFFERED=unbuffered)
    assert code == 75 and (tmp_path / "file").read_text() == "went on"
    assert printed == ("line 0 " + 200 * "x" + "\n" if "head" in line else "")


def test_all_is_said_to_who_reads(tmp_path: Path) -> None:
    code, printed = shell('"$@" | cat', SAYS, tmp_path / "file")
    assert code == 75 and printed == "".join(f"line {number} {200 * 'x'}\n" for number in range(500))


def test_what_was_said_outlives_a_kill() -> None:
    code = "import os; from fashion_ddp.console import say; say('said'); os.kill(os.getpid(), 9)"
    assert shell('"$@" | cat', code) == (137, "said\n")


@pytest.mark.parametrize("line", ['"$@" 2>&1 | true', '"$@" 2> /dev/full', '"$@" >&- 2>&-', '"$@"'])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_exit_code_of_a_failure_does_not_depend_on_who_reads(line: str, unbuffered: str) -> None:
    # The program waits for the reader to have gone.
    code, printed = shell(line, f"import time; time.sleep(0.2); {FAILS}", PYTHONUNBUFFERED=unbuffered)
    assert code == 2 and printed == ("error: the reason\n" if line == '"$@"' else "")


STOPPED = "stopped (SIGTERM) and saved in epoch 1: the same command continues\n"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("UserError('mend this')", 2, "error: mend this\n"),
        ("TrainingFailed('went wrong')", 1, "error: went wrong\n"),
        ("Stopped('epoch 1', 'SIGTERM')", os.EX_TEMPFAIL, STOPPED),
        ("KeyboardInterrupt", 130, "error: interrupted\n"),
        ("KeyboardInterrupt('nothing is queued')", 130, "error: nothing is queued\n"),
        ("SystemExit(3)", 3, ""),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_a_command_raises_becomes_one_message_and_an_exit_code(
    raised: str, code: int, said: str, rank: str
) -> None:
    command = "from fashion_ddp.console import entry_point; from fashion_ddp.errors import *\n@entry_point\n"
    command += f"def main(): raise {raised}\nmain()"
    assert shell('"$@"', command, RANK=rank) == (code, said if rank == "0" else "")


def test_an_error_without_a_plain_explanation_is_told_with_its_stack_and_where_to_look() -> None:
    code = "from fashion_ddp.console import entry_point\n@entry_point\ndef main(): 1 / 0\nmain()"
    exit_code, printed = shell('"$@"', code)
    *stack, error, where = printed.splitlines()
    assert exit_code == 1 and stack[0].startswith("Traceback") and error.startswith("ZeroDivisionError")
    assert (CHECKOUT / where.split()[0]).is_file()


@pytest.mark.parametrize("command", ["fashion_ddp.train", "fashion_ddp.compare", "launch.local", "launch.status"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_who_asks_for_help_may_leave_before_its_end(command: str, unbuffered: str) -> None:
    run = f"runpy.run_module('{command}', run_name='__main__', alter_sys=True)"
    code = f"import runpy, sys; sys.argv = ['x', '--help']; {run}"
    assert shell('"$@" 2>&1 | sleep 0', code, PYTHONUNBUFFERED=unbuffered) == (0, "")


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"caf\xe9 \udce9"), ("utf-8", "caf\u00e9 \\udce9")])
def test_a_path_that_the_terminal_cannot_show(encoding: str, shown: str) -> None:
    code = r"from fashion_ddp.console import say; say('caf\u00e9 \udce9')"
    assert shell('"$@"', code, PYTHONIOENCODING=encoding) == (0, shown + "\n")


@pytest.mark.parametrize(
    ("rank", "local_rank", "of", "speaks"),
    [
        (None, None, "run", True), ("0", "0", "run", True), ("1", "1", "run", False), ("2", "0", "run", False),
        ("2", "0", "machine", True), ("3", "1", "machine", False), (None, None, "machine", True),
        ("0", "0", "rank", True), ("1", "1", "rank", True),
    ],
)  # fmt: skip
def test_a_failure_is_told_once(rank: str | None, local_rank: str | None, of: str, speaks: bool) -> None:
    code = f"from fashion_ddp.console import fail; e = ValueError('the reason'); e.of_{of} = True; fail(e, 1)"
    place = {"RANK": rank, "LOCAL_RANK": local_rank}
    env = {name: value for name, value in place.items() if value is not None}
    assert shell('"$@"', code, **env) == (1, "error: the reason\n" if speaks else "")


@pytest.mark.parametrize("module", ["fashion_ddp.train", "fashion_ddp.compare", "launch.local", "launch.submit"])
def test_a_python_without_our_packages_is_told_in_one_line(module: str) -> None:
    line = [sys.executable, "-S", "-m", module, "--help"]  # without site-packages
    done = subprocess.run(line, cwd=CHECKOUT, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(
        r"error: .* has no torch, .*source \.venv/bin/activate.*\n", done.stderr
    )
