"""The pictures of a report: grey and coloured, small and large, and feature maps in the order of the layers."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reports import make_report, make_run
from safetensors.numpy import load_file, save_file

from fashion_ddp.report.album import LARGEST, as_pixels, png, tile_maps

pytestmark = pytest.mark.quick


def decoded(uri: str) -> np.ndarray:
    head, _, content = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


@pytest.mark.parametrize("shape", [(28, 28), (5, 9), (7, 4, 3)])
def test_a_png_holds_the_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)
    assert np.array_equal(decoded(png(pixels)), pixels)


def test_images_become_pixels_of_a_bounded_size() -> None:
    random = np.random.default_rng(0)
    shapes = ((1, 28, 28), (3, 32, 32), (3, 224, 160))
    grey, coloured, large = (random.integers(0, 256, size=shape, dtype=np.uint8) for shape in shapes)
    assert np.array_equal(as_pixels(grey), grey[0])
    assert np.array_equal(as_pixels(coloured)[..., 2], coloured[2])
    assert as_pixels(large).shape == (56, 40, 3) and max(as_pixels(large).shape) <= LARGEST


def test_feature_maps_stand_side_by_side_each_in_its_own_range() -> None:
    maps = np.stack([np.linspace(low, high, 49).reshape(7, 7) for low, high in ((0, 1), (-50, 3), (2, 2))])
    sheet = tile_maps(maps)
    assert sheet.shape == (7, 23)
    assert np.allclose(sheet[:, :7], sheet[:, 8:15].astype(int), atol=1) and (sheet[0, 0], sheet[6, 6]) == (0, 255)
    assert not sheet[:, 16:].any()  # all equal: nothing to see
    assert tile_maps(np.zeros((10, 4, 4))).shape == (9, 24)  # two lines of five


def test_the_report_shows_coloured_images_and_layers_in_order(tmp_path: Path) -> None:
    path = make_run(tmp_path / "runs" / "one", model="cnn") / "examples.safetensors"
    saved = load_file(path)
    for name in ("samples", "test_images"):
        saved[name] = np.repeat(saved[name], 3, axis=1)
    saved["image"] = np.repeat(saved["image"], 3, axis=0)
    save_file(saved, path)
    page = make_report([tmp_path / "runs"], tmp_path / "report").text
    assert page.index("2.MaxPool2d: 10 x 7 x 7") < page.index("10.Conv2d: 10 x 14 x 14")
    shapes = [decoded(uri).shape for uri in re.findall(r'data:image/png[^"]+', page)]
    assert sorted(set(shapes)) == [(15, 39), (28, 28, 3), (29, 74)]  # maps after the pooling, images, the convolution
