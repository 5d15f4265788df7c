"""Classify pictures with a trained model, or verify that its weights give the figures that its run recorded.

    python -m fashion_ddp.predict runs/cnn-blog-seed42 boot.jpg shirt.png
    python -m fashion_ddp.predict runs/cnn-blog-seed42 --verify

For each picture it prints the three likeliest classes, and saves a picture of what the model saw. Exit code 1: the
weights do not give what was recorded. 2: nothing was done, because the user must fix something first.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from fashion_ddp import user_code
from fashion_ddp.config import flags
from fashion_ddp.config.names import is_code
from fashion_ddp.console import entry_point, say
from fashion_ddp.data.photo import Photo, draw_card, is_light_on_dark, prepare_photo, save_without_replacing
from fashion_ddp.errors import CommandFailed, UserError, pluralize
from fashion_ddp.runs.reading import Run, load_run, softmax

T = TypeVar("T")

TOP = 3
# How far a logit may be from the recorded one, as a share of the largest: rounding, for another order of additions.
# Of its 24 bits float32 keeps 11 where tf32 multiplies; half precision has 8 or 11.
ROUNDING = {"fp64": 1e-6, "fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}


class Mismatch(CommandFailed):
    """A run's weights do not give what it recorded."""


@dataclass(frozen=True)
class Arguments:
    """Classify pictures with a trained model, or check that its weights give what its run recorded."""

    run: flags.Positional[Path]
    """A finished run's folder."""
    images: flags.Positional[tuple[Path, ...]] = ()
    """Pictures of any size and colour."""
    out: Path = Path("predictions")
    """Folder for pictures of what the model saw; no existing file is replaced."""
    model: str | None = None
    """For a run with a model of your own: its name again, package.module:Name."""
    verify: bool = False
    """Evaluate the test set again, and compare the result with what the run recorded."""
    data_dir: Path | None = None
    """With --verify: the folder of the data; by default it is found as for training."""
    dataset: str | None = None
    """With --verify, for a run whose data a function of your own makes: its name again, package.module:function."""


@entry_point
def main(argv: list[str] | None = None) -> None:
    arguments = flags.parse(Arguments, "fashion_ddp.predict", argv)
    if not arguments.images and not arguments.verify:
        raise UserError("nothing to do: name pictures, or give --verify")
    run = load_run(arguments.run)
    kept = run.path / "model.py"
    if arguments.model and kept.is_file() and user_code.source_differs(arguments.model, kept):
        say(f"note: the source of {arguments.model} is not that of the run, which {kept} keeps")
    if arguments.verify:
        say(verify(run, arguments.model, arguments.data_dir, arguments.dataset))
    if arguments.images:
        classify(run, arguments)


def classify(run: Run, arguments: Arguments) -> None:
    """Print what each picture is taken for, and save what the model saw.

    Raises UserError where a picture cannot be read; then nothing is printed or saved.
    """
    light_on_dark = is_light_on_dark(run.arrays("examples.safetensors")["samples"])
    photos, unreadable = list[Photo](), list[str]()
    for path in _progress(arguments.images, "reading"):
        try:
            photos.append(prepare_photo(path, run.image_shape, light_on_dark, run.settings().image_size))
        except UserError as error:
            unreadable.append(str(error))
    if unreadable:
        more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise UserError("; ".join(unreadable[:5]) + more)
    logits = compute_logits(run, np.stack([photo.pixels for photo in photos]), arguments.model)
    classes = run.summary["classes"]
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for photo, row in _progress(list(zip(photos, softmax(logits), strict=True)), "saving"):
            top = [(classes[c], float(row[c])) for c in np.argsort(-row, kind="stable")[:TOP]]
            saved = save_without_replacing(draw_card(photo, top), arguments.out / photo.path.name)
            likeliest = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in top)
            say(f"{photo.path}: {likeliest}  ({saved})")
    except OSError as error:
        raise UserError(
            f"{arguments.out}: cannot be written ({error.strerror or error}): choose another --out"
        ) from None


def _progress(each: "Sequence[T]", doing: str) -> "tqdm[T]":
    return tqdm(each, desc=doing, unit="picture", leave=False, disable=len(each) < 2 or not sys.stderr.isatty())


def compute_logits(run: Run, images: np.ndarray, user_model: str | None) -> np.ndarray:
    """Return the model's logits [n, classes] for images uint8 [n, C, H, W], on the CPU, in the run's precision.

    A CPU has no tf32: there such a run's products are in full. `user_model` names the model of a run with one of the
    user's own, as `Run.model` needs it.
    """
    model = run.model(user_model)
    import torch

    from fashion_ddp.training.batches import to_unit
    from fashion_ddp.training.evaluate import ROWS

    dtype = next(model.parameters()).dtype
    mixed = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(run.config["precision"])
    rows = torch.from_numpy(images).split(ROWS)
    with torch.no_grad(), torch.autocast("cpu", mixed or torch.bfloat16, enabled=mixed is not None):
        return torch.cat([model(to_unit(part, dtype)).to(dtype) for part in _progress(rows, "classifying")]).numpy()


def verify(run: Run, user_model: str | None, data_dir: Path | None, user_dataset: str | None = None) -> str:
    """Evaluate the test set with the run's weights, compare with the record, and return the result in a sentence.

    `user_model` and `user_dataset` name the model and the data again, where they are the user's own.

    Raises Mismatch where anything differs from the record, UserError where that cannot be decided.
    """
    from fashion_ddp import data

    recorded, cfg = run.predictions, run.settings()
    data_md5 = run.environment[-1]["made_by"]["data"] if run.environment else {}
    if is_code(cfg.dataset) and user_dataset is None:  # a run folder never decides which code is imported
        raise UserError(f"{run.path} has data of your own: name it again, as --dataset {cfg.dataset}")
    cfg = dataclasses.replace(cfg, dataset=user_dataset or cfg.dataset, data_dir=data_dir or cfg.data_dir)
    dataset = data.load_for(cfg)
    if dataset.md5 != data_md5:
        raise UserError(
            f"{run.path} was made with other data than {dataset.source} holds: name its own with --data-dir"
        )
    count = len(dataset.test_labels)
    if not np.array_equal(recorded["labels"], dataset.test_labels):
        raise Mismatch(f"{run.path}: the labels in predictions.safetensors are not those of the test set")
    if accuracy(recorded["predicted"], recorded["labels"]) != run.summary["test/accuracy"]:
        raise Mismatch(f"{run.path}: predictions.safetensors and summary.json give different accuracies")
    logits = compute_logits(run, dataset.test_images, user_model)
    difference = float(np.abs(logits - recorded["logits"]).max())
    limit = ROUNDING[cfg.precision] * max(1.0, float(np.abs(recorded["logits"]).max()))
    found = (
        f"{count:,} test images: logits at most {difference:.1e} from the recorded ones (rounding: up to {limit:.1e})"
    )
    if not difference <= limit:  # also true for nan
        raise Mismatch(f"{run.path}: its weights do not give its record. {found}")
    # When logits differ by rounding only, a predicted class can change only where two classes had the same logit.
    changed = int((logits.argmax(axis=1) != recorded["predicted"]).sum())
    recomputed = accuracy(logits.argmax(axis=1), dataset.test_labels)
    exactly = (
        "exactly as recorded" if not changed else f"with {pluralize(changed, 'tie')} of two classes decided otherwise"
    )
    return f"verified: {found}; accuracy {100 * recomputed:.2f} %, {exactly}"


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return int((predicted == labels).sum()) / len(labels)


if __name__ == "__main__":
    main()
