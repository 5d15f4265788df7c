"""What a finished run leaves for those who read it: predictions, examples to draw, and the weights."""

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fashion_ddp import models
from fashion_ddp.batches import to_unit
from fashion_ddp.data import Dataset
from fashion_ddp.evaluate import Scores
from fashion_ddp.rundir import RunFolder

SAMPLES = 25  # training images kept for a grid of samples


def write(folder: RunFolder, model: nn.Module, data: Dataset, scores: Scores) -> None:
    """Write predictions.safetensors, examples.safetensors and model.safetensors. `scores` are on the test set."""
    files: dict[str, dict[str, Tensor]] = {
        "predictions.safetensors": {
            "logits": scores.logits.float(),
            "predicted": scores.predicted,
            "labels": torch.from_numpy(data.test_labels),
        },
        "examples.safetensors": _examples(model, data),
        "model.safetensors": model.state_dict(),
    }
    for name, tensors in files.items():
        content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        folder.write(name, content)


def _examples(model: nn.Module, data: Dataset) -> dict[str, Tensor]:
    """The first training samples with their labels, the first test image, and the model's feature maps of it."""
    image = torch.from_numpy(data.test_images[0])
    parameter = next(model.parameters())
    model.eval()
    maps = models.feature_maps(model, to_unit(image.to(parameter.device), parameter.dtype))
    model.train()
    samples = {
        "samples": torch.from_numpy(data.train_images[:SAMPLES].copy()),
        "sample_labels": torch.from_numpy(data.train_labels[:SAMPLES].copy()),
        "image": image,
        "image_label": torch.tensor(int(data.test_labels[0])),
    }
    return samples | {f"maps.{name}": map_ for name, map_ in maps.items()}
