"""Weights & Biases, behind a guard: the only user of wandb.

Nothing that happens to W&B (no account, no network, no package, a service that dies or hangs) prompts, holds up or
stops training: it is told in one line, and training goes on.
"""

import atexit
import hashlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

from fashion_ddp.config import Config
from fashion_ddp.console import say
from fashion_ddp.errors import Stopped
from fashion_ddp.redact import redact
from fashion_ddp.runs.reading import load_run
from fashion_ddp.tracking import panels

INIT = 20.0  # seconds that W&B's server gets to answer at the start
START = 30.0  # seconds that training waits for W&B at the start; then it begins, and W&B may join later
FINISH, FINISH_EARLY = 90.0, 15.0  # seconds that W&B gets at the end; less where the run ended early, or W&B did
UPLOAD = 600.0  # the same, where there is nothing else to do
BEHIND = 1000  # things told and not taken (about one comes a second) after which W&B is left

Rows = list[dict[str, Any]]


class Wandb:
    """One W&B run behind a guard: the first exception is told in one line, and ends the mirroring, not the training.

    A thread of its own talks to W&B, because any call may wait for ever (`log`, too, when the service stands still):
    training hands over what there is to tell, and goes on. wandb is imported there and only there: it is slow, and may
    be missing. Exceptions of every kind are caught, because after the service dies its calls raise plain OSErrors.
    """

    def __init__(
        self, path: Path, cfg: Config, id: str, config: dict[str, Any], job: str = "train", upload: bool = False
    ):
        """`id` is the run's name to W&B, the same at every start; in a sweep W&B's agent gives another. `config` and
        `job` (its type) are shown there.

        To `upload` is all that is wanted: nothing else waits, and offline is no way out unless the user chose it.
        """
        self.path, self.cfg, self.id, self.config, self.job, self.upload = path, cfg, id, config, job, upload
        self.module: Any = None
        self.run: Any = None
        self.mode: str | None = None  # that W&B works in; None before, and as soon as it is left
        self.left = False
        self.points_known = self.epochs_known = 0  # up to which step, and which epoch, its server has been told
        self.calls: queue.SimpleQueue[tuple[str, Callable[[Any], object]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.started = threading.Event()

    def start(self, points: Rows, epochs: Rows) -> None:
        """Start W&B, and tell it what the run's files hold of earlier starts."""
        self.points(points)
        self.epochs(epochs)
        self.thread.start()
        # Not so long that the other ranks, which wait for this one, would give up.
        self.started.wait(min(START, self.cfg.timeout / 4))

    def points(self, points: Rows) -> None:
        """Points of steps.jsonl."""
        names = ("loss", "accuracy", "lr")
        rows = [(point["step"], {"step": point["step"], **{f"step/{k}": point[k] for k in names}}) for point in points]
        if rows:
            self._tell("log", lambda run: [run.log(row) for step, row in rows if step > self.points_known])

    def epochs(self, rows: Rows) -> None:
        """Rows of metrics.jsonl."""
        if rows:
            self._tell("log", lambda run: [run.log(row) for row in rows if row["epoch"] > self.epochs_known])

    def summarise(self, figures: dict[str, Any]) -> None:
        flat = panels.single_values(figures)
        self._tell("summary", lambda run: run.summary.update(flat))

    def show(self, images: "np.ndarray | None") -> None:
        """Tables and figures of the finished run, and its weights where they are asked for. `images`: of the test set,
        uint8 [n, C, H, W]."""
        self._tell("show", lambda run: self._show(run, images))

    def show_report(self, runs: Rows) -> None:
        """A report's table, figures and page. `runs`: report.json's."""
        page = self.path / "report.html"
        mark = hashlib.sha256(page.read_bytes()).hexdigest()
        self._tell("show", lambda run: panels.show_once(run, mark, lambda: panels.of_report(self.module, page, runs)))

    def finish(self, error: BaseException | None) -> None:
        """Hand over what is left; `error` ended the run. Bounded in time, as W&B itself is not."""
        if isinstance(error, Stopped):
            self._tell("mark_preempting", lambda run: run.mark_preempting())
        self._tell("finish", lambda run: run.finish(exit_code=0 if error is None else 1))
        self.calls.put(None)
        early = min(FINISH_EARLY, self.cfg.timeout / 4)  # other ranks may be waiting
        self.thread.join(UPLOAD if self.upload else FINISH if error is None and self.mode else early)
        if self.thread.is_alive():
            self._leave("did not finish in time, and is left; `wandb sync` uploads what it has")
            atexit.unregister(_Farewell())  # it would hang in the same way

    def _tell(self, name: str, call: Callable[[Any], object]) -> None:
        """Have the thread make a call."""
        if self.calls.qsize() >= BEHIND:
            self._leave("does not keep up, and is left; the run's own files go on")
        if not self.left:
            self.calls.put((name, call))

    def _leave(self, why: str) -> None:
        if not self.left:
            say(f"W&B: {why}")
        self.left, self.run, self.mode = True, None, None

    # --- In the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        self._open()
        self.started.set()
        while (told := self.calls.get()) is not None:
            name, call = told
            if (run := self.run) is not None:
                try:
                    call(run)
                except Exception as error:  # noqa: BLE001 - see the class
                    self._leave(f"stopped ({name}: {_short(error)}); the run's own files go on")
        self._teardown()

    def _open(self) -> None:
        sys.argv = [redact(word) for word in sys.argv]  # which W&B writes down
        older = list((self.path / "wandb").glob("offline-run-*"))
        here = str(self.path.resolve() / "wandb")
        defaults = {
            "WANDB_DATA_DIR": here,  # else staging fills the home
            "WANDB_CACHE_DIR": here,
            # Else it asks its server for the user's name, for ten seconds where none answers; or on a terminal, where
            # there is no key, its user for one, for ever.
            "WANDB_SILENT": "true",
            # Else it reports its own use to its server as the process ends, offline too, and waits as long.
            "WANDB_ERROR_REPORTING": "false",
        }
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        try:
            import wandb
        except Exception as error:  # noqa: BLE001 - see the class
            say(f"W&B: cannot be used ({_short(error)}); the run is recorded in {self.path} alone")
            return
        self.module = wandb
        for mode in self._modes():
            try:
                self._init(mode)
                break
            except Exception as error:  # noqa: BLE001 - see the class
                say(f"W&B: {mode} failed ({_short(error)})")
                self.run = None
                self._teardown()  # else the name stays in use
        if self.mode in ("online", "offline"):
            for folder in older:  # which tell a part of what is now told from its beginning
                with suppress(OSError):
                    (self.path / "wandb" / "superseded").mkdir(exist_ok=True)
                    folder.rename(self.path / "wandb" / "superseded" / folder.name)

    def _modes(self) -> list[Any]:
        """What to try, in order: what the user said, or online where there is a key; offline always works."""
        said = os.environ.get("WANDB_MODE")
        if said in ("disabled", "dryrun", "offline"):
            return ["disabled" if said == "disabled" else "offline"]
        if self.upload:
            return ["online"]
        try:
            logged_in = self.module.login(prompt=False, verify=False)
        except Exception:  # noqa: BLE001 - a malformed key, for one
            logged_in = False
        return ["online", "offline"] if logged_in or said == "online" else ["offline"]

    def _init(self, mode: Any) -> None:
        run = self.module.init(
            **self._said(),
            mode=mode,
            id=self.id,
            resume="allow" if mode == "online" else None,  # offline there is nothing to resume
            name=self.path.name,
            dir=str(self.path.resolve()),
            config=self.config,
            allow_val_change=True,  # of a run that continues on other ranks
            settings=self.module.Settings(
                silent=True, init_timeout=INIT, finish_timeout=UPLOAD - 30 if self.upload else 60
            ),
        )
        panels.define_axes(run)
        if mode == "online":
            # What its server has of earlier starts it says itself: a kill may have lost what had been sent.
            self.points_known, self.epochs_known = (int(run.summary.get(name) or 0) for name in ("step", "epoch"))
            say(f"W&B: online at {run.url}")
        elif mode == "offline":
            say(f"W&B: offline, in {self.path}/wandb; `wandb sync {self.path}/wandb/offline-run-*` uploads it")
        if not self.left:
            self.run, self.mode, self.id = run, mode, str(run.id)

    def _said(self) -> dict[str, Any]:
        """What the user said by flag; and where nobody said anything, by variable or in W&B's own settings files, our
        defaults. An argument wins over both, so no other is given."""
        known, names = self.module.setup().settings, ("project", "entity", "group", "tags", "notes")
        said: dict[str, Any] = {n: value for n in names if (value := getattr(self.cfg, f"wandb_{n}")) is not None}
        if "tags" in said:
            said["tags"] = [tag.strip() for tag in said["tags"].split(",") if tag.strip()]
        ours = {} if known.project else {"project": "fashion_ddp"}
        return ours | ({} if known.run_job_type and self.job == "train" else {"job_type": self.job}) | said

    def _show(self, run: Any, images: "np.ndarray | None") -> None:
        try:
            of = load_run(self.path)
            panels.show_once(run, of.summary["step"], lambda: panels.figures(self.module, of, images))
            if self.cfg.wandb_weights:
                run.log_artifact(panels.weights(self.module, of))
        except Exception as error:  # noqa: BLE001 - it is the least of what W&B has of the run, which must be closed
            say(f"W&B: tables and figures are left out ({_short(error)})")

    def _teardown(self) -> None:
        """End its service, which would otherwise be waited for when the process ends."""
        if self.module is not None:
            with suppress(Exception):
                self.module.teardown()


class _Farewell:
    """Equal to what wandb registered for the end of the process, as `atexit.unregister` compares."""

    def __eq__(self, other: object) -> bool:
        return str(getattr(other, "__module__", "")).startswith("wandb.")

    def __call__(self) -> None: ...


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
