"""What others must not get: secrets in what a run writes and says, and the right to change its files."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fashion_ddp.errors import UserError

# Names of variables and flags whose values are secret: WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, --password.
_WORDS = "key|apikey|token|secret|password|passwd|passphrase|credential|jwt"
_NAME = re.compile(rf"(?:^|[^a-z])(?:{_WORDS})s?(?:[^a-z]|$)", re.IGNORECASE)
_IN_URL = re.compile(r"(://[^/\s:@]*):[^/\s@]+@")  # https://user:password@host
SHORTEST = 8  # characters of a secret: shorter values are parts of other words


def secrets() -> dict[str, str]:
    """The environment's secrets: each value, and the variable that holds it. The path of a key's file is none."""
    named = ((name, value) for name, value in os.environ.items() if len(value) >= SHORTEST and _NAME.search(name))
    found = {value: name for name, value in named if not os.path.exists(value)}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))  # one that holds another comes first


def redact(text: str) -> str:
    """A text with *** in the place of secrets."""
    for value in secrets():
        text = text.replace(value, "***")
    return _IN_URL.sub(r"\1:***@", text)


def refuse_secrets(settings: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that holds a secret: settings are written into the run's files and name it."""
    for setting, value in settings.items():
        for secret, variable in secrets().items():
            if isinstance(value, str | Path | tuple) and secret in str(value):
                raise UserError(
                    f"{setting}: holds the value of ${variable}, which by its name is secret, and would be written "
                    f"into the run's files: choose another, or unset {variable} if it is none"
                )


def restrict_umask() -> None:
    """Whatever this process makes from here on, only its user, and the group where the umask lets it, may change."""
    os.umask(os.umask(0o022) | 0o002)
