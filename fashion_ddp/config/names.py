"""Check and shorten the names of models, datasets and weights, without importing or opening any of them."""

import ast
import os
import re
from collections.abc import Container
from functools import cache

from fashion_ddp.errors import UserError, nearest
from fashion_ddp.files import PACKAGE

LIBRARIES = ("torchvision", "timm")
DATASETS = ("fashion_mnist", "mnist", "kmnist", "synthetic")


@cache
def architectures() -> dict[str, tuple[str, ...]]:
    """Return our models by name, with the arguments that each takes after (image_shape, classes).

    They are read from the source of models/architectures.py (the functions under `@architecture`), because importing
    it would import torch.
    """
    tree = ast.parse((PACKAGE / "models" / "architectures.py").read_text())
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return {
        f.name: tuple(a.arg for a in f.args.args[2:] + f.args.kwonlyargs)
        for f in functions
        if any(isinstance(d, ast.Name) and d.id == "architecture" for d in f.decorator_list)
    }


def is_code(name: str) -> bool:
    """Tell whether a name stands for a user's own code: package.module:Name."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None and not in_library(name)


def in_library(model: str) -> bool:
    """Tell whether a model is of torchvision or timm: torchvision:NAME or timm:NAME."""
    return re.fullmatch(rf"({'|'.join(LIBRARIES)}):[\w.]+", model) is not None


def is_path(dataset: str) -> bool:
    """Tell by its name alone whether a dataset is a folder or an .npz file."""
    return not is_code(dataset) and ("/" in dataset or dataset in (".", "..") or dataset.endswith(".npz"))


def may_have_validation(dataset: str) -> bool:
    """Tell by its name alone whether a dataset may have images to choose by: a folder, which may be one of pictures."""
    return is_path(dataset) and not dataset.endswith(".npz")


def check_model(name: str) -> None:
    """Raise UserError for a model that is neither ours nor a library's nor a user's own."""
    library, _, path = name.partition(".")
    if library in LIBRARIES and is_code(name):
        raise UserError(f"model: {name} takes no image_shape: write {library}:{path.partition(':')[2]}")
    if name not in architectures() and not is_code(name) and not in_library(name):
        raise UserError(
            f"model: unknown {name!r}; {nearest(name, architectures())}, one of a library as torchvision:resnet18 or "
            "timm:resnet18, or your own as package.module:Name"
        )
    if name.startswith("__main__:"):
        raise UserError(
            f"model {name}: a run keeps the file of its model, and this one is in none that can be imported: write it "
            f"to one, as mine.py (in a notebook: %%writefile mine.py), and name it mine:{name.partition(':')[2]}"
        )


def check_model_args(model: str, texts: tuple[str, ...], besides: Container[str]) -> None:
    """Check --model-args: `texts`, each `name=value`. `besides` are names that other flags give to the model.

    Raises UserError for arguments of our own models, for text in another form, and for a name that is given twice.
    """
    given = [text.partition("=")[0] for text in texts]
    if given and model in architectures():
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in architectures()[model]) or "none"
        raise UserError(f"model_args are for a library's model or your own; {model!r} has flags: {flags}")
    for text, name in zip(texts, given, strict=True):
        if not name.isidentifier() or "=" not in text:
            raise UserError(f"model_args: expected name=value, as dropout=0.2, got {text!r}")
        if given.count(name) > 1 or name in besides:
            raise UserError(f"model_args: {name} is given twice; keep one")


def check_dataset(name: str) -> None:
    """Raise UserError for a dataset that is neither ours nor a user's own."""
    if name not in DATASETS and not is_code(name) and not is_path(name):
        raise UserError(
            f"dataset: unknown {name!r}; {nearest(name, DATASETS)}, or your own: a folder with a / in its name (as "
            f"./{name or 'mine'}), an .npz file, or package.module:function"
        )


def check_metrics(name: str | None) -> None:
    """Raise UserError for figures that are no user's own."""
    if name is not None and not is_code(name):
        raise UserError(f"metrics: expected package.module:function, got {name!r}")


def dataset_name(dataset: str) -> str:
    """Return the name of a dataset in run folders and tables: without the folders above it."""
    if not is_path(dataset):
        return dataset
    name = os.path.basename(os.path.abspath(dataset)).removesuffix(".npz") or "root"
    return f"own_{name}" if name in DATASETS else name


def weights_name(init_from: str) -> str:
    """Return the name of initial weights in run folders and tables: without the folders above them."""
    return os.path.basename(os.path.abspath(init_from)) or "root"
