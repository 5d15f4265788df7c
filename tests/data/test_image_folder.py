"""Folders of pictures: what is understood, what is refused, and the cache that they are decoded into."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.transforms.functional as transforms
from conftest import forked, ranks
from PIL import Image

from fashion_ddp import data
from fashion_ddp.config.layers import make_config
from fashion_ddp.data import cache, picture
from fashion_ddp.data.cache import PictureSettings
from fashion_ddp.data.photo import prepare_photo
from fashion_ddp.distributed import signals
from fashion_ddp.distributed.world import open_world
from fashion_ddp.errors import Stopped, UserError
from fashion_ddp.runs.reading import load_run
from fashion_ddp.training import startup

quick = pytest.mark.quick

COLOURS = {"blue": (2, 60), "green": (1, 50), "red": (0, 70)}  # by class: the channel that is bright, training images


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path


def picture_folder(folder: Path, size: int = 32) -> Path:
    """Noise in colour, one channel of which is bright; and what an operating system leaves beside pictures."""
    random = np.random.default_rng(0)
    for part, share in (("train", 1.0), ("test", 0.4)):
        for name, (channel, count) in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for number in range(int(share * count)):
                pixels = random.integers(0, 100, (size, size, 3)).astype(np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
            (folder / part / name / "Thumbs.db").write_bytes(b"no picture")
    (folder / ".DS_Store").write_bytes(b"")
    return folder


def unlike_pictures(folder: Path, parts: str = "train val test", each: int = 30) -> Path:
    """Noise of many sizes, as photographs are, whose brightness tells the class; JPEG and PNG."""
    random = np.random.default_rng(1)
    for part in parts.split():
        for label, name in enumerate(("dark", "light")):
            (folder / part / name).mkdir(parents=True)
            for number in range(each):
                height, width = random.integers(20, 90, 2)
                pixels = (random.integers(0, 100, (height, width, 3)) + 120 * label).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.{('jpg', 'png')[number % 2]}")
    return folder


@quick
def test_pictures_in_folders() -> None:
    found = data.load(str(picture_folder(Path("art").absolute())))
    assert found.classes == ("blue", "green", "red") and found.image_shape == (3, 32, 32) and found.name == "art"
    assert np.bincount(found.train_labels).tolist() == [60, 50, 70]
    brightest = found.train_images.mean((2, 3)).argmax(1)
    assert np.array_equal(brightest, 2 - found.train_labels)  # channels and labels belong together
    first = np.asarray(Image.open("art/test/red/0.png")).transpose(2, 0, 1)
    assert any(np.array_equal(first, image) for image in found.test_images[found.test_labels == 2])
    # Classes come mixed, for a recipe that does not shuffle: no class is missing from a batch.
    assert all(len(set(found.train_labels[at : at + 25])) == 3 for at in range(0, 175, 25))


@quick
def test_the_order_of_pictures_is_that_of_no_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    picture_folder(Path("art"))
    first, listed = data.load("./art"), os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: reversed(list(listed(folder))))
    Path("art").rename("elsewhere")
    again = data.load("./elsewhere")
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.md5 == again.md5


@quick
def test_grey_pictures_have_one_channel_and_one_in_colour_makes_three() -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            Path("art", part, name).mkdir(parents=True)
            Image.new("L", (4, 5), 7).save(f"art/{part}/{name}/1.png")
    assert data.load("./art").image_shape == (1, 5, 4)
    Image.new("P", (4, 5)).save("art/train/b/2.PNG")
    assert data.load("./art").image_shape == (3, 5, 4)


@quick
def test_pictures_of_every_kind_are_upright_have_8_bits_and_lie_on_white(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 6), (200, 10, 10))
    red.putpixel((0, 0), (10, 200, 10))  # top left
    turned = red.rotate(90, expand=True)  # as a camera held upright stores it
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save("turned.png", exif=exif)
    assert np.array_equal(picture.read(Path("turned.png")), red) and picture.look(Path("turned.png")) == (False, (4, 6))
    clear = red.convert("RGBA")
    clear.putpixel((1, 1), (200, 10, 10, 0))
    for name, image in (("alpha.png", clear), ("alpha.webp", clear), ("palette.png", clear.quantize(8))):
        image.save(name, lossless=True)
        pixels = np.asarray(picture.read(Path(name)))
        assert pixels[1, 1].tolist() == [255, 255, 255] and np.abs(pixels[0, 1] - [200, 10, 10]).max() < 3, name
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(deep).save("deep.png")
    Image.fromarray(np.array([[0, 1, 128, 255]], np.uint8)).save("grey.png")
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save("bits.png")
    for name, values in (("deep.png", [0, 1, 128, 255]), ("grey.png", [0, 1, 128, 255]), ("bits.png", [0, 255])):
        assert np.asarray(picture.read(Path(name))).tolist() == [values] and picture.look(Path(name))[0], name
        assert picture.load(Path(name), (3, 1, len(values)))[:, 0].tolist() == [values] * 3


@quick
@pytest.mark.parametrize("size", [(300, 171), (64, 700)])
def test_a_picture_is_scaled_by_its_shorter_side_and_its_centre_kept(size: tuple[int, int]) -> None:
    """As torchvision's Resize and CenterCrop do, which round to a pixel where to cut."""
    smooth = Image.effect_noise((9, 9), 90).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    smooth.save("one.png")
    side = cache.stored_side(56)
    assert side == 64
    seen = cache.centre(picture.load(Path("one.png"), (3, side, side)), 56)
    theirs = transforms.center_crop(transforms.resize(smooth, side), 56)
    assert np.abs(seen - np.asarray(theirs).transpose(2, 0, 1).astype(int)).mean() < 2
    smooth.save("one.jpg", quality=98)  # which is decoded at a part of its size
    assert np.abs(seen - picture.load(Path("one.jpg"), (3, side, side))[:, 4:60, 4:60].astype(int)).mean() < 3


def art(changed: str, change: Callable[[Path], object]) -> str:
    change(picture_folder(Path("art")) / changed)
    return "./art"


def single(width: int) -> Callable[[Path], object]:
    return lambda path: Image.new("RGB", (width, 32)).save(path)


REFUSED: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "a class missing in test": (lambda: art("test/red", shutil.rmtree), ("./art", "no test image of class 'red'")),
    "a class missing in train": (lambda: art("train/red", shutil.rmtree), ("class 'red'", "none in train/")),
    "no test folder": (lambda: art("test", shutil.rmtree), ("dataset art: has train/, and neither test/ nor val/",)),
    "no pictures": (
        lambda: str(Path("x/train/a").mkdir(parents=True) or Path("x/val/a").mkdir(parents=True) or "./x"),
        ("dataset x: no pictures in train/<class>/ and val/<class>/",),
    ),
    "a picture of another size": (
        lambda: art("test/red/x.png", single(40)),
        ("32x32", "art/test/red/x.png is 40x32", "--image-size 64"),
    ),
    "a damaged picture and one that is none": (
        lambda: (
            art("train/red/3.png", lambda path: path.write_bytes(path.read_bytes()[:200]))
            + str(Path("art/test/blue/0.png").write_text("<html>") and "")
        ),
        ("2 pictures cannot be decoded", "art/train/red/3.png: ", "art/test/blue/0.png: no picture", "--skip-broken"),
    ),
}


@quick
@pytest.mark.parametrize("mistake", REFUSED)
def test_pictures_that_cannot_be_trained_on_are_named(mistake: str) -> None:
    make, words = REFUSED[mistake]
    with pytest.raises(UserError) as told:
        data.load(make())
    assert all(word in str(told.value) for word in words), told.value


@quick
def test_a_size_is_for_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image_size is for a folder of pictures.*synthetic is none"):
        data.load("synthetic", pictures=PictureSettings(image_size=32))


@quick
def test_val_alone_is_tested_on_and_with_test_it_is_chosen_by() -> None:
    alone = data.load(str(unlike_pictures(Path("alone").absolute(), "train val")), pictures=PictureSettings(24))
    assert len(alone.test_labels) == 60 and alone.val_images is None
    both = data.load(str(unlike_pictures(Path("both").absolute())), pictures=PictureSettings(24))
    assert both.val_labels is not None and len(both.test_labels) == len(both.val_labels) == 60
    assert both.image_shape == (3, 24, 24) and len(both.train_images) == len(both.train_labels) == 60


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The pictures that are decoded from now on."""
    seen, load = [], picture.load
    monkeypatch.setattr(picture, "load", lambda path, shape: (seen.append(path), load(path, shape))[1])
    return seen


@quick
def test_pictures_are_decoded_once_and_a_change_makes_another_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, settings, seen = unlike_pictures(Path("set")), PictureSettings(24), decoded(monkeypatch)
    first = data.load("./set", pictures=settings)
    assert len(seen) == 180 and isinstance(first.train_images.base, np.memmap)
    again = data.load("./set", pictures=settings)
    assert len(seen) == 180 and again.md5 == first.md5 and np.array_equal(again.train_images, first.train_images)
    other = data.load("./set", pictures=PictureSettings(16))
    assert len(seen) == 360 and other.image_shape == (3, 16, 16)
    (folder / "train/dark/0.jpg").unlink()
    assert len(data.load("./set", pictures=settings).train_labels) == 59 and len(seen) == 539
    lines = [one.line for one in cache.found(settings.root)]
    assert len(lines) == 3 and all("180 pictures, 3x" in line or "179 pictures, 3x27x27" in line for line in lines)
    with pytest.raises(UserError, match="has no 'this'"):
        cache.remove(settings.root, ["this"])
    assert len(cache.remove(settings.root, [cache.found(settings.root)[0].name])) == 1
    assert len(cache.remove(settings.root, ["all"])) == 2 and not cache.found(settings.root)


@quick
def test_a_cache_that_was_broken_off_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK", 8)
    unlike_pictures(Path("set"))
    one, other = (PictureSettings(24, cache_dir=Path(name)) for name in ("one", "other"))
    whole = cache.prepare(Path("set"), one)
    looks, seen = 180 / 8, decoded(monkeypatch)
    between = iter(range(1000))

    def stop() -> None:
        if next(between) > looks + 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.prepare(Path("set"), other, stop)
    [partial] = cache.found(other.root)
    assert partial.line.endswith("unfinished") and 64 <= len(seen) < 180
    with open(partial.folder / "journal.jsonl", "a") as journal:
        journal.write('\n{"test 0": {"md')  # as a kill leaves it
    done = sum("md5" in line for line in (partial.folder / "journal.jsonl").read_text().splitlines()[:-1])
    seen.clear()
    made = cache.prepare(Path("set"), other)
    assert len(seen) <= 180 - 8 * (done - 3) and {path.name for path in made.iterdir()} == {
        path.name for path in whole.iterdir()
    }
    for name in ("train.u8", "val.u8", "test.u8"):
        assert (made / name).read_bytes() == (whole / name).read_bytes(), name


@quick
def test_what_is_broken_is_left_out_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = unlike_pictures(Path("set"))
    good = data.load("./set", pictures=PictureSettings(24))
    broken = {folder / f"train/{name}" for name in ("dark/1.png", "dark/4.jpg", "light/7.png")}
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="3 pictures cannot be decoded"):
        data.load("./set", pictures=PictureSettings(24))
    rest = data.load("./set", pictures=PictureSettings(24, skip_broken=True))
    assert len(rest.left_out) == 3 and {Path(one.partition(": ")[0]) for one in rest.left_out} == broken
    assert np.bincount(rest.train_labels).tolist() == [28, 29] and len(rest.test_labels) == 60

    def known(dataset: data.Dataset) -> set[tuple[bytes, int]]:
        return {(i.tobytes(), int(n)) for i, n in zip(dataset.train_images, dataset.train_labels, strict=True)}

    assert known(rest) < known(good) and len(known(rest)) == 57  # each with its own label
    for part, images in (("train", rest.train_images), ("test", rest.test_images)):  # and its own sums
        assert np.array_equal(rest.sums[part], cache.pixel_sums(np.ascontiguousarray(images)))
        assert rest.sums[part][..., 0].sum() == images.sum(dtype=np.int64)
    with pytest.raises(UserError, match="3 pictures cannot be decoded"):  # the cache is there, and yet nobody asked
        data.load("./set", pictures=PictureSettings(24))


@quick
def test_a_part_of_which_nothing_can_be_decoded_is_told() -> None:
    folder = unlike_pictures(Path("set"), parts="train test")
    for path in (folder / "test").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="test set is empty: add images"):
        data.load("./set", pictures=PictureSettings(24, skip_broken=True))


@quick
def test_a_cache_without_room_or_place_or_with_damage_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    unlike_pictures(Path("set"))
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"file/pictures cannot be written \(Not a directory\).*--cache-dir"):
        data.load("./set", pictures=PictureSettings(24, cache_dir=Path("file")))
    made = cache.prepare(Path("set"), PictureSettings(24))
    os.truncate(made / "val.u8", 5)
    with pytest.raises(UserError, match=r"val.u8 is damaged: remove .*, and it is made anew"):
        data.load("./set", pictures=PictureSettings(24))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"take 0.00 GB, and 0.00 GB are free in .*: name a folder on another disk"):
        data.load("./set", pictures=PictureSettings(32))


def loading_rank(folder: str, stop: int | None) -> Any:
    """What a rank of two gets, where rank `stop` is asked to stop while rank 0 decodes."""
    os.chdir(folder)
    cfg = make_config({"dataset": "./set", "image_size": 24, "cache_dir": "kept", "device": "cpu"})
    with open_world(cfg) as world:
        if world.rank == stop:
            signals._received.add("SIGTERM")
        if stop is not None:
            cache.BLOCK = 1
        try:
            loaded = startup.load_data(cfg, world)
        except Stopped as error:
            return str(error)
    return loaded.md5, len(os.listdir("kept/pictures"))


def test_one_rank_of_a_machine_decodes_for_all_and_any_can_stop_it(tmp_path: Path) -> None:
    unlike_pictures(tmp_path / "set")
    stopped = ranks(2, loading_rank, str(tmp_path), 1)
    assert stopped[0] == stopped[1] and "stopped (SIGTERM)" in stopped[0]
    (ours, files), (theirs, _) = ranks(2, loading_rank, str(tmp_path), None)
    assert ours == theirs and files == 2  # the cache and its lock


TRAIN = ("fashion_ddp.train", "--device", "cpu", "--tracker", "none", "--threads", "1")


def test_pictures_of_all_sizes_from_files_to_report_and_predictions(tmp_path: Path) -> None:
    folder = unlike_pictures(tmp_path / "set", each=60)
    (folder / "train/dark/1.png").write_bytes(b"")
    words = ["--dataset", "./set", "--image-size", "24", "--batch-size", "30", "--lr", "0.005", "--optimizer", "adam"]
    more = ["--model", "cnn", "--epochs", "3", "--shift", "2", "--normalize", "--skip-broken"]
    words += ["--cache-dir", "cache"]
    done = forked(*TRAIN, *words, *more, cwd=tmp_path)
    assert done.returncode == 0 and "left out 1 picture that cannot be decoded" in done.stdout, done.stderr
    [path] = (tmp_path / "runs").iterdir()
    run = load_run(path)
    assert len(run.environment[0]["left_out"]) == 1 and run.summary["image_shape"] == [3, 24, 24]
    # The set has images to choose by: the test set is opened once.
    assert ["test/accuracy" in row for row in run.metrics] == [False, False, True]
    assert all("val/accuracy" in row for row in run.metrics) and run.summary["test/accuracy"] > 0.9
    done = forked("fashion_ddp.compare", "runs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report/report.json").read_text())["runs"][0]["test/accuracy"] > 0.9
    assert "validation accuracy %" in (tmp_path / "report/report.html").read_text()
    done = forked("fashion_ddp.predict", str(path), "--verify", "set/test/light/1.png", cwd=tmp_path)
    assert done.returncode == 0 and "exactly as recorded" in done.stdout and "light" in done.stdout, done.stderr
    # A prediction sees a picture as the evaluation did.
    photo = prepare_photo(folder / "test/light/2.jpg", (3, 24, 24), False, 24)
    seen = data.load("./set", pictures=PictureSettings(24, skip_broken=True)).test_images
    assert any(np.array_equal(photo.pixels, image) for image in seen)
    both = forked(*TRAIN, *words, "--validation", "5", "--skip-broken", cwd=tmp_path)
    assert both.returncode == 2 and "leave --validation out" in both.stderr
    # And nothing is chosen by what a run is tested on.
    choosing = (*TRAIN, *words, "--skip-broken", "--keep", "best", "--patience", "1", "--check-only")
    assert forked(*choosing, cwd=tmp_path).returncode == 0
    shutil.rmtree(folder / "test")
    alone = forked(*choosing, cwd=tmp_path)
    assert alone.returncode == 2 and alone.stderr.startswith("error: keep best needs a validation set, and dataset set")
