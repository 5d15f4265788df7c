"""Describe a model: its parameters, operations, layers, feature maps, and layers that depend on the ranks."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fashion_ddp.models.batch_norm import GlobalBatchNorm
from fashion_ddp.models.dropout import SampleDropout

Shape = tuple[int, int, int]  # channels, height, width
MOST_ROWS = 40  # of the table of layers
# Layers with statistics of one rank's rows, and layers for which each rank draws.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


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
    """Return the model's layers as a table of text: type, output shape for one image, parameters.

    A model of more than MOST_ROWS layers is shown by its blocks, whose names are shown, too.
    """
    rows: list[tuple[str, str, int]] = []
    blocks = _blocks(model)
    named = any(any(module.children()) for module in blocks)

    def note(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: Any, output: Any) -> None:
            shape = "x".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else "-"
            text = f"{name} {type(module).__name__}" if named else type(module).__name__
            rows.append((text, shape, count_parameters(module)))

        return add

    hooks = [module.register_forward_hook(note(name)) for module, name in blocks.items()]
    apply_to_zeros(model, image_shape)
    for hook in hooks:
        hook.remove()
    rows.append(("total", "", count_parameters(model)))
    width = max(20, *(len(name) + 2 for name, _, _ in rows))
    lines = [f"  {name:<{width}}{shape:>14}{count:>12,}" for name, shape, count in rows]
    return "\n".join([f"  {'layer':<{width}}{'output':>14}{'parameters':>12}", *lines])


def _blocks(model: nn.Module) -> dict[nn.Module, str]:
    """Return the model's layers with their names; of more than MOST_ROWS the blocks that they are in, as small as can
    be. A layer that is used at several places has its first name."""
    shown: dict[nn.Module, str] = {}
    for depth in range(max(name.count(".") for name, _ in model.named_modules()) + 1, -1, -1):
        shown = {}
        for name, module in _parts(model, depth):
            shown.setdefault(module, name)
        if len(shown) <= MOST_ROWS:
            break
    return shown


def _parts(module: nn.Module, depth: int, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers in a module with their names; where they are more than `depth` levels below it, their blocks."""
    own = name and any(True for _ in module.parameters(recurse=False))  # as a batch norm with an activation in it has
    if depth == 0 or own or not any(module.children()):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _parts(child, depth - 1, f"{name}.{child_name}" if name else child_name)


def rank_dependent_layers(model: nn.Module) -> list[str]:
    """Return the types of layers that make the result depend on the number of ranks; none in our own models."""
    per_rank = (*BATCH_NORMS, *DROPOUTS)
    layers = (m for m in model.modules() if isinstance(m, per_rank) and not isinstance(m, GlobalBatchNorm))
    return sorted({type(m).__name__ for m in layers})


@torch.no_grad()
def draws_random_numbers(model: nn.Module, image_shape: Shape) -> bool:
    """Return whether a model that trains draws numbers other than by the image, as a call of F.dropout does.

    A copy is tried, and what it draws is not missing afterwards. False also where the model cannot be copied.
    """
    try:
        trial = copy.deepcopy(model).train()
    except Exception:  # noqa: BLE001 - a user's model may hold anything
        return False
    parameter = next(model.parameters())
    images = torch.linspace(0, 1, 2 * math.prod(image_shape), dtype=parameter.dtype, device=parameter.device)
    for module in trial.modules():
        if isinstance(module, GlobalBatchNorm):
            module.whole_batch = True  # no other rank is asked
        elif isinstance(module, SampleDropout):
            module.row_keys = torch.arange(2, device=images.device)
    outputs = []
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        for seed in (1, 2):
            torch.manual_seed(seed)
            outputs.append(trial(images.view(2, *image_shape)))
    return not torch.equal(*outputs)
