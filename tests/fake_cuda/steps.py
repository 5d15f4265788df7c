"""Take steps of many configurations in one process on the stand-in, and print what the library counted for each.

    python steps.py every       or few

The process is the only rank of a process group, so that DDP and NCCL are part of each step.
"""

import ctypes
import itertools
import json
import os
import sys
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from conftest import free_port
from stand_in import parse
from trainer import Trainer

from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.world import open_world
from fashion_ddp.models import architectures
from fashion_ddp.training import cuda_graph, images
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.images import Part

IMAGES, LABELS = np.zeros((96, 1, 28, 28), dtype=np.uint8), np.zeros(96, dtype=np.int64)
STEPS = 5

library = ctypes.CDLL(None)
library.fake_cuda_counts.restype = ctypes.c_char_p


def configurations() -> list[dict[str, Any]]:
    """Each model with each optimizer, each optimizer with each precision, and the other settings in turns."""
    models, optimizers = ("linear", "relu", "mlp", "cnn"), ("sgd", "momentum", "adam", "muon")
    precisions = itertools.cycle(("fp32", "bf16", "fp16"))
    decay = {"weight_decay": 0.1, "decay_biases": False}
    others = itertools.cycle(
        [{}, {"clip_norm": 1.0} | decay, {"shift": 2, "flip": 0.5, "erase": 0.5}, {"micro_batch": 3, "ema": 0.9}]
        + [{"schedule": "one_cycle", "label_smoothing": 0.1, "mixup": 0.5}, {"cutout": 8, "alternating_flip": True}]
        + [{"clip_norm": 1.0, "micro_batch": 3, "flip": 0.5, "mixup": 0.5, "cutmix": 1.0}]
    )
    found = [
        {"model": model, "optimizer": optimizer, "precision": next(precisions), "lr": 0.001} | next(others)
        for model, optimizer in itertools.product(models, optimizers)
    ]
    for one in found:
        if (one["optimizer"], one["precision"]) == ("muon", "fp16"):  # which it does not take
            one |= {"optimizer": "adamw"}
    adamw = {"model": "cnn", "batch_norm": True, "optimizer": "adamw", "lr": 0.001, "ema": 0.9}
    ahead = {"data_on": "host", "random_resized_crop": 0.5, "mixup": 0.5}
    return [*found, adamw, {"model": "cnn", "hidden_units": 25, "precision": "fp16"}, {"model": "linear"} | ahead]


def counts() -> dict[str, int]:
    """Return what was counted since the last call."""
    report = library.fake_cuda_counts().decode()
    library.fake_cuda_reset_counts()
    return parse(report)


def observe(given: dict[str, Any], graph: bool) -> dict[str, Any]:
    """Return what one configuration's capture made the library count, then what its steps did, what came between two
    epochs, and the run's end."""
    cfg = make_config({"device": "cuda", "batch_size": 8, "epochs": 2, "cuda_graph": graph} | given)
    with open_world(cfg) as world:
        model = architectures.build(cfg, (1, 28, 28), 10)
        place = images.choose_place(cfg, world, [part := Part(IMAGES, LABELS)])
        step = Trainer(cfg, world, model, Batches(cfg, world, part, place))
        step.batches.draw(1)
        counts()
        step.take, no_graph = cuda_graph.capture(step.step, step.state, step.rates)
        capture = counts()
        for k in [*range(step.batches.steps), 0]:  # DDP's first ten passes are others, and so is an epoch's first step
            step(k)
        # If torch took the host's memory that a graph copies for free, others get it now.
        others = [torch.full([2**size], 255, dtype=torch.uint8).pin_memory() for size in range(16) for _ in range(4)]
        counts()
        for k in range(1, 1 + STEPS):
            step(k)
        steps = counts()
        step.batches.draw_ahead(2)
        counts()
        step.batches.draw(2)
        between = counts()
        del others
        step.batches.images.close()
    AcceleratorState._reset_state(reset_partial_state=True)
    return {
        "given": given,
        "no_graph": no_graph,
        "capture": capture,
        "steps": steps,
        "between": between,
        "end": counts(),
    }


def main() -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    every = configurations()
    few = [*every[::5], every[-1]]  # each model, and each optimizer, once; and images that are read ahead
    captured = every if sys.argv[1] == "every" else [*few, {"model": "torchvision:resnet18"}]
    for graph, given in [*((True, one) for one in captured), *((False, one) for one in few)]:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        print(json.dumps(observe(given, graph) | {"graph": graph}))


if __name__ == "__main__":
    main()
