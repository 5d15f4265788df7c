"""Write a run folder, the only interface between training and everything that reads results.

    config.yaml               the resolved settings; loads back with --config
    environment.json          one object per start: versions, machine, ranks, code, data, command
    metrics.jsonl             one object per epoch
    steps.jsonl               about 100 objects per epoch
    summary.json              status and the last figures: what a table needs
    model.txt                 the model's layers, as printed at the start
    predictions.safetensors   logits [n, classes] float32, predicted [n] int64, labels [n] int64 of the test set
    examples.safetensors      what a report draws: training samples, test images, feature maps of one of them
    model.safetensors         the weights that the run kept
    checkpoints/              what a run that was stopped or killed continues from; the newest two
    logs/                     one file per rank: stacks and errors

Only rank 0 writes, except for logs/. A file is replaced atomically, or lines are appended to it, so that a reader never
sees half a file. A kill may leave an incomplete last line, which is removed when the run continues.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashion_ddp.errors import TrainingFailed
from fashion_ddp.files import write_whole
from fashion_ddp.redact import redact
from fashion_ddp.runs.lock import Lock

FORMAT = 1  # of summary.json; increased when a reader of the old format would misread the new one


def to_jsonable(value: Any) -> Any:
    """Return a value that strict JSON can hold: None for numbers that are not finite, text for paths, no secrets."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(v) for v in value]
    return redact(str(value)) if isinstance(value, str | Path) else value


@dataclass(frozen=True)
class RunFolder:
    """A run folder that this process may write. Every write raises TrainingFailed where it fails."""

    path: Path
    finished: bool = False  # the folder holds exactly this run, finished: nothing is left to do
    lock: Lock | None = None

    def make_folder(self, name: str) -> None:
        """Make a folder inside, unless it exists."""
        with self._explain_errors(name):
            (self.path / name).mkdir(exist_ok=True)

    def write(self, name: str, content: str | bytes) -> None:
        """Replace a file atomically."""
        with self._explain_errors(name):
            write_whole(self.path / name, content, self._check)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(to_jsonable(value), indent=1, allow_nan=False) + "\n")

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Append rows to a file of JSON lines."""
        with self._explain_errors(name), open(self.path / name, "a") as file:
            file.write(_lines(rows))

    def keep_rows(self, name: str, keep: list[dict[str, Any]]) -> None:
        """Remove all other rows from a file of JSON lines."""
        path, content = self.path / name, _lines(keep)
        with self._explain_errors(name):
            changed = path.exists() and path.read_bytes() != content.encode()
        if changed:
            self.write(name, content)

    @contextlib.contextmanager
    def _explain_errors(self, name: str) -> Iterator[None]:
        """Check the lock, then turn an OSError of the block into TrainingFailed, which names the file."""
        try:
            self._check()
            yield
        except OSError as error:
            raise TrainingFailed(
                f"{self.path / name} cannot be written ({error.strerror or error}): mend that, and give the same "
                "command again, which continues from the last checkpoint"
            ) from error

    def _check(self) -> None:
        if self.lock is not None:
            self.lock.check()


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(to_jsonable(row), allow_nan=False) + "\n" for row in rows)
