"""Print what a command says, and end it. Nothing that happens to the terminal stops a run."""

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from fashion_ddp.errors import CommandFailed, Stopped, UserError
from fashion_ddp.redact import redact, restrict_umask

P = ParamSpec("P")
T = TypeVar("T")


def entry_point(main: Callable[P, T]) -> Callable[P, T]:
    """Make a function the entry point of a command: what it raises becomes one message and an exit code.

    2: UserError. 1: CommandFailed, or any other exception with its stack. 130: Ctrl-C. 75 (EX_TEMPFAIL): Stopped.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        restrict_umask()
        try:
            return main(*args, **kwargs)
        except Stopped as error:
            if os.environ.get("RANK", "0") == "0":
                say(str(error))
            sys.exit(os.EX_TEMPFAIL)
        except UserError as error:
            fail(error, 2)
        except CommandFailed as error:
            fail(error, 1)
        except KeyboardInterrupt as error:
            fail(CommandFailed(str(error) or "interrupted"), 130)
        except Exception:  # noqa: BLE001 - no plain explanation is known
            crash()
        finally:
            _flush()

    return run


def say(text: str) -> None:
    """Print a line, above the progress bar where there is one."""
    if sys.stdout is None:  # closed from the start, as by `>&-`
        return
    # There is a bar only where tqdm is imported: help does not wait for it.
    write = sys.modules["tqdm"].tqdm.write if "tqdm" in sys.modules else print
    text = redact(text)
    try:
        try:
            write(text)
        except UnicodeEncodeError:  # a terminal that cannot show a character of a path
            encoding = sys.stdout.encoding
            write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError:  # nobody reads it any more: `| tee log` ends at Ctrl-C, before the run has saved
        _stop_writing()


def _flush() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _stop_writing()


def _stop_writing() -> None:
    """Write to nowhere from here on: Python's own last flush would fail again, and change the exit code."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


def fail(error: Exception, code: int) -> NoReturn:
    """Exit with a code and one message.

    All ranks find the same error, and rank 0 prints it for them. An error that only the ranks of one machine find
    (`of_machine`) is printed by the first of them; an error that one rank finds alone (`of_rank`), by that rank.
    """
    variable = "LOCAL_RANK" if getattr(error, "of_machine", False) else "RANK"
    speaks = getattr(error, "of_rank", False) or os.environ.get(variable, "0") == "0"
    if speaks:
        _complain(f"error: {error}\n")
    sys.exit(code)


def crash() -> NoReturn:
    """Exit with code 1 and the stack of the exception that is being handled, as Python does, but without secrets."""
    _complain(f"{traceback.format_exc()}docs/trouble-shooting.md says what may be wrong, and what a bug report needs\n")
    sys.exit(1)


def _complain(text: str) -> None:
    try:
        print(redact(text), end="", file=sys.stderr, flush=True)
    except OSError:  # nobody reads it, as above
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
