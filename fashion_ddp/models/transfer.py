"""Transfer learning: load weights to start from, and freeze parts."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from fashion_ddp.config import Config
from fashion_ddp.errors import UserError, nearest
from fashion_ddp.models.batch_norm import GlobalBatchNorm2d
from fashion_ddp.models.describe import Shape
from fashion_ddp.models.library import published_weights
from fashion_ddp.models.normalize import BUFFERS
from fashion_ddp.models.weights import weights_file


def prepare(cfg: Config, model: nn.Module, image_shape: Shape) -> list[str]:
    """Load the initial weights that the settings ask for into a new model, and freeze the parts that they name.

    Returns what was done, in words. Raises UserError where the weights do not fit, or no parameter has a name.
    """
    done = []
    if (path := weights_file(cfg)) is not None:
        published = cfg.init_from == "pretrained"
        given = published_weights(cfg, path, image_shape) if published else _read(path)
        done.append(_load(model, given, path))
    if cfg.freeze:
        done.append(_freeze(model, cfg.freeze))
    return done


def _load(model: nn.Module, given: dict[str, Tensor], path: Path) -> str:
    """Load weights by name. The last layer may be new, for other classes; the first is adapted to other channels.

    `path`: where they are from, for messages.
    """
    ours = model.state_dict()
    if given.keys() & set(BUFFERS) and not ours.keys() & set(BUFFERS):
        raise UserError(f"init_from {path}: its model saw normalized images: add --normalize")
    first, last = _first_and_last(model)
    loaded, new, misfits = {}, [], []
    adapted = ""
    for name, tensor in ours.items():
        other = given.get(name)
        if other is not None and other.shape == tensor.shape:
            loaded[name] = other
        elif other is not None and name == first and _differ_in_channels_only(other, tensor):
            loaded[name] = _adapt_channels(other, tensor.shape[1])
            adapted = f"; {name} made of {other.shape[1]} channels for {tensor.shape[1]}"
        elif name in last:
            new.append(name)
        elif name not in BUFFERS and not name.endswith("num_batches_tracked"):  # of this run's data; nothing needs it
            misfits.append(f"{name} {_shape_text(other)} for {_shape_text(tensor)}")
    misfits += [f"{name}, which the model does not have" for name in given if name not in ours]
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise UserError(
            f"init_from {path}: holds another model's weights: {', '.join(misfits[:3])}{more}: choose the model that "
            "they are of (only the last layer, and the channels of a first convolution, may differ)"
        )
    model.load_state_dict(loaded, strict=False)
    return f"initial weights from {path}" + adapted + (f"; new: {', '.join(new)}" if new else "")


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file by name; they are read as data, which cannot run code."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own message advises to run code from the file
        raise UserError(
            f"init_from {path}: cannot be read as weights ({type(error).__name__}): it must be a .safetensors file, or "
            "torch.save(model.state_dict(), ...)"
        ) from error
    for key in ("state_dict", "model"):  # many training programs store it under one of these
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"init_from {path}: holds no state_dict (tensors by name): save model.state_dict()")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}  # DDP's


def _first_and_last(model: nn.Module) -> tuple[str, set[str]]:
    """Return the name of the first convolution's weight ("" without one), and those of the last layer's parameters."""
    layers = [(name, m) for name, m in model.named_modules() if [*m.parameters(recurse=False)]]
    name, layer = layers[-1]
    last = {f"{name}.{own}" if name else own for own, _ in layer.named_parameters(recurse=False)}
    return next((f"{name}.weight" for name, m in layers if isinstance(m, nn.Conv2d)), ""), last


def _differ_in_channels_only(one: Tensor, two: Tensor) -> bool:
    """Return whether both are weights of a convolution, and their shapes differ in the input channels alone."""
    return one.dim() == two.dim() == 4 and one[:, 0].shape == two[:, 0].shape


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Return a convolution's weight for another number of input channels.

    For an image that is equal in all channels, the output stays the same.
    """
    return weight.mean(1, keepdim=True).repeat(1, channels, 1, 1) * (weight.shape[1] / channels)


def _shape_text(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))


def _freeze(model: nn.Module, parts: tuple[str, ...]) -> str:
    """Freeze the parameters below these names; a batch norm among them keeps its statistics. Return a note on it."""
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(_is_below(name, part) for name in names):
            choices = dict.fromkeys(name.partition(".")[0] for name in names)
            raise UserError(f"freeze: no parameter's name starts with {part!r}; {nearest(part, choices)}")
    for name, parameter in model.named_parameters():
        if any(_is_below(name, part) for part in parts):
            parameter.requires_grad_(False)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and not module.weight.requires_grad:
            module.__class__ = GlobalBatchNorm2d  # this class, frozen, uses its stored statistics
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not left:
        raise UserError(f"freeze: {' '.join(parts)} leaves nothing to train: name fewer parts")
    return (
        f"frozen: {' '.join(parts)}; {left:,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained"
    )


def _is_below(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
