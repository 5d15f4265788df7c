"""Fetch the published weights of models of torchvision and timm, for machines without a network.

    python -m fashion_ddp.weights torchvision:resnet18 timm:convnext_atto.d2_in1k

They go into the caches of torch ($TORCH_HOME) and of the Hugging Face hub ($HF_HOME), where `--init-from pretrained`
looks for them. Exit code 2: no such model, it has no published weights, or they cannot be fetched.
"""

from dataclasses import dataclass

from fashion_ddp.config import flags
from fashion_ddp.config.names import in_library
from fashion_ddp.console import entry_point, say
from fashion_ddp.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Fetch published weights of models, verify them, and say where they are."""

    models: flags.Positional[tuple[str, ...]]
    """Models as --model of a training takes them: torchvision:NAME or timm:NAME."""


@entry_point
def main(argv: list[str] | None = None) -> None:
    arguments = flags.parse(Arguments, "fashion_ddp.weights", argv)
    for name in arguments.models:
        if not in_library(name):
            raise UserError(f"{name!r} is no model of a library: write torchvision:NAME or timm:NAME")
    from fashion_ddp.models import library, pretrained  # import torch

    for name in arguments.models:
        file = library.published(name)
        path = file.find()
        if path is None:
            say(f"{name}: fetching {file}")
            path = pretrained.fetch(file)
        digest = pretrained.check_digest(file, path)
        say(f"{name}: {path}, {path.stat().st_size / 1e6:,.1f} MB, sha256 {digest}")


if __name__ == "__main__":
    main()
