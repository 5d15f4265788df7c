"""How much faster a run trains than the loop that a tutorial writes, on this machine, in one sitting.

    python benchmarks/plain_loop.py --models linear relu --repeats 3

Both train the same model with the blog recipe on one process and the CPU, in turn: plain, ours, plain, ours ... The
plain loop is torchvision's FashionMNIST with ToTensor behind a DataLoader. The clock of both is the tutorials': the
epochs with a test pass each, without start-up. Prints medians and the spread of the ratios; writes --out.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fashion_ddp import data, machine, models, provenance
from fashion_ddp.settings import make_config


def plain(model_name: str, root: Path) -> dict[str, float]:
    """Train as the blog does; seconds and exact test accuracy."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import FashionMNIST
    from torchvision.transforms import ToTensor

    cfg = make_config({"model": model_name})
    train = DataLoader(FashionMNIST(root, train=True, transform=ToTensor()), cfg.batch_size, shuffle=False)
    test = DataLoader(FashionMNIST(root, train=False, transform=ToTensor()), cfg.batch_size, shuffle=False)
    classes = len(train.dataset.classes)  # type: ignore[attr-defined]
    model = models.build(cfg, tuple(next(iter(train))[0].shape[1:]), classes)
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[cfg.optimizer](model.parameters(), lr=cfg.lr)
    loss_function = nn.CrossEntropyLoss()
    start = time.perf_counter()
    for _ in range(cfg.epochs):
        model.train()
        for images, labels in train:
            loss = loss_function(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        right = 0
        with torch.inference_mode():
            for images, labels in test:
                right += int((model(images).argmax(1) == labels).sum())
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "accuracy": right / len(test.dataset)}  # type: ignore[arg-type]


def ours(model_name: str, folder: Path) -> dict[str, float]:
    """A run of this project, by its own clock."""
    command = [sys.executable, "-m", "fashion_ddp.train", "--model", model_name, "--recipe", "blog"]
    command += ["--device", "cpu", "--tracker", "none", "--run-dir", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / "summary.json").read_text())
    seconds = summary["time/train_total_s"] + summary["time/eval_total_s"]
    return {"seconds": seconds, "accuracy": summary["test/accuracy"], "whole_process": summary["time/total_s"]}


def unpack(source: Path, root: Path) -> None:
    """torchvision wants the files unpacked."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in source.rglob("*-ubyte.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["linear"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plain_loop.json")
    parser.add_argument("--plain", nargs=2, metavar=("MODEL", "ROOT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        print(json.dumps(plain(args.plain[0], Path(args.plain[1]))))
        return
    source = data.locate("fashion_mnist", None) or data.fetch("fashion_mnist")
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        unpack(source, Path(scratch))
        for model in args.models:
            rows: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
            for repeat in range(args.repeats):
                command = [sys.executable, __file__, "--plain", model, scratch]
                rows["plain"].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
                rows["ours"].append(ours(model, Path(scratch) / f"{model}-{repeat}"))
            ratios = [p["seconds"] / o["seconds"] for p, o in zip(rows["plain"], rows["ours"], strict=True)]
            medians = {name: statistics.median(row["seconds"] for row in of) for name, of in rows.items()}
            print(
                f"{model}: plain {medians['plain']:.2f} s, ours {medians['ours']:.2f} s; "
                f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}, n={len(ratios)})",
                flush=True,
            )
            results[model] = {"median_seconds": medians, "ratios": ratios, "runs": rows}
    made: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": provenance.git_commit()}
    made |= {"machine": {"processor": machine.cpu_name(), "cores": os.cpu_count(), **provenance.versions()}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**made, "models": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
