"""The pictures of a report: grey and coloured, small and large, and feature maps in the order of the layers."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import reports
from PIL import Image
from reports import make_report, make_run
from safetensors.numpy import load_file, save_file

from fashion_ddp.report.album import LARGEST_MAP, LAYERS, data_uri, tile_maps
from fashion_ddp.thumbnail import LARGEST, thumbnail

pytestmark = pytest.mark.quick


def decoded(uri: str) -> np.ndarray:
    head, _, content = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 5, 9), (3, 32, 32), (1, 64, 64)])
def test_small_images_are_shown_to_the_pixel(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)
    shown = decoded(data_uri(thumbnail(pixels)))
    assert np.array_equal(shown, pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2))


def test_photographs_become_small_without_false_patterns() -> None:
    stripes = np.zeros((3, 224, 160), np.uint8)
    stripes[:, ::2] = 255  # every fourth row of them would be black, or white
    shown = decoded(data_uri(thumbnail(stripes)))
    assert shown.shape == (LARGEST, 46, 3) and abs(shown[4:-4].astype(int) - 128).max() < 20
    ramp = np.broadcast_to(np.linspace(0, 255, 200).astype(np.uint8), (3, 200, 200))
    assert abs(decoded(data_uri(thumbnail(ramp)))[32, :, 1] - np.linspace(0, 255, LARGEST)).max() < 6


def test_feature_maps_stand_side_by_side_each_in_its_own_range() -> None:
    maps = np.stack([np.linspace(low, high, 49).reshape(7, 7) for low, high in ((0, 1), (-50, 3), (2, 2))])
    sheet = np.asarray(tile_maps(maps))
    assert sheet.shape == (7, 23)
    assert np.allclose(sheet[:, :7], sheet[:, 8:15].astype(int), atol=1) and (sheet[0, 0], sheet[6, 6]) == (0, 255)
    assert not sheet[:, 16:].any()  # all equal: nothing to see
    assert np.asarray(tile_maps(np.zeros((10, 4, 4)))).shape == (9, 24)  # two lines of five
    assert np.asarray(tile_maps(np.zeros((3, 112, 56)))).shape == (LARGEST_MAP, 50)


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


def test_a_report_on_photographs_of_many_classes_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a ResNet-18 on pictures of 224 x 224 pixels; noise, which no other pictures exceed in size."""
    monkeypatch.setattr(reports, "CLASSES", [f"<i>class {n}</i>" for n in range(200)])
    monkeypatch.setattr(reports, "IMAGES", 1000)
    random = np.random.default_rng(0)
    for number in range(6):
        path = make_run(tmp_path / "runs" / str(number), model="cnn", lr=0.01 + number) / "examples.safetensors"
        saved = {name: array for name, array in load_file(path).items() if not name.startswith("maps.")}
        for name in ("samples", "test_images", "image"):
            shape = (*saved[name].shape[:-3], 3, 224, 224)
            saved[name] = random.integers(0, 256, shape, dtype=np.uint8)
        sides = [112] + 4 * [56] + 5 * [28] + 5 * [14] + 5 * [7]
        saved |= {f"maps.{n}.Conv2d": random.random((64, side, side), np.float32) for n, side in enumerate(sides)}
        save_file(saved, path)
    made = make_report([tmp_path / "runs"], tmp_path / "report")
    assert (made.out / "report.html").stat().st_size < 5_000_000
    assert len(made.table_of("training images")) == 201 and "<i>class" not in made.html + made.markdown
    layers = re.findall(r"<figcaption>(\d+).Conv2d", made.html)
    assert layers[:LAYERS] == ["0", "2", "5", "7", "10", "12", "15", "17"]
