"""What a finished run leaves to be drawn: enough that the report needs neither the data nor the model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fashion_ddp.config.layers import make_config
from fashion_ddp.data import Dataset, load
from fashion_ddp.models import architectures
from fashion_ddp.runs.folder import RunFolder
from fashion_ddp.training import artifacts
from fashion_ddp.training.evaluate import Scores

pytestmark = pytest.mark.quick


def written(folder: Path, data: Dataset, logits: torch.Tensor) -> dict[str, np.ndarray]:
    model = architectures.build(make_config({"model": "cnn"}), data.image_shape, len(data.classes))
    artifacts.write(RunFolder(folder), model, data, {"test": Scores(0.0, 0.0, logits, logits.argmax(1))})
    return load_file(folder / "examples.safetensors")


def test_the_images_kept_are_those_that_tell_most(tmp_path: Path) -> None:
    data = load("synthetic")
    labels, n = torch.from_numpy(data.test_labels), len(data.test_labels)
    logits = 5 * torch.nn.functional.one_hot(labels, 10).float()
    # 20 images of class 3 are taken for 4, from hardly to very sure, and 6 of class 1 for 2.
    threes, ones = (labels == 3).nonzero().flatten()[:20], (labels == 1).nonzero().flatten()[:6]
    logits[threes, 4] = 6 + torch.arange(20.0)
    logits[ones, 2] = 5.5
    saved = written(tmp_path, data, logits)
    ids = saved["test_ids"].tolist()
    assert ids == sorted(set(ids)) and np.array_equal(saved["test_images"], data.test_images[ids])
    grid = [place * n // 9 for place in range(9)]
    assert saved["grid_ids"].tolist() == grid
    # The surest 16, the first four of either pair of classes, and the grid; nothing else.
    assert set(ids) == {*grid, *threes[4:].tolist(), *threes[:4].tolist(), *ones[:4].tolist()}
    assert np.array_equal(saved["samples"], data.train_images[:25])
    assert {name for name in saved if name.startswith("maps.")} >= {"maps.0.Conv2d", "maps.4.MaxPool2d"}


def test_a_run_that_is_never_wrong_keeps_the_grid(tmp_path: Path) -> None:
    data = load("synthetic")
    saved = written(tmp_path, data, torch.nn.functional.one_hot(torch.from_numpy(data.test_labels), 10).float())
    assert saved["test_ids"].tolist() == saved["grid_ids"].tolist()
