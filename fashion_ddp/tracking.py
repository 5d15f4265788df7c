"""How a run tells what it does: files always, the screen, and Weights & Biases where it can; all from rank 0.

The files of the run folder are the record; W&B mirrors them through one guarded object. Nothing that happens to W&B
(no account, no network, no package, a dying service) prompts, hangs or stops training: it is told in one line, and
training goes on.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from fashion_ddp.config import Config, counted
from fashion_ddp.evaluate import Scores
from fashion_ddp.provenance import identity
from fashion_ddp.ranks import World
from fashion_ddp.rundir import FORMAT, RunFolder, plain
from fashion_ddp.step import Trained

POINTS = 100  # per epoch in steps.jsonl


class Silent:
    """The recorder of every rank but the first: says and writes nothing."""

    def begin_epoch(self, epoch: int, steps: int) -> None: ...

    def steps(self, trained: Sequence[Trained]) -> None: ...

    def epoch(self, scores: Mapping[str, Scores], timings: Mapping[str, float]) -> None: ...

    def finish(self, figures: Mapping[str, Any]) -> None: ...


class Recorder(Silent):
    """The recorder of rank 0."""

    def __init__(self, folder: RunFolder, cfg: Config, known: dict[str, Any], wandb: "Wandb | None"):
        self.folder, self.wandb, self.epochs = folder, wandb, cfg.epochs
        self.known = {"format": FORMAT, "status": "running", **known}
        self.step = 0  # updates since the run began
        self.bar = tqdm(disable=True)
        self.summary("running")

    def begin_epoch(self, epoch: int, steps: int) -> None:
        self.now, self.left = epoch, steps
        self.bin_size = math.ceil(steps / POINTS)
        self.total, self.bin = Sums(), Sums()
        self.bar = tqdm(total=steps, desc=f"epoch {epoch}", unit="step", leave=False, disable=not sys.stderr.isatty())

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
            for point in points:
                self.wandb.log({"step": point["step"], **{f"step/{k}": point[k] for k in ("loss", "accuracy", "lr")}})
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
            self.wandb.log(row)
        self.summary("running", row)
        shown = [f"epoch {self.now}/{self.epochs}"]
        for name in ("train", *scores):
            shown.append(f"{name} loss {row[f'{name}/loss']:.4f} accuracy {100 * row[f'{name}/accuracy']:.2f} %")
        shown.append(f"{row['time/train_s']:.2f} s + {row['time/eval_s']:.2f} s evaluation")
        shown.append(f"{row['throughput/images_per_s']:,.0f} images/s")
        say(" | ".join(shown))

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Complete summary.json, and say where everything is."""
        self.summary("finished", figures)
        if self.wandb:
            self.wandb.summarise(self.known)
        trained = self.known["time/train_total_s"] + self.known["time/eval_total_s"]
        whole = self.known["time/total_s"]
        epochs = counted(self.epochs, "epoch")
        say(f"finished: {epochs} in {trained:.2f} s ({whole:.1f} s from start to end): {self.folder.path}")

    def summary(self, status: str, figures: Mapping[str, Any] | None = None) -> None:
        """Replace summary.json: the status, what is known of the run, and its last figures."""
        self.known |= {"status": status} | dict(figures or {})
        self.folder.write_json("summary.json", self.known)

    def close(self, error: BaseException | None) -> None:
        """End the run's records; `error` ended the run before it was finished."""
        if error is not None:
            self.bar.close()
            if isinstance(error, KeyboardInterrupt):
                self.summary("stopped", {"error": "interrupted"})
            else:
                self.summary("failed", {"error": f"{type(error).__name__}: {error}"})
        if self.wandb:
            self.wandb.finish(failed=error is not None)


@contextmanager
def open_recorder(folder: RunFolder, cfg: Config, world: World, known: dict[str, Any]) -> Iterator[Silent]:
    """The run's recorder, closed whatever happens."""
    if world.rank > 0:
        yield Silent()
        return
    recorder = Recorder(folder, cfg, known, Wandb(folder, cfg) if cfg.tracker != "none" else None)
    try:
        yield recorder
    except BaseException as error:
        recorder.close(error)
        raise
    recorder.close(None)


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


def say(text: str) -> None:
    """Print a line, above the progress bar where there is one."""
    tqdm.write(text)
    sys.stdout.flush()


class Wandb:
    """One W&B run behind a guard: the first exception is told in one line, and ends the mirroring, not the training.

    wandb is imported here and only here: it is slow, and may be missing. Exceptions of every kind are caught, because
    after wandb's service process dies its calls raise plain OSErrors.
    """

    def __init__(self, run: RunFolder, cfg: Config):
        self.run: Any = None
        folder = run.path.resolve()
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):  # else staging fills the home
            os.environ.setdefault(name, str(folder / "wandb"))
        try:
            import wandb
        except Exception as error:  # noqa: BLE001 - see the docstring
            say(f"W&B: cannot be used ({_short(error)}); the run is recorded in {run.path} alone")
            return
        self.module = wandb
        # An argument wins over the user's variable, so it is given only where there is none.
        project: dict[str, Any] = {} if "WANDB_PROJECT" in os.environ else {"project": "fashion_ddp"}
        for mode in self._modes():
            try:
                settings = wandb.Settings(silent=True, init_timeout=20, finish_timeout=60)  # else 10 s for a name
                self.run = wandb.init(
                    **project,
                    mode=mode,
                    name=run.path.name,
                    dir=str(folder),
                    config=plain(identity(cfg)),
                    settings=settings,
                )
                self.run.define_metric("epoch")
                self.run.define_metric("step")
                self.run.define_metric("step/*", step_metric="step")
                for group in ("train/*", "val/*", "test/*", "time/*", "throughput/*"):
                    self.run.define_metric(group, step_metric="epoch")
                if mode == "online":
                    say(f"W&B: online at {self.run.url}")
                elif mode == "offline":
                    say(f"W&B: offline, in {run.path}/wandb; `wandb sync {run.path}/wandb/offline-run-*` uploads it")
                break
            except Exception as error:  # noqa: BLE001 - see the docstring
                say(f"W&B: {mode} failed ({_short(error)})")
                self.run = None
                self._teardown()

    def _modes(self) -> list[Any]:
        """What to try, in order: what the user said, or online where there is a key; offline always works."""
        said = os.environ.get("WANDB_MODE")
        if said in ("disabled", "dryrun", "offline"):
            return ["disabled" if said == "disabled" else "offline"]
        try:
            logged_in = self.module.login(prompt=False, verify=False)
        except Exception:  # noqa: BLE001 - a malformed key, for one
            logged_in = False
        if said == "online" and not logged_in:  # init would ask for a key on a terminal, and wait for ever
            say("W&B: online failed (no usable API key: run `wandb login`)")
        return ["online", "offline"] if logged_in else ["offline"]

    def log(self, row: dict[str, Any]) -> None:
        self._guard("log", lambda run: run.log(row))

    def summarise(self, figures: dict[str, Any]) -> None:
        flat = {k: v for k, v in figures.items() if isinstance(v, int | float | str | bool)}
        self._guard("summary", lambda run: run.summary.update(flat))

    def finish(self, failed: bool) -> None:
        self._guard("finish", lambda run: run.finish(exit_code=int(failed)))
        if self.run is None:
            self._teardown()  # else a service that died is complained of once more when the process ends

    def _guard(self, name: str, call: Callable[[Any], object]) -> None:
        if self.run is not None:
            try:
                call(self.run)
            except Exception as error:  # noqa: BLE001 - see the docstring
                say(f"W&B: stopped ({name}: {_short(error)}); the run's own files go on")
                self.run = None

    def _teardown(self) -> None:
        with suppress(Exception):
            self.module.teardown()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
