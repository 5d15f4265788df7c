"""Build a model by the name of its architecture.

To add an architecture, write a function here under `@architecture`. It takes (image_shape, classes) and settings of its
own, which must be fields of config.py, and returns a module that maps images [N, C, H, W] in [0, 1] to logits
[N, classes]. Its name becomes a choice of `--model`.
"""

import inspect
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashion_ddp import user_code
from fashion_ddp.config import Config
from fashion_ddp.config.names import in_library, is_code
from fashion_ddp.distributed.precision import channels_last
from fashion_ddp.errors import UserError
from fashion_ddp.models import library
from fashion_ddp.models.batch_norm import GlobalBatchNorm, GlobalBatchNorm1d, GlobalBatchNorm2d
from fashion_ddp.models.describe import Shape, apply_to_zeros
from fashion_ddp.models.dropout import SampleDropout
from fashion_ddp.models.normalize import normalize_input

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
def deep_mlp(
    image_shape: Shape, classes: int, hidden_units: int = 1024, depth: int = 3, dropout: float = 0.0
) -> nn.Module:
    """Fully connected layers with batch norm and dropout. 2,916,362 parameters for 28 x 28 pixels and 10 classes."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = math.prod(image_shape)
    for _ in range(depth):
        layers += [nn.Linear(inputs, hidden_units, bias=False), GlobalBatchNorm1d(hidden_units), nn.ReLU(inplace=True)]
        layers += [SampleDropout(dropout)] if dropout else []
        inputs = hidden_units
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def convolution(channels: int, out: int, *after: nn.Module, stride: int = 1) -> list[nn.Module]:
    """Return a 3x3 convolution that divides the image's sides by the stride, then `after`, then batch norm."""
    return [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), *after, GlobalBatchNorm2d(out)]


class Residual(nn.Module):
    """relu(x + f(x))."""

    def __init__(self, f: nn.Module):
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.f(x), inplace=True)


class MaxAndMean(nn.Module):
    """Return each channel's largest value and its mean: images [N, C, H, W] to features [N, 2 C]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.amax((2, 3)), x.mean((2, 3))], dim=1)


@architecture
def small_resnet(image_shape: Shape, classes: int, hidden_units: int = 16) -> nn.Module:
    """A residual net (He et al., arXiv 1512.03385) of 97,450 parameters for one channel and 10 classes: a stem and two
    residual blocks, each after a pooling; the largest value and the mean of each channel decide."""
    widths = hidden_units, 2 * hidden_units, 7 * hidden_units // 2
    relu = nn.ReLU(inplace=True)
    layers = [*convolution(image_shape[0], widths[0]), relu]
    for before, width in itertools.pairwise(widths):
        block = nn.Sequential(*convolution(width, width), relu, *convolution(width, width))
        layers += [*convolution(before, width, nn.MaxPool2d(2)), relu, Residual(block)]
    return nn.Sequential(*layers, MaxAndMean(), nn.Linear(2 * widths[-1], classes))


@architecture
def airbench(image_shape: Shape, classes: int, hidden_units: int = 48) -> nn.Module:
    """airbench's net (Jordan, arXiv 2404.00498), narrower: a 2x2 convolution, then three blocks of two convolutions,
    the first with pooling, which begin as the identity. 417,346 parameters for one channel and 10 classes."""
    widths = 24, hidden_units, 2 * hidden_units, 8 * hidden_units // 3
    relu = nn.ReLU(inplace=True)
    layers: list[nn.Module] = [nn.Conv2d(image_shape[0], widths[0], 2), relu]
    for before, width in itertools.pairwise(widths):
        layers += [*convolution(before, width, nn.MaxPool2d(2)), relu, *convolution(width, width), relu]
    for layer in layers[1:]:
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight[: layer.in_channels])
    return nn.Sequential(*layers, MaxAndMean(), nn.Linear(2 * widths[-1], classes))


@architecture
def wide_resnet(
    image_shape: Shape, classes: int, hidden_units: int = 64, depth: int = 16, dropout: float = 0.0
) -> nn.Module:
    """WRN-depth-k with k = hidden_units / 16 (Zagoruyko and Komodakis, arXiv 1605.07146): three groups of
    (depth - 4) / 6 blocks, each normalized before it convolves. 2,748,602 parameters for one channel and 10 classes."""
    if depth < 10 or depth % 6 != 4:
        raise UserError(f"depth={depth}: wide_resnet has 6 n + 4 layers: 10, 16, 22, 28, 34, 40, ...")
    layers: list[nn.Module] = [nn.Conv2d(image_shape[0], 16, 3, padding=1, bias=False)]
    inputs = 16
    for group, width in enumerate((hidden_units, 2 * hidden_units, 4 * hidden_units)):
        for block in range((depth - 4) // 6):
            stride = 2 if group and not block else 1
            layers.append(PreActivation(inputs, width, stride, dropout))
            inputs = width
    pooled = [GlobalBatchNorm2d(inputs), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *pooled, nn.Linear(inputs, classes))


class PreActivation(nn.Module):
    """A wide residual network's block: batch norm, ReLU and convolution, twice, added to x or to its projection."""

    def __init__(self, inputs: int, width: int, stride: int, dropout: float):
        super().__init__()
        self.first = nn.Sequential(GlobalBatchNorm2d(inputs), nn.ReLU(inplace=True))
        drop = [SampleDropout(dropout)] if dropout else []
        last = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.rest = nn.Sequential(*convolution(inputs, width, stride=stride), nn.ReLU(inplace=True), *drop, last)
        changes = stride > 1 or inputs != width
        self.project = nn.Conv2d(inputs, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.first(x)
        return self.rest(active) + (x if self.project is None else self.project(active))


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

    Raises UserError for a model that cannot be found, does not take the arguments, has nothing to train, or does not
    return logits [N, classes], and for settings that would cut the batch of one with batch norm.
    """
    function = function or ARCHITECTURES.get(cfg.model)
    if function is None and in_library(cfg.model):
        function = library.factory(cfg.model, cfg.keep_batch_norm)
    function = function or user_code.load(cfg.model, "model")
    arguments = cfg.model_settings() | user_code.convert_arguments(function, cfg.model_args)
    torch.manual_seed(cfg.seed)
    images = [2, *image_shape]
    try:
        if callable(function):  # torchvision's factories would take an image_shape for weights, and download these
            inspect.signature(function).bind(image_shape, classes, **arguments)
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
    cuts = "micro_batch" if cfg.micro_batch else "reduction_shards" if cfg.reduction_shards else None
    if cuts and any(isinstance(module, GlobalBatchNorm) for module in model.modules()):
        raise UserError(f"{cuts} would change batch norm's statistics, which need the whole batch: leave it out")
    if cfg.normalize:
        normalize_input(model, torch.zeros(image_shape[0]), torch.ones(image_shape[0]))  # until train.py knows the data
    if rank > 0:  # from here on each rank draws other numbers: a user's Dropout must not drop the same units on each
        torch.manual_seed(cfg.seed + rank)
    if not is_code(cfg.model) and channels_last(cfg.precision, trained_on):
        # A user's own model keeps its format: Dropout draws in memory order, and would drop other units than in the
        # user's own loop.
        model = model.to(memory_format=torch.channels_last)
    return model.to(torch.float64 if cfg.precision == "fp64" else torch.float32)
