"""Finding, downloading, verifying and decoding the data: real files, real servers, real processes."""

import contextlib
import errno
import fcntl
import gzip
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CHECKOUT, command, free_port, on_a_terminal

from fashion_ddp import data
from fashion_ddp.config import names
from fashion_ddp.data.published import PUBLISHED, Fingerprint, IdxFile, PublishedDataset
from fashion_ddp.errors import UserError

# The limit stands for "bounded": a wait without an end fails here.
pytestmark = [pytest.mark.quick, pytest.mark.timeout(120)]

FASHION = PUBLISHED["fashion_mnist"]
NAMES = [file.name for file in FASHION.files]

Files = dict[str, bytes]
Patch = pytest.MonkeyPatch
Publish = Callable[..., None]


@pytest.fixture(autouse=True)
def elsewhere(data_dir: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    """An empty working directory and cache, and an environment that names no folder, mirror or proxy."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in list(os.environ):
        if name.startswith("FASHION_DDP_DATA") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    return here


@pytest.fixture(scope="session")
def raw(data_dir: Path) -> Files:
    """The real files as published, by name."""
    folder = data.locate("fashion_mnist", data_dir)
    assert folder is not None
    return {f"{name}.gz": (folder / f"{name}.gz").read_bytes() for name in NAMES}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where a download goes."""
    return tmp_path / "cache" / "fashion_ddp" / FASHION.folder


def put(folder: Path, contents: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


# --- Finding ----------------------------------------------------------------------------------------------------


def test_the_folders_are_searched_in_order(tmp_path: Path, elsewhere: Path, cache: Path, monkeypatch: Patch) -> None:
    empty = dict.fromkeys(NAMES, b"")
    assert data.locate("fashion_mnist", None) is None
    assert data.locate("fashion_mnist", put(cache, empty)) == cache
    assert data.locate("fashion_mnist", None) == cache
    beside = put(elsewhere / "data" / FASHION.folder, empty)
    assert data.locate("fashion_mnist", None) == beside
    by_variable = put(tmp_path / "variable", empty)
    monkeypatch.setenv("FASHION_DDP_DATA_DIR", str(by_variable))
    assert data.locate("fashion_mnist", None) == by_variable
    by_flag = put(tmp_path / "flag", empty)
    assert data.locate("fashion_mnist", by_flag) == by_flag


def test_all_four_files_must_be_in_one_folder(tmp_path: Path) -> None:
    put(tmp_path / "half", dict.fromkeys(NAMES[:2], b""))
    put(tmp_path / "half" / FASHION.folder, dict.fromkeys(NAMES[2:], b""))
    assert data.locate("fashion_mnist", tmp_path / "half") is None


@pytest.mark.parametrize("by", ["--data-dir", "$FASHION_DDP_DATA_DIR"])
def test_a_named_folder_is_the_only_one(
    by: str, tmp_path: Path, elsewhere: Path, raw: Files, monkeypatch: Patch
) -> None:
    put(elsewhere / "data", raw)
    assert data.load("fashion_mnist").source == str(elsewhere / "data")
    named = put(tmp_path / "named", {"train-images-idx3-ubyte.gz": b""})
    if by.startswith("$"):
        monkeypatch.setenv(by[1:], str(named))
    with pytest.raises(UserError) as error:
        data.load("fashion_mnist", None if by.startswith("$") else named)
    assert f"{named} (from {by})" in str(error.value)
    assert str(elsewhere / "data") not in str(error.value)


# --- Verifying and decoding -------------------------------------------------------------------------------------


def test_the_real_data(data_dir: Path, raw: Files) -> None:
    real = data.load("fashion_mnist", data_dir)
    assert real.train_images.shape == (60_000, 1, 28, 28) and real.test_images.shape == (10_000, 1, 28, 28)
    assert real.train_images.dtype == real.test_images.dtype == np.uint8 and not real.synthetic
    assert real.train_labels.dtype == real.test_labels.dtype == np.int64
    assert real.test_images[-1, 0].tobytes() == gzip.decompress(raw[f"{NAMES[2]}.gz"])[-28 * 28 :]
    # Published facts that fix order and scale: the first labels, and the training set's mean and std.
    assert [real.classes[label] for label in real.train_labels[:3]] == ["Ankle boot", "T-shirt/top", "T-shirt/top"]
    assert [real.classes[label] for label in real.test_labels[:3]] == ["Ankle boot", "Pullover", "Trouser"]
    assert [round(x / 255, 4) for x in (real.train_images.mean(), real.train_images.std())] == [0.2860, 0.3530]
    # torch.from_numpy warns of arrays that cannot be written.
    assert real.train_images.flags.writeable and real.test_images.flags.writeable


@pytest.mark.parametrize("layout", [FASHION.folder, "."])
@pytest.mark.parametrize("unpacked", [[], NAMES[1:3], NAMES], ids=["gz", "mixed", "unpacked"])
def test_every_layout_is_the_same_data(
    layout: str, unpacked: list[str], tmp_path: Path, data_dir: Path, raw: Files
) -> None:
    real = data.load("fashion_mnist", data_dir)
    stored = {name: gzip.decompress(raw[f"{name}.gz"]) for name in unpacked}
    stored |= {f"{name}.gz": raw[f"{name}.gz"] for name in NAMES if name not in unpacked}
    folder = put(tmp_path / "stored" / layout, stored)
    folder.chmod(0o555)
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    other = data.load("fashion_mnist", tmp_path / "stored")
    after = {path: path.stat() for path in tmp_path.rglob("*")}
    assert {p: s.st_mtime_ns for p, s in after.items()} == {p: s.st_mtime_ns for p, s in before.items()}
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert np.array_equal(getattr(other, name), getattr(real, name))
    assert other.md5 == real.md5 == {f"{file.name}.gz": file.gz.md5 for file in FASHION.files}
    assert other.source == str(folder)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "one bit": flipped,
    "truncated": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "a web page": lambda content: b"<html>not found</html>",
}


@pytest.mark.parametrize(
    ("file", "form", "damage"),
    [(FASHION.files[2], form, damage) for form in ("gz", "idx") for damage in DAMAGES]
    + [(file, "gz", "one bit") for file in (*FASHION.files[:2], FASHION.files[3])],
    ids=lambda value: value.name if isinstance(value, IdxFile) else value,
)
def test_a_damaged_file_is_named(file: IdxFile, form: str, damage: str, tmp_path: Path, raw: Files) -> None:
    folder = put(tmp_path / "stored", raw)
    path, good = folder / f"{file.name}.gz", raw[f"{file.name}.gz"]
    if form == "idx":
        path.unlink()
        path, good = folder / file.name, gzip.decompress(good)
    path.write_bytes(DAMAGES[damage](good))
    with pytest.raises(UserError) as error:
        data.load("fashion_mnist", folder)
    found = Fingerprint.from_bytes(DAMAGES[damage](good))
    expected = f"expected {getattr(file, form)}, found {found.size:,} bytes with md5 {found.md5}"
    for part in (f"{path} is damaged", expected, "python -m fashion_ddp.data"):
        assert part in str(error.value)


def test_files_of_another_published_set_are_told(tmp_path: Path, raw: Files) -> None:
    """Relatives of MNIST share the names of their files: to delete these would be the wrong advice."""
    folder = put(tmp_path / "stored", raw)
    for name in ("mnist", "kmnist"):
        said = f"{NAMES[0]}.gz is of fashion_mnist, not {name}: name the folder of {name}"
        with pytest.raises(UserError, match=said):
            data.load(name, folder)
    folder = put(tmp_path / "unpacked", {name: gzip.decompress(raw[f"{name}.gz"]) for name in NAMES})
    with pytest.raises(UserError, match=f"{NAMES[0]} is of fashion_mnist, not mnist"):
        data.load("mnist", folder)
    # What kmnist's files are unpacked is not known: they are not taken on trust.
    assert data.locate("kmnist", folder) is None
    with pytest.raises(UserError, match=r"kmnist needs .*t10k-labels-idx1-ubyte.gz, which are not all in"):
        data.load("kmnist", folder)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, raw: Files) -> None:
    folder = put(tmp_path / "stored", raw)
    path = folder / f"{NAMES[2]}.gz"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # opens for everyone, and fails when read, as a bad disk does
    with pytest.raises(UserError, match=f"{path}: cannot be read"):
        data.load("fashion_mnist", folder)


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


SMALL = [np.arange(30).reshape(5, 3, 2), np.array([0, 1, 2, 1, 0])]
SMALL += [np.arange(24).reshape(4, 3, 2), np.array([2, 1, 0, 0])]


def load_tiny(folder: Path, monkeypatch: Patch, changed: dict[int, bytes]) -> data.Dataset:
    """Publish a dataset of three classes, some of whose files have another content, and load it."""
    files = []
    for at, name in enumerate(NAMES):
        content = changed.get(at, idx(SMALL[at]))
        packed = gzip.compress(content)
        put(folder, {f"{name}.gz": packed})
        files.append(IdxFile(name, Fingerprint.from_bytes(packed), Fingerprint.from_bytes(content)))
    monkeypatch.setattr(names, "DATASETS", (*names.DATASETS, "tiny"))
    monkeypatch.setitem(PUBLISHED, "tiny", PublishedDataset("Tiny/raw", (), ("a", "b", "c"), tuple(files)))
    return data.load("tiny", folder)


def test_another_dataset_is_a_row_of_the_table(tmp_path: Path, monkeypatch: Patch) -> None:
    tiny = load_tiny(tmp_path, monkeypatch, {})
    assert tiny.image_shape == (1, 3, 2) and tiny.classes == ("a", "b", "c")
    assert np.array_equal(tiny.train_images[:, 0], SMALL[0]) and np.array_equal(tiny.test_labels, SMALL[3])


@pytest.mark.parametrize(
    ("at", "content", "said"),
    [
        (0, idx(SMALL[1]), "an idx header starting 00000803, found 00000801"),
        (2, b"\0\0\x0d\x03" + idx(SMALL[2])[4:], "an idx header starting 00000803, found 00000d03"),
        (2, idx(SMALL[2])[:9], "an idx header starting 00000803, found 000008030000000400"),
        (2, idx(SMALL[2])[:-1], r"40 bytes for \(4, 3, 2\), found 39"),
        (2, idx(SMALL[2]) + b"\0", r"40 bytes for \(4, 3, 2\), found 41"),
        (2, idx(SMALL[2].reshape(4, 2, 3)), r"images of \(3, 2\) like the training set's, found \(2, 3\)"),
        (1, idx(SMALL[1][:4]), "5 labels, one per image, found 4"),
        (3, idx(np.array([0, 1, 3, 2])), "labels below 3, one per class, found label 3"),
    ],
    ids=["axes", "type", "header", "short", "long", "shape", "count", "label"],
)
def test_content_that_is_no_such_dataset_is_named(
    at: int, content: bytes, said: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    with pytest.raises(UserError, match=f"{NAMES[at]}.gz is damaged or another file: expected {said}"):
        load_tiny(tmp_path, monkeypatch, {at: content})


# --- Downloading ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(
    contents: Files, spoil: Callable[[bytes], bytes] = bytes, delay: float = 0, stall: threading.Event | None = None
) -> Iterator[SimpleNamespace]:
    """A real HTTP server: its url, and how often each file was requested. `spoil` changes what it sends, `delay` is in
    seconds before the first answer; with `stall` it sends half of a file, says so by the event, and no more."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/")
            source.requests[name] += 1
            if source.requests.total() == 1:
                time.sleep(delay)
            if name not in contents:
                return self.send_error(404)
            content = spoil(contents[name])
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if stall:
                self.wfile.write(content[: len(content) // 2])
                stall.set()
                over.wait()
            else:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    source = SimpleNamespace(url=f"http://127.0.0.1:{server.server_address[1]}", requests=Counter())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield source
    finally:
        over.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def sources(monkeypatch: Patch) -> Publish:
    """Sets where Fashion-MNIST is published."""

    def publish_at(*urls: str) -> None:
        monkeypatch.setitem(PUBLISHED, "fashion_mnist", replace(FASHION, urls=urls))

    return publish_at


def nobody() -> str:
    """A URL at which nothing listens."""
    return f"http://127.0.0.1:{free_port()}"


def get_data(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own. Without a mirror it finds no network: the proxy is not there."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), nobody()) | {"no_proxy": "127.0.0.1"}
    return command("python", "-m", "fashion_ddp.data", *flags, cwd=Path.cwd(), timeout=60, **proxies, **env)


def assert_complete(folder: Path, raw: Files) -> None:
    """The published files, and nothing that looks like one."""
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"} == raw


def test_four_processes_at_once_fetch_each_file_once(cache: Path, raw: Files) -> None:
    # The first answer takes long enough for all four to ask, were there nothing to hold them back.
    with serve(raw, delay=1) as source, ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: get_data(FASHION_DDP_DATA_MIRROR=source.url), range(4)))
    assert [p.returncode for p in done] == [0] * 4, [p.stderr for p in done]
    assert source.requests == Counter(raw.keys())
    assert_complete(cache, raw)
    for process in done:
        assert str(cache) in process.stdout and "60,000" in process.stdout and "md5 verified" in process.stdout
    # One plain line per file, from the one that downloaded.
    lines = [line for p in done for line in p.stderr.splitlines()]
    assert len(lines) == 4 and all(line.startswith("downloading http://127.0.0.1") for line in lines)


def test_found_data_is_not_downloaded(elsewhere: Path, cache: Path, raw: Files) -> None:
    put(elsewhere / "data", raw)
    with serve(raw) as source:
        process = get_data(FASHION_DDP_DATA_MIRROR=source.url)
    assert process.returncode == 0 and str(elsewhere / "data") in process.stdout
    assert not source.requests and not cache.exists()


def test_a_terminal_sees_a_bar(raw: Files) -> None:
    words = [sys.executable, "-m", "fashion_ddp.data"]
    with serve(raw) as source:
        env = {"FASHION_DDP_DATA_MIRROR": source.url}
        code, seen = on_a_terminal(*words, cwd=Path.cwd(), stdout=subprocess.DEVNULL, **env)
    assert code == 0
    assert all(f"{name}: 100%".encode() in seen for name in raw), seen
    assert b"downloading" not in seen


def test_only_what_is_missing_is_fetched(cache: Path, raw: Files, sources: Publish) -> None:
    put(cache, {f"{n}.gz": raw[f"{n}.gz"] for n in NAMES[:3]})
    with serve(raw) as source:
        sources(source.url)
        assert data.fetch("fashion_mnist") == cache
    assert source.requests == Counter([f"{NAMES[3]}.gz"])


@pytest.mark.parametrize("damage", ["one bit", "truncated", "a web page"])
def test_a_wrong_file_is_fetched_from_the_next_source(damage: str, cache: Path, raw: Files, sources: Publish) -> None:
    with serve(raw, DAMAGES[damage]) as bad, serve(raw) as good:
        sources(bad.url, good.url)
        data.fetch("fashion_mnist")
    assert bad.requests == good.requests == Counter(raw.keys())
    assert_complete(cache, raw)


def test_the_mirror_comes_first_and_the_next_sources_after_it(
    raw: Files, cache: Path, sources: Publish, monkeypatch: Patch
) -> None:
    half = {f"{n}.gz": raw[f"{n}.gz"] for n in NAMES[:2]}
    with serve(half) as mirror, serve(raw) as public:
        monkeypatch.setenv("FASHION_DDP_DATA_MIRROR", f"{mirror.url}/")
        sources(f"{public.url}/")
        data.fetch("fashion_mnist")
    assert mirror.requests == Counter(raw.keys())
    assert public.requests == Counter(raw.keys() - half.keys())
    assert_complete(cache, raw)


def test_without_any_source_the_error_says_all(elsewhere: Path, cache: Path, raw: Files, sources: Publish) -> None:
    """One refuses, one has other files, one sends rubbish, one is no URL."""
    with serve({}) as other, serve(raw, flipped) as bad:
        urls = {
            nobody(): "refused",
            other.url: "404",
            bad.url: f"expected {FASHION.files[0].gz}, found 26,421,880 bytes",
            "no-url": "unknown url",
        }
        sources(*urls)
        with pytest.raises(UserError) as error:
            data.fetch("fashion_mnist", timeout=60)
    said = str(error.value)
    for url, why in urls.items():
        assert why in said.partition(f"{url}/{NAMES[0]}.gz (")[2].partition("), ")[0]
    for part in (*NAMES, str(elsewhere / "data"), str(cache.parents[1]), "python -m fashion_ddp.data", "--data-dir"):
        assert part in said
    assert "\n" not in said
    assert_complete(cache, {})


def test_a_server_that_is_silent_or_stalls_is_given_up(cache: Path, raw: Files, sources: Publish) -> None:
    # The first connects, and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent, serve(raw, stall=threading.Event()) as stalling:
        sources(f"http://127.0.0.1:{silent.getsockname()[1]}", stalling.url)
        with pytest.raises(UserError) as error:
            data.fetch("fashion_mnist", timeout=0.3)
    reasons = re.findall(rf"{NAMES[0]}\.gz \((.*?)\)[,;]", str(error.value))
    assert len(reasons) == 2 and set(reasons) <= {"nothing came for 0.3 s", "timed out"}
    assert_complete(cache, {})


def test_a_name_server_that_is_silent_is_given_up(sources: Publish, monkeypatch: Patch) -> None:
    over = threading.Event()

    def silent(*_: object, **__: object) -> None:
        over.wait()
        raise socket.gaierror("over")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    sources("http://example.invalid")
    with pytest.raises(UserError, match="nothing came for 0.3 s"):
        data.fetch("fashion_mnist", timeout=0.3)
    over.set()


def test_a_killed_download_leaves_nothing_that_counts(cache: Path, raw: Files) -> None:
    half_sent = threading.Event()
    with serve(raw, stall=half_sent) as stalling:
        env = os.environ | {"FASHION_DDP_DATA_MIRROR": stalling.url}
        process = subprocess.Popen([sys.executable, "-m", "fashion_ddp.data"], env=env, stderr=subprocess.DEVNULL)
        assert half_sent.wait(60)
        process.kill()
        process.wait()
    put(cache, {f".{NAMES[0]}.gz.host.1": raw[f"{NAMES[0]}.gz"][:1000]})  # as killed while writing, too
    assert data.locate("fashion_mnist", None) is None
    with serve(raw) as good:
        again = get_data(FASHION_DDP_DATA_MIRROR=good.url)
    assert again.returncode == 0, again.stderr
    assert all((cache / name).read_bytes() == content for name, content in raw.items())


def test_no_network_ends_the_command() -> None:
    process = get_data()
    *downloads, said = process.stderr.splitlines()
    assert process.returncode == 2 and process.stdout == "" and said.startswith("error: ")
    assert all(line.startswith("downloading ") for line in downloads)
    # Refused, rather than not known: urllib asked the proxy that the environment names.
    assert said.count("refused") == len(FASHION.urls) and all(url in said for url in FASHION.urls)


@pytest.mark.parametrize("by", ["--data-dir", "$FASHION_DDP_DATA_DIR"])
def test_a_download_that_would_not_be_looked_at_is_refused(by: str, tmp_path: Path, cache: Path, raw: Files) -> None:
    typo = str(tmp_path / "typo")
    flags, env = ((), {by[1:]: typo}) if by.startswith("$") else ((by, typo), {})
    with serve(raw) as source:
        process = get_data(*flags, FASHION_DDP_DATA_MIRROR=source.url, **env)
    assert process.returncode == 2 and not source.requests and not cache.exists()
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert f"{typo} (from {by})" in process.stderr


def test_an_unwritable_cache_is_named(tmp_path: Path, raw: Files, sources: Publish, monkeypatch: Patch) -> None:
    (tmp_path / "file").touch()  # holds for root, too, whom permissions do not stop
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with serve(raw) as source:
        sources(source.url)
        with pytest.raises(UserError, match=rf"{tmp_path / 'file'}.* cannot be written \(Not a directory\).*XDG_CACHE"):
            data.fetch("fashion_mnist")
    assert not source.requests


def test_a_full_disk_is_no_download_problem_and_leaves_nothing(
    cache: Path, raw: Files, sources: Publish, monkeypatch: Patch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with serve(raw) as source:
        sources(source.url, source.url)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            data.fetch("fashion_mnist")
    assert source.requests == Counter([f"{NAMES[0]}.gz"])
    assert_complete(cache, {})


def test_a_file_system_without_locks_will_do(cache: Path, raw: Files, sources: Publish, monkeypatch: Patch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with serve(raw) as source:
        sources(source.url)
        data.fetch("fashion_mnist")
    assert_complete(cache, raw)


# --- Synthetic data ---------------------------------------------------------------------------------------------


def test_synthetic_data_is_the_same_everywhere() -> None:
    made = data.load("synthetic")
    assert made.synthetic and made.name == "synthetic" and made.image_shape == (1, 28, 28)
    assert made.train_images.dtype == made.test_images.dtype == np.uint8
    assert made.train_labels.dtype == made.test_labels.dtype == np.int64
    assert len(made.classes) == 10 and all("SYNTHETIC" in name for name in made.classes)
    assert made.md5 == {
        "train_images": "7c334b2fff507eab4a955aed80ab0353",
        "train_labels": "b857b6cda67af70ab04cebb4db99cf5d",
        "test_images": "3a5f6b9979307abc51eb50cdec17d0fb",
        "test_labels": "741d83675acb99999f19e96c256a13ee",
    }


def test_synthetic_data_needs_nothing(elsewhere: Path, tmp_path: Path) -> None:
    process = get_data("--dataset", "synthetic")
    assert process.returncode == 0 and process.stderr == ""
    assert "12,000" in process.stdout and "built in" in process.stdout and "SYNTHETIC 0" in process.stdout
    assert "md5" not in process.stdout  # which says that the files are the published ones
    assert not list(elsewhere.iterdir()) and not (tmp_path / "cache").exists()


# --- The rest of the house --------------------------------------------------------------------------------------


def test_every_named_dataset_is_there() -> None:
    assert {*names.DATASETS} == {*PUBLISHED, "synthetic"}
