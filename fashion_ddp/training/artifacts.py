"""What a finished run leaves for those who read it: predictions, examples to draw, and the weights."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fashion_ddp.data import Dataset
from fashion_ddp.distributed.world import World
from fashion_ddp.models import describe
from fashion_ddp.runs.folder import RunFolder
from fashion_ddp.runs.reading import GRID_SIZE, evenly_spaced
from fashion_ddp.training.batches import Batches, to_unit
from fashion_ddp.training.evaluate import Scores
from fashion_ddp.training.state import State
from fashion_ddp.training.timing import peak_memory_bytes

SAMPLES = 25  # training images kept for a grid of samples
WRONG = 16  # the most confidently wrong test images
PAIRS, EACH = 10, 4  # the most confused pairs (true, predicted), and test images of each


def write(folder: RunFolder, model: nn.Module, data: Dataset, scored: Mapping[str, Scores]) -> None:
    """Write predictions.safetensors, examples.safetensors and model.safetensors. `scored`: the model's scores."""
    scores = scored["test"]
    files: dict[str, dict[str, Tensor]] = {
        "predictions.safetensors": {
            "logits": scores.logits.float(),
            "predicted": scores.predicted,
            "labels": torch.from_numpy(data.test_labels),
        },
        "examples.safetensors": _examples(model, data, scores),
        "model.safetensors": model.state_dict(),
    }
    if augmented := scored.get("test_tta"):
        files["predictions.safetensors"]["logits_tta"] = augmented.logits.float()
    for name, tensors in files.items():
        content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        folder.write(name, content)


def figures(world: World, model: nn.Module, data: Dataset, batches: Batches, state: State) -> dict[str, Any]:
    """Return the figures of the whole run: times, memory, operations. A collective."""
    timings = state.timings.of_run(state.epoch * batches.count, world.size, state.clock)
    peak = max(world.all_gather_object(peak_memory_bytes(world.device)))
    flops = describe.flops_per_image(model, data.image_shape)
    return timings | {"flops_per_image": flops, "peak_memory_bytes": peak}


def _examples(model: nn.Module, data: Dataset, scores: Scores) -> dict[str, Tensor]:
    """Return what a report draws: the first training images and labels, the first test image with its feature maps, and
    the test images to show, with their places in the test set (`test_ids` [k]; `grid_ids` are those of the grid)."""
    image = torch.from_numpy(data.test_images[0])
    parameter = next(model.parameters())
    model.eval()
    maps = describe.feature_maps(model, to_unit(image.to(parameter.device), parameter.dtype))
    model.train()
    labels = torch.from_numpy(data.test_labels)
    grid = torch.from_numpy(evenly_spaced(GRID_SIZE, len(labels)))
    shown = torch.cat([grid, *most_telling(scores.logits.cpu(), scores.predicted.cpu(), labels)]).unique()
    samples = {
        "samples": torch.from_numpy(data.train_images[:SAMPLES].copy()),
        "sample_labels": torch.from_numpy(data.train_labels[:SAMPLES].copy()),
        "image": image,
        "image_label": torch.tensor(int(data.test_labels[0])),
        "grid_ids": grid,
        "test_ids": shown,
        "test_images": torch.from_numpy(data.test_images[shown.numpy()]),
    }
    return samples | {f"maps.{name}": map_ for name, map_ in maps.items()}


def most_telling(logits: Tensor, predicted: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the places of the most confidently wrong images, and of some images of each of the most confused pairs."""
    wrong = (predicted != labels).nonzero().flatten()
    confidence = logits[wrong].double().softmax(1).gather(1, predicted[wrong].unsqueeze(1)).flatten()
    chosen = [wrong[confidence.argsort(descending=True, stable=True)[:WRONG]]]
    pairs = labels[wrong] * logits.shape[1] + predicted[wrong]
    found, counts = pairs.unique(return_counts=True)
    for pair in found[counts.argsort(descending=True, stable=True)[:PAIRS]]:
        chosen.append(wrong[pairs == pair][:EACH])
    return chosen
