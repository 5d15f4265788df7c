"""How a run tells what it does: files always, the screen, and W&B where it can; all from rank 0.

The files of the run folder are the record, and W&B mirrors them. A run that continues takes the record up where its
checkpoint was saved: what was written after it is taken back, and will be written again.
"""

import math
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm import tqdm

from fashion_ddp.config import Config
from fashion_ddp.console import say
from fashion_ddp.distributed.world import World, explain
from fashion_ddp.errors import Stopped, TrainingFailed, UserError, pluralize
from fashion_ddp.runs import lock
from fashion_ddp.runs.folder import FORMAT, RunFolder
from fashion_ddp.runs.reading import load_run
from fashion_ddp.tracking.mirror import FOLDER, WandbMirror, panels
from fashion_ddp.training.evaluate import Scores
from fashion_ddp.training.state import Recorded, Sums
from fashion_ddp.training.sync import Trained

POINTS = 100  # per epoch in steps.jsonl


class NullRecorder:
    """The recorder of every rank but the first: says and writes nothing."""

    def begin_epoch(self, epoch: int, steps: int) -> None: ...

    def steps(self, trained: Sequence[Trained]) -> None: ...

    def epoch(self, scores: Mapping[str, Scores], timings: Mapping[str, float]) -> None: ...

    def chosen(self, outcome: Mapping[str, Any], scores: Mapping[str, Scores]) -> None: ...

    def finish(self, figures: Mapping[str, Any], test_images: np.ndarray) -> None: ...


class Recorder(NullRecorder):
    """The recorder of rank 0."""

    def __init__(self, folder: RunFolder, cfg: Config, known: dict[str, Any], recorded: Recorded):
        """Go on from what was `recorded`. What the files hold beyond it is removed: it will be written again."""
        self.folder, self.epochs, self.recorded = folder, cfg.epochs, recorded
        self.bar = tqdm(disable=True)
        old = load_run(folder.path)
        points = [row for row in old.steps if row["step"] <= recorded.step]
        epochs = [row for row in old.metrics if row["step"] < recorded.step]  # one saved at its end is evaluated again
        folder.keep_rows("steps.jsonl", points)
        folder.keep_rows("metrics.jsonl", epochs)
        self.known = {"format": FORMAT, **known, **(epochs[-1] if epochs else {})}
        self.known["test_evaluations"] = sum("test/accuracy" in row for row in epochs)
        self.wandb: WandbMirror | None = None
        # The name that W&B knows the run by stands in the folder before W&B is told of it, by this process or by push.
        self.known["wandb_id"] = old.summary.get("wandb_id") or secrets.token_hex(4)
        self.summary("running")
        if cfg.tracker != "none":
            shown = panels.run_config(cfg, self.known, old.environment)
            # After the summary, which says that this process will tell W&B: who pushes locks first and reads it then,
            # so at least one of the two sees the other.
            pushed_by = lock.holder(folder.path / FOLDER)
            self.wandb = WandbMirror(folder.path, cfg, self.known["wandb_id"], shown, pushed_by=pushed_by)
            self.wandb.start(self.known, points, epochs)

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Begin an epoch, or go on where its checkpoint was saved."""
        done = self.recorded.step - (epoch - 1) * steps
        if not done:
            self.recorded.total, self.recorded.bin = Sums(), Sums()
        self.now, self.left = epoch, steps - done
        self.bin_size = math.ceil(steps / POINTS)
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=done, desc=f"epoch {epoch}", unit="step", leave=False, disable=hidden)

    def steps(self, trained: Sequence[Trained]) -> None:
        """Add up what a window's steps did; each full bin becomes a point of steps.jsonl."""
        points: list[dict[str, Any]] = []
        so_far = self.recorded
        for loss, hits, rows, lr in trained:
            so_far.total.add(loss, hits, rows)
            so_far.bin.add(loss, hits, rows)
            so_far.step, so_far.lr, self.left = so_far.step + 1, lr, self.left - 1
            if self.left % self.bin_size == 0:
                point = {"epoch": self.now, "step": so_far.step, "loss": so_far.bin.mean_loss}
                points.append(point | {"accuracy": so_far.bin.accuracy, "lr": lr})
                so_far.bin = Sums()
        self.folder.append("steps.jsonl", points)
        if self.wandb:
            self.wandb.log(points, [])
        self.bar.update(len(trained))

    def epoch(self, scores: Mapping[str, Scores], timings: Mapping[str, float]) -> None:
        """Write and show an epoch's row."""
        self.bar.close()
        row: dict[str, Any] = {"epoch": self.now, "step": self.recorded.step, "lr": self.recorded.lr}
        row |= {"train/loss": self.recorded.total.mean_loss, "train/accuracy": self.recorded.total.accuracy}
        row |= self._figures(scores)
        row |= timings
        self.folder.append("metrics.jsonl", [row])
        if self.wandb:
            self.wandb.log([], [row])
        self.summary("running", row)
        shown = [f"epoch {self.now}/{self.epochs}", *_shown(row, "train", *scores)]
        shown.append(f"{row['time/train_s']:.2f} s + {row['time/eval_s']:.2f} s evaluation")
        shown.append(f"{row['throughput/images_per_s']:,.0f} images/s")
        say(" | ".join(shown))

    def chosen(self, outcome: Mapping[str, Any], scores: Mapping[str, Scores]) -> None:
        """Write and show the figures of the weights that are kept, and what of the run validation decided."""
        figures = dict(outcome) | self._figures(scores)
        kept, early = outcome.get("kept_epoch"), outcome.get("stopped_early")
        if kept:
            row = load_run(self.folder.path).metrics[kept - 1]
            figures |= {name: row[name] for name in ("train/loss", "train/accuracy")}
        self.summary("running", figures)
        if early:
            say(f"stopped early {early}")
        what = f"kept epoch {kept} of {self.now}, chosen by validation" if kept else f"kept the last epoch, {self.now}"
        say(" | ".join([what, *_shown(figures, *scores)]))

    def _figures(self, scores: Mapping[str, Scores]) -> dict[str, Any]:
        """Return the figures of an evaluation by name, and count it where the test set was in it."""
        self.known["test_evaluations"] += "test" in scores
        figures: dict[str, Any] = {}
        for name, score in scores.items():
            figures |= {f"{name}/loss": score.loss, f"{name}/accuracy": score.accuracy}
            figures |= {f"{name}/{figure}": value for figure, value in score.figures.items()}
        return figures

    def finish(self, figures: Mapping[str, Any], test_images: np.ndarray) -> None:
        """Complete summary.json, and say where everything is."""
        self.summary("finished", figures)
        if self.wandb:
            self.wandb.update_summary(self.known)
            self.wandb.show_results(test_images)
        trained = self.known["time/train_total_s"] + self.known["time/eval_total_s"]
        whole = self.known["time/total_s"]
        epochs = pluralize(self.now, "epoch")
        say(f"finished: {epochs} in {trained:.2f} s ({whole:.1f} s from start to end): {self.folder.path}")

    def summary(self, status: str, figures: Mapping[str, Any] | None = None) -> None:
        """Replace summary.json: the status, what is known of the run, and its last figures."""
        self.known |= {"status": status} | dict(figures or {})
        if self.wandb:
            self.known |= {"wandb_mode": self.wandb.mode, "wandb_id": self.wandb.id}
        self.folder.write_json("summary.json", self.known)

    def end(self, error: BaseException | None) -> None:
        """Write how the run ended. `error` ended it before it was finished."""
        self.bar.close()
        if error is None:
            return
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        if isinstance(error, Stopped | TrainingFailed | UserError):
            said = str(error)
        else:
            said = explain(error) or f"{type(error).__name__}: {error}".removesuffix(": ")
        why = {"error": said} | ({"stopped_by": error.reason} if isinstance(error, Stopped) else {})
        try:
            self.summary("stopped" if stopped else "failed", why)
        except TrainingFailed as another:
            if not isinstance(error, TrainingFailed):  # which tells of the same trouble
                say(f"warning: {another}")
        if self.wandb:
            self.wandb.update_summary(self.known)


def _shown(row: Mapping[str, Any], *names: str) -> list[str]:
    """Return loss and accuracy on each of these sets as the screen shows them."""
    return [f"{name} loss {row[f'{name}/loss']:.4f} accuracy {100 * row[f'{name}/accuracy']:.2f} %" for name in names]


@contextmanager
def open_recorder(
    folder: RunFolder, cfg: Config, world: World, known: dict[str, Any], recorded: Recorded
) -> Iterator[NullRecorder]:
    """Open the recorder of this rank, which goes on from what was `recorded`, and close it whatever happens."""
    if world.rank > 0:
        yield NullRecorder()
        return
    recorder = Recorder(folder, cfg, known, recorded)
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
