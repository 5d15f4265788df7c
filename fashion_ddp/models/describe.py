"""Describe a model: its parameters, operations, layers, feature maps, and layers that depend on the ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fashion_ddp.models.batch_norm import GlobalBatchNorm

Shape = tuple[int, int, int]  # channels, height, width


@torch.no_grad()
def apply_to_zeros(model: nn.Module, image_shape: Shape, rows: int = 1) -> Any:
    """Return the model's output for `rows` black images, computed in evaluation mode.

    The model's mode and the random numbers stay as they were: a user's model may draw some, and a run that continues
    must draw the same ones afterwards.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    was_training = model.training
    images = torch.zeros(rows, *image_shape, dtype=parameter.dtype, device=parameter.device)
    try:
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            return model.eval()(images)
    finally:
        model.train(was_training)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops_per_image(model: nn.Module, image_shape: Shape) -> int:
    """Count the operations of a forward pass for one image: 2 per multiply-add of matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode  # takes seconds to import

    with FlopCounterMode(display=False) as counter:
        apply_to_zeros(model, image_shape)
    return counter.get_total_flops()


def feature_maps(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Return each convolution's and pooling's output for one image [C, H, W]: {"<name in model>.<type>": [c, h, w]}."""
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: maps.update({name: output[0].detach().float().cpu().clone()})

    layers = [(f"{name}.{type(m).__name__}", m) for name, m in model.named_modules()]
    hooks = [m.register_forward_hook(keep(name)) for name, m in layers if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
    with torch.no_grad():
        model(image.unsqueeze(0))
    for hook in hooks:
        hook.remove()
    return maps


def layers_table(model: nn.Module, image_shape: Shape) -> str:
    """Return the model's layers as a table of text: type, output shape for one image, parameters."""
    rows: list[tuple[str, str, int]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        shape = "x".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else "-"
        rows.append((type(module).__name__, shape, sum(p.numel() for p in module.parameters(recurse=False))))

    leaves = [m for m in model.modules() if not any(m.children())]
    hooks = [m.register_forward_hook(note) for m in leaves]
    apply_to_zeros(model, image_shape)
    for hook in hooks:
        hook.remove()
    lines = [
        f"  {name:<20}{shape:>14}{count:>12,}" for name, shape, count in [*rows, ("total", "", count_parameters(model))]
    ]
    return "\n".join([f"  {'layer':<20}{'output':>14}{'parameters':>12}", *lines])


def rank_dependent_layers(model: nn.Module) -> list[str]:
    """Return the types of layers that make the result depend on the number of ranks; none in our own models."""
    per_rank = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    layers = (m for m in model.modules() if isinstance(m, per_rank) and not isinstance(m, GlobalBatchNorm))
    return sorted({type(m).__name__ for m in layers})
