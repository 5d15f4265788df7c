"""Read the command line of any command. Its flags are the fields of a dataclass; the text below a field explains it.

A comment above a field begins a group of --help. A field that is a dataclass itself stands for the fields of that one.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import os
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

from fashion_ddp.config import Config, convert
from fashion_ddp.console import say
from fashion_ddp.errors import UserError

T = TypeVar("T")
Positional = Annotated[T, "positional"]  # a field whose value is given without a flag

WIDTH = 100  # columns of --help, at most
VALUES = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}  # what --help writes for a value


class Documented(NamedTuple):
    """What the source of a dataclass says about a field."""

    kind: str
    meaning: str
    group: str  # the comment above this field, or above the nearest field before it that has one


@cache
def documentation(cls: type) -> dict[str, Documented]:
    """Read what the source of a dataclass says about each of its fields."""
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    [body] = [node.body for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.ClassDef)]
    found, group = {}, ""
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            above = lines[field.lineno - 2].strip()
            group = above.removeprefix("# ") if above.startswith("# ") else group
            meaning = " ".join(ast.literal_eval(text.value).split())
            found[field.target.id] = Documented(ast.unparse(field.annotation), meaning, group)
    return found


@dataclasses.dataclass(frozen=True)
class Argument:
    """A field of a dataclass as the command line knows it."""

    cls: type
    name: str
    kind: Any
    default: Any  # dataclasses.MISSING where one must be given
    positional: bool

    @property
    def flags(self) -> list[str]:
        """None of a positional argument. --no-flag exists for what a recipe or a file may have turned on."""
        name, negatable = self.name.replace("_", "-"), self.cls is Config and self.kind is bool
        return [] if self.positional else [f"--{name}"] + [f"--no-{name}"] * negatable

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.kind) is tuple

    @property
    def documented(self) -> Documented:
        return documentation(self.cls)[self.name]

    def add_to(self, parser: Any, **settings: Any) -> None:
        """Add this argument to an argparse parser or group. Every value stays text."""
        options = typing.get_args(self.kind)
        one = next((option for option in options if option is not type(None)), self.kind)
        if self.kind is bool:
            settings |= {"action": argparse.BooleanOptionalAction if len(self.flags) > 1 else "store_true"}
        elif typing.get_origin(self.kind) is Literal:
            settings |= {"metavar": f"{{{','.join(options)}}}"}
        else:
            settings |= {"metavar": self.name.upper() if self.positional else VALUES[one]}
        parser.add_argument((self.flags or [self.name])[0], **settings, **({"nargs": "*"} if self.is_list else {}))

    def typed(self, value: Any) -> Any:
        """Convert a word, a list of words or a bool to the type of the field. Raises UserError."""
        options = typing.get_args(self.kind)

        def plain(word: str) -> Any:
            whole = int in (self.kind, *options) and re.fullmatch(r"[+-]?\d+", word)
            return int(word) if whole else None if word == "None" and type(None) in options else word

        if isinstance(value, str):
            value = plain(value)
        elif isinstance(value, list):
            value = [plain(word) for word in value]
        return convert(self.name, value, self.kind)


@cache
def arguments(cls: type) -> dict[str, Argument]:
    """Return the arguments that the fields of a dataclass stand for, by name."""
    found: dict[str, Argument] = {}
    kinds = typing.get_type_hints(cls)
    positional = {name for name, kind in typing.get_type_hints(cls, include_extras=True).items() if kind != kinds[name]}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(kind := kinds[field.name]):
            found |= arguments(kind)  # type: ignore[arg-type]
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = Argument(cls, field.name, kind, default, field.name in positional)
    return found


def flag_names(cls: type) -> list[str]:
    """Return all flags of a dataclass, as --batch-size."""
    return [flag for argument in arguments(cls).values() for flag in argument.flags]


def _parser(**settings: Any) -> argparse.ArgumentParser:
    settings |= {"argument_default": argparse.SUPPRESS, "allow_abbrev": False, "exit_on_error": False}
    parser = argparse.ArgumentParser(add_help=False, **settings)
    parser.add_argument("-h", "--help", action="store_true", help="Show this text.")
    return parser


def read(cls: type, words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Read only what a command line gives. Returns the values by field, with `help` where it is asked for; and the
    words that belong to no flag of `cls`.

    Raises UserError for a flag without its value, and for a value that its field cannot take.
    """
    try:
        given, others = _reader(cls).parse_known_args(list(_with_dashes(cls, words)))
    except argparse.ArgumentError as error:  # the only mistake that is left for argparse to find
        flag = str(error.argument_name)
        raise UserError(f"{_name(flag)} needs a value, as in {flag}=VALUE") from None
    values = {n: arguments(cls)[n].typed(value) if n != "help" else True for n, value in vars(given).items()}
    return values, others


@cache  # a submission reads the flags of each of its runs
def _reader(cls: type) -> argparse.ArgumentParser:
    parser = _parser()
    for argument in arguments(cls).values():
        if not argument.positional:
            argument.add_to(parser)
    return parser


def _with_dashes(cls: type, words: list[str]) -> Iterator[str]:
    """Spell each flag as argparse knows it: --batch_size becomes --batch-size, and --seeds=0 1 becomes --seeds 0 1."""
    for word in words:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        argument = next((argument for argument in arguments(cls).values() if flag in argument.flags), None)
        if argument and argument.kind is bool and equals:
            raise UserError(f"{flag} takes no value, got {value!r}: write {' or '.join(argument.flags)}")
        if argument and argument.is_list and equals and not value.startswith("-"):
            yield from (flag, value)
        else:
            yield flag + equals + value


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def parse(cls: type[T], program: str, words: list[str] | None = None) -> T:
    """Read a command line (None: that of this process) into a dataclass.

    Raises UserError for any mistake. Prints help and exits with 0 where that is asked for.
    """
    words = sys.argv[1:] if words is None else words
    at = words.index("--") if "--" in words else len(words)  # no word after it is a flag
    given, others = _read_or_help(cls, program, words[:at])
    refuse_unknown_flags(others, flag_names(cls))
    others += words[at + 1 :]
    for argument in arguments(cls).values():  # type: ignore[arg-type]
        if argument.positional and others:
            taken, others = (others, []) if argument.is_list else (others[0], others[1:])
            given[argument.name] = argument.typed(taken)
        if argument.default is dataclasses.MISSING and argument.name not in given:
            raise UserError(f"{argument.name.upper()} is missing: {argument.documented.meaning} See --help")
    refuse_words(others, cls)
    return cls(**given)


def parse_known(cls: type[T], program: str, words: list[str] | None = None) -> tuple[T, list[str]]:
    """Read a command line as `parse` does, but return the words that belong to no flag of `cls`, unchecked."""
    given, others = _read_or_help(cls, program, sys.argv[1:] if words is None else words)
    return cls(**given), others


def _read_or_help(cls: type, program: str, words: list[str]) -> tuple[dict[str, Any], list[str]]:
    given, others = read(cls, words)
    if given.pop("help", False):
        show_help(cls, program)
    return given, others


def refuse_unknown_flags(words: Iterable[str], known: list[str]) -> None:
    """Raise UserError for a flag among the words that is not known. No value is shown: it may be a secret."""
    for flag in (word.partition("=")[0] for word in words if re.match(r"-(?!\.?\d)", word)):  # -1 is a number
        if flag not in known:
            hint = suggest(flag.strip("-"), [name.strip("-") for name in known], "--")
            raise UserError(f"unknown flag {flag}; {hint}see --help")


def suggest(name: str, known: Iterable[str], before: str = "") -> str:
    """Return "did you mean ...? " with the known name that is nearest, and what stands `before` it; "" for none."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {before}{near[0]}? " if near else ""


def refuse_words(words: list[str], cls: type) -> None:
    """Raise UserError for a word that no flag takes."""
    if words:
        flag, default = next((a.flags[0], a.default) for a in arguments(cls).values() if a.flags)
        raise UserError(f"{words[0]!r} is no flag, and no flag takes it: a value follows its flag, as {flag} {default}")


def show_help(cls: type, program: str, defaults: Mapping[str, Any] | None = None) -> NoReturn:
    """Print the help of a command and exit with 0. `defaults` are those that hold instead of the fields' own."""
    every = arguments(cls).values()
    words = [f"[{a.name.upper()} ...]" if a.is_list else a.name.upper() for a in every if a.positional]
    columns = min(WIDTH, shutil.get_terminal_size().columns)
    parser = _parser(
        usage=" ".join([f"python -m {program} [flags]", *words]),
        description=inspect.getdoc(cls),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=columns),
    )
    groups: dict[str, Any] = {}
    for argument in every:
        title = "Arguments" if argument.positional else argument.documented.group or "Flags"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = (defaults or {}).get(argument.name, argument.default)
        shown = "" if default in ((), dataclasses.MISSING) else f" (default: {_shown(default)})"
        argument.add_to(groups[title], help=(argument.documented.meaning + shown).replace("%", "%%"))
    if os.environ.get("RANK", "0") == "0":
        say(parser.format_help().rstrip())
    sys.exit(0)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
