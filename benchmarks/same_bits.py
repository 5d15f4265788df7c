"""Whether a change to the code changes a result: the sha256 of what runs leave, by this checkout and by another commit.

    python benchmarks/same_bits.py --against HEAD~1

Trains every kind of run on 1 and 2 CPU ranks, two short epochs each, with a batch that does not divide among the ranks
and a short last one, and compares them in a report. Of each run: weights, logits, and metrics.jsonl without times; of
report.json all but times and what names the code. Digests hold for one kind of processor and one version of torch,
so that both commits are run here. Exit code 1: something differs, and is named.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fashion_ddp import data
from fashion_ddp.distributed.rendezvous import free_port

CHECKOUT = Path(__file__).parent.parent
TRAINING, TEST = 2_100, 1_003  # images
SHARED = ["--dataset", "part.npz", "--device", "cpu", "--threads", "1", "--tracker", "none", "--shuffle"]
SHARED += ["--epochs", "2", "--batch-size", "127"]
SMALL_CNN = ["--model", "cnn", "--hidden-units", "6"]
CASES = {
    "linear": ["--model", "linear"],
    "relu": ["--model", "relu"],
    "mlp": ["--model", "mlp", "--recipe", "lab"],
    "cnn": SMALL_CNN,
    "cnn batch norm": [*SMALL_CNN, "--batch-norm"],
    "cnn augmented": [*SMALL_CNN, "--shift", "2", "--flip", "0.5", "--erase", "0.25"],
    "cnn micro-batches": [*SMALL_CNN, "--micro-batch", "20", "--clip-norm", "1"],
    "cnn reduction shards": [*SMALL_CNN, "--reduction-shards", "4"],
    "cnn fp64": [*SMALL_CNN, "--precision", "fp64", "--optimizer", "adamw", "--lr", "0.002", "--schedule", "cosine"],
}
# Keys of report.json that depend on the clock or on where the code is.
CLOCK = ("time/", "throughput/", "peak_memory", "started", "code", "git_commit", "command", "data_source")


def digests(code: Path, folder: Path) -> dict[str, str]:
    """Run every case with the package in the folder `code`; the sha256 by case, ranks and file."""
    env = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    found: dict[str, str] = {}
    for name, flags in CASES.items():
        for ranks in (1, 2):
            run = f"runs/{name.replace(' ', '-')}-{ranks}"
            train(folder, env, ranks, *SHARED, *flags, "--run-dir", run)
            saved = load_file(folder / run / "predictions.safetensors")
            weights = load_file(folder / run / "model.safetensors")
            rows = [without_clock(json.loads(line)) for line in (folder / run / "metrics.jsonl").open()]
            content = {
                "weights": b"".join(name.encode() + array.tobytes() for name, array in sorted(weights.items())),
                "logits": saved["logits"].tobytes(),
                "metrics.jsonl": json.dumps(rows).encode(),
            }
            found |= {f"{name}, {ranks} ranks, {what}": sha256(value) for what, value in content.items()}
    call(folder, env, "-m", "fashion_ddp.compare", "runs", "--out", "report")
    report = without_clock(json.loads((folder / "report" / "report.json").read_text()))
    return found | {f"report.json, {part}": sha256(json.dumps(value).encode()) for part, value in report.items()}


def train(folder: Path, env: dict[str, str], ranks: int, *flags: str) -> None:
    """Train one run, its ranks started directly: a launcher would load torch once more."""
    place = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    words = [sys.executable, "-m", "fashion_ddp.train", *flags]
    log = folder / "log"
    with open(log, "w") as output:
        started = [
            subprocess.Popen(
                words,
                cwd=folder,
                env=env | {k: str(v) for k, v in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()},
                stdout=output,
                stderr=output,
            )
            for rank in range(ranks)
        ]
        codes = [rank.wait() for rank in started]
    if any(codes):
        sys.exit(f"error: {' '.join(words)} ended with {codes}:\n{log.read_text()}")


def call(folder: Path, env: dict[str, str], *words: str) -> None:
    done = subprocess.run([sys.executable, *words], check=False, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def without_clock(value: Any) -> Any:
    """A value of report.json or metrics.jsonl without what is another each time."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if not k.startswith(CLOCK)}
    return [without_clock(one) for one in value] if isinstance(value, list) else value


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def prepare(folder: Path) -> None:
    """Put a part of the real data into a folder that runs start in."""
    whole = data.load("fashion_mnist")
    arrays = {"train_images": whole.train_images[:TRAINING], "train_labels": whole.train_labels[:TRAINING]}
    arrays |= {"test_images": whole.test_images[:TEST], "test_labels": whole.test_labels[:TEST]}
    np.savez(folder / "part.npz", allow_pickle=False, classes=np.array(whole.classes), **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="COMMIT", help="another commit, whose results are to be the same")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs, code = (Path(temporary, name) for name in ("ours", "theirs", "code"))
        for folder in (ours, theirs, code):
            folder.mkdir()
        prepare(ours)
        prepare(theirs)
        found = digests(CHECKOUT, ours)
        if not asked.against:
            print(json.dumps(found, indent=1))
            return
        archive = subprocess.run(
            ["git", "-C", str(CHECKOUT), "archive", asked.against], check=True, capture_output=True
        ).stdout
        subprocess.run(["tar", "-x", "-C", str(code)], input=archive, check=True)
        other = digests(code, theirs)
    different = [name for name in found | other if found.get(name) != other.get(name)]
    for name in different:
        print(f"differs: {name}")
    print(f"{len(found) - len(different)} of {len(found)} digests are equal to those of {asked.against}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
