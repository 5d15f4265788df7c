"""Print what this machine has, and whether training can start on it. A bug report needs this, too.

    python -m fashion_ddp.check                    prints everything in a few seconds; starts nothing
    accelerate launch -m fashion_ddp.check         probes the ranks: cards, memory, a timed all-reduce (probe.py)

Exit code 0: training can start. 1: it cannot, and the lines with PROBLEM say why.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fashion_ddp.config import Config, default_runs_dir
from fashion_ddp.console import entry_point, say
from fashion_ddp.data.published import PUBLISHED, cache_folder, locate, missing_files_message
from fashion_ddp.distributed import machine
from fashion_ddp.errors import CommandFailed, UserError, pluralize
from fashion_ddp.redact import redact
from fashion_ddp.runs import provenance

PACKAGES = ("torchvision", "wandb", "submitit", "torchmetrics", "safetensors")
# Names (beginnings) of libraries that torch ships. Another copy of one on the search path would be loaded instead.
TORCH_LIBRARIES = ("libcudart", "libcublas", "libcudnn", "libnccl", "libnvrtc", "libcusparse", "libcufft", "libtorch")
SLURM = ("sbatch", "srun", "squeue", "scontrol", "sacct")


@dataclass(frozen=True)
class CheckResult:
    """One printed line."""

    what: str
    text: str
    problem: bool = False

    def __str__(self) -> str:
        return f"{self.what:<12}{'PROBLEM: ' * self.problem}{self.text}"


def check() -> list[CheckResult]:
    """Return all lines in the order in which they are printed."""
    return [*system(), *packages(), *cards(), *precisions(), *accelerate(), *datasets(), *wandb(), *slurm(), *disk()]


def system() -> Iterator[CheckResult]:
    yield CheckResult("system", f"{platform.platform()}; Python {platform.python_version()} in {sys.prefix}")
    free = machine.free_memory()
    memory = f", {free / 1e9:.1f} GB of memory free" if free is not None else ""
    yield CheckResult("processor", f"{machine.cpu_name()}, {pluralize(machine.usable_cores(), 'usable core')}{memory}")


def packages() -> Iterator[CheckResult]:
    ours = provenance.versions()
    others = {name: _version(name) for name in PACKAGES}
    text = ", ".join(f"{name} {version or '(not installed)'}" for name, version in (ours | others).items())
    commit = provenance.git_commit() or "unknown"
    yield CheckResult("versions", f"{text}; source {provenance.code_hash()[:12]}, commit {commit}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cards() -> Iterator[CheckResult]:
    """Check NVIDIA's cards and driver against this build of torch, and whether a run would use them."""
    import torch

    built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda or '(none)'}"
    driver = machine.run_and_read_lines("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    yield CheckResult("driver", f"NVIDIA {driver[0]}; {built}" if driver else f"no NVIDIA driver answers; {built}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"
        yield CheckResult(f"card {index}", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    for process in machine.run_and_read_lines(
        "nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"
    ):
        yield CheckResult("card in use", process)
    try:
        device = machine.choose_device(Config(), machine.RankPlacement())
        yield CheckResult(
            "device", f"a run takes {'the cards' if device == 'cuda' else 'the CPU: there is no NVIDIA card'}"
        )
    except UserError as error:
        yield CheckResult("device", str(error), problem=True)
    for folder in filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")):
        if shadows := sorted(p.name for p in _files(Path(folder)) if p.name.startswith(TORCH_LIBRARIES)):
            text = f"{folder} on LD_LIBRARY_PATH comes before torch's own {', '.join(shadows[:5])}"
            yield CheckResult("libraries", f"{text}: unset it where CUDA fails to start")


def _files(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def precisions() -> Iterator[CheckResult]:
    supported, unsupported = [], []
    for precision in ("fp32", "tf32", "fp16", "bf16", "fp64"):
        try:
            machine.choose_device(Config(precision=precision), machine.RankPlacement())
            supported.append(precision)
        except UserError:
            unsupported.append(precision)
    yield CheckResult("precision", ", ".join(supported) + (f"; not {', '.join(unsupported)}" if unsupported else ""))


def accelerate() -> Iterator[CheckResult]:
    """Name the file that `accelerate launch` reads by default."""
    from accelerate.commands.config.config_args import default_config_file

    path = Path(default_config_file)
    if path.is_file():
        text = f"`accelerate launch` reads {path}; `--config_file accelerate_config.yaml` uses ours instead, "
        text += "which `python -m launch.templates` writes"
    else:
        text = f"`accelerate launch` finds no file at {path}, and uses all cards"
    yield CheckResult("accelerate", text)


def datasets() -> Iterator[CheckResult]:
    for name in PUBLISHED:
        folder = locate(name, None)
        if folder is not None:
            yield CheckResult("data", f"{name} in {folder}")
        elif name == Config.dataset:
            yield CheckResult("data", f"a run would download it: {missing_files_message(name, None)}")


def wandb() -> Iterator[CheckResult]:
    version, settings = _version("wandb"), {k: v for k, v in sorted(os.environ.items()) if k.startswith("WANDB_")}
    if version is None:
        yield CheckResult("W&B", "not installed: runs are recorded in their folders alone")
        return
    mode = settings.get("WANDB_MODE") or (
        "online" if _has_key() else "offline: there is no key, `wandb login` keeps one"
    )
    variables = ", ".join(redact(f"{name}={value}") for name, value in settings.items() if "KEY" not in name)
    yield CheckResult("W&B", f"{version}, {mode}{f' ({variables})' if variables else ''}")


def _has_key() -> bool:
    """Return whether W&B's key is in its variable, or in the file that `wandb login` writes."""
    import netrc

    try:
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
        stored = netrc.netrc(os.environ.get("NETRC") or os.path.expanduser("~/.netrc")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        stored = None
    return bool(os.environ.get("WANDB_API_KEY") or stored)


def slurm() -> Iterator[CheckResult]:
    installed = [name for name in SLURM if shutil.which(name)]
    inside = f"; this is inside job {job}" if (job := os.environ.get("SLURM_JOB_ID")) else ""
    if installed:
        missing = [name for name in SLURM if name not in installed]
        yield CheckResult(
            "SLURM", ", ".join(installed) + (f"; without {', '.join(missing)}" if missing else "") + inside
        )
    else:
        yield CheckResult("SLURM", "none of its commands is installed")


def disk() -> Iterator[CheckResult]:
    runs = default_runs_dir().absolute()
    virtual = sys.prefix != sys.base_prefix  # the system's own Python is not counted
    folders = {"environment": Path(sys.prefix)} if virtual else {}
    for what, folder in (folders | {"data cache": cache_folder(), "runs": runs}).items():
        if folder.is_dir():
            size, count = _size(folder)
            yield CheckResult("disk", f"{what}: {size / 1e9:.2f} GB in {pluralize(count, 'file')}, {folder}")
    existing = next(folder for folder in (runs, *runs.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    yield CheckResult("disk", f"{free / 1e9:.1f} GB free where runs are written", problem=free < 50e6)


def _size(folder: Path) -> tuple[int, int]:
    """Return the number of bytes and of files below a folder, without what cannot be read."""
    size = count = 0
    for below, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(below, name)).st_size
                count += 1
            except OSError:
                continue
    return size, count


@entry_point
def main() -> None:
    if "WORLD_SIZE" in os.environ:
        from fashion_ddp.distributed import probe  # imports torch.distributed

        probe.main()
        return
    found = check()
    for one in found:
        say(redact(str(one)))
    if problems := [one for one in found if one.problem]:
        raise CommandFailed(f"training cannot start here: {pluralize(len(problems), 'problem')}, see above")
    say("training can start here")


if __name__ == "__main__":
    main()
