"""What a step may cost, counted and not timed: operations, words between ranks, reads by the host, memory, imports."""

import ctypes
import gc
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKOUT, ranks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from trainer import Trainer

from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.world import open_world
from fashion_ddp.models import architectures, describe
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.images import Part

IMAGES = np.random.default_rng(0).integers(0, 256, (200, 1, 28, 28), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, 200)
SMALL = {"model": "cnn", "device": "cpu", "threads": 1, "batch_size": 20}
VIEWS = ["_record_function_enter_new", "_record_function_exit", "view", "t", "transpose", "detach", "select", "slice"]
VIEWS += ["unsqueeze", "as_strided", "_unsafe_view", "expand"]


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(model: str, **given: Any) -> Counter[str]:
    """Of one step, on one rank."""
    cfg = make_config(SMALL | {"model": model} | given)
    with open_world(cfg) as world:
        step = Trainer(cfg, world, architectures.build(cfg, (1, 28, 28), 10), Batches(cfg, world, Part(IMAGES, LABELS)))
        step.batches.draw(1)
        step(0)
        with Operations() as seen:
            step(1)
        return seen.count


# Of these, gathering the batch takes 3 (index_select, a conversion, a division), recording losses and predictions 3,
# and DDP one per parameter; the rest is the model's, the loss's and the optimizer's own. A higher number is a slower
# step: raise it knowingly.
@pytest.mark.quick
@pytest.mark.parametrize(("model", "most"), [("linear", 30), ("mlp", 32), ("cnn", 52)])
def test_a_step_does_no_more_than_it_must_and_the_host_reads_nothing(model: str, most: int) -> None:
    [count] = ranks(1, operations, model)
    assert sum(times for name, times in count.items() if name not in VIEWS) <= most, count  # a view does no work
    assert not {"_local_scalar_dense", "equal", "is_nonzero", "nonzero"} & set(count)


def collectives(steps: int, given: dict[str, Any]) -> tuple[dict[str, int], int, int]:
    """Of some steps between two sync points: how often each was called, the numbers in them, and the parameters."""
    cfg = make_config(SMALL | given)
    with open_world(cfg) as world:
        model = architectures.build(cfg, (1, 28, 28), 10)
        step = Trainer(cfg, world, model, Batches(cfg, world, Part(IMAGES, LABELS)))
        step.batches.draw(1)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            for k in range(steps):
                step(k)
        events = [e for e in seen.events() if e.name.startswith("gloo:")]
        numbers = sum(np.prod(e.input_shapes[0]) for e in events)
        return Counter(e.name for e in events), numbers, describe.count_parameters(model)


@pytest.mark.parametrize("given", [{}, {"micro_batch": 3}, {"clip_norm": 1.0}], ids=str)
def test_a_step_talks_to_the_other_ranks_once_and_of_its_gradient_only(given: dict[str, Any]) -> None:
    for calls, numbers, parameters in ranks(2, collectives, 4, given):
        assert calls == {"gloo:all_reduce": 4} and numbers == 4 * parameters


# glibc's struct mallinfo2
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
MallInfo = type("MallInfo", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in FIELDS]})


def kept_bytes() -> int:
    """How much more memory is in use after 40 steps of a run that is warm."""
    cfg = make_config(SMALL | {"optimizer": "adam"})
    info = ctypes.CDLL(None).mallinfo2
    info.restype = MallInfo
    with open_world(cfg) as world:
        step = Trainer(cfg, world, architectures.build(cfg, (1, 28, 28), 10), Batches(cfg, world, Part(IMAGES, LABELS)))
        step.batches.draw(1)
        step.rates = step.rates * 100  # for more steps than the run has
        used = []
        for _ in range(2):
            for k in range(40):
                step(k % step.batches.steps)
            gc.collect()
            used.append(info().uordblks + info().hblkhd)
        return used[1] - used[0]


@pytest.mark.quick
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 or newer tells what is in use")
def test_a_step_leaves_no_memory_behind() -> None:
    [kept] = ranks(1, kept_bytes)
    assert kept < 40 * 10_000, kept  # of 40 steps; one batch's images are 63,000 bytes


@pytest.mark.quick
def test_a_run_imports_nothing_unused_and_nobody_looks_for_garbage_among_what_was_loaded(tmp_path: Path) -> None:
    code = """
import gc, sys
from fashion_ddp import train
from fashion_ddp.training.recorder import Recorder

looked_at = []
def note(phase, about):
    if phase == "start" and about["generation"] == 2:
        looked_at.append(len(gc.get_objects()))

def begin(recorder, *args):
    if not looked_at:
        gc.callbacks.append(note)
        gc.collect()
    begin_epoch(recorder, *args)

begin_epoch, Recorder.begin_epoch = Recorder.begin_epoch, begin
train.main(sys.argv[1:])
print(*{"matplotlib", "wandb", "pandas", "sklearn", "scipy", "transformers"} & set(sys.modules))
print(looked_at[0], gc.isenabled(), gc.get_freeze_count())
"""
    words = ["--model", "linear", "--dataset", "synthetic", "--epochs", "1", "--device", "cpu", "--tracker", "none"]
    line = [sys.executable, "-c", code, *words, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(line, check=True, cwd=CHECKOUT, capture_output=True, text=True)
    imported, figures = done.stdout.splitlines()[-2:]
    looked_at, enabled, frozen = figures.split()
    assert imported == ""
    assert int(looked_at) < 10_000  # of 140,000
    assert (enabled, frozen) == ("True", "0")  # a program that trains again, or goes on, has all its objects looked at
