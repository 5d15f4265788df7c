"""Let a model normalize its input: pixels less their mean, divided by their standard deviation, by channel.

Mean and deviation are buffers of the model. Saved with its weights, they let whoever loads these see pixels as training
did.
"""

from typing import Any

import numpy as np
from torch import Tensor, nn

BUFFERS = "input_mean", "input_std"


def normalize_input(model: nn.Module, mean: Tensor, std: Tensor, saved: bool = True) -> None:
    """Let a model that takes images [N, C, H, W] in [0, 1] normalize them first, by `mean` and `std` [C].

    `saved`: keep these with the weights, whose names are then not only the model's own.
    """
    for name, value in zip(BUFFERS, (mean, std), strict=True):
        model.register_buffer(name, value.view(-1, 1, 1), persistent=saved)
    model.register_forward_pre_hook(_normalize)


def _normalize(model: Any, inputs: tuple[Tensor]) -> Tensor:
    return (inputs[0] - model.input_mean) / model.input_std


def set_statistics(model: nn.Module, images: np.ndarray) -> None:
    """Give a model from `normalize_input` the mean and the standard deviation of images uint8 [N, C, H, W], by channel.

    They are computed from counts of the 256 values, exactly, so that all ranks have the same. A channel that is the
    same everywhere is left undivided.
    """
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for part in np.array_split(images[:, channel], max(1, len(images) // 4096)):  # bincount needs int64 copies
            counts += np.bincount(part.reshape(-1), minlength=256)
        values = np.arange(256) / 255
        mean = float(counts @ values) / int(counts.sum())
        std = float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum()))
        model.get_buffer("input_mean")[channel] = mean
        model.get_buffer("input_std")[channel] = std or 1.0
