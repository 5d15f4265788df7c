"""Build a model by the name of its architecture.

To add an architecture, write a function here under `@architecture`. It takes (image_shape, classes) and settings of its
own, which must be fields of config.py, and returns a module that maps images [N, C, H, W] in [0, 1] to logits
[N, classes]. Its name becomes a choice of `--model`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fashion_ddp import user_code
from fashion_ddp.config import Config
from fashion_ddp.distributed.precision import channels_last
from fashion_ddp.errors import UserError
from fashion_ddp.models import transfer
from fashion_ddp.models.batch_norm import GlobalBatchNorm2d
from fashion_ddp.models.describe import Shape, apply_to_zeros

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {}


def architecture(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register a function as a choice of --model, under its own name."""
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
            layers.append(nn.ReLU(inplace=True))  # halves the memory, also in the cache
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
    """Return the run's model on the CPU, with initial weights that are the same on every rank.

    `trained_on`: the type of the device that it will be trained on, which decides the memory format of convolutions.
    `function`: builds the model; without it, the function or class of the name `cfg.model` does.

    Raises UserError for a model of the user's own that cannot be found, does not take the arguments, has nothing to
    train, or does not return logits [N, classes].
    """
    function = function or ARCHITECTURES.get(cfg.model) or user_code.load(cfg.model, "model")
    arguments = cfg.model_settings() | user_code.convert_arguments(function, cfg.model_args)
    torch.manual_seed(cfg.seed)
    images = [2, *image_shape]
    try:
        model = function(image_shape, classes, **arguments)
        output = apply_to_zeros(model, image_shape, rows=2) if isinstance(model, nn.Module) else None
    except UserError:
        raise
    except Exception as error:
        settings = "".join(f", {name}={value}" for name, value in arguments.items())
        raise UserError(
            f"model {cfg.model} cannot be used: {user_code.describe_error(error)}; it is called with "
            f"({image_shape}, {classes}{settings}) and the module that it returns with images of shape {images}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model {cfg.model} returned a {type(model).__name__}, not a torch.nn.Module: return the module"
        )
    shape = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if shape != [2, classes]:
        raise UserError(
            f"model {cfg.model} maps images of shape {images} to {shape}: it must return logits of shape [2, {classes}]"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"model {cfg.model} has no parameters to train")
    if rank > 0:  # from here on each rank draws other numbers: a user's Dropout must not drop the same units on each
        torch.manual_seed(cfg.seed + rank)
    if cfg.model in ARCHITECTURES and channels_last(cfg.precision, trained_on):
        # A user's own model keeps its format: Dropout draws in memory order, and would drop other units than in the
        # user's own loop.
        model = model.to(memory_format=torch.channels_last)
    return model.to(torch.float64 if cfg.precision == "fp64" else torch.float32)
