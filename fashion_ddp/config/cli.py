"""The command line of a run. Help and a mistake are answered in a fraction of a second: nothing imports torch."""

import argparse
import itertools
import os
import re
import sys
import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from fashion_ddp.config import Config, convert, field_types
from fashion_ddp.config.layers import checked, make_config, read_mapping
from fashion_ddp.console import broken_pipe_ok
from fashion_ddp.errors import UserError
from fashion_ddp.redact import hide_values, refuse_secrets


@dataclass(frozen=True)
class Command:
    """What to do with a run, beside the run itself."""

    run: tyro.conf.OmitArgPrefixes[Config]
    config: Path | None = None
    """YAML file of settings, such as config.yaml of another run's folder; flags win over it."""
    fresh: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep an existing run folder as <name>.1 and train anew."""
    reuse: tyro.conf.FlagCreatePairsOff[bool] = False
    """Accept a finished run made by other code or versions."""
    check_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check the command, the data and the machine; start nothing."""


def _flags(argv: list[str]) -> dict[str, Any]:
    """The settings that flags give, as Config's types; dashes and underscores are the same.

    Read here and not by tyro, because they decide the defaults of the others (--model, --recipe), and because a
    wrong value deserves one line.
    """
    settings: dict[str, Any] = {}
    for at, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        kind = field_types().get(name.removeprefix("no_"))
        if not flag.startswith("--") or kind is None:
            continue
        if kind is bool:
            settings[name.removeprefix("no_")] = not name.startswith("no_")
            continue
        if typing.get_origin(kind) is tuple:
            words = itertools.takewhile(lambda word: not word.startswith("--"), argv[at + 1 :])
            settings[name] = convert(name, [value] if equals else list(words))
            continue
        if not equals and at + 1 == len(argv):
            raise UserError(f"{name} needs a value after {flag}")
        text = value if equals else argv[at + 1]
        whole = int in (kind, *typing.get_args(kind)) and re.fullmatch(r"[+-]?\d+", text)
        settings[name] = convert(name, int(text) if whole else None if text == "None" else text)
    return settings


def parse(argv: list[str] | None = None) -> Command:
    """The command line as a validated Command. Raises UserError; prints help and leaves with 0 when asked to."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        raise UserError(f"{argv[0]!r} is no flag: every setting is one, as in --model linear")
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path, nargs="?")  # without a value: tyro says so
    file = files.parse_known_args(argv)[0].config
    from_environment = {"runs_dir": Path(folder)} if (folder := os.environ.get("FASHION_DDP_RUNS_DIR")) else {}
    from_file = checked(file, *read_mapping(file)) if file is not None else {}
    base = make_config(from_environment, from_file, _flags(argv))
    refuse_secrets(asdict(base))
    try:
        # What tyro adds to the values that we have: help, and misspelt flags found.
        with broken_pipe_ok():
            return tyro.cli(
                Command,
                prog="python -m fashion_ddp.train",
                args=list(hide_values(argv)),  # of flags that we do not have: it shows them
                default=Command(run=base),
                console_outputs=os.environ.get("RANK", "0") == "0",
            )
    except SystemExit as stop:
        if stop.code:
            raise UserError("") from None  # tyro has said it
        raise
