"""benchmarks/card.py: what its steps find is kept, however they or the machine end. No card is needed."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT
from stand_in import StandIn, environment


@pytest.fixture(scope="module")
def card() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CHECKOUT / "benchmarks"))
        yield importlib.import_module("card")


def processes_naming(word: str) -> list[str]:
    """Command lines of living processes that hold a word."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_text().replace("\0", " "))
        except OSError:  # it has ended
            continue
    return [line for line in lines if word in line]


@pytest.mark.quick
def test_a_step_that_takes_too_long_is_cut_with_all_that_it_started(card: Any, tmp_path: Path) -> None:
    step = f"""
import subprocess, sys, time
line = [sys.executable, "-c", "import time; time.sleep(600)", {str(tmp_path)!r}]
subprocess.Popen(line, stdout=subprocess.DEVNULL, start_new_session=True)
print('["section", "name", 1]', flush=True)
time.sleep(600)
"""
    found: list[Any] = []
    for limit in (1, 4, 16, 64):  # the first within which this machine starts it
        ended = card.run([sys.executable, "-c", step], limit, found.append)
        assert ended["ended"] == "out of time"
        if found:
            break
    assert found == [["section", "name", 1]]
    assert not processes_naming(str(tmp_path))


@pytest.mark.quick
def test_an_interrupt_while_a_step_is_started_leaves_no_process(
    card: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = subprocess.Popen

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        process = popen(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell shuts off in its background
    try:
        with pytest.raises(KeyboardInterrupt):
            card.run([sys.executable, "-c", "import time; time.sleep(600)", str(tmp_path)], 600, print)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not processes_naming(str(tmp_path))


@pytest.mark.quick
def test_a_step_that_fails_is_recorded_with_what_it_said(card: Any) -> None:
    found: list[Any] = []
    host = socket.gethostname()
    assert card.without_names(f"error: {host}: no, in {CHECKOUT}/a.py") == "error: HOST: no, in CHECKOUT/a.py"
    step = "print('[1, 2, 3]'); import sys; sys.exit('error: why')"
    ended = card.run([sys.executable, "-c", step], 600, found.append)
    assert (ended["ended"], ended["lines"], found) == ("failed (exit code 1)", ["error: why"], [[1, 2, 3]])


@pytest.mark.quick
def test_the_page_says_what_failed(card: Any) -> None:
    torchrun = ["error: rank 0 on host: NCCL failed with unhandled system error", "=====", "exitcode  : 1", "====="]
    machine = {"card": "a card", "torch": "2.11.0", "accelerate": "1.15.0", "python": "3.12.3"}
    said = card.page.on_card(
        {"date": "today", "commit": "0123456789", "machine": machine, "epochs": 3, "card": {"driver": "580"}}
        | {"steps": {"describe": {"ended": "done"}, "tests": {"ended": "out of time"}}}
        | {"smoke": {"cnn, ours, DDP of one rank": {"failed": torchrun}}}
        | {"tests": {"test_a": {"outcome": "failed", "why": ["def test_a():", "E   assert 1 == 2", "E    +  where"]}}}
        | {"track failed": {"cnn-10 blog, accelerate": ["Traceback:", "ValueError: no"]}}
        | {"precision": {"tf32": {"failed": ["error: precision tf32: needs another card"]}}}
    )
    for what in ("today, a card", "driver 580", "`tests` (out of time)", "NCCL failed with unhandled system error"):
        assert what in said
    for what in ("1 failed", "`assert 1 == 2`", "`ValueError: no`", "- tf32: `error: precision tf32: needs"):
        assert what in said
    assert "`describe`" not in said and "====" not in said


STEPS = ("describe", "smoke", "tests", "track", "precision", "memory", "rounds")
WAYS = ("plain", "accelerate", "ours", "ours, kernel by kernel", "ours, DDP of one rank")
PRECISIONS = ("fp32", "fp16")  # of the four, one that scales no gradient and the one that does
# Those of tests/test_gpu.py decide by numbers, which a stand-in has not.
OF_A_CARD = """
import torch
def test_that_passes(): assert torch.cuda.is_available()
def test_that_fails(): assert torch.cuda.device_count() == 2
"""


def ends(results: dict[str, Any]) -> dict[str, str]:
    """How each step ended."""
    return {step: one["ended"] for step, one in results["steps"].items()}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_of_it_on_a_stand_in_for_a_card(stand_in: StandIn, data_dir: Path) -> None:
    absent = stand_in.folder / "absent"  # what need not be installed
    absent.mkdir()
    for package in ("wandb", "submitit"):
        (absent / f"{package}.py").write_text("raise ModuleNotFoundError(__name__)")
    path = f"{absent}:{environment(stand_in.library)['PYTHONPATH']}"
    out, page = stand_in.folder / "card.json", stand_in.folder / "page.md"
    line = ["python", str(CHECKOUT / "benchmarks" / "card.py"), "--data-dir", str(data_dir), "--minutes", "60"]
    line += ["--cases", "linear-10", "--models", "linear", "--epochs", "1", "--repeats", "1"]
    line += ["--precisions", *PRECISIONS]
    line += ["--tests", str(tests := stand_in.folder / "test_of_a_card.py"), "--out", str(out), "--page", str(page)]
    tests.write_text(OF_A_CARD)

    def start() -> subprocess.Popen[str]:
        return stand_in.start(1, *line, PYTHONPATH=path, FAKE_CUDA_CARD="hopper")

    # Stopped in the middle: what was found is there, and no process is left.
    with start() as process:
        while "smoke" not in (json.loads(out.read_text())["steps"] if out.exists() else {}):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    stopped = json.loads(out.read_text())
    assert process.returncode == 1 and stopped["card"]["nccl"]
    assert ends(stopped) == {"describe": "done", "smoke": "interrupted"}
    assert "`smoke` (interrupted)" in page.read_text()
    assert not processes_naming(str(stand_in.folder))

    with start() as process:
        said, _ = process.communicate()
    results = json.loads(out.read_text())
    assert process.returncode == 0, said
    assert ends(results) == dict.fromkeys(STEPS, "done"), said
    assert page.read_text().count("| launched as one CUDA graph |") == len(results["smoke"]) == 2
    assert "NCCL" in results["smoke"]["linear, ours, DDP of one rank"]["backend"]
    outcomes = {name.rpartition("::")[2]: one["outcome"] for name, one in results["tests"].items()}
    assert outcomes == {"test_that_passes": "passed", "test_that_fails": "failed"}
    assert {way: len(one["runs"]) for way, one in results["track"]["linear-10 blog"].items()} == dict.fromkeys(WAYS, 1)
    for precision in PRECISIONS:
        found = results["precision"][precision]
        assert found["rates"]["bytes_per_s"] and found["linear-10"]["step_s"]
        assert set(found["distances"]["linear-10"]) == {"logits", "gradient"}
    # Products of a batch of 128: two forward, and backward two for the weights and one for the hidden layer.
    assert results["precision"]["fp32"]["counts"]["linear-10"]["flops"] == 2 * 128 * (784 * 10 * 2 + 10 * 10 * 3)
    assert all(one["torch_bytes"] for one in results["memory"].values())
    assert results["card"]["name"] in page.read_text() and "not measured" not in said
