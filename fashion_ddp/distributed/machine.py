"""Read what the launcher asked for and what this machine has, and refuse what does not fit together.

Every rank runs these checks before it talks to another one. A launcher may only place ranks. Anything else that it asks
for (precision, accumulation, another engine) is refused by name, because the run would not be what its command says.
"""

import contextlib
import os
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fashion_ddp.config import Config
from fashion_ddp.distributed.precision import mixed_precision
from fashion_ddp.errors import UserError, pluralize

TORCHRUN = "torchrun --standalone --nproc-per-node N -m fashion_ddp.train ..."
CARDS = (
    ("/proc/driver/nvidia/gpus", "*"),
    ("/dev", "nvidia[0-9]*"),
)  # where Linux shows NVIDIA's cards: a folder, names
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
FLOPS_PER_THREAD = 10**8  # of a training step: about a millisecond of one core
AMPERE = (8, 0)  # the first compute capability with units for bf16 and tf32


def host_name(env: Mapping[str, str] = os.environ) -> str:
    """Return this machine's name; in a job that of SLURM, by which it can be drained or left out."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


class MachineError(UserError):
    """An error that may occur on this machine alone: its first rank prints it, with the machine's name."""

    of_machine = True

    def __str__(self) -> str:
        return f"{host_name()}: {super().__str__()}"


@dataclass(frozen=True)
class RankPlacement:
    """A rank's numbers, as its launcher gives them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def read_placement(env: Mapping[str, str] = os.environ) -> RankPlacement:
    """Read this process's rank and world size from the launcher's variables; without any it is the only rank.

    Raises UserError where only some variables are set, or where several processes were started without ranks.
    """
    if "WORLD_SIZE" not in env:
        _refuse_processes_without_ranks(env)
        return RankPlacement()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        rank, world_size, local_rank = (int(env[name]) for name in names)
        placement = RankPlacement(rank, world_size, local_rank, ranks_here(env))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE={env['WORLD_SIZE']} is set, but {'/'.join(names)} are not all whole numbers ({error}): "
            f"start ranks with {TORCHRUN}, or unset WORLD_SIZE to train on one"
        ) from None
    if world_size > 1 and "MASTER_ADDR" not in env:
        raise UserError(f"WORLD_SIZE={world_size} but no MASTER_ADDR: start ranks with {TORCHRUN}, or unset WORLD_SIZE")
    return placement


def ranks_here(env: Mapping[str, str] = os.environ) -> int:
    """Return how many ranks the launcher started on this machine; 1 in a process that none started."""
    return int(env.get("LOCAL_WORLD_SIZE", env.get("WORLD_SIZE", 1)))


def _refuse_processes_without_ranks(env: Mapping[str, str]) -> None:
    """Raise UserError where several processes were asked for and each would train alone, as if it were the only one."""
    # `accelerate launch` without --multi_gpu sets an address for N > 1 processes, then starts one.
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does for CPU ranks and where "
            f"torch finds no card: for N CPU ranks use {TORCHRUN} --device cpu; for one rank give --num_processes 1, "
            "and unset MASTER_ADDR if you set it yourself"
        )
    for variable, starter in (("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")):
        if int(env.get(variable) or 1) > 1:
            raise UserError(
                f"{starter} started {env[variable]} processes without telling them their ranks, so each would train "
                "alone: start one task per machine, and in it torchrun or accelerate launch"
            )


def _is_true(env: Mapping[str, str], name: str) -> bool:
    """Return whether Accelerate reads a variable as true."""
    return env.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def refuse_launcher_settings(cfg: Config, env: Mapping[str, str] = os.environ) -> None:
    """Raise UserError where `accelerate launch`, its files or ACCELERATE_* variables do more than place ranks."""
    mixed = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    ours = mixed_precision(cfg.precision)
    # By variable that the launcher sets: whether it asks for more, and what for.
    refused = {
        "ACCELERATE_DYNAMO_BACKEND": (env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no", "dynamo"),
        "ACCELERATE_USE_FSDP": (_is_true(env, "ACCELERATE_USE_FSDP"), "FSDP"),
        "ACCELERATE_USE_DEEPSPEED": (_is_true(env, "ACCELERATE_USE_DEEPSPEED"), "DeepSpeed"),
        "ACCELERATE_USE_MEGATRON_LM": (_is_true(env, "ACCELERATE_USE_MEGATRON_LM"), "Megatron-LM"),
        "ACCELERATE_USE_PARALLELISM_CONFIG": (
            _is_true(env, "ACCELERATE_USE_PARALLELISM_CONFIG"),
            "a parallelism config",
        ),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") not in (None, "", "1"),
            "gradient accumulation (here batch_size is global and --micro-batch cuts it)",
        ),
        "ACCELERATE_MIXED_PRECISION": (
            mixed not in ("no", ours),
            f"precision {mixed!r} where the run's is {cfg.precision} (choose it with --precision)",
        ),
        "ACCELERATE_USE_CPU": (
            _is_true(env, "ACCELERATE_USE_CPU") and cfg.device == "cuda",
            "the CPU where the run asks for cuda",
        ),
    }
    for variable, (asks, what) in refused.items():
        if asks:
            raise UserError(
                f"{variable}={env[variable]}: the launcher, its config file or the environment asks for {what}. "
                "Start with `accelerate launch --config_file accelerate_config.yaml -m fashion_ddp.train ...`, "
                "which leaves the run to its own settings (`python -m launch.templates` writes that file), and unset "
                f"{variable} if you exported it"
            )


def _control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups (v1 or v2) that this process is in: its own, as that of a SLURM job, and
    those that it lies in, as that of a container. The limits of all of them hold."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        # Several controllers in one folder have links to it of their own names. A system with both versions has that
        # of version 2 in a folder of its own.
        for root in [CGROUPS / controllers, CGROUPS / controller] if controllers else [CGROUPS, CGROUPS / "unified"]:
            own = root / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def usable_cores() -> int:
    """Return how many CPU cores this process may use, by its affinity and the quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [float(cores)]
    for group in _control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no quota
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            quotas += [int(quota) / int(period)] if int(quota) > 0 else []  # -1: no quota
    return max(1, int(min(quotas)))


def run_and_read_lines(*words: str) -> list[str]:
    """Run a program and return the lines that it prints; none where it is missing or fails, or after 20 seconds."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def cpu_name() -> str:
    """Return the processor's name, as far as the system knows it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_multiplies_bf16() -> bool:
    """Return whether the processor has instructions for bf16; True also where the system does not say."""
    words = _cpuinfo("flags", "Features")  # of x86, of ARM
    return not words or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(words.split()))


def _cpuinfo(*names: str) -> str:
    """Return what Linux says of the first processor under the first of some names that it has; "" for nothing."""
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")


def free_memory() -> int | None:
    """Return how many bytes of memory this process can still get on this machine, within the limits of its control
    groups, as a SLURM job's --mem; None where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (PROC / "meminfo").read_text().splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    for group in _control_groups("memory"):
        for limit, used, prefix in (("max", "current", ""), ("limit_in_bytes", "usage_in_bytes", "total_")):
            with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no number: no limit
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                # Of what is used, the system drops cached files when memory is needed.
                cached = sum(int(stat[f"{prefix}{name}_file"]) for name in ("active", "inactive"))
                most, taken = (int((group / f"memory.{name}").read_text()) for name in (limit, used))
                found.append(most - taken + cached)
    return min(found, default=None)


def require_memory(
    what: str,
    needed: int,
    free: int | None,
    on: str = "this machine",
    way_on: str = "take fewer or smaller images, fewer ranks on the machine, or another machine",
) -> None:
    """Raise UserError, with both sizes, where `needed` bytes do not fit into `free` ones. None: unknown, accepted."""
    if free is not None and needed > free:
        raise UserError(
            f"{what} takes {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB of memory are free on {on}: {way_on}"
        )


def threads_per_rank(cfg: Config, local_world_size: int) -> int:
    """Return the most CPU threads that one rank takes.

    It is decided here because each launcher would choose another number, and the number decides the order of additions
    and so the last bits of the result.
    """
    return cfg.threads or max(1, usable_cores() // local_world_size)


def threads_for_step(cfg: Config, most: int, flops_per_image: int, rows: int) -> int:
    """Return how many of at most `most` CPU threads share the passes of a step of `rows` images.

    `flops_per_image`: of a forward pass; a backward pass takes twice that. Of a small step a second thread has too
    little to do to gain anything, and where other work runs, each operation waits until both had their turn. It follows
    from the step, not from a measurement, so that a run has the same bits each time.
    """
    return cfg.threads or max(1, min(most, 3 * flops_per_image * rows // FLOPS_PER_THREAD))


def runs_per_card(env: Mapping[str, str] = os.environ) -> int:
    """Return how many runs share each card, as their launcher says; 1 where none does."""
    return int(env.get("FASHION_DDP_RUNS_PER_CARD", 1))


def _cards_present() -> int:
    """Return how many NVIDIA cards this machine has, even if torch cannot use them; 0 where they are hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1", "none"):
        return 0
    return max(len(list(Path(folder).glob(name))) for folder, name in CARDS)


def choose_card(placement: RankPlacement, visible: int, env: Mapping[str, str] = os.environ) -> int:
    """Return the index of this rank's card among the `visible` ones.

    Raises MachineError where the machine has more ranks than cards.
    """
    if placement.local_world_size <= visible:
        return placement.local_rank
    # SLURM can show each task a card of its own (--gpus-per-task, --gpu-bind): each then sees one, number 0. Should it
    # be the same one for several ranks, NCCL says so while they join.
    one_named = "CUDA_VISIBLE_DEVICES" in env and "," not in env["CUDA_VISIBLE_DEVICES"]
    bound = "SLURM_GPUS_PER_TASK" in env or "SLURM_GPU_BIND" in env
    if visible == 1 and (one_named or bound or _cards_present() > 1):
        return 0
    raise MachineError(
        f"{placement.local_world_size} ranks were started for {pluralize(visible, 'NVIDIA card')}: "
        f"start {visible} (--num_processes {visible}), or add --device cpu"
    )


def choose_device(cfg: Config, placement: RankPlacement, env: Mapping[str, str] = os.environ) -> Literal["cpu", "cuda"]:
    """Return the kind of device that every rank of the run uses.

    Raises MachineError where this machine lacks what the settings or the launcher ask for.
    """
    import torch

    asked_cpu = cfg.device == "cpu" or _is_true(env, "ACCELERATE_USE_CPU")
    usable = not asked_cpu and torch.cuda.is_available()
    if not asked_cpu and not usable:
        if _cards_present():
            raise MachineError(
                f"there are NVIDIA cards, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use them: "
                "the driver is probably older than this build needs. `make setup LOCK=cuda12` takes one for drivers "
                "from 525 to 579; --device cpu goes on without the cards"
            )
        if cfg.device == "cuda":
            raise MachineError("--device cuda, but torch finds no NVIDIA card: check nvidia-smi, or use --device cpu")
        if placement.world_size > 1 and "ACCELERATE_MIXED_PRECISION" in env:
            raise MachineError(
                f"accelerate launch was asked for {placement.world_size} GPU ranks, and there is no NVIDIA card here: "
                "add --device cpu to train on CPU ranks"
            )
    if not usable:
        if cfg.precision in ("fp16", "tf32"):
            raise MachineError(f"precision {cfg.precision} needs an NVIDIA card: choose fp32 or bf16")
        return "cpu"
    if cfg.compile:
        raise MachineError(
            "--compile is for CPUs, and on a card a step is one CUDA graph: leave it out, or add --device cpu"
        )
    card = choose_card(placement, torch.cuda.device_count(), env)
    if cfg.precision == "fp64":
        raise MachineError("precision fp64 is for proofs on CPU: add --device cpu, or choose fp32, tf32, fp16 or bf16")
    # Not torch.cuda.is_bf16_supported: that asks the current card, and says yes where bf16 is emulated, slowly.
    if cfg.precision in ("bf16", "tf32") and torch.cuda.get_device_capability(card) < AMPERE:
        name = torch.cuda.get_device_name(card)
        raise MachineError(f"precision {cfg.precision}: {name} has no {cfg.precision} units; choose fp16 or fp32")
    return "cuda"
