"""Errors that a message can explain, and helpers that write such messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user can fix this: the text says what is wrong, where, and how to fix it. Exit code 2."""

    of_rank = False  # each rank prints it, because rank 0 may not find it


class CommandFailed(RuntimeError):
    """A command could not do all that it was asked to, and its text says why. Exit code 1."""


class TrainingFailed(CommandFailed):
    """Training failed, and the text explains why. Exit code 1."""


class Stopped(RuntimeError):
    """A command was asked to stop and has saved what it did: the same one continues. Exit code os.EX_TEMPFAIL (75)."""

    def __init__(self, position: str | None, reason: str):
        """`position`: where in a run it is saved; None where it goes on from what was saved before."""
        saved = f" and saved in {position}" if position else ""
        super().__init__(f"stopped ({reason}){saved}: the same command continues")
        self.reason = reason  # a signal's name, or what else asked for the stop


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: the choice that was probably meant, and all choices."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + "choices: " + ", ".join(choices)


def pluralize(n: int, noun: str) -> str:
    """Return a number with its noun: `1 rank`, `2 ranks`."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
