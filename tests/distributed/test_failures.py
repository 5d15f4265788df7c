"""What errors of NCCL and of a card mean, in words that say what to do: of texts as torch and NCCL build them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import FULL_CARD, NCCL_ERROR, Fault, start_tiny
from torch import OutOfMemoryError
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from fashion_ddp.distributed import failures
from fashion_ddp.distributed.failures import explain_joining, nccl_words
from fashion_ddp.distributed.world import explain, is_lost_rank
from fashion_ddp.errors import TrainingFailed, UserError
from fashion_ddp.runs.reading import load_run

quick = pytest.mark.quick

HOST = os.uname().nodename
SHARED_MEMORY = (
    "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888), error: No space left on device (28)"
)
HEAD = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
TWICE = (
    HEAD
    + """\
invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.7
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"""
)
TWICE_NOW = (
    TWICE[: TWICE.index("Duplicate")]
    + "Multiple Ranks are using the same GPU/Partition. Set NCCL_MULTI_RANK_GPU_ENABLE=1"
)
NO_LAST = HEAD + "internal error, NCCL version 2.27.7\nncclInternalError: Internal check failed."
NEWER_BACKEND = "Failed to initialize NCCL communicator: unhandled system error (run with NCCL_DEBUG=INFO for details)"
REMOTE = (
    HEAD
    + """\
remote process exited or there was a network error, NCCL version 2.27.7
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
socketProgress: Connection closed by remote peer node2<41234>"""
)
STORE = (
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', but "
    "store->get('0') got error: Connection reset by peer"
)


@quick
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (NCCL_ERROR, f"ncclSystemError: {SHARED_MEMORY}"),
        (TWICE, "ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"),
        (NO_LAST, "ncclInternalError: Internal check failed."),
        (NEWER_BACKEND, NEWER_BACKEND),
    ],
)
def test_nccl_speaks_for_itself(text: str, words: str) -> None:
    for error in (DistBackendError(text), RuntimeError(text)):
        assert nccl_words(error) == words and not is_lost_rank(error)
        assert explain(error) == f"NCCL failed with {words}"


@quick
@pytest.mark.parametrize(
    "error",
    [
        DistBackendError(REMOTE),
        DistBackendError(STORE),
        DistBackendError(NEWER_BACKEND.replace("unhandled system error", "remote process exited")),
        DistNetworkError("Connection reset by peer"),
        DistStoreError("wait timeout after 300000ms, keys: /0"),
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234"),
    ],
    ids=str,
)
def test_some_errors_only_say_that_another_rank_is_gone(error: Exception) -> None:
    assert is_lost_rank(error) and explain(error) == failures.LOST_RANK


@quick
@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("Broken"), UserError("NCCL"), TrainingFailed("gloo")])
def test_other_errors_speak_for_themselves(error: Exception) -> None:
    assert explain(error) is None


@quick
@pytest.mark.parametrize(("text", "who"), [(TWICE, "ranks 1 and 0"), (TWICE_NOW, "several ranks")])
def test_ranks_that_share_a_card_are_told_to_take_one_each(text: str, who: str) -> None:
    told = explain_joining(nccl_words(DistBackendError(text)) or "", rank=1)
    assert isinstance(told, UserError) and "\n" not in str(told)
    assert f"{who} share one card (ncclInvalidUsage: " in str(told) and "start one rank for each card" in str(told)


@quick
@pytest.mark.parametrize(
    ("error", "sizes"),
    [
        (OutOfMemoryError(FULL_CARD), " (20.00 MiB were asked for, 8.62 MiB free)"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
    ],
)
def test_a_full_card_is_told_with_what_helps(error: Exception, sizes: str) -> None:
    told = str(explain(error))
    assert told.startswith(f"the memory of the card is full{sizes}: add --micro-batch 32") and "\n" not in told
    assert "--batch-size" in told and "nvidia-smi" in told


CONTINUES = "; the same command continues from the last checkpoint"
LOST = f"error: {failures.LOST_RANK}{CONTINUES}"
JOINING = f"error: {HOST}: rank 1: ncclSystemError: {SHARED_MEMORY}; the ranks cannot talk to each other. What to try"
TRAINING = f"error: rank 1 on {HOST}: NCCL failed with ncclSystemError: {SHARED_MEMORY}{CONTINUES}"
FULL = f"error: rank 1 on {HOST}: the memory of the card is full (20.00 MiB were asked for, 8.62 MiB free): "


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (Fault("all-reduce", "NCCL fails", 1, 1), 2, JOINING),
        (Fault("step", "NCCL fails", 1, 5), 1, TRAINING),
        (Fault("step", "card is full", 1, 5), 1, FULL),
    ],
    ids=str,
)
def test_the_rank_that_finds_an_error_prints_it(fault: Fault, code: int, said: str, tmp_path: Path) -> None:
    run = start_tiny(2, tmp_path, [], [fault])
    codes = run.wait()
    lost, own = run.errors()  # as their files are read, rank 0's first
    assert codes == [1, code] and lost == LOST and own.startswith(said)


@pytest.mark.parametrize("action", ["NCCL fails", "card is full"])
def test_an_error_that_all_ranks_find_is_told_once(action: str, tmp_path: Path) -> None:
    run = start_tiny(2, tmp_path, [], [Fault("step", action, rank, 5) for rank in range(2)])
    assert run.wait() == [1, 1]
    told = [line for line in run.errors() if line != LOST]
    assert len(told) == 1 and told[0].startswith("error: rank ")
    assert load_run(tmp_path / "run").summary["error"] in told[0]


@pytest.mark.slow
def test_a_first_exchange_that_hangs_ends_with_advice(tmp_path: Path) -> None:
    run = start_tiny(2, tmp_path, ["--timeout", "3"], [Fault("all-reduce", "hang", 1, 1)])
    assert run.wait(patience=60) == [1, 1]
    late = [f"error: rank {rank} on {HOST}: the first exchange did not end" for rank in range(2)]
    assert [line.partition(" within 20 s; ")[0] for line in run.errors()] == late
    assert "NCCL_P2P_DISABLE=1" in run.printed() and run.printed().count("see the advice of rank 0") == 1


@quick
def test_ranks_that_hang_end_with_advice() -> None:
    code = "import time; from fashion_ddp.distributed import failures\n"
    code += "with failures.time_limit(0, 'an all-reduce', 0.2): time.sleep(60)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False, capture_output=True, text=True)
    assert done.returncode == 1 and time.monotonic() - start < 50
    assert "error: rank 0 on " in done.stdout and ": an all-reduce did not end within 0 s; " in done.stdout
    assert "NCCL_P2P_DISABLE=1" in done.stdout and "IOMMU" in done.stdout and "a firewall" in done.stdout
