"""A user's own code, named as package.module:Name: found, called with typed arguments, and known again."""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from fashion_ddp.errors import UserError, nearest

# How the files begin that are not the user's own: this package's, Python's, what is installed, and what is no file.
INSTALLED = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]
OTHERS = (*(f"{folder}{os.sep}" for folder in (Path(__file__).parent, *INSTALLED)), "<")


def reach_current_folder() -> None:
    """Let modules of the current folder be imported: some launchers leave it out."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def find(name: str, what: str) -> Any:
    """What `package.module:Name` names; `what` it is to be, for the message. Imports the module.

    Raises UserError where there is no such module or name, or where importing it fails.
    """
    module, _, attribute = name.partition(":")
    reach_current_folder()
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} {name}: there is no module {error.name!r}{_at_line(error)}: run where it can be imported"
        ) from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} {name}: importing {module}: {described(error)}: correct it") from error
    if not hasattr(found, attribute):
        raise UserError(f"{what} {name}: {module} has no {attribute!r}: check the name after the colon")
    return getattr(found, attribute)


def described(error: Exception) -> str:
    """What went wrong in the user's code, and the line of it: `KeyError: 'x' (nets/mine.py, line 7)`."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}{f': {text}' if text else ''}{_at_line(error)}"


def _at_line(error: Exception) -> str:
    """The innermost line of the user's own code that an error came from; empty where it came from none."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno))
    own = [place for place in places if not place[0].startswith(OTHERS)]
    return f" ({_short(own[-1][0])}, line {own[-1][1]})" if own else ""


def _short(file: str) -> str:
    """The path, from the current folder where it lies in it."""
    return os.path.relpath(file) if Path(file).is_relative_to(Path.cwd()) else file


def source(name: str) -> Path | None:
    """The file of the module that `package.module:Name` names, which is not imported; None where there is none."""
    reach_current_folder()
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except Exception:  # noqa: BLE001 - a package whose import fails: `find` says why
        return None
    path = Path(spec.origin) if spec and spec.origin else None
    return path if path and path.is_file() else None


def source_hash(name: str) -> str | None:
    """sha256 of that file."""
    path = source(name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else None


def differs(name: str, copy: Path) -> bool:
    """Whether that file is not what `copy` holds, or is not there any more."""
    path = source(name)
    return path is None or not copy.is_file() or path.read_bytes() != copy.read_bytes()


def typed(function: Callable[..., Any], texts: Iterable[str]) -> dict[str, Any]:
    """Arguments given as `name=value`, of the types that the function's signature asks for, after its first two.

    A type is that of the annotation, else of the default, else what the value is in YAML. Raises UserError for a name
    that the function does not take, or a value that is not of its type.
    """
    if not callable(function):
        return {}
    takes = dict(list(inspect.signature(function).parameters.items())[2:])
    takes_any = any(one.kind is one.VAR_KEYWORD for one in takes.values())
    named = {name: one for name, one in takes.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception:  # noqa: BLE001 - an annotation that cannot be looked up: the default tells
        hints = {}
    found = {}
    for name, _, text in (text.partition("=") for text in texts):
        if name not in named and not takes_any:
            raise UserError(f"model_args: unknown {name!r}; {nearest(name, named) if named else 'it takes none'}")
        default = named[name].default if name in named else None
        kind = hints.get(name, type(default) if default not in (None, inspect.Parameter.empty) else None)
        found[name] = _value(name, text, kind)
    return found


def _value(name: str, text: str, kind: Any) -> Any:
    options = typing.get_args(kind)
    if type(None) in options:
        if text == "None":
            return None
        kind = next(option for option in options if option is not type(None))
    try:
        if kind is str:
            return text
        if kind in (int, float):
            return kind(text)
        value = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        value = ...
    if value is ... or (kind is bool and not isinstance(value, bool)):
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(
            kind, "a value as YAML writes it"
        )
        raise UserError(f"model_args: {name} must be {wanted}, got {text!r}")
    if typing.get_origin(kind) is typing.Literal and value not in options:
        raise UserError(f"model_args: {name}: unknown {text!r}; {nearest(text, map(str, options))}")
    return tuple(value) if isinstance(value, list) and tuple in (kind, typing.get_origin(kind)) else value
