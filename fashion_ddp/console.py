"""What a run says on the terminal. Nothing that happens to the terminal stops a run."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from fashion_ddp.redact import redact


def say(text: str) -> None:
    """Print a line, above the progress bar where there is one."""
    from tqdm import tqdm  # not at the top: a mistake in the command is answered without it

    if sys.stdout is None:  # closed from the start, as by `>&-`
        return
    text = redact(text)
    try:
        try:
            tqdm.write(text)
        except UnicodeEncodeError:  # a terminal that cannot show a character of a path
            encoding = sys.stdout.encoding
            tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError:  # whoever read it is gone: `| tee log` ends at Ctrl-C, before the run has saved
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


@contextlib.contextmanager
def broken_pipe_ok() -> Iterator[None]:
    """While a command line is read: who asks for help may leave before its end, as in `--help | head`."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
        sys.exit(0)


def fail(error: Exception, code: int) -> NoReturn:
    """End with an exit code and one message.

    Rank 0 prints for all, who find the same; what only a machine's ranks may find, the first rank there prints, and
    what one rank may find alone, each that does.
    """
    variable = "LOCAL_RANK" if getattr(error, "of_machine", False) else "RANK"
    speaks = getattr(error, "of_rank", False) or os.environ.get(variable, "0") == "0"
    if speaks and str(error):
        _complain(f"error: {error}\n")
    sys.exit(code)


def crash() -> NoReturn:
    """End with exit code 1 and the stack of the exception that is being handled, as Python does, without secrets."""
    _complain(f"{traceback.format_exc()}docs/trouble-shooting.md says what may be wrong, and what a bug report needs\n")
    sys.exit(1)


def _complain(text: str) -> None:
    try:
        print(redact(text), end="", file=sys.stderr, flush=True)
    except OSError:  # nobody reads it; Python would fail again at its own last flush, and change the exit code
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
