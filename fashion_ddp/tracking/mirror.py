"""Mirror a run to Weights & Biases, behind a guard. Only this module uses wandb.

Whatever goes wrong with W&B (no account, no network, no package, a service that dies or hangs), training never asks,
waits or stops for it: one line is printed, and training goes on.

Each row has a place of its own in W&B's history (its `_step`), which follows from the row alone. So W&B's server, asked
for the last place it has, says which rows are missing, whoever sent the others and however that process ended.
"""

import atexit
import functools
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
from fashion_ddp.private import untested
from fashion_ddp.redact import redact
from fashion_ddp.runs.reading import load_run
from fashion_ddp.tracking import panels

INIT_TIMEOUT = 20.0  # seconds that W&B's server gets to answer at the start
START_TIMEOUT = 30.0  # seconds that training waits for W&B at the start; then training begins, and W&B may join later
FINISH_TIMEOUT = 90.0  # seconds that W&B gets at the end
EARLY_FINISH_TIMEOUT = 15.0  # the same where the run failed or stopped, or W&B was abandoned
UPLOAD_TIMEOUT = 600.0  # the same where nothing else is to be done
MAX_PENDING = 1000  # calls in the queue (about one comes a second) after which W&B is abandoned

FOLDER = "wandb"  # in a run's folder: what W&B writes, and the lock of the process that pushes the run
POINT, EPOCH, TABLES = range(3)  # what is logged of a step, in this order

Rows = list[dict[str, Any]]


class WandbMirror:
    """One W&B run behind a guard: the first exception prints one line and ends the mirroring, not the training.

    A separate thread calls W&B, because any call may wait for ever (even `log`, when the service hangs). Training puts
    its calls into a queue and goes on. Only that thread imports wandb, which is slow and may be missing. It catches all
    exceptions, because after the service dies its calls raise plain OSErrors.
    """

    def __init__(
        self,
        path: Path,
        cfg: Config,
        id: str,
        config: dict[str, Any],
        job_type: str = "train",
        upload: bool = False,
        pushed_by: str | None = None,
    ):
        """`id` identifies the run at W&B, the same at every start; in a sweep W&B's agent gives another. W&B shows
        `config` and `job_type`.

        `upload`: uploading is the only purpose. Nothing else waits, and W&B is offline only if the user chose it.
        `pushed_by`: the process, in words, that brings this run to W&B's server, so that this one must not.
        """
        self.path, self.cfg, self.id, self.config, self.job_type, self.upload = path, cfg, id, config, job_type, upload
        self.pushed_by = pushed_by
        self.module: Any = None
        self.run: Any = None
        self.mode: str | None = None  # W&B's mode; None before it has started, and after it was abandoned
        self.abandoned = False
        self.next_place = 0  # rows before it were logged, by this process or by earlier ones
        self.calls: queue.SimpleQueue[tuple[str, Callable[[Any], object]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.started = threading.Event()

    @property
    def failed(self) -> bool:
        """Whether W&B did not start, or was abandoned."""
        return self.abandoned or (self.started.is_set() and self.mode is None)

    def start(self, figures: dict[str, Any], points: Rows, epochs: Rows) -> None:
        """Start W&B, and log what the run's files hold from earlier starts. `figures`: of its summary."""
        # Before rows, because what W&B is told first after a pause may travel alone. Of a row that would be its part in
        # W&B's own summary: after a kill the server would take the row's place for that of its last one.
        self.update_summary(figures)
        self.log(points, epochs)
        self.thread.start()
        # The other ranks wait for this one: do not wait so long that they give up.
        self.started.wait(min(START_TIMEOUT, self.cfg.timeout / 4))

    def log(self, points: Rows, epochs: Rows) -> None:
        """Log those points of steps.jsonl and rows of metrics.jsonl that W&B does not have yet."""
        names = ("loss", "accuracy", "lr")
        rows = [(_place(p["step"], POINT), {"step": p["step"], **{f"step/{k}": p[k] for k in names}}) for p in points]
        rows += [(_place(row["step"], EPOCH), row) for row in epochs]
        rows.sort(key=lambda row: row[0])
        if rows:
            self._enqueue("log", lambda run: self._log(run, rows))

    def update_summary(self, figures: dict[str, Any]) -> None:
        flat = panels.single_values(figures)
        self._enqueue("summary", lambda run: run.summary.update(flat))

    def show_results(self, images: "np.ndarray | None") -> None:
        """Log tables and figures of the finished run, and its weights if the settings ask for it.

        `images` are the test set's, uint8 [n, C, H, W]; None for tables without images.
        """
        self._enqueue("show", lambda run: self._show_results(run, images))

    def show_report(self, runs: Rows) -> None:
        """Log a report's table, figures and page. `runs` are the objects in report.json."""
        page = self.path / "report.html"
        mark = hashlib.sha256(page.read_bytes()).hexdigest()
        self._enqueue(
            "show", lambda run: panels.log_once(run, mark, lambda: panels.report_figures(self.module, page, runs))
        )

    def finish(self, error: BaseException | None) -> None:
        """Finish the W&B run within bounded time. `error` is the exception that ended the run, if any."""
        if isinstance(error, Stopped):
            self._enqueue("mark_preempting", lambda run: run.mark_preempting())
        self._enqueue("finish", lambda run: run.finish(exit_code=0 if error is None else 1))
        self.calls.put(None)
        limit = min(EARLY_FINISH_TIMEOUT, self.cfg.timeout / 4)  # other ranks may wait for this one
        if self.upload and not self.abandoned and not isinstance(error, Stopped):
            limit = UPLOAD_TIMEOUT
        elif error is None and self.mode:
            limit = FINISH_TIMEOUT
        self.thread.join(limit)
        if self.thread.is_alive():
            what_now = "the same command goes on" if self.upload else "`wandb sync` uploads what it has"
            self._abandon(f"did not finish in time, and is left; {what_now}")
            hook = _WandbExitHook()
            atexit.unregister(hook)  # it would hang, too
            if self.module is not None and not hook.met:
                say(f"W&B: {untested('wandb', 'may wait for ever when this process ends')}")

    def _enqueue(self, name: str, call: Callable[[Any], object]) -> None:
        """Queue a call for the thread; `name` stands in messages."""
        if self.calls.qsize() >= MAX_PENDING:
            self._abandon("does not keep up, and is left; the run's own files go on")
        if not self.abandoned:
            self.calls.put((name, call))

    def _abandon(self, why: str) -> None:
        if not self.abandoned:
            say(f"W&B: {why}")
        self.abandoned, self.run, self.mode = True, None, None

    # --- Run by the thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        self._open()
        self.started.set()
        while (item := self.calls.get()) is not None:
            name, call = item
            if (run := self.run) is not None:
                try:
                    call(run)
                except Exception as error:  # noqa: BLE001 - see the class
                    self._abandon(f"stopped ({name}: {_first_line(error)}); the run's own files go on")
        self._teardown()

    def _open(self) -> None:
        sys.argv = [redact(word) for word in sys.argv]  # W&B records them
        older = list((self.path / FOLDER).glob("offline-run-*"))
        folder = str(self.path.resolve() / FOLDER)
        defaults = {
            "WANDB_DATA_DIR": folder,  # without it, files are staged in the home folder
            "WANDB_CACHE_DIR": folder,
            # Without it, W&B asks its server for the user's name, and waits ten seconds where none answers; or, on a
            # terminal without a key, it asks the user for one and waits for ever.
            "WANDB_SILENT": "true",
            # Without it, W&B reports its own use to its server as the process ends, even offline, and waits as long.
            "WANDB_ERROR_REPORTING": "false",
        }
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        try:
            import wandb
        except Exception as error:  # noqa: BLE001 - see the class
            say(f"W&B: cannot be used ({_first_line(error)}); the run is recorded in {self.path} alone")
            return
        self.module = wandb
        for mode in self._modes():
            try:
                self._init(mode)
                break
            except Exception as error:  # noqa: BLE001 - see the class
                say(f"W&B: {mode} failed ({_first_line(error)})")
                self.run = None
                self._teardown()  # without it, the id stays in use
        if self.mode in ("online", "offline"):
            for fragment in older:  # the new fragment repeats all that they hold
                with suppress(OSError):
                    (self.path / FOLDER / "superseded").mkdir(exist_ok=True)
                    fragment.rename(self.path / FOLDER / "superseded" / fragment.name)

    def _modes(self) -> list[Any]:
        """Return the modes to try in order: the user's choice, or online if there is a key, then offline."""
        chosen = os.environ.get("WANDB_MODE")
        if chosen in ("disabled", "dryrun", "offline"):
            return ["disabled" if chosen == "disabled" else "offline"]
        if self.upload:
            return ["online"]
        if self.pushed_by:
            return ["offline"]
        try:
            logged_in = self.module.login(prompt=False, verify=False)
        except Exception:  # noqa: BLE001 - for example a malformed key
            logged_in = False
        return ["online", "offline"] if logged_in or chosen == "online" else ["offline"]

    def _init(self, mode: Any) -> None:
        run = self.module.init(
            **self._user_settings(),
            mode=mode,
            id=self.id,
            resume="allow" if mode == "online" else None,  # offline there is nothing to resume
            name=self.path.name,
            dir=str(self.path.resolve()),
            config=self.config,
            allow_val_change=True,  # a run may continue on another number of ranks
            settings=self.module.Settings(
                silent=True,
                init_timeout=INIT_TIMEOUT,
                finish_timeout=UPLOAD_TIMEOUT - 30 if self.upload else 60,
                x_disable_stats=self.upload,  # they would be those of a machine that does not train
            ),
        )
        panels.define_axes(run)
        # The place after the last row that its server has: a kill may have lost what was queued.
        self.next_place = run.starting_step
        if mode == "online":
            say(f"W&B: online at {run.url}")
        elif mode == "offline":
            upload = f"`wandb sync {self.path}/{FOLDER}/offline-run-*` uploads it"
            if self.pushed_by:
                upload = f"{self.pushed_by} pushes the run meanwhile"
            say(f"W&B: offline, in {self.path}/{FOLDER}; {upload}")
        if not self.abandoned:
            self.run, self.mode, self.id = run, mode, str(run.id)

    def _user_settings(self) -> dict[str, Any]:
        """Return arguments for wandb.init: what the user set by flag, and our defaults for what is set nowhere.

        An argument wins over W&B's variables and settings files, so what is set there is not passed.
        """
        known, names = self.module.setup().settings, ("project", "entity", "group", "tags", "notes")
        flags: dict[str, Any] = {n: value for n in names if (value := getattr(self.cfg, f"wandb_{n}")) is not None}
        if "tags" in flags:
            flags["tags"] = [tag.strip() for tag in flags["tags"].split(",") if tag.strip()]
        defaults = {} if known.project else {"project": "fashion_ddp"}
        if not (known.run_job_type and self.job_type == "train"):
            defaults["job_type"] = self.job_type
        return defaults | flags

    def _log(self, run: Any, rows: list[tuple[int, dict[str, Any]]]) -> None:
        for place, row in rows:
            if place >= self.next_place:
                run.log(row, step=place, commit=True)
                self.next_place = place + 1

    def _show_results(self, run: Any, images: "np.ndarray | None") -> None:
        try:
            trained = load_run(self.path)
            step = trained.summary["step"]
            figures = functools.partial(panels.run_figures, self.module, trained, images)
            panels.log_once(run, step, figures, _place(step, TABLES))
            if self.cfg.wandb_weights:
                run.log_artifact(panels.weights_artifact(self.module, trained))
        except Exception as error:  # noqa: BLE001 - W&B has all else of the run, which must still be finished
            say(f"W&B: tables and figures are left out ({_first_line(error)})")

    def _teardown(self) -> None:
        """End W&B's service process; otherwise Python waits for it when this process ends."""
        if self.module is not None:
            with suppress(Exception):
                self.module.teardown()


class _WandbExitHook:
    """Equals every function that wandb registered with atexit, so that `atexit.unregister` removes them."""

    met = False  # whether there was one

    def __eq__(self, other: object) -> bool:
        found = str(getattr(other, "__module__", "")).startswith("wandb.")
        self.met = self.met or found
        return found

    def __call__(self) -> None: ...


def _place(step: int, kind: int) -> int:
    """Return a row's place in W&B's history. `step` counts optimizer updates; `kind`: POINT, EPOCH or TABLES."""
    return 3 * step + kind


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
