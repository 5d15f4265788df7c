"""Build models of torchvision and timm by name, so that their result does not depend on the number of ranks."""

import difflib
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fashion_ddp import user_code
from fashion_ddp.config import Config
from fashion_ddp.errors import UserError
from fashion_ddp.models.batch_norm import GlobalBatchNorm1d, GlobalBatchNorm2d
from fashion_ddp.models.describe import Shape
from fashion_ddp.models.dropout import SampleDropout, SampleDropPath
from fashion_ddp.models.normalize import normalize_input
from fashion_ddp.models.pretrained import HubFile, TorchFile


class LibraryModel(Protocol):
    """A model of a library, and what else the library knows of it."""

    def new(self, image_shape: Shape, classes: int, arguments: dict[str, Any]) -> nn.Module:
        """Return the model with random weights, for images [N, C, H, W]."""

    def input_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and deviation of the pixels, by channel, that the published weights expect."""

    def published(self) -> TorchFile | HubFile | None:
        """Return where its published weights are; None where there are none."""

    def trained(self, path: Path, image_shape: Shape, arguments: dict[str, Any]) -> nn.Module:
        """Return the model with its published weights, which are in the file `path`, for their channels and classes."""


class Torchvision:
    # While they train they return the logits of further heads, too.
    MANY_HEADS = ("googlenet", "inception_v3")

    def __init__(self, name: str):
        from torchvision import models  # not at the top: it takes seconds to import

        _check_name(f"torchvision:{name}", models.list_models(models), self.MANY_HEADS)
        self.name, self.library = name, models
        self.weights = getattr(models.get_model_weights(name), "DEFAULT", None)

    def new(self, image_shape: Shape, classes: int, arguments: dict[str, Any]) -> nn.Module:
        channels, height, width = image_shape
        size = {"image_size": height} if self.name.startswith("vit_") else {}
        if size and height != width:
            raise UserError(f"model torchvision:{self.name} takes square images, got {height}x{width}: --image-size")
        model = self.library.get_model(self.name, weights=None, num_classes=classes, **size | arguments)
        place, first = next((place, m) for place, m in model.named_modules() if isinstance(m, nn.Conv2d))
        if first.in_channels != channels:
            model.set_submodule(place, _for_channels(first, channels))
        return model

    def input_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        seen = self.weights and self.weights.transforms()
        return (seen.mean, seen.std) if seen else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's

    def published(self) -> TorchFile | None:
        return self.weights and TorchFile(self.weights.url)

    def trained(self, path: Path, image_shape: Shape, arguments: dict[str, Any]) -> nn.Module:
        return self.library.get_model(self.name, weights=self.weights, **arguments)  # from torch's cache: `path`


class Timm:
    def __init__(self, name: str):
        try:
            import timm
        except ModuleNotFoundError as error:
            if error.name != "timm":
                raise
            raise UserError(f"model timm:{name}: timm is not installed in this environment: pip install timm") from None
        _check_name(f"timm:{name}", [*timm.list_models(), *timm.list_pretrained()])
        self.name, self.library = name, timm
        settings = timm.get_pretrained_cfg(name)
        assert settings is not None
        self.settings = settings.to_dict()

    def new(self, image_shape: Shape, classes: int, arguments: dict[str, Any]) -> nn.Module:
        given = self._size(image_shape) | {"num_classes": classes, "in_chans": image_shape[0]} | arguments
        model = self.library.create_model(self.name, **given)
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None) if self._size(image_shape) else None
        if patch and any(side % length for side, length in zip(image_shape[1:], patch, strict=True)):
            sides, patches = ("x".join(map(str, lengths)) for lengths in (image_shape[1:], patch))
            raise UserError(
                f"model timm:{self.name} cuts images into patches of {patches}, which {sides} is no multiple of: "
                "choose --model-args patch_size=..., or for a folder of pictures --image-size"
            )
        return model

    def _size(self, image_shape: Shape) -> dict[str, Any]:
        return {"img_size": image_shape[1:]} if self.settings.get("fixed_input_size") else {}

    def input_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        return self.settings["mean"], self.settings["std"]

    def published(self) -> TorchFile | HubFile | None:
        if repository := self.settings.get("hf_hub_id"):
            return HubFile(repository, self.settings.get("hf_hub_filename"))
        return TorchFile(self.settings["url"]) if self.settings.get("url") else None

    def trained(self, path: Path, image_shape: Shape, arguments: dict[str, Any]) -> nn.Module:
        given = self._size(image_shape) | arguments  # what is known by place is scaled to this size
        overlay = {"file": str(path), "source": ""}
        return self.library.create_model(self.name, pretrained=True, pretrained_cfg_overlay=overlay, **given)


def find(name: str) -> LibraryModel:
    """Return the model that `torchvision:NAME` or `timm:NAME` stands for. Raises UserError where there is none."""
    library, _, own = name.partition(":")
    return Torchvision(own) if library == "torchvision" else Timm(own)


def published(name: str) -> TorchFile | HubFile:
    """Return where the published weights of `torchvision:NAME` or `timm:NAME` are. Raises UserError without any."""
    file = find(name).published()
    if file is None:
        raise UserError(f"{name} has no published weights: leave --init-from out, or name a file")
    return file


def factory(name: str, keep_batch_norm: bool = False) -> Callable[..., nn.Module]:
    """Return a function of (image_shape, classes, **arguments) that builds the model `torchvision:NAME` or `timm:NAME`.

    The model takes images [N, C, H, W] in [0, 1], and normalizes them as its published weights expect. Its batch norm
    is over the global batch, unless `keep_batch_norm`; its dropout and stochastic depth go by the image.
    """

    def build(image_shape: Shape, classes: int, **arguments: Any) -> nn.Module:
        found = find(name)
        model = found.new(image_shape, classes, arguments)
        _make_exact(model, keep_batch_norm)
        mean, std = (torch.tensor(list(values)) for values in found.input_statistics())
        if image_shape[0] != len(mean):
            mean, std = (values.mean().expand(image_shape[0]).clone() for values in (mean, std))
        normalize_input(model, mean, std, saved=False)  # so that the weights have the library's names
        return model

    return build


def published_weights(cfg: Config, path: Path, image_shape: Shape) -> dict[str, Tensor]:
    """Return the published weights of the library's model `cfg.model`, which are in the file `path`, by name.

    Channels and classes are those that they were trained with. Raises UserError where the library cannot load them.
    """
    arguments = user_code.convert_arguments(factory(cfg.model), cfg.model_args)
    try:
        with torch.random.fork_rng(devices=[]):  # the library draws weights before it loads these
            return find(cfg.model).trained(path, image_shape, arguments).state_dict()
    except Exception as error:
        library = cfg.model.partition(":")[0]
        raise UserError(
            f"init_from pretrained: {library} {importlib.metadata.version(library)} cannot load {path} as {cfg.model} "
            f"({type(error).__name__}: {' '.join(str(error).split())}): leave --model-args out that change its "
            "weights, or name a file of weights"
        ) from error


def _check_name(name: str, choices: Iterable[str], refused: Sequence[str] = ()) -> None:
    library, _, own = name.partition(":")
    if own in refused:
        raise UserError(f"model {name} returns more than its logits while it trains: choose another, as one of timm's")
    if own not in (choices := set(choices)):
        close = [f"{library}:{one}" for one in difflib.get_close_matches(own, sorted(choices), n=3, cutoff=0.5)]
        listed = "torchvision.models.list_models()" if library == "torchvision" else "timm.list_models()"
        raise UserError(f"model {name}: {library} has none; close to it: {', '.join(close) or 'none'}; see {listed}")


def _for_channels(first: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Return a new first convolution for images of other channels, with weights drawn as widely as the old one's."""
    shape = first.kernel_size, first.stride, first.padding, first.dilation, first.groups, first.bias is not None
    new = nn.Conv2d(channels, first.out_channels, *shape)  # type: ignore[arg-type]
    nn.init.normal_(new.weight, std=first.weight.std().item())
    if first.bias is not None:
        new.bias = first.bias
    return new


class GlobalBatchNormAct2d(GlobalBatchNorm2d):
    """timm's batch norm with an activation in it, over the global batch."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def _make_exact(model: nn.Module, keep_batch_norm: bool) -> None:
    """Replace layers whose result depends on a rank's rows by ours, which hold the same weights by the same names."""
    norms = {"BatchNorm1d": GlobalBatchNorm1d, "BatchNorm2d": GlobalBatchNorm2d, "BatchNormAct2d": GlobalBatchNormAct2d}
    new: dict[nn.Module, nn.Module] = {}
    for place, module in [*model.named_modules(remove_duplicate=False)]:
        kind = type(module).__name__
        if kind == "Dropout":
            new.setdefault(module, SampleDropout(module.p))
        elif kind == "DropPath":  # timm's
            new.setdefault(module, SampleDropPath(module.drop_prob or 0.0))
        elif kind == "StochasticDepth" and module.mode == "row":  # torchvision's
            new.setdefault(module, SampleDropPath(module.p))
        elif kind in norms and not keep_batch_norm and module.track_running_stats and module.affine:
            module.__class__ = norms[kind]
        if module in new:
            model.set_submodule(place, new[module])
