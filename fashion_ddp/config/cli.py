"""The command line of a run. Nothing here imports torch, so that help and a mistake take a fraction of a second."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fashion_ddp.config import Config, convert, default_runs_dir, field_types, flags
from fashion_ddp.config.layers import make_config, read_mapping, read_section
from fashion_ddp.errors import UserError
from fashion_ddp.redact import refuse_secrets


@dataclass(frozen=True)
class Command:
    """Train one model. Where no flag sets a value, the file of --config does, else the recipe: the defaults shown are
    those of the chosen model, recipe and file."""

    run: Config
    # What to do with the run
    config: Path | None = None
    """YAML file of settings, such as config.yaml of another run's folder; flags win over it."""
    fresh: bool = False
    """Keep an existing run folder as <name>.1 and train anew."""
    reuse: bool = False
    """Accept a finished run made by other code or versions."""
    check_only: bool = False
    """Check the command, the data and the machine; start nothing."""


def parse(argv: list[str] | None = None) -> Command:
    """Read a command line (None: that of this process) into a validated Command.

    Raises UserError for any mistake. Prints help and exits with 0 where that is asked for.
    """
    given, others = flags.read(Command, sys.argv[1:] if argv is None else argv)
    help_wanted = given.pop("help", False)
    if not help_wanted:
        flags.refuse_unknown_flags(others, flags.flag_names(Command))
        flags.refuse_words(others, Command)
    command = _combine(given)
    if help_wanted:
        flags.show_help(Command, "fashion_ddp.train", asdict(command) | asdict(command.run))
    return command


def from_keywords(given: dict[str, Any]) -> Command:
    """Make a validated Command from values by the names of flags, with underscores.

    Raises UserError for any mistake.
    """
    known = {name: argument for name, argument in flags.arguments(Command).items() if name != "check_only"}
    for name in given:
        if name not in known:
            hint = flags.suggest(name, known)
            raise UserError(f"unknown setting {name!r}; {hint}python -m fashion_ddp.train --help lists all")
    return _combine({name: convert(name, value, known[name].kind) for name, value in given.items()})


def _combine(given: dict[str, Any]) -> Command:
    """Make a Command from what is given of it and of its run's settings."""
    file = given.get("config")
    from_file = read_section(file, *read_mapping(file)) if file is not None else {}
    settings = {name: given.pop(name) for name in list(given) if name in field_types()}
    run = make_config({"runs_dir": default_runs_dir()}, from_file, settings)
    refuse_secrets(asdict(run))
    return Command(run, **given)
