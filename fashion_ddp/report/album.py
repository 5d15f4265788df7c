"""Show images in the report: test images with the models' predictions, training samples, and feature maps.

All come from the runs' examples.safetensors. The page contains each image once, however often it shows it. What an old
run did not save is left out.
"""

import base64
import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from fashion_ddp.report.results import Result
from fashion_ddp.report.rows import Row, Section
from fashion_ddp.report.svg import element
from fashion_ddp.runs.reading import evenly_spaced, read_arrays
from fashion_ddp.thumbnail import LARGEST, thumbnail

LARGEST_MAP = 32  # pixels of a feature map's side: there are many of them
LAYERS = 8  # layers whose feature maps are shown of a model
WRONG = 12  # images in the list of the most confidently wrong ones
EACH = 4  # images of a confused pair
MAPS = 32  # feature maps of a layer


def data_uri(image: Image.Image) -> str:
    """Return a picture as a data URI: as JPEG where it is a photograph, scaled to LARGEST; else, exactly, as PNG."""
    kind = "jpeg" if image.mode == "RGB" and max(image.size) == LARGEST else "png"
    content = io.BytesIO()
    image.save(content, kind, optimize=True, quality=85)
    return f"data:image/{kind};base64," + base64.b64encode(content.getvalue()).decode()


class Tile(NamedTuple):
    """A picture and the words below it."""

    picture: Markup
    true: str
    predicted: str = ""  # empty for a sample of the training set
    confidence: float = 0.0

    @property
    def right(self) -> bool:
        return self.true == self.predicted


@dataclass(frozen=True)
class Maps:
    """A layer's output for an image, its maps side by side in one picture."""

    layer: str
    shape: tuple[int, int, int]  # maps, height, width
    picture: str


class Album:
    """The pictures of one section. `symbols` collects each image that was used, once."""

    def __init__(self, section: Section, prefix: str, rows: int):
        self.prefix, self.symbols = prefix, dict[str, Markup]()
        self.classes = section.first.classes
        results = [result for row in section.rows[:rows] for result in row.results]
        self.examples = {
            result.name: read_arrays(result.run.path / "examples.safetensors", missing_ok=True) for result in results
        }
        self.images: dict[int, np.ndarray] = {}
        self.grid: list[int] = []
        for saved in self.examples.values():
            if "test_ids" in saved:
                self.images |= dict(zip(saved["test_ids"].tolist(), saved["test_images"], strict=True))
                self.grid = self.grid or saved["grid_ids"].tolist()

    def _picture(self, key: str, image: np.ndarray, label: str) -> Markup:
        name = f"{self.prefix}-{key}"
        if name not in self.symbols:
            height, width = image.shape[1:]
            drawn = element("image", width=width, height=height, href=data_uri(thumbnail(image)))
            self.symbols[name] = element("symbol", drawn, id=name, viewBox=f"0 0 {width} {height}")
        return element("svg", element("use", href=f"#{name}"), class_="px", role="img", aria_label=label)

    def _tile(self, result: Result, index: int) -> Tile:
        assert result.predictions is not None
        true, predicted = (self.classes[c[index]] for c in (result.predictions.labels, result.predictions.predicted))
        label = f"test image {index}: {true}, predicted {predicted}"
        return Tile(
            self._picture(str(index), self.images[index], label),
            true,
            predicted,
            float(result.predictions.confidence[index]),
        )

    def prediction_tiles(self, row: Row) -> list[Tile]:
        """Return the same images for every row, with its first run's predictions."""
        return [self._tile(row.first, index) for index in self.grid] if row.first.predictions else []

    def confidently_wrong_tiles(self, row: Row) -> list[Tile]:
        """Return the images that the row's first run gets wrong with the highest confidence."""
        predictions, saved_ids = row.first.predictions, self.examples[row.first.name].get("test_ids")
        if predictions is None or saved_ids is None:
            return []
        wrong = [index for index in saved_ids.tolist() if not predictions.correct[index]]
        wrong.sort(key=lambda index: -predictions.confidence[index])
        return [self._tile(row.first, index) for index in wrong[:WRONG]]

    def confused_tiles(self, row: Row, true: int, predicted: int) -> list[Tile]:
        """Return images of one class that a run of the row takes for the other."""
        tiles: dict[int, Tile] = {}
        for result in row.results:
            if predictions := result.predictions:
                is_pair = (predictions.labels == true) & (predictions.predicted == predicted)
                tiles |= {n: self._tile(result, n) for n in self.images if is_pair[n] and n not in tiles}
        return [tiles[n] for n in sorted(tiles)][:EACH]

    def sample_tiles(self) -> list[Tile]:
        """Return the first images of the training set."""
        saved = next((s for s in self.examples.values() if "samples" in s), None)
        if saved is None:
            return []
        names = [self.classes[label] for label in saved["sample_labels"]]
        tiles = zip(saved["samples"], names, strict=True)
        return [Tile(self._picture(f"t{n}", image, f"training image {n}: {name}"), name)
                for n, (image, name) in enumerate(tiles)]  # fmt: skip

    def feature_maps(self, result: Result) -> tuple[Tile | None, list[Maps]]:
        """Return the first test image, and the output of each convolution and pooling of a run's model for it."""
        saved = self.examples[result.name]
        layers = {name.removeprefix("maps."): maps for name, maps in saved.items() if name.startswith("maps.")}
        if not layers:
            return None, []
        label = self.classes[int(saved["image_label"])]
        names = sorted(layers, key=_order)
        names = [names[n] for n in evenly_spaced(LAYERS, len(names))]
        shown = [Maps(layer, layers[layer].shape, data_uri(tile_maps(layers[layer][:MAPS]))) for layer in names]
        return Tile(self._picture("0", saved["image"], f"test image 0: {label}"), label), shown


def _order(layer: str) -> list[tuple[int, int | str]]:
    """Return a key that sorts layers by their position in the model: 2 before 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in layer.split(".")]


def tile_maps(maps: np.ndarray) -> Image.Image:
    """Return feature maps, float [n, h, w], as one grey picture; each map is scaled to its own range of values."""
    maps = np.nan_to_num(maps.astype(np.float64))
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    grey = (255 * (maps - low) / np.where(high > low, high - low, 1)).round().astype(np.uint8)
    pictures = [thumbnail(one[None], LARGEST_MAP) for one in grey]
    count, (width, height) = len(pictures), pictures[0].size
    # Up to eight per line; for more maps, the number per line from five to eight that leaves the fewest gaps.
    per_line = count if count <= 8 else min(range(8, 4, -1), key=lambda n: -count % n)
    sheet = Image.new("L", (per_line * (width + 1) - 1, -(-count // per_line) * (height + 1) - 1), 128)
    for n, picture in enumerate(pictures):
        sheet.paste(picture, (n % per_line * (width + 1), n // per_line * (height + 1)))
    return sheet
