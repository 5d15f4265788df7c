"""Architectures by name.

A new architecture is a function here, under `@architecture`, from (image_shape, classes) and settings of its own to
a module that maps images [N, C, H, W] in [0, 1] to logits [N, classes]; its name and settings become choices of
`--model` and flags that exist in config.py.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fashion_ddp import own_code, transfer
from fashion_ddp.config import Config
from fashion_ddp.errors import UserError
from fashion_ddp.norm import GlobalBatchNorm2d

Shape = tuple[int, int, int]  # channels, height, width
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {}


def architecture(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Make a function a choice of --model, under its own name."""
    ARCHITECTURES[build.__name__] = build
    return build


@architecture
def linear(image_shape: Shape, classes: int, hidden_units: int = 10) -> nn.Module:
    """Two linear layers with nothing between them: one linear map."""
    inputs = math.prod(image_shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden_units), nn.Linear(hidden_units, classes))


@architecture
def relu(image_shape: Shape, classes: int, hidden_units: int = 10) -> nn.Module:
    """The tutorials' ReLU net, with its ReLU on the logits: a class whose logit is negative for every image is
    never predicted and never learns again. `mlp` is the same without it."""
    return nn.Sequential(*mlp(image_shape, classes, hidden_units).children(), nn.ReLU())


@architecture
def mlp(image_shape: Shape, classes: int, hidden_units: int = 10) -> nn.Module:
    """One hidden layer."""
    inputs = math.prod(image_shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden_units), nn.ReLU(), nn.Linear(hidden_units, classes))


@architecture
def cnn(
    image_shape: Shape, classes: int, hidden_units: int = 10, conv_blocks: int = 2, batch_norm: bool = False
) -> nn.Module:
    """TinyVGG: blocks of two 3x3 convolutions and a 2x2 pooling, then one linear layer."""
    channels, height, width = image_shape
    if min(height, width) >> conv_blocks == 0:
        most = int(math.log2(min(height, width)))
        raise UserError(f"conv_blocks={conv_blocks} halves a {height}x{width} image to nothing: at most {most}")
    layers: list[nn.Module] = []
    for _ in range(conv_blocks):
        for _ in range(2):
            layers.append(nn.Conv2d(channels, hidden_units, kernel_size=3, padding=1))
            layers += [GlobalBatchNorm2d(hidden_units)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))  # half of the memory, and the cache's
            channels = hidden_units
        layers.append(nn.MaxPool2d(2))
    features = channels * (height >> conv_blocks) * (width >> conv_blocks)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


@architecture
def resnet18(image_shape: Shape, classes: int) -> nn.Module:
    """torchvision's ResNet-18 (He et al., arXiv 1512.03385), for these channels and classes."""
    return transfer.resnet18(image_shape[0], classes)


def build(
    cfg: Config,
    image_shape: Shape,
    classes: int,
    rank: int = 0,
    trained_on: str = "cpu",
    function: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """The run's model with its initial weights, the same on every rank, on CPU.

    `trained_on`: the type of the device that it is for, which decides how convolutions lie in memory. `function`: the
    model itself, where it is not to be found by its name.

    Raises UserError for a model of the user's that cannot be found, does not take the arguments, or does not give
    logits [N, classes].
    """
    function = function or ARCHITECTURES.get(cfg.model) or own_code.find(cfg.model, "model")
    arguments = cfg.model_settings() | own_code.typed(function, cfg.model_args)
    torch.manual_seed(cfg.seed)
    images = [2, *image_shape]
    try:
        model = function(image_shape, classes, **arguments)
        output = _apply_to_zeros(model, image_shape, rows=2) if isinstance(model, nn.Module) else None
    except UserError:
        raise
    except Exception as error:
        settings = "".join(f", {name}={value}" for name, value in arguments.items())
        raise UserError(
            f"model {cfg.model} cannot be used: {own_code.described(error)}; it is called with "
            f"({image_shape}, {classes}{settings}) and the module that it gives with images of shape {images}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model {cfg.model} gave a {type(model).__name__}, not a torch.nn.Module: return the module")
    shape = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if shape != [2, classes]:
        raise UserError(
            f"model {cfg.model} maps images of shape {images} to {shape}: it must give logits of shape [2, {classes}]"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"model {cfg.model} has no parameters to train")
    if rank > 0:  # from here on ranks draw apart: a user's Dropout must not drop the same units on each
        torch.manual_seed(cfg.seed + rank)
    if trained_on == "cpu" and cfg.model in ARCHITECTURES:
        # A CPU's convolutions are up to twice as fast with channels last. A user's own model stays as it is: Dropout
        # draws in the order of memory, and would drop other units than in the user's own loop.
        model = model.to(memory_format=torch.channels_last)
    return model.to(torch.float64 if cfg.precision == "fp64" else torch.float32)


@torch.no_grad()
def _apply_to_zeros(model: nn.Module, image_shape: Shape, rows: int = 1) -> Any:
    """The model's output for black images, in evaluation mode, which leaves the model as it was, and the random numbers
    too: a user's model may draw some, and a run that continues must draw those that follow."""
    parameter = next(model.parameters(), torch.zeros(()))
    was_training = model.training
    images = torch.zeros(rows, *image_shape, dtype=parameter.dtype, device=parameter.device)
    try:
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            return model.eval()(images)
    finally:
        model.train(was_training)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops_per_image(model: nn.Module, image_shape: Shape) -> int:
    """Operations of one forward pass for one image: 2 per multiply-add of matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode  # takes seconds to import

    with FlopCounterMode(display=False) as counter:
        _apply_to_zeros(model, image_shape)
    return counter.get_total_flops()


def feature_maps(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What each convolution and pooling makes of one image [C, H, W]: {"<place in the model>.<layer>": [c, h, w]}."""
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


def summary(model: nn.Module, image_shape: Shape) -> str:
    """The model's layers as a table: layer, output shape for one image, parameters."""
    rows: list[tuple[str, str, int]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        shape = "x".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else "-"
        rows.append((type(module).__name__, shape, sum(p.numel() for p in module.parameters(recurse=False))))

    leaves = [m for m in model.modules() if not any(m.children())]
    hooks = [m.register_forward_hook(note) for m in leaves]
    _apply_to_zeros(model, image_shape)
    for hook in hooks:
        hook.remove()
    lines = [f"  {name:<20}{shape:>14}{count:>12,}" for name, shape, count in [*rows, ("total", "", parameters(model))]]
    return "\n".join([f"  {'layer':<20}{'output':>14}{'parameters':>12}", *lines])


def rank_dependent(model: nn.Module) -> list[str]:
    """Layers that make the result depend on how many ranks share the batch; empty for our own models."""
    per_rank = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    names = {type(m).__name__ for m in model.modules() if isinstance(m, per_rank)} - {"GlobalBatchNorm2d"}
    return sorted(names)
