"""What the launcher asked for and what the machine has: accepted where they meet, refused in words where not.

There is no card in a test: torch.cuda answers as the case says, and the machine's files lie below a folder of the test.
"""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fashion_ddp.config import Config
from fashion_ddp.distributed import machine
from fashion_ddp.distributed.machine import MachineError, RankPlacement, choose_device, read_placement
from fashion_ddp.errors import UserError

pytestmark = pytest.mark.quick

# What `accelerate launch` of 1.15 exports: to each of N ranks (here rank 1 of accelerate_config.yaml's four), and to
# the one process that it starts where it finds no card or is told --cpu.
DYNAMO = {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default"}
DYNAMO |= {f"ACCELERATE_DYNAMO_USE_{what}": "False" for what in ("DYNAMIC", "FULLGRAPH", "REGIONAL_COMPILATION")}
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "55363"}
ACCELERATE_FOUR = DYNAMO | TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "no"}
ACCELERATE_ONE = DYNAMO | {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}
ACCELERATE_LOST = ACCELERATE_ONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # --num_processes 2


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, RankPlacement()),
        (TORCHRUN, RankPlacement(rank=1, world_size=4, local_rank=1, local_world_size=4)),
        (ACCELERATE_FOUR, RankPlacement(rank=1, world_size=4, local_rank=1, local_world_size=4)),
        (ACCELERATE_ONE, RankPlacement()),
        (TORCHRUN | {"RANK": "5", "WORLD_SIZE": "8"}, RankPlacement(5, 8, 1, 4)),  # the second of two machines
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, RankPlacement()),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, RankPlacement()),  # one task of a larger allocation
        (TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"}, RankPlacement(1, 4, 1, 4)),  # one torchrun per task
        ({"OMPI_COMM_WORLD_SIZE": "1"}, RankPlacement()),
    ],
)
def test_place(env: dict[str, str], expected: RankPlacement) -> None:
    assert read_placement(env) == expected


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"WORLD_SIZE": "4"}, ("WORLD_SIZE=4", "RANK", "torchrun", "unset WORLD_SIZE")),
        (TORCHRUN | {"WORLD_SIZE": "four"}, ("WORLD_SIZE=four", "whole numbers")),
        (TORCHRUN | {"RANK": "one"}, ("'one'",)),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ("WORLD_SIZE=2", "MASTER_ADDR", "torchrun")),
        (ACCELERATE_LOST, ("accelerate launch", "several processes and started one", "torchrun", "--num_processes 1")),
        ({"SLURM_STEP_NUM_TASKS": "2"}, ("srun started 2 processes", "one task per machine")),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, ("mpirun started 3 processes", "one task per machine")),
    ],
)
def test_ranks_half_described_or_lost(env: dict[str, str], said: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as told:
        read_placement(env)
    assert all(words in str(told.value) for words in said) and "\n" not in str(told.value)


@pytest.mark.parametrize("env", [{}, TORCHRUN, ACCELERATE_FOUR, ACCELERATE_ONE])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "fp64"])
def test_a_plain_launch_is_accepted(env: dict[str, str], precision: Any) -> None:
    machine.refuse_launcher_settings(Config(precision=precision), env)
    asked = {"ACCELERATE_MIXED_PRECISION": precision} if precision in ("bf16", "fp16") else {}
    machine.refuse_launcher_settings(Config(precision=precision), env | asked)


@pytest.mark.parametrize(
    ("variable", "value", "what"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "True", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "yes", "parallelism config"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--micro-batch"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--precision"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "--precision"),
        ("ACCELERATE_USE_CPU", "true", "the CPU where the run asks for cuda"),
    ],
)
def test_what_would_train_something_else_is_refused(variable: str, value: str, what: str) -> None:
    with pytest.raises(UserError) as told:
        machine.refuse_launcher_settings(Config(device="cuda"), ACCELERATE_FOUR | {variable: value})
    message = str(told.value)
    assert message.startswith(f"{variable}={value}: ") and what in message and "\n" not in message
    assert "--config_file accelerate_config.yaml" in message and f"unset {variable}" in message


@pytest.mark.parametrize(
    ("variable", "value"),
    [("USE_FSDP", "false"), ("USE_DEEPSPEED", "0"), ("GRADIENT_ACCUMULATION_STEPS", "1"), ("USE_CPU", "true")]
    + [("LOG_LEVEL", "info")],
)
def test_what_changes_nothing_is_accepted(variable: str, value: str) -> None:
    machine.refuse_launcher_settings(Config(), ACCELERATE_ONE | {f"ACCELERATE_{variable}": value})


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Let the machine have `present` cards, of which torch can use all or none, and this process sees all or some.
    Those that are not in `ampere` are Turing."""
    import torch

    def have(present: int, usable: bool = True, visible: int | None = None, ampere: Sequence[int] = range(8)) -> None:
        (tmp_path / "dev").mkdir(exist_ok=True)
        for n in range(present):
            (tmp_path / "dev" / f"nvidia{n}").touch()
        monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.lstrip("/"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable and present > 0)
        seen = present if visible is None else visible
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)  # also where the driver is too old
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6) if index in ampere else (7, 5))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return have


def here(ranks: int, rank: int = 0) -> RankPlacement:
    return RankPlacement(rank=rank, world_size=ranks, local_rank=rank, local_world_size=ranks)


@pytest.mark.parametrize(
    ("present", "cfg", "ranks", "env", "device"),
    [
        (0, {}, 1, {}, "cpu"),
        (0, {"precision": "fp64"}, 3, {}, "cpu"),
        (0, {"precision": "bf16"}, 2, TORCHRUN, "cpu"),
        *[(2, {"precision": precision}, 2, ACCELERATE_FOUR, "cuda") for precision in ("fp32", "tf32", "bf16", "fp16")],
        (2, {"device": "cuda"}, 1, {}, "cuda"),
        (2, {"device": "cpu"}, 4, ACCELERATE_FOUR, "cpu"),
        *[(2, {}, 1, ACCELERATE_ONE | {"ACCELERATE_USE_CPU": true}, "cpu") for true in ("1", "True", "yes", "on")],
    ],
)
def test_auto_takes_the_cards_where_there_are_any_and_nobody_asked_for_the_cpu(
    cards: Any, present: int, cfg: dict[str, Any], ranks: int, env: dict[str, str], device: str
) -> None:
    cards(present)
    assert choose_device(Config(**cfg), here(ranks), env) == device


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_cards_are_none(cards: Any, monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    cards(2, usable=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device(Config(), here(1), {}) == "cpu"


@pytest.mark.parametrize(
    ("present", "usable", "cfg", "ranks", "env", "said"),
    [
        (0, True, {"device": "cuda"}, 1, {}, ("--device cuda", "no NVIDIA card", "--device cpu")),
        (2, False, {}, 1, {}, ("cannot use them", "driver", "make setup", "--device cpu")),
        (0, True, {}, 4, ACCELERATE_FOUR, ("4 GPU ranks", "no NVIDIA card", "--device cpu")),
        (2, True, {}, 4, TORCHRUN, ("4 ranks were started for 2 NVIDIA cards", "--num_processes 2", "--device cpu")),
        (1, True, {}, 2, TORCHRUN, ("2 ranks were started for 1 NVIDIA card:",)),
        (0, True, {"precision": "fp16"}, 1, {}, ("fp16", "NVIDIA card", "fp32")),
        (0, True, {"precision": "tf32"}, 1, {}, ("tf32", "NVIDIA card", "fp32")),
        (1, True, {"precision": "fp64"}, 1, {}, ("fp64", "--device cpu")),
        (1, True, {"compile": True}, 1, {}, ("--compile is for CPUs", "--device cpu")),
    ],
)
def test_device_and_command_do_not_fit(
    cards: Any, present: int, usable: bool, cfg: dict[str, Any], ranks: int, env: dict[str, str], said: tuple[str, ...]
) -> None:
    cards(present, usable)
    with pytest.raises(MachineError) as told:
        choose_device(Config(**cfg), here(ranks), env)
    assert str(told.value).startswith(socket.gethostname() + ": ") and "\n" not in str(told.value)
    assert all(words in str(told.value) for words in said)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_what_ampere_brought_wants_units_of_this_ranks_card(cards: Any, precision: Any) -> None:
    cards(2, ampere=[0])
    assert choose_device(Config(precision=precision), here(2, rank=0), TORCHRUN) == "cuda"
    with pytest.raises(MachineError, match=f"{precision}: card 1 has no {precision} units; choose fp16 or fp32"):
        choose_device(Config(precision=precision), here(2, rank=1), TORCHRUN)
    assert choose_device(Config(precision="fp16"), here(2, rank=1), TORCHRUN) == "cuda"


@pytest.mark.parametrize(
    ("present", "env"),
    [
        (4, {}),  # the machine has more than this task sees
        *[(1, {"CUDA_VISIBLE_DEVICES": name}) for name in ("2", "GPU-5b2f4c8e", "MIG-1f2a")],
        (1, {"SLURM_GPUS_PER_TASK": "1"}),
        (1, {"SLURM_GPU_BIND": "single:1"}),
    ],
)
def test_a_task_that_sees_its_own_card_only_takes_it(cards: Any, present: int, env: dict[str, str]) -> None:
    cards(present, visible=1, ampere=[0])
    assert choose_device(Config(precision="bf16"), here(4, rank=3), TORCHRUN | env) == "cuda"
    assert machine.choose_card(here(4, rank=3), 1, env) == 0


def test_ranks_take_the_cards_that_they_see_by_their_number(cards: Any) -> None:
    cards(4)
    assert [machine.choose_card(here(4, rank=rank), 4, {}) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(MachineError, match="4 ranks were started for 2 NVIDIA cards: start 2"):
        machine.choose_card(here(4), 2, {"CUDA_VISIBLE_DEVICES": "0,1"})


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A system whose files say this of the process's control groups."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")

    def write(of_process: str, files: dict[str, str]) -> None:
        for name, text in {"proc/self/cgroup": of_process, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")

    return write


JOB = "/slurm/uid_0/job_7/step_0"
V1 = f"9:name=systemd:/\n4:cpu,cpuacct:{JOB}\n3:memory:{JOB}\n0::/"


@pytest.mark.parametrize(
    ("of_process", "files", "cores"),
    [
        ("0::/", {}, 8),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "400000 100000"}, 4),
        ("0::/", {"cpu.max": "150000 100000"}, 1),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "9900000 100000"}, 8),
        (f"0::{JOB}", {"slurm/uid_0/cpu.max": "300000 100000", "cpu.max": "500000 100000"}, 3),
        (V1, {f"cpu,cpuacct{JOB}/cpu.cfs_{n}_us": str(v) for n, v in (("quota", 200_000), ("period", 100_000))}, 2),
        (V1, {f"cpu,cpuacct{JOB}/cpu.cfs_{n}_us": str(v) for n, v in (("quota", -1), ("period", 100_000))}, 8),
    ],
)
def test_usable_cores(
    of_process: str, files: dict[str, str], cores: int, groups: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups(of_process, {f"cgroup/{name}": text for name, text in files.items()})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.usable_cores() == cores


def memory(folder: str, limit: str, version: int = 2) -> dict[str, str]:
    """The files of a group that uses 100 bytes, 30 of them for files that were read."""
    names = ("max", "current", "") if version == 2 else ("limit_in_bytes", "usage_in_bytes", "total_")
    stat = f"{names[2]}active_file 10\n{names[2]}inactive_file 20\nshmem 5"
    return {f"{folder}memory.{names[0]}": limit, f"{folder}memory.{names[1]}": "100", f"{folder}memory.stat": stat}


@pytest.mark.parametrize(
    ("of_process", "files", "free"),
    [
        ("0::/", {}, 2**20),
        ("0::/", memory("", "max"), 2**20),
        ("0::/", memory("", "1100"), 1030),
        (f"0::{JOB}", memory("slurm/uid_0/job_7/", "600") | memory("", "1100"), 530),  # a job's --mem, in a container
        (V1, memory(f"memory{JOB}/", "600", 1), 530),
        (V1, memory(f"memory{JOB}/", str(2**63 - 4096), 1), 2**20),
        (V1, memory("unified/", "600"), 530),
    ],
)
def test_free_memory(of_process: str, files: dict[str, str], free: int, groups: Callable[..., None]) -> None:
    groups(of_process, {f"cgroup/{name}": text for name, text in files.items()} | {"proc/meminfo": INFO})
    assert machine.free_memory() == free


INFO = "MemTotal:       4096 kB\nMemFree:         512 kB\nMemAvailable:   1024 kB"


def test_memory_that_is_free_here_is_asked_for() -> None:
    free = machine.free_memory()
    assert free is not None and 1e8 < free < 1e14
    machine.require_memory("dataset x", free, free)
    machine.require_memory("dataset x", 1, None)
    with pytest.raises(UserError, match=r"dataset x takes 2.00 GB, and 1.00 GB of memory are free on this machine"):
        machine.require_memory("dataset x", 2 * 10**9, 10**9)


@pytest.mark.parametrize(("asked", "ranks", "threads"), [(0, 1, 8), (0, 3, 2), (0, 16, 1), (5, 1, 5), (5, 16, 5)])
def test_threads_per_rank(asked: int, ranks: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    assert machine.threads_per_rank(Config(threads=asked), ranks) == threads


@pytest.mark.parametrize(("asked", "rows", "threads"), [(0, 128, 1), (0, 5000, 2), (0, 10**6, 8), (5, 128, 5)])
def test_a_small_step_takes_few_threads(asked: int, rows: int, threads: int) -> None:
    assert machine.threads_for_step(Config(threads=asked), 8, 2 * 7840, rows) == threads


@pytest.mark.parametrize(
    ("flags", "has"),
    [("fpu sse2 avx512f avx512_bf16", True), ("fpu amx_bf16 amx_tile", True), ("fp asimd bf16", True), ("", True)]
    + [("fpu sse2 avx2 avx512f", False), ("fp asimd", False)],
)
def test_a_processor_without_instructions_for_bf16_is_known(
    flags: str, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_cpuinfo", lambda *names: flags)
    assert machine.cpu_multiplies_bf16() is has
