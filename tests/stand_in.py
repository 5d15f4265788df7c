"""Run a command on the stand-in for CUDA: cards that compute nothing, on a machine without any (fake_cuda/README.md).

    python tests/stand_in.py --cards 2 torchrun --standalone --nproc-per-node 2 -m fashion_ddp.train --device cuda
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent / "fake_cuda"


def headers() -> list[Path]:
    """Return the folders of CUDA's, NCCL's and the compiler's headers among torch's wheels; none where a build of torch
    needs no CUDA."""
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    site = Path(spec.origin).parents[1]
    found = [*site.glob("nvidia/*/include"), *site.glob("nvidia/*/include/cccl")]
    # Triton alone brings the headers crt/, which those of the CUDA wheels include.
    return [*sorted(found), site / "triton" / "backends" / "nvidia" / "include"] if found else []


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
    return {
        "LD_PRELOAD": str(library),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "FAKE_CUDA_DEVICES": str(cards),
    }


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
