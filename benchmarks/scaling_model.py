"""Where more cards stop paying, on paper: a model of a step's time on 1 to 64 GPUs. Nothing in it was measured on one.

    python benchmarks/scaling_model.py      prints the table of docs/scaling.md

A step takes max(host, device) + all-reduce. `host` is what Python and torch spend to start its kernels, whatever the
batch; `device` is its arithmetic and its memory traffic; DDP sends all gradients at once, since they fit its first
bucket of 1 MiB, so that nothing overlaps (a larger model's overlap is left out here).
"""

import math
from dataclasses import dataclass

CARDS = (1, 2, 4, 8, 16, 32, 64)
PER_NODE = 4
BATCH = 128
FLOPS = 0.35 * 13.45e12  # a third of an RTX 2080 Ti's peak: what small convolutions reach
MEMORY = 616e9  # bytes/s, RTX 2080 Ti
BUS = 5e9  # bytes/s between cards of a node, through the host's memory
NETWORK = 12.5e9  # bytes/s between nodes: 100 Gbit/s


@dataclass(frozen=True)
class Model:
    name: str
    parameters: int
    flops: float  # of a training step, per image
    traffic: float  # bytes of activations and gradients read and written, per image
    host: float  # seconds


MODELS = [
    Model("linear, relu, mlp", 7_960, 32e3, 10e3, 0.13e-3),
    Model("cnn, 10 channels", 7_740, 6.66e6, 1.0e6, 0.72e-3),
    Model("cnn, 25 channels", 29_460, 40.5e6, 2.6e6, 0.72e-3),
    Model("a ResNet of 1.2 million", 1_228_908, 110e6, 12e6, 2.5e-3),
]


def all_reduce(size: float, cards: int) -> float:
    """Seconds to add up `size` bytes over cards: NCCL's own model of its tree (src/graph/tuning.cc, protocol LL):
    6.8 us, and twice 1 us per card of a node (1.8 where there are several nodes) and 5 us per level of nodes."""
    if cards == 1:
        return 0.0
    here = min(cards, PER_NODE)
    nodes = math.ceil(cards / PER_NODE)
    latency = 6.8 + 2 * ((here - 1) * (1.0 if nodes == 1 else 1.8) + math.log2(nodes) * 5.0)
    seconds = latency * 1e-6 + 2 * (here - 1) / here * size / BUS
    return seconds + (2 * (nodes - 1) / nodes * size / NETWORK if nodes > 1 else 0.0)


def step(model: Model, cards: int, rows: float) -> float:
    """Seconds of a step with so many images on each card."""
    device = rows * (model.flops / FLOPS + model.traffic / MEMORY)
    return max(model.host, device) + all_reduce(4 * model.parameters, cards)


def speed_up(model: Model, cards: int) -> float:
    """Of the same batch, dealt to more cards."""
    return step(model, 1, BATCH) / step(model, cards, BATCH / cards)


def efficiency(model: Model, cards: int) -> float:
    """Of a batch that grows with the cards: images per second and card, as a share of one card's."""
    return step(model, 1, BATCH) / step(model, cards, BATCH)


def table() -> str:
    rows = ["| model | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in CARDS) + " |", "|---|" + "---:|" * len(CARDS)]
    for model in MODELS:
        cells = (f"{speed_up(model, n):.2f}, {efficiency(model, n):.0%}" for n in CARDS)
        rows.append(f"| {model.name} | {' | '.join(cells)} |")
    for model in (MODELS[0], MODELS[2]):
        times = (f"{all_reduce(4 * model.parameters, n) * 1e6:.0f}" for n in CARDS)
        rows.append(f"| all-reduce of {4 * model.parameters / 1e3:.0f} KB, microseconds | {' | '.join(times)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
