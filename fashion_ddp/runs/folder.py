"""The run folder, as training writes it: the only interface between training and everything that reads results.

    config.yaml               the resolved settings; loads back with --config
    environment.json          one object per start: versions, machine, ranks, code, data, command
    metrics.jsonl             one object per epoch
    steps.jsonl               about 100 objects per epoch
    summary.json              status and the last figures: what a table needs
    model.txt                 the model's layers, as printed at the start
    predictions.safetensors   logits [n, classes] float32, predicted [n] int64, labels [n] int64 of the test set
    examples.safetensors      what a report draws: training samples, test images, feature maps of one of them
    model.safetensors         the weights after the last epoch
    checkpoints/              what a run that was stopped or killed continues from; the newest two
    logs/                     one file per rank: stacks and errors

Written by rank 0 alone (but its log, by each rank). Files are replaced whole or appended to by the line, so that a
reader sees no half file; half a last line, which a kill may leave, is mended when the run continues.
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

FORMAT = 1  # of summary.json; counts up when a reader of old folders would misread new ones


def plain(value: Any) -> Any:
    """A value as strict JSON can hold it: null for what is not finite, text for a path; and without secrets."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return redact(str(value)) if isinstance(value, str | Path) else value


@dataclass(frozen=True)
class RunFolder:
    """A run folder that this run may write. Every write raises TrainingFailed where it cannot be done."""

    path: Path
    finished: bool = False  # it holds this very run, complete: nothing is left to do
    lock: Lock | None = None

    def make(self, name: str) -> None:
        """Make a folder inside, where there is none."""
        with self._writing(name):
            (self.path / name).mkdir(exist_ok=True)

    def write(self, name: str, content: str | bytes) -> None:
        """Replace a file, whole."""
        with self._writing(name):
            write_whole(self.path / name, content, self._check)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with self._writing(name), open(self.path / name, "a") as file:
            file.write(_lines(rows))

    def keep_lines(self, name: str, keep: list[dict[str, Any]]) -> None:
        """Leave only these of a file's rows, where it holds others."""
        path, content = self.path / name, _lines(keep)
        with self._writing(name):
            changed = path.exists() and path.read_bytes() != content.encode()
        if changed:
            self.write(name, content)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
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
    return "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
