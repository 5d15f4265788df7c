"""Keep secrets out of what a run writes and prints, and keep other users from changing its files."""

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
SHORTEST = 8  # characters: a shorter value may be a part of an ordinary word


def find_secrets() -> dict[str, str]:
    """Return the secrets in the environment: each value with its variable's name, longest value first.

    The path of an existing file (of a key, for example) is not a secret.
    """
    named = ((name, value) for name, value in os.environ.items() if len(value) >= SHORTEST and _NAME.search(name))
    found = {value: name for name, value in named if not os.path.exists(value)}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))  # one secret may contain another


def redact(text: str) -> str:
    """Replace each secret in a text by ***."""
    for value in find_secrets():
        text = text.replace(value, "***")
    return _IN_URL.sub(r"\1:***@", text)


def refuse_secrets(settings: Mapping[str, Any]) -> None:
    """Raise UserError for a setting that contains a secret, because settings are written into the run's files."""
    secrets = find_secrets()
    for setting, value in settings.items():
        for secret, variable in secrets.items():
            if isinstance(value, str | Path | tuple) and secret in str(value):
                raise UserError(
                    f"{setting}: holds the value of ${variable}, whose name says that it is secret, and would be "
                    f"written into the run's files: choose another, or unset {variable} if it is no secret"
                )


def restrict_umask() -> int:
    """Let only the user, and the group if the umask allows it, change the files that this process makes from now on.

    Returns the umask before.
    """
    before = os.umask(0o022)
    os.umask(before | 0o002)
    return before
