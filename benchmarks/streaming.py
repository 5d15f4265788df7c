"""Sets that memory does not hold: rates measured here, and what they come to at ImageNet's size, on paper.

    python benchmarks/streaming.py             measures for two minutes; writes benchmarks/results/streaming.json
    python benchmarks/streaming.py --page      prints the section of docs/scaling.md that its results make

Measured: how long a core decodes a JPEG of ImageNet's usual size; how many images of 256 x 256 one thread reads ahead,
from the page cache and from the disk; and what reading ahead costs a training step, in turns with steps whose images
are all there.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import made
from PIL import Image, ImageFilter

from fashion_ddp.config.layers import make_config
from fashion_ddp.data import picture
from fashion_ddp.data.cache import centre
from fashion_ddp.distributed.world import open_world
from fashion_ddp.models import architectures
from fashion_ddp.training import optim
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.images import Part, Stream
from fashion_ddp.training.step import Step
from fashion_ddp.training.sync import StepRecord

RESULTS = Path(__file__).parent / "results" / "streaming.json"
CPU = torch.device("cpu")
STORED = 3 * 256 * 256  # bytes of an image of which a model sees 224 x 224
IMAGES = 1_281_167 + 50_000  # of ImageNet, to train and to choose by
CARD = 2_470  # images/s that a card trains, see the page
PER_NODE, CORES = 4, 32  # cards, and cores, of a node
DISK, SERVER = 3.2e9, 10e9  # bytes/s: an NVMe disk by four lanes of PCIe 3; a file server for all nodes

PAGE = """\
## Sets that memory does not hold

Measured by `python benchmarks/streaming.py`: medians of {n}, and the smallest and the largest.

| | |
| --- | ---: |
| decode a JPEG of 500 x 375 pixels ({jpeg_kb:.0f} KB) to 256 x 256, one core | {decode} ms |
| read ahead from the page cache, one thread, images of 256 x 256 | {warm} a second |
| the same from this machine's disk | {cold} a second |
| a step of the cnn that reads ahead (10 channels, 64 x 64, batch 128, one thread) | {ratio} times as long as without |

{origin}

**On paper, not measured: ImageNet** at 224 x 224. Its {images:.2f} million pictures take {size:.0f} GB decoded. A card
that trains {card:,} images a second reads {card_rate:.2f} GB/s.

| | 4 cards, one node | 32 cards, eight nodes |
| --- | ---: | ---: |
| make the cache, once per file system, on {cores} cores | {making:.0f} min | {making:.0f} min |
| read by a node | {node_rate:.1f} GB/s | {node_rate:.1f} GB/s |
| read in all | {node_rate:.1f} GB/s | {all_rate:.1f} GB/s |
| busy threads that read, in a node | {threads:.1f} | {threads:.1f} |

- **Memory.** A node with 384 GB holds the set in its page cache, which its ranks share: from the second epoch on it
  reads nothing. The first one waits for whatever holds the file.
- **A disk in each node** ({disk:.1f} GB/s) feeds {disk_cards:.1f} such cards. Where memory does not hold the set, more
  than these wait for it.
- **A file server** that gives {server:.0f} GB/s in all feeds {server_cards:.0f}: 4 cards train at full speed; 32 do
  not, until each node's memory has its copy. A cache on the node's own disk (`--cache-dir`) does without it.

Sources: NVIDIA's DeepLearningExamples (ResNet-50 v1.5 for PyTorch, mixed precision, one A100: {card:,} images/s, with
NVIDIA's loader). Assumed: a disk on four lanes of PCIe 3, the server, four cards and {cores} cores in a node.
"""


def decoding(repeats: int) -> dict[str, Any]:
    """Milliseconds that a core takes for a picture, and the file's size."""
    noise = Image.merge("RGB", [Image.effect_noise((500, 375), 120) for _ in range(3)])
    content = io.BytesIO()
    noise.filter(ImageFilter.GaussianBlur(1.2)).save(content, "JPEG", quality=92)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.jpg"
        path.write_bytes(content.getvalue())
        each = [timed(lambda: [picture.load(path, (3, 256, 256)) for _ in range(40)]) / 40 for _ in range(repeats)]
    return {"jpeg_bytes": len(content.getvalue()), "decode_s": each}


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def mapped(folder: Path, count: int, side: int) -> Part:
    """A set of random images in a file, as the cache has them: 1 / 0.875 times as wide as what is seen."""
    path, seen = folder / f"{count}.u8", round(0.875 * side)
    noise = np.random.default_rng(0).integers(0, 256, (64, 3, side, side), np.uint8).tobytes()
    with open(path, "wb") as file:
        file.writelines(noise for _ in range(0, count, 64))
        os.fsync(file.fileno())
    stored = np.memmap(path, np.uint8, "c", shape=(count, 3, side, side))
    return Part(centre(stored, seen), np.arange(count) % 10, None, stored)


def reading(folder: Path, repeats: int) -> dict[str, Any]:
    """Images a second that one thread reads ahead, from memory and from the disk."""
    part = mapped(folder, 8192, 256)
    assert part.stored is not None
    stream, found = Stream(part, CPU), {"warm_per_s": list[float](), "cold_per_s": list[float]()}

    def take_all() -> None:
        table = torch.randperm(8192).view(-1, 1, 128)
        stream.order(table)
        for k in range(len(table)):
            stream.bring(k)

    for _ in range(repeats):
        os.posix_fadvise(stream.file, 0, 0, os.POSIX_FADV_DONTNEED)
        found["cold_per_s"].append(8192 / timed(take_all))
        found["warm_per_s"].append(8192 / timed(take_all))
    stream.close()
    return found


def stepping(folder: Path, repeats: int) -> dict[str, Any]:
    """How many times as long a step takes that reads ahead, as the one that does not beside which it was taken."""
    part = mapped(folder, 64_000, 73)
    cfg = make_config({"model": "cnn", "recipe": "lab", "batch_size": 128, "device": "cpu", "threads": 1})
    with open_world(cfg) as world:
        steps = []
        for place in ("device", "host"):
            model = architectures.build(cfg, (3, 64, 64), 10)
            batches = Batches(cfg, world, part, place)
            steps.append(
                Step(cfg, world, world.wrap(model), optim.build(cfg, model, CPU), batches, StepRecord(batches))
            )
            batches.draw(1)
        took: list[list[float]] = [[], []]
        for k in range(25 * repeats):
            for step, of in zip(steps, took, strict=True):

                def take(step: Step = step, k: int = k) -> None:
                    step.batches.images.bring(k)
                    step(k, 0.01)

                of.append(timed(take))
        steps[1].batches.images.close()
    rounds = [slice(25 * n, 25 * (n + 1)) for n in range(repeats)]
    return {"step_ratio": [statistics.median(took[1][one]) / statistics.median(took[0][one]) for one in rounds]}


def spread(values: list[float], scale: float = 1.0, digits: int = 0) -> str:
    """Write a median with the smallest and the largest."""
    middle, low, high = (f"{scale * v:,.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def page(found: dict[str, Any]) -> str:
    """Return the section of docs/scaling.md."""
    about, decode = found["made"]["machine"], statistics.median(found["decode_s"])
    node, warm = PER_NODE * CARD, statistics.median(found["warm_per_s"])
    return PAGE.format(
        n=len(found["decode_s"]),
        jpeg_kb=found["jpeg_bytes"] / 1e3,
        decode=spread(found["decode_s"], 1e3, 1),
        warm=spread(found["warm_per_s"]),
        cold=spread(found["cold_per_s"]),
        ratio=spread(found["step_ratio"], digits=2),
        origin=f"{about['cores']} cores of an {about['processor']}, torch {about['torch']}.",
        images=IMAGES / 1e6,
        size=IMAGES * STORED / 1e9,
        card=CARD,
        card_rate=CARD * STORED / 1e9,
        cores=CORES,
        making=IMAGES * decode / CORES / 60,
        node_rate=node * STORED / 1e9,
        all_rate=8 * node * STORED / 1e9,
        threads=node / warm,
        disk=DISK / 1e9,
        disk_cards=DISK / STORED / CARD,
        server=SERVER / 1e9,
        server_cards=SERVER / STORED / CARD,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--page", action="store_true", help="print what the results say, and measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.page:
        print(page(json.loads(given.out.read_text())), end="")
        return 0
    with tempfile.TemporaryDirectory(dir=".") as folder:
        found = {"made": made()} | decoding(given.repeats)
        found |= reading(Path(folder), given.repeats) | stepping(Path(folder), given.repeats)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(page(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
