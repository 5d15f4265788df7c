"""Run a command on the stand-in for CUDA: cards that compute nothing, on a machine without any (fake_cuda/README.md).

python tests/stand_in.py --cards 2 torchrun --standalone --nproc-per-node 2 -m fashion_ddp.train --device cuda
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "fake_cuda"
TINY = ["--dataset", "synthetic", "--epochs", "1", "--batch-size", "1000", "--tracker", "none", "--device", "cuda"]
TINY += ["--model", "linear", "--run-dir", "run", "--threads", "1"]


def headers() -> list[Path]:
    """Return the folders of CUDA's, NCCL's and the compiler's headers among torch's wheels; none where a build of torch
    needs no CUDA."""
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    site = Path(spec.origin).parents[1]
    found = sorted(site.glob("nvidia/*/include"))
    # Triton alone brings the headers crt/, which those of the CUDA wheels include.
    return [*found, site / "triton" / "backends" / "nvidia" / "include"] if found else []


def build(library: Path) -> None:
    """Compile the stand-in. Raises CalledProcessError where the compiler refuses it, having said why."""
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    folders = [word for folder in headers() for word in ("-isystem", str(folder))]
    sources = map(str, sorted((HERE / "runtime").glob("*.cpp")))
    # The name by which torch asks for the driver. A library of that name that is loaded already serves.
    name = "-Wl,-soname,libcuda.so.1"
    words = ["c++", *flags, *folders, *sources, name, "-lrt", "-lpthread", "-o", str(library)]
    subprocess.run(words, check=True)


def environment(library: Path, cards: int = 1) -> dict[str, str]:
    """Return what a process's environment must have so that it runs on so many cards."""
    path = [str(HERE / "replaced"), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    env = {"LD_PRELOAD": str(library), "FAKE_CUDA_DEVICES": str(cards)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    if sys.dont_write_bytecode:  # else each process would compile all of torch anew, for seconds
        env |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(library.parent / "bytecode")}
    return env


class StandIn:
    """Commands on stand-in cards, in a test's own folder."""

    def __init__(self, library: Path, folder: Path):
        self.library, self.folder, self.reports = library, folder, folder / "reports"
        self.reports.mkdir()
        self.run = folder / "run"  # as TINY names it

    def start(self, cards: int, *words: str, **env: str) -> subprocess.Popen[str]:
        """Start a program of this environment on a machine with so many cards."""
        hidden = ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "TORCH_DIST_USE_NCCL2")
        surroundings = {k: v for k, v in os.environ.items() if k not in hidden}
        surroundings |= environment(self.library, cards) | {"FAKE_CUDA_REPORTS": str(self.reports)} | env
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        line = [str(Path(sys.executable).parent / words[0]), *words[1:]]
        return subprocess.Popen(line, cwd=self.folder, env=surroundings, text=True, **streams)

    def start_ranks(
        self, number: int, *words: str, program: str = "fashion_ddp.train", own_card: bool = False, **env: str
    ) -> list[subprocess.Popen[str]]:
        """Start ranks by themselves, which is seconds faster than by a launcher.

        `own_card`: each sees its own card only, as where SLURM binds tasks to cards.
        """
        from conftest import free_port

        place = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": str(free_port())} | env
        processes = []
        for rank in map(str, range(number)):
            card = {"CUDA_VISIBLE_DEVICES": rank} if own_card else {}
            place |= {"RANK": rank, "LOCAL_RANK": rank} | card
            processes.append(self.start(number, "python", "-m", program, *words, **place))
        return processes

    def train(self, number: int, *flags: str, **env: str) -> tuple[list[int], str]:
        """Return the exit codes of a tiny run's ranks, and what they print."""
        return finish(self.start_ranks(number, *TINY, *flags, **env))

    def counts(self) -> list[dict[str, int]]:
        """Return what the library counted in each rank that ended by itself, by rank."""
        return [parse(file.read_text()) for file in sorted(self.reports.glob("rank*.txt"))]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.run / "summary.json").read_text())  # type: ignore[no-any-return]


def parse(report: str) -> dict[str, int]:
    """Return how often what was counted."""
    return {what: int(times) for what, _, times in (line.rpartition(": ") for line in report.splitlines())}


def finish(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Wait until processes end, none of which outlives the test. Return their exit codes, and all that they print."""
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], "".join(printed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, default=1, help="how many the machine has (1)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a program of this environment, or any other")
    args = parser.parse_args()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "libcuda.so.1")
        env = environment(Path(folder) / "libcuda.so.1", args.cards)
        # By env, so that the new PATH is the one that the program is looked for in.
        return subprocess.run(["env", *args.command], env=os.environ | env | {"PATH": path}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
