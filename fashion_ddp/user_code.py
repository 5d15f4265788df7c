"""Work with a user's own code, named as package.module:Name: load it, convert its arguments, recognize its source."""

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
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import yaml

from fashion_ddp.errors import UserError, nearest

INSTALLED = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]
# Beginnings of file names that are not the user's own: this package, Python, installed packages, and `<string>` etc.
NOT_USER_CODE = (*(f"{folder}{os.sep}" for folder in (Path(__file__).parent, *INSTALLED)), "<")
_sources: WeakKeyDictionary[ModuleType, str | None] = WeakKeyDictionary()  # the hash of each module's file, as loaded


def add_current_folder_to_path() -> None:
    """Make modules in the current folder importable: some launchers leave it out of sys.path."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def load(name: str, what: str) -> Any:
    """Import a module, anew where its file has changed, and return the object that `package.module:Name` names in it.

    `what` says in messages what the object is for: "model" or "dataset". Raises UserError where there is no such module
    or name, or where the import fails.
    """
    module, _, attribute = name.partition(":")
    add_current_folder_to_path()
    try:
        source = source_hash(name)
        imported = importlib.import_module(module)
        if _sources.setdefault(imported, source) != source:  # edited between two runs of this process
            importlib.reload(imported)
            _sources[imported] = source
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} {name}: there is no module {error.name!r}{_at_line(error)}: run where it can be imported"
        ) from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} {name}: importing {module}: {describe_error(error)}: correct it") from error
    if not hasattr(imported, attribute):
        raise UserError(f"{what} {name}: {module} has no {attribute!r}: check the name after the colon")
    return getattr(imported, attribute)


def describe_error(error: Exception) -> str:
    """Return an error of the user's code with its line: `KeyError: 'x' (nets/mine.py, line 7)`."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}{f': {text}' if text else ''}{_at_line(error)}"


def _at_line(error: Exception) -> str:
    """Return the innermost line of the user's own code that an error came from; "" where it came from other code."""
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((error.filename, error.lineno))
    own = [(file, number) for file, number in lines if not file.startswith(NOT_USER_CODE)]
    return f" ({_relative_path(own[-1][0])}, line {own[-1][1]})" if own else ""


def _relative_path(file: str) -> str:
    """Return the path relative to the current folder if the file is below it, else the path as it is."""
    return os.path.relpath(file) if Path(file).is_relative_to(Path.cwd()) else file


def source_path(name: str) -> Path | None:
    """Return the file of the module that `package.module:Name` names, without importing it; None if there is none."""
    add_current_folder_to_path()
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except Exception:  # noqa: BLE001 - a package whose import fails: `load` says why
        return None
    path = Path(spec.origin) if spec and spec.origin else None
    return path if path and path.is_file() else None


def source_hash(name: str) -> str | None:
    """Return the sha256 of the module's file; None if there is none."""
    path = source_path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else None


def source_differs(name: str, copy: Path) -> bool:
    """Return whether the module's file differs from `copy`, or one of the two is missing."""
    path = source_path(name)
    return path is None or not copy.is_file() or path.read_bytes() != copy.read_bytes()


def convert_arguments(function: Callable[..., Any], texts: Iterable[str]) -> dict[str, Any]:
    """Convert arguments given as `name=value` to the types in the function's signature, its first two left out.

    The type is that of the annotation, else of the default, else the one that YAML reads. Raises UserError for a name
    that the function does not take, or for a value of another type.
    """
    if not callable(function):
        return {}
    parameters = dict(list(inspect.signature(function).parameters.items())[2:])
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception:  # noqa: BLE001 - an annotation that cannot be looked up: the default tells the type
        hints = {}
    converted = {}
    for name, _, text in (text.partition("=") for text in texts):
        if name not in named and not takes_any:
            raise UserError(f"model_args: unknown {name!r}; {nearest(name, named) if named else 'it takes none'}")
        default = named[name].default if name in named else None
        kind = hints.get(name, type(default) if default not in (None, inspect.Parameter.empty) else None)
        converted[name] = _convert(name, text, kind)
    return converted


def _convert(name: str, text: str, kind: Any) -> Any:
    """Convert one argument's text to the type `kind`; None stands for the type that YAML reads."""
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
