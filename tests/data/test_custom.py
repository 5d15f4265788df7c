"""Arrays of the user's own: what is understood, what is refused, and whole runs on them."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKOUT, forked, ranks
from safetensors.numpy import load_file
from test_dataset import NAMES as IDX
from test_dataset import idx

from fashion_ddp import data
from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed import machine
from fashion_ddp.distributed.world import open_world
from fashion_ddp.errors import UserError
from fashion_ddp.runs.reading import load_run
from fashion_ddp.training import startup

quick = pytest.mark.quick

CLASSES = 7


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seven(count: int, height: int = 12, width: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Images [count, height, width] whose bright row tells their class, and labels."""
    labels = np.arange(count) % CLASSES
    images = np.random.default_rng(count).integers(0, 60, (count, height, width)).astype(np.uint8)
    images[np.arange(count), labels] = 250
    return images, labels.astype(np.uint8)


def idx_folder(folder: Path, packed: bool = True) -> Path:
    folder.mkdir(parents=True)
    for name, array in zip(IDX, (*seven(350), *seven(84)), strict=True):
        content = gzip.compress(idx(array)) if packed else idx(array)
        (folder / (f"{name}.gz" if packed else name)).write_bytes(content)
    return folder


@quick
def test_a_set_that_memory_does_not_hold_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = seven(350)
    np.savez_compressed("set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    idx_folder(Path("packed"))
    idx_folder(Path("plain"), packed=False)
    # Values alone, or with .npz's headers; on each of two ranks.
    for dataset, nbytes in (("./packed", 434 * 109), ("./plain", 434 * 109), ("./set.npz", 2 * 350 * 109 + 4 * 128)):
        for ranks_here in (1, 2):
            place = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "x", "LOCAL_WORLD_SIZE": ranks_here}
            for name, value in place.items():
                monkeypatch.setenv(name, str(value))
            monkeypatch.setattr(machine, "free_memory", lambda: ranks_here * nbytes - 1)  # noqa: B023
            with pytest.raises(UserError, match=r"and 0.00 GB of memory are free on this machine: take fewer") as told:
                data.load(dataset)
            assert ("decoded by 2 ranks, takes" in str(told.value)) == (ranks_here == 2)
            monkeypatch.setattr(machine, "free_memory", lambda: ranks_here * nbytes)  # noqa: B023
            assert len(data.load(dataset).train_labels) == 350


@quick
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_of_whatever_content(packed: bool) -> None:
    idx_folder(Path("letters"), packed)
    found = data.load("./letters")
    images, labels = seven(350)
    assert found.image_shape == (1, 12, 9) and found.classes == tuple("0123456") and found.name == "letters"
    assert np.array_equal(found.train_images[:, 0], images) and np.array_equal(found.train_labels, labels)
    assert len(found.test_labels) == 84 and found.test_labels.dtype == np.int64 and not found.synthetic
    assert found.train_images.flags.writeable and found.source == "./letters"


@quick
def test_idx_files_with_names_for_the_classes_and_under_other_names() -> None:
    idx_folder(Path("set"))
    for path in list(Path("set").iterdir()):
        path.rename(path.with_name("emnist-days-" + path.name.replace("t10k", "test").replace("-idx", ".idx")))
    Path("set/classes.txt").write_text("Mon\nTue\nWed\nThu\nFri\nSat\nSun\n")
    assert data.load("set/").classes == ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


@quick
@pytest.mark.parametrize("names", [IDX, ("train_images", "train_labels", "test_images", "test_labels")])
def test_an_npz_and_other_layouts_of_arrays(names: tuple[str, ...]) -> None:
    images, labels = seven(70)
    coloured = np.stack([images] * 3, axis=3)  # [N, H, W, C]
    keys = ("x_train", "y_train", "x_test", "y_test") if names is IDX else names
    np.savez("mine.npz", **dict(zip(keys, (coloured, labels[:, None], coloured, labels.astype(np.int32)), strict=True)))
    found = data.load("mine.npz")
    assert found.image_shape == (3, 12, 9) and np.array_equal(found.train_images[:, 1], images)
    assert np.array_equal(found.train_labels, labels) and found.classes == tuple("0123456") and found.name == "mine"


@quick
def test_the_function_of_the_page_about_data(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (CHECKOUT / "docs" / "data.md").read_text()
    Path("own_sets_3.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    monkeypatch.syspath_prepend(".")
    found = data.load("own_sets_3:stripes")
    assert found.image_shape == (1, 16, 16) and found.classes == ("lying", "standing")
    assert found.name == "own_sets_3:stripes" and found.train_labels[:3].tolist() == [0, 1, 0]
    assert found.train_images[0, 0, 4].all() and not found.train_images[0, 0, 5].any()
    assert found.train_images[1, 0, :, 4].all() and not found.train_images[1, 0, :, 5].any()


@quick
def test_the_hash_tells_sets_apart() -> None:
    def md5(images: np.ndarray, **more: Any) -> dict[str, str]:
        labels = np.arange(len(images)) % 2
        np.savez("mine.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels, **more)
        return data.load("mine.npz").md5

    images = np.zeros((4, 6, 4), np.uint8)
    first = md5(images)
    assert first == md5(images)
    assert set(first) == {"train_images", "train_labels", "test_images", "test_labels", "classes"}
    assert first["train_images"] != md5(images.reshape(4, 4, 6))["train_images"]
    assert first["classes"] != md5(images, classes=np.array(["a", "b"]))["classes"]
    images[3, 5, 3] = 1
    assert first["test_images"] != md5(images)["test_images"]


FUNCTIONS = """
def broken():
    open("absent.npy")
def one():
    return [[[0]]], [0]
"""


def npz(**replaced: Any) -> str:
    images, labels = seven(70)
    held = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels} | replaced
    np.savez("mine.npz", **{name: array for name, array in held.items() if array is not None})
    return "mine.npz"


def npz_both(labels: np.ndarray) -> str:
    return npz(train_labels=labels, test_labels=labels)


def idx_with(name: str, change: Callable[[Path], object], packed: bool = True) -> str:
    change(idx_folder(Path("s"), packed) / name)
    return "./s"


def own(name: str) -> str:
    Path("own_sets_2.py").write_text(FUNCTIONS)
    return f"own_sets_2:{name}"


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


FLOATS = b"\0\0\x0d\3" + bytes(12)
FOUR = np.array(list("abcd"))
REFUSED: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "no such folder": (lambda: "./absent", ("dataset ./absent", "no such folder or file")),
    "an empty folder": (lambda: str(Path("empty/x").mkdir(parents=True) or "./empty"), ("train-images-idx3", "none")),
    "one file missing": (lambda: idx_with(f"{IDX[3]}.gz", Path.unlink), ("t10k-labels-idx1-ubyte", "none")),
    "labels too high": (lambda: npz(test_labels=seven(70)[1] + 1), ("test labels", "from 0 to 6", "found 7")),
    "labels negative": (lambda: npz(train_labels=np.arange(70) % 7 - 1), ("train labels", "found -1")),
    "a class that is not tested": (lambda: npz(test_labels=np.arange(70) % 6), ("no test image of class '6'",)),
    "a class of none": (lambda: npz(train_labels=seven(70)[1] % 3, classes=FOUR), ("no train image of class 'd'",)),
    "labels from 1": (lambda: npz_both(np.arange(70) % 7 + 1), ("'0'", "from 0")),
    "one class": (lambda: npz_both(np.zeros(70, int)), ("one class",)),
    "labels of another number": (lambda: npz(train_labels=np.arange(69)), ("70 whole numbers", "[69]")),
    "labels that are no numbers": (lambda: npz(train_labels=np.array(["a"] * 70)), ("whole numbers", "<U1")),
    "pixels from 0 to 1": (lambda: npz(test_images=np.zeros((70, 12, 9))), ("test images must be uint8", "float64")),
    "flat images": (lambda: npz(train_images=np.zeros((70, 108), np.uint8)), ("[N, C, H, W]", "[70, 108]")),
    "images of two shapes": (lambda: npz(test_images=np.zeros((70, 9, 12), np.uint8)), ("(1, 9, 12)", "(1, 12, 9)")),
    "nothing in it": (lambda: npz(test_images=seven(0)[0], test_labels=seven(0)[1]), ("test set is empty",)),
    "an array missing": (lambda: npz(test_labels=None), ("mine.npz: needs the arrays", "np.savez")),
    "objects": (lambda: npz(classes=np.array([{}], object)), ("mine.npz: cannot be read", "no objects")),
    "no npz": (lambda: str(Path("x.npz").write_bytes(b"1234") and "x.npz"), ("x.npz: cannot be read",)),
    "idx of numbers with points": (
        lambda: idx_with(IDX[0], lambda path: path.write_bytes(FLOATS), packed=False),
        (f"s/{IDX[0]}: cannot be read", "00000803, found 00000d03"),
    ),
    "half a gz": (lambda: idx_with(f"{IDX[2]}.gz", shorten), (f"s/{IDX[2]}.gz: cannot be read",)),
    "no such function": (lambda: own("absent"), ("dataset own_sets_2:absent", "check the name after the colon")),
    "no such module": (lambda: "no_such_sets:f", ("no module 'no_such_sets'",)),
    "a function that fails": (lambda: own("broken"), ("FileNotFoundError", "absent.npy", ", line ", "it must return")),
    "a function of another shape": (lambda: own("one"), ("dataset own_sets_2:one", "it must return")),
}


@quick
@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_trained_on_is_named(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.getcwd())
    make, words = REFUSED[mistake]
    with pytest.raises(UserError) as told:
        data.load(make())
    assert all(word in str(told.value) for word in words) and "\n" not in str(told.value), told.value


TRAIN = ("fashion_ddp.train", "--device", "cpu", "--tracker", "none", "--threads", "1")


def train_and_compare(folder: Path, models: str, *words: str) -> list[dict[str, Any]]:
    """The runs of the report."""
    for line in [*((*TRAIN, *words, "--model", model) for model in models.split()), ("fashion_ddp.compare", "runs")]:
        done = forked(*line, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "report" / "report.html").stat().st_size > 10_000
    return json.loads((folder / "report" / "report.json").read_text())["runs"]


def test_seven_classes_of_idx_files_from_files_to_report(tmp_path: Path) -> None:
    idx_folder(tmp_path / "letters")
    (tmp_path / "letters" / "classes.txt").write_text("\n".join(f"day {n}" for n in range(7)))
    words = ["--dataset", "./letters", "--batch-size", "25", "--epochs", "4", "--lr", "0.05", "--optimizer", "momentum"]
    runs = train_and_compare(tmp_path, "mlp cnn", *words)
    assert {run["model"] for run in runs} == {"mlp", "cnn"}
    for run in runs:
        assert run["dataset"] == "letters" and run["classes"] == [f"day {n}" for n in range(7)]
        assert run["image_shape"] == [1, 12, 9] and (run["training_images"], run["test_images"]) == (350, 84)
        assert np.sum(run["confusion"]) == 84 and len(run["confusion"]) == 7
        assert run["test/accuracy"] > 0.5 and run["published"] is None, run["model"]
    folder = tmp_path / "runs" / "mlp-blog-seed42-epochs4-batch_size25-optimizermomentum-lr0.05-datasetletters"
    run = load_run(folder)
    known = {"train_images", "train_labels", "test_images", "test_labels", "classes"}
    assert set(run.environment[0]["made_by"]["data"]) == known
    examples = load_file(folder / "examples.safetensors")
    assert examples["samples"].shape == (25, 1, 12, 9) and examples["image"].shape == (1, 12, 9)
    assert load_file(folder / "predictions.safetensors")["logits"].shape == (84, 7)
    # The same data is the same run, wherever it lies; other data under its name is not taken for it.
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "letters", tmp_path / "moved" / "letters")
    again = (TRAIN[0], "--config", str(folder / "config.yaml"), "--dataset", "./moved/letters", "--check-only")
    assert "find its run finished" in forked(*again, cwd=tmp_path).stdout
    (tmp_path / "moved" / "letters" / "classes.txt").unlink()
    assert "other data files" in forked(*again, cwd=tmp_path).stderr


def own_rank(folder: str) -> str:
    os.chdir(folder)
    with open_world(make_config({"dataset": "drawn:f", "device": "cpu"})) as world:
        try:
            startup.load_data(make_config({"dataset": "drawn:f"}), world)
        except UserError as error:
            return str(error)
    return "nothing"


def test_ranks_that_find_other_data_are_told(tmp_path: Path) -> None:
    (tmp_path / "drawn.py").write_text(
        "import os\nimport numpy as np\n\ndef f():\n"
        "    images, labels = np.full((20, 4, 4), os.environ['RANK'], np.uint8), np.arange(20) % 2\n"
        "    return (images, labels), (images, labels), 'ab'\n"
    )
    said = ranks(2, own_rank, str(tmp_path))
    assert said[0] == said[1] and "dataset drawn:f: the ranks found different data" in said[0]
