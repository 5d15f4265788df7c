"""Pictures of a user's through a trained model, and a run's weights against its record."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import faults
import numpy as np
import pytest
from conftest import on_a_terminal
from faults import Fault
from PIL import Image
from safetensors.numpy import load_file, save_file

from fashion_ddp import data, load_run, predict
from fashion_ddp.config.config import field_types
from fashion_ddp.data import photo, synthetic
from fashion_ddp.errors import UserError
from fashion_ddp.runs.reading import Run
from fashion_ddp.tracking import upload

SHAPE = 1, 28, 28


@pytest.fixture(scope="module")
def shoes(data_dir: Path) -> np.ndarray:
    """Images of Fashion-MNIST: uint8 [n, 1, 28, 28]."""
    return data.load("fashion_mnist", data_dir).test_images


@pytest.fixture(scope="module")
def run(uninterrupted: Path) -> Run:
    return load_run(uninterrupted / "run")


@pytest.fixture
def its_data(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The data that the run was made with, which is the built-in one cut short."""
    monkeypatch.setattr(synthetic.arrays, "__defaults__", (2_000, 2_000 // 6))
    return synthetic.arrays()


def saved(image: Any, path: Path, **how: Any) -> Path:
    """A file with a picture, of an array or of Pillow's."""
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **how)
    return path


def seen(path: Path, light_on_dark: bool = True, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return photo.prepare_photo(path, shape, light_on_dark).pixels


@pytest.mark.quick
def test_a_picture_of_the_datas_own_kind_keeps_its_pixels(shoes: np.ndarray, tmp_path: Path) -> None:
    for number, shoe in enumerate(shoes[:20, 0]):
        as_it_is = saved(shoe, tmp_path / f"{number}.png")
        inverted = saved(255 - shoe, tmp_path / f"{number}i.png")
        colour = saved(np.stack([255 - shoe] * 3, 2), tmp_path / f"{number}c.png")
        for path in (as_it_is, inverted, colour):
            assert np.array_equal(seen(path)[0], shoe), path


@pytest.mark.quick
def test_the_background_of_the_data_is_known(shoes: np.ndarray) -> None:
    assert max(photo.background_brightness(image) for image in shoes[:2_000]) <= 127
    assert photo.is_light_on_dark(shoes[:25]) and not photo.is_light_on_dark(255 - shoes[:25])


def photograph(shoe: np.ndarray, size: int, height: int, width: int, top: int, left: int) -> np.ndarray:
    """A shop's photograph: a thing in colour somewhere on a background that is nearly white, with noise."""
    thing = np.zeros((height, width))
    large = Image.fromarray(shoe).resize((size, size), Image.Resampling.BICUBIC)
    thing[top : top + size, left : left + size] = np.asarray(large)
    noise = np.random.default_rng(0).normal(0, 2, (height, width))
    layers = [lightest - share * thing + noise for lightest, share in ((250, 0.9), (246, 0.8), (242, 0.9))]
    return np.stack(layers, 2).clip(0, 255).astype(np.uint8)


@pytest.mark.quick
@pytest.mark.parametrize("place", [(0, 0), (10, 200), (150, 30)])
def test_a_photograph_becomes_such_an_image(place: tuple[int, int], shoes: np.ndarray, tmp_path: Path) -> None:
    for number, shoe in enumerate(shoes[:20, 0]):
        path = saved(photograph(shoe, 224, 400, 500, *place), tmp_path / f"{number}.jpg", quality=85)
        image = seen(path)[0]
        thing = image > 0
        assert thing.any(1)[[0, -1]].all() or thing.any(0)[[0, -1]].all()  # it fills the frame, as in the data
        assert image.max() >= 250
        apart = np.abs(image.astype(float) - shoe).mean()
        assert apart < 40 < np.abs(255.0 - image - shoe).mean(), number


@pytest.mark.quick
def test_kinds_of_files_are_seen_alike(shoes: np.ndarray, tmp_path: Path) -> None:
    shirt = shoes[1, 0]
    large = np.asarray(Image.fromarray(shirt).resize((280, 280), Image.Resampling.NEAREST))
    expected = seen(saved(large, tmp_path / "plain.png")).astype(int)
    deep = saved(Image.fromarray(large.astype(np.uint16) * 257), tmp_path / "deep.png")
    palette = saved(Image.fromarray(large).convert("P"), tmp_path / "palette.gif")
    sideways = Image.fromarray(np.rot90(large).copy())
    exif = sideways.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = saved(sideways, tmp_path / "turned.jpg", exif=exif, quality=100)
    cut_out = np.stack([255 - large] * 3 + [np.where(large > 0, 255, 0).astype(np.uint8)], 2)
    alpha = saved(cut_out, tmp_path / "alpha.png")
    for path in (deep, palette, turned, alpha):
        assert np.abs(seen(path) - expected).mean() < 3, path


@pytest.mark.quick
def test_a_picture_of_one_colour_is_black(tmp_path: Path) -> None:
    for colour in (0, 77, 255):
        assert not seen(saved(np.full((90, 60), colour, np.uint8), tmp_path / "one.png")).any()


@pytest.mark.quick
def test_data_of_photographs_is_scaled_and_cropped_only(tmp_path: Path) -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 250, 200, 10
    image = seen(saved(wide, tmp_path / "wide.png"), light_on_dark=False, shape=(3, 32, 32))
    assert image.shape == (3, 32, 32) and (image[:, :, 4:-4] == np.array([250, 200, 10])[:, None, None]).all()


def call(*words: Any) -> None:
    predict.main([str(word) for word in words])


def test_it_prints_and_shows_the_likeliest_classes(run: Run, its_data: Any, tmp_path: Path, capsys: Any) -> None:
    for name in ("0", "1", "2", "out"):
        (tmp_path / name).mkdir()
    images, out = its_data["test_images"][:3, 0], tmp_path / "out"
    paths = [saved(image, tmp_path / str(number) / "image.bmp") for number, image in enumerate(images)]
    (out / "image.png").write_text("the user's")
    call(run.path, *paths, "--out", out)
    logits = run.predictions["logits"][:3].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    lines = capsys.readouterr().out.splitlines()
    for path, row, line, saved_as in zip(paths, probabilities, lines, (1, 2, 3), strict=True):
        top = [f"{run.summary['classes'][c]} {100 * row[c]:.1f} %" for c in np.argsort(-row)[:3]]
        assert line == f"{path}: {', '.join(top)}  ({out / f'image.{saved_as}.png'})"
    assert (out / "image.png").read_text() == "the user's"
    with Image.open(out / "image.2.png") as shown:
        # What it saw, seven times as large, stands to the right of what was given.
        x, y = 2 * photo.EDGE + photo.SIDE, 2 * photo.EDGE + 8
        assert np.array_equal(np.asarray(shown.convert("L"))[y + 3 : y + 196 : 7, x + 3 : x + 196 : 7], images[1])


def refused(*words: Any, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a command that ends with this exit code."""
    with pytest.raises(SystemExit) as end:
        call(*words)
    printed = capsys.readouterr()
    assert end.value.code == code and printed.out == "" and printed.err.count("error: ") == 1, printed
    return printed.err.removeprefix("error: ").rstrip("\n")


def test_what_cannot_be_done_is_said_in_one_message(run: Run, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    good = saved(np.zeros((28, 28), np.uint8), Path("good.png"))
    Path("text.png").write_text("no picture")
    noise = saved(np.random.default_rng(0).integers(0, 255, (90, 90), np.uint8), Path("half.png"))
    noise.write_bytes(noise.read_bytes()[:3_000])
    ranks = faults.start_tiny(1, tmp_path, [], [Fault("step", "TERM", count=10)])
    assert ranks.wait() == [75]

    assert refused("none", good, code=2, capsys=capsys).startswith("none is no run folder")
    assert "the run is stopped, not finished" in refused("run", good, code=2, capsys=capsys)
    assert refused(run.path, code=2, capsys=capsys) == "nothing to do: name pictures, or give --verify"
    said = refused(run.path, good, "text.png", "half.png", "no.png", ".", code=2, capsys=capsys)
    parts = ["text.png is no picture", "half.png cannot be read", "no.png cannot be read", ". is a folder"]
    assert [part for part in parts if part in said] == parts
    Path("taken").touch()
    assert "taken: cannot be written" in refused(run.path, good, "--out", "taken", code=2, capsys=capsys)
    assert not Path("predictions").exists()


def test_many_pictures_show_how_far_it_is(run: Run, tmp_path: Path) -> None:
    paths = [saved(np.zeros((30, 30), np.uint8), tmp_path / f"{number}.png") for number in range(3)]
    line = [sys.executable, "-m", "fashion_ddp.predict", str(run.path), *map(str, paths)]
    code, shown = on_a_terminal(*line, cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert code == 0, shown
    assert all(re.search(rf"{word}: +\d+%.*/3 ".encode(), shown) for word in ("reading", "saving")), shown


def copy(run: Run, tmp_path: Path, was: str = "", now: str = "") -> Path:
    """A copy of the run's folder; in its config.yaml `now` stands for `was`."""
    folder = Path(shutil.copytree(run.path, tmp_path / "copy"))
    if was:
        (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace(was, now))
    return folder


def test_weights_give_the_recorded_figures(run: Run, its_data: Any, capsys: Any) -> None:
    call(run.path, "--verify")
    said = capsys.readouterr().out
    assert said.startswith("verified: 333 test images: logits at most ")
    assert said.endswith(f"accuracy {100 * run.summary['test/accuracy']:.2f} %, exactly as recorded\n")


@pytest.mark.parametrize(
    ("file", "key", "said"),
    [
        ("model.safetensors", None, "its weights do not give its record"),
        ("predictions.safetensors", "logits", "its weights do not give its record"),
        ("predictions.safetensors", "predicted", "predictions.safetensors and summary.json give different accuracies"),
        ("predictions.safetensors", "labels", "the labels in predictions.safetensors are not those of the test set"),
    ],
)
def test_a_difference_is_found(
    file: str, key: str | None, said: str, run: Run, its_data: Any, tmp_path: Path, capsys: Any
) -> None:
    path = copy(run, tmp_path) / file
    arrays = load_file(path)
    changed = arrays[key or next(iter(arrays))]
    changed.flat[:] = (changed + 1) % 10 if key in ("predicted", "labels") else changed + 0.01
    save_file(arrays, path)
    assert said in refused(path.parent, "--verify", code=1, capsys=capsys)


def test_other_data_is_no_difference(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(run.path, "--verify", code=2, capsys=capsys)
    assert "was made with other data than built in holds" in said


def test_a_tie_within_rounding_is_told(run: Run, its_data: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    path = copy(run, tmp_path)
    arrays = load_file(path / "predictions.safetensors")
    best, other = np.argsort(-arrays["logits"][0])[:2]
    monkeypatch.setitem(predict.ROUNDING, "fp32", float(arrays["logits"][0][best] - arrays["logits"][0][other]))
    arrays["predicted"][0] = other
    save_file(arrays, path / "predictions.safetensors")
    summary = run.summary | {"test/accuracy": predict.accuracy(arrays["predicted"], arrays["labels"])}
    (path / "summary.json").write_text(json.dumps(summary))
    call(path, "--verify")
    assert capsys.readouterr().out.endswith("with 1 tie of two classes decided otherwise\n")


def test_a_users_model_is_named(run: Run) -> None:
    with pytest.raises(UserError, match="model nobody:Net"):
        predict.compute_logits(run, np.zeros((1, *SHAPE), np.uint8), "nobody:Net")


def test_every_precision_says_how_much_rounding_is_forgiven() -> None:
    assert set(predict.ROUNDING) == set(get_args(field_types()["precision"]))


def test_a_run_does_not_decide_which_code_makes_its_data(
    run: Run, its_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = copy(run, tmp_path, "dataset: synthetic", "dataset: its_data_7:make")
    (tmp_path / "its_data_7.py").write_text("raise RuntimeError('imported')")
    monkeypatch.chdir(tmp_path)
    assert "name it again, as --dataset its_data_7:make" in refused(path, "--verify", code=2, capsys=capsys)
    assert upload._test_images(load_run(path)) is None
    call(path, "--verify", "--dataset", "synthetic")
    assert capsys.readouterr().out.endswith("exactly as recorded\n")


def test_a_model_whose_source_has_changed_is_told(
    run: Run, its_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = copy(run, tmp_path, "model: cnn", "model: its_model_7:make")
    code = "from fashion_ddp.models.architectures import cnn\n\ndef make(shape, classes, hidden_units=4):\n"
    code += "    return cnn(shape, classes, 4)\n"
    for source in (tmp_path / "its_model_7.py", path / "model.py"):
        source.write_text(code)
    monkeypatch.chdir(tmp_path)
    call(path, "--verify", "--model", "its_model_7:make")
    assert capsys.readouterr().out.startswith("verified: ")
    (path / "model.py").write_text(code.replace("4", "5"))
    call(path, "--verify", "--model", "its_model_7:make")
    said = capsys.readouterr().out
    assert said.startswith("note: the source of its_model_7:make is not that of the run") and "\nverified: " in said
