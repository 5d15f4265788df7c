"""Training from a program or a notebook: `fit`, called again and again in one process, on one rank and on several."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import CHECKOUT, forked, ranks
from faults import eventually

from fashion_ddp import fit
from fashion_ddp.errors import UserError
from fashion_ddp.runs import provenance

SMALL: dict[str, Any] = {"dataset": "synthetic", "device": "cpu", "tracker": "none", "threads": 1, "epochs": 1}
PROGRAM = f"""
import json, os, signal, sys, time
import torch
import faults
from faults import Fault
from fashion_ddp import fit
from fashion_ddp.distributed import signals
from fashion_ddp.errors import Stopped

SMALL = {SMALL!r}
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell shuts off for tests in its background
torch.set_num_threads(2)
"""


def program(folder: Path, code: str) -> Any:
    """What a program that begins as PROGRAM does prints last, as JSON."""
    (folder / "program.py").write_text(PROGRAM + code)
    done = forked("program", cwd=folder, PYTHONPATH=f"{CHECKOUT}/tests")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_each_run_of_a_process_is_as_of_a_process_of_its_own_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    told = program(
        tmp_path,
        """
def found():
    umask = os.umask(0o022)
    os.umask(umask)
    handlers = [str(signal.getsignal(one)) for one in signals.SIGNALS]
    return handlers, dict(os.environ), umask, torch.get_num_threads(), torch.get_rng_state().tolist()

before, told = found(), []
for settings in ({"model": "linear"}, {"model": "mlp", "seed": 3, "precision": "bf16"}, {"model": "linear"}):
    since = time.time()
    run = fit(**SMALL, **settings)
    spent = time.time() - since
    told.append([run.path.name, run.status, run.summary["time/startup_s"], run.summary["time/total_s"], spent])
print(json.dumps([told, found() == before]))
""",
    )
    (linear, mlp, again), as_before = told
    assert as_before
    for name, status, startup, total, spent in (linear, mlp):
        assert status == "finished" and 0 < startup < total <= spent, name
    assert again[:4] == linear[:4]  # it was finished
    words = ("--model", "mlp", "--seed", "3", "--precision", "bf16", "--run-dir", "alone")
    words += tuple(word for name, value in SMALL.items() for word in (f"--{name}", str(value)))
    assert forked("fashion_ddp.train", *words, cwd=tmp_path).returncode == 0
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in (f"runs/{mlp[0]}", "alone")]
    assert weights[0] == weights[1]


def test_ctrl_c_twice_interrupts_and_once_saves_and_the_same_call_continues(tmp_path: Path) -> None:
    told = program(
        tmp_path,
        """
signals.SECOND_INTERRUPT = 0.0  # seconds
for count in (7, 7, 12):
    faults.inject(Fault("step", "INT", count=count))
ended = []
for _ in range(3):
    try:
        run = fit(model="mlp", checkpoint_every=0, **SMALL)
    except (Stopped, KeyboardInterrupt) as error:
        ended.append([type(error).__name__, getattr(error, "reason", None)])
print(json.dumps([ended, run.status, run.summary["starts"]]))
""",
    )
    assert told == [[["KeyboardInterrupt", None], ["Stopped", "SIGINT"]], "finished", 3]


def fits(folder: Path) -> tuple[list[tuple[str, str, int]], list[int]]:
    """In a rank: three runs; of rank 0 also how many entries each left at the meeting place, which stays as torchrun's
    does."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    place = {"host_name": "127.0.0.1", "port": int(os.environ["MASTER_PORT"]), "wait_for_workers": False}
    store = dist.TCPStore(**place, is_master=True) if os.environ["RANK"] == "0" else None
    told, entries = [], []
    for seed in (0, 1, 0):
        run = fit(**SMALL, model="linear", seed=seed, runs_dir=folder, timeout=20)
        told.append((run.path.name, run.status, run.summary["world_size"]))
        entries.append(store.num_keys() if store else 0)
    return told, entries


def test_ranks_meet_anew_for_each_run_and_all_get_it(tmp_path: Path) -> None:
    (first, entries), (second, _) = ranks(2, fits, tmp_path)
    assert first == second and len(set(first)) == 2 and {one[1:] for one in first} == {("finished", 2)}
    assert entries[0] < entries[1] < entries[2]  # none reads an address of a run before, where nobody listens any more


def forked_after_use(threads: int) -> bool:
    """In a process that has computed on so many threads: whether a fork of it does so, too."""
    torch.set_num_threads(threads)
    square = torch.ones(2000, 2000)
    square @ square
    if not (child := os.fork()):
        os._exit(int((square @ square).mean() != 2000))
    try:
        eventually(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    finally:
        os.kill(child, signal.SIGKILL)
        code = os.waitpid(child, 0)[1]
    return code == 0


def test_a_process_forked_from_one_that_has_computed_computes() -> None:
    assert ranks(1, forked_after_use, 2) == [True]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epoch": 3}, "unknown setting 'epoch'; did you mean epochs? python -m fashion_ddp.train --help lists all"),
        ({"check_only": True}, "unknown setting 'check_only'; "),
        ({"epochs": "3"}, "epochs must be a whole number, got '3'"),
        ({"model": "cn"}, "model: unknown 'cn'; did you mean 'cnn'?"),
        ({"model": "__main__:Net"}, "(in a notebook: %%writefile mine.py), and name it mine:Net"),
        ({"config": "none.yaml"}, "none.yaml: cannot be read"),
        ({"device": "cuda"}, "--device cuda, but torch finds no NVIDIA card"),
    ],
)
def test_a_mistake_raises_the_command_s_message(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        fit(**settings, runs_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
def test_code_that_changed_since_the_process_loaded_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    provenance.refuse_changed_code()
    monkeypatch.setattr(provenance, "COMPUTES", ("config",))
    with pytest.raises(UserError, match="has changed since this process loaded it: start the process again"):
        fit(**SMALL)
