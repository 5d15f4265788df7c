"""How a run tells what it does: files always, the screen, and W&B where it can; all from rank 0.

The files of the run folder are the record, and W&B mirrors them. A run that continues takes the record up where its
checkpoint was saved: what was written after it is taken back, and will be written again.
"""

import math
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from fashion_ddp.config import Config
from fashion_ddp.console import say
from fashion_ddp.distributed.world import LOST_RANK, World, is_lost_rank
from fashion_ddp.errors import Stopped, TrainingFailed, UserError, pluralize
from fashion_ddp.runs.folder import FORMAT, RunFolder
from fashion_ddp.runs.reading import load_run
from fashion_ddp.tracking.mirror import WandbMirror, panels
from fashion_ddp.training.evaluate import Scores
from fashion_ddp.training.step import Trained

POINTS = 100  # per epoch in steps.jsonl


class NullRecorder:
    """The recorder of every rank but the first: says and writes nothing."""

    def begin_epoch(self, epoch: int, steps: int) -> None: ...

    def steps(self, trained: Sequence[Trained]) -> None: ...

    def epoch(self, scores: Mapping[str, Scores], timings: Mapping[str, float]) -> None: ...

    def finish(self, figures: Mapping[str, Any], test_images: np.ndarray) -> None: ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the record."""
        return {}


class Recorder(NullRecorder):
    """The recorder of rank 0."""

    def __init__(self, folder: RunFolder, cfg: Config, known: dict[str, Any], saved: dict[str, Any]):
        """`saved`: the state to go on from, or empty. What the files hold beyond it is taken back."""
        self.folder, self.epochs = folder, cfg.epochs
        self.step = saved.get("step", 0)  # updates since the run began
        self.lr = saved.get("lr", 0.0)
        self.total, self.bin = (Sums(**saved.get(name, {})) for name in ("total", "bin"))
        self.bar = tqdm(disable=True)
        old = load_run(folder.path)
        points = [row for row in old.steps if row["step"] <= self.step]
        epochs = [row for row in old.metrics if row["step"] < self.step]  # one saved at its end is evaluated again
        folder.keep_rows("steps.jsonl", points)
        folder.keep_rows("metrics.jsonl", epochs)
        self.known = {"format": FORMAT, **known, **(epochs[-1] if epochs else {})}
        self.wandb: WandbMirror | None = None
        # The name that W&B knows the run by stands in the folder before W&B is told of it.
        if cfg.tracker != "none" or "wandb_id" in old.summary:
            self.known["wandb_id"] = old.summary.get("wandb_id") or secrets.token_hex(4)
        self.summary("running")
        if cfg.tracker != "none":
            shown = panels.run_config(cfg, self.known, old.environment)
            self.wandb = WandbMirror(folder.path, cfg, self.known["wandb_id"], shown)
            self.wandb.start(points, epochs)

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "lr": self.lr, "total": asdict(self.total), "bin": asdict(self.bin)}

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """An epoch begins, or goes on where its checkpoint was saved."""
        done = self.step - (epoch - 1) * steps
        if not done:
            self.total, self.bin = Sums(), Sums()
        self.now, self.left = epoch, steps - done
        self.bin_size = math.ceil(steps / POINTS)
        where = {"total": steps, "initial": done, "desc": f"epoch {epoch}", "unit": "step"}
        self.bar = tqdm(**where, leave=False, disable=not sys.stderr.isatty())

    def steps(self, trained: Sequence[Trained]) -> None:
        """Add up what a window's steps did; each full bin becomes a point of steps.jsonl."""
        points: list[dict[str, Any]] = []
        for one in trained:
            self.total.add(one)
            self.bin.add(one)
            self.lr = one.lr
            self.step, self.left = self.step + 1, self.left - 1
            if self.left % self.bin_size == 0:
                at = {"epoch": self.now, "step": self.step}
                points.append(at | {"loss": self.bin.mean_loss, "accuracy": self.bin.accuracy, "lr": one.lr})
                self.bin = Sums()
        self.folder.append("steps.jsonl", points)
        if self.wandb:
            self.wandb.log_steps(points)
        self.bar.update(len(trained))

    def epoch(self, scores: Mapping[str, Scores], timings: Mapping[str, float]) -> None:
        """Write and show an epoch's row."""
        self.bar.close()
        row: dict[str, Any] = {"epoch": self.now, "step": self.step, "lr": self.lr}
        row |= {"train/loss": self.total.mean_loss, "train/accuracy": self.total.accuracy}
        for name, score in scores.items():
            row |= {f"{name}/loss": score.loss, f"{name}/accuracy": score.accuracy}
        row |= timings
        self.folder.append("metrics.jsonl", [row])
        if self.wandb:
            self.wandb.log_epochs([row])
        self.summary("running", row)
        shown = [f"epoch {self.now}/{self.epochs}"]
        for name in ("train", *scores):
            shown.append(f"{name} loss {row[f'{name}/loss']:.4f} accuracy {100 * row[f'{name}/accuracy']:.2f} %")
        shown.append(f"{row['time/train_s']:.2f} s + {row['time/eval_s']:.2f} s evaluation")
        shown.append(f"{row['throughput/images_per_s']:,.0f} images/s")
        say(" | ".join(shown))

    def finish(self, figures: Mapping[str, Any], test_images: np.ndarray) -> None:
        """Complete summary.json, and say where everything is."""
        self.summary("finished", figures)
        if self.wandb:
            self.wandb.update_summary(self.known)
            self.wandb.show_results(test_images)
        trained = self.known["time/train_total_s"] + self.known["time/eval_total_s"]
        whole = self.known["time/total_s"]
        epochs = pluralize(self.epochs, "epoch")
        say(f"finished: {epochs} in {trained:.2f} s ({whole:.1f} s from start to end): {self.folder.path}")

    def summary(self, status: str, figures: Mapping[str, Any] | None = None) -> None:
        """Replace summary.json: the status, what is known of the run, and its last figures."""
        self.known |= {"status": status} | dict(figures or {})
        if self.wandb:
            self.known |= {"wandb_mode": self.wandb.mode, "wandb_id": self.wandb.id}
        self.folder.write_json("summary.json", self.known)

    def end(self, error: BaseException | None) -> None:
        """End the run's files; `error` ended the run before it was finished."""
        self.bar.close()
        if error is None:
            return
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        if isinstance(error, Stopped | TrainingFailed | UserError):
            said = str(error)
        else:
            said = LOST_RANK if is_lost_rank(error) else f"{type(error).__name__}: {error}".removesuffix(": ")
        why = {"error": said} | ({"stopped_by": error.reason} if isinstance(error, Stopped) else {})
        try:
            self.summary("stopped" if stopped else "failed", why)
        except TrainingFailed as another:
            if not isinstance(error, TrainingFailed):  # which tells of the same trouble
                say(f"warning: {another}")


@contextmanager
def open_recorder(
    folder: RunFolder, cfg: Config, world: World, known: dict[str, Any], saved: dict[str, Any]
) -> Iterator[NullRecorder]:
    """The run's recorder, closed whatever happens. `saved`: the state of another one to go on from, or empty."""
    if world.rank > 0:
        yield NullRecorder()
        return
    recorder = Recorder(folder, cfg, known, saved)
    error: BaseException | None = None
    try:
        recorder.summary("running")  # and how W&B works
        yield recorder
    except BaseException as caught:
        error = caught
        raise
    finally:
        recorder.end(error)
        if recorder.wandb:
            if error is None or isinstance(error, Stopped | TrainingFailed | UserError):
                world.leave()  # W&B may take its time, and the other ranks need not wait for it
            recorder.wandb.finish(error)


@dataclass
class Sums:
    """Figures over some steps."""

    loss: float = 0.0
    hits: float = 0.0
    rows: int = 0

    def add(self, one: Trained) -> None:
        self.loss, self.hits, self.rows = self.loss + one.loss, self.hits + one.hits, self.rows + one.rows

    @property
    def mean_loss(self) -> float:
        return self.loss / self.rows

    @property
    def accuracy(self) -> float:
        return self.hits / self.rows
