"""Let a model normalize its input: pixels less their mean, divided by their standard deviation, by channel.

Mean and deviation are buffers of the model. Saved with its weights, they let whoever loads these see pixels as training
did.
"""

import math
from fractions import Fraction
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


def set_statistics(model: nn.Module, sums: np.ndarray, pixels: int) -> None:
    """Give a model from `normalize_input` the mean and the standard deviation of a set's images, by channel.

    `sums`: [N, C, 2] int64, of each image the sum of its pixels (0 to 255) and that of their squares; `pixels`: of an
    image, H * W. All is computed in whole numbers, so that every rank has the same. A channel that is the same
    everywhere is left undivided.
    """
    count = len(sums) * pixels
    for channel, (first, second) in enumerate(sums.sum(0).tolist()):
        variance = Fraction(second, count) - Fraction(first, count) ** 2
        model.get_buffer("input_mean")[channel] = first / count / 255
        model.get_buffer("input_std")[channel] = math.sqrt(variance) / 255 or 1.0
