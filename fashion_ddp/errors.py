"""What goes wrong in ways that have a plain explanation, and words for the messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: its text says what is wrong, where, and how to fix it. Exit code 2."""


class CommandFailed(RuntimeError):
    """A command could not do all that it was asked to, and its text says why. Exit code 1."""


class TrainingFailed(CommandFailed):
    """Training went wrong in a way that has a plain explanation. Exit code 1."""


class Stopped(RuntimeError):
    """Training was told to stop, and saved what it had: the same command continues. Exit code os.EX_TEMPFAIL (75)."""

    def __init__(self, text: str, reason: str):
        super().__init__(text)
        self.reason = reason  # a signal's name, or what else it was told


def nearest(word: str, choices: Iterable[str]) -> str:
    """The text that ends a message about an unknown word: what was probably meant, and what there is."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + "choices: " + ", ".join(choices)


def counted(n: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
