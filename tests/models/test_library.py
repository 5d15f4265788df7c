"""Models of torchvision and timm: built for the data, exact on any number of ranks, their weights from local caches."""

import contextlib
import hashlib
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import ranks
from safetensors.torch import save_file
from torch import nn
from trainer import Trainer

from fashion_ddp import load_run, weights
from fashion_ddp.config import Config
from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.world import open_world
from fashion_ddp.errors import UserError
from fashion_ddp.models import architectures, describe, library, transfer
from fashion_ddp.models.dropout import SampleDropout, SampleDropPath
from fashion_ddp.models.pretrained import TorchFile, check_digest, fetch
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.images import Part

quick = pytest.mark.quick
Patch = pytest.MonkeyPatch
SHAPE = (1, 32, 32)
# Batch norm, dropout, stochastic depth, and what a transformer has; made small.
MODELS: dict[str, list[str]] = {
    "torchvision:resnet18": [],
    "torchvision:mobilenet_v3_small": [],
    "timm:mobilenetv3_small_050.lamb_in1k": ["drop_path_rate=0.3"],
    "timm:convnext_atto.d2_in1k": ["depths=[1,1,1,1]", "drop_path_rate=0.3"],
    "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k": ["depth=2", "embed_dim=24", "num_heads=3", "patch_size=4"],
}
TORCHVISION = {name: torchvision.models.get_model_weights(name.partition(":")[2]).DEFAULT for name in list(MODELS)[:2]}


def config(model: str, **more: Any) -> Config:
    settings = {"model": model, "model_args": MODELS.get(model, []), "device": "cpu", "threads": 1, "batch_size": 10}
    return make_config(settings | {"precision": "fp64", "init_from": "pretrained"} | more)


def published(model: str) -> dict[str, torch.Tensor]:
    """Weights that the library itself could have published: of its own model, for three channels and 1,000 classes."""
    torch.manual_seed(3)
    name = model.partition(":")[2]
    if model in TORCHVISION:
        return torchvision.models.get_model(name).state_dict()
    size = {"img_size": 32} if "vit" in name else {}
    arguments = dict(text.split("=") for text in MODELS[model])
    return timm.create_model(name, **size, **{key: eval(value) for key, value in arguments.items()}).state_dict()


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caches of torch and of the hub, with weights of all models in them."""
    folder = tmp_path_factory.mktemp("caches")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    for model in MODELS:
        file = folder / "file"
        if model in TORCHVISION:
            torch.save(published(model), file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            file.rename(folder / "hub" / "checkpoints" / f"{model.partition(':')[2]}-{digest[:8]}.pth")
        else:
            save_file(published(model), file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            repository = folder / "hub" / f"models--timm--{model.partition(':')[2]}"
            for inside in ("blobs", "refs", "snapshots/1234"):
                (repository / inside).mkdir(parents=True)
            (repository / "refs" / "main").write_text("1234")
            file.rename(repository / "blobs" / digest)
            (repository / "snapshots" / "1234" / "model.safetensors").symlink_to(f"../../blobs/{digest}")
    return folder


@contextlib.contextmanager
def cached(caches: Path) -> Iterator[None]:
    """Look for weights in these caches; torchvision's have the digests of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(caches))
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(caches / "hub"))
        for model, weights in TORCHVISION.items():
            [file] = (caches / "hub" / "checkpoints").glob(f"{model.partition(':')[2]}-*.pth")
            patch.setattr(weights.value, "url", f"http://127.0.0.1:1/{file.name}")
        yield


def train(caches: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every model's gradient at its published weights, and its weights two steps later."""
    images = np.random.default_rng(0).integers(0, 255, (20, *SHAPE)).astype(np.uint8)
    found = {}
    with cached(caches), open_world(config("timm:resnet18")) as world:
        for model in MODELS:
            freeze = ["conv1", "bn1", "layer1"] if model == "torchvision:resnet18" else []
            cfg = config(model, optimizer="momentum", lr=0.01, freeze=freeze)
            net = architectures.build(cfg, SHAPE, 3)
            transfer.prepare(cfg, net, SHAPE)
            trainer = Trainer(cfg, world, net, Batches(cfg, world, Part(images, np.arange(20) % 3)))
            trainer.leave_gradient(0)
            graded = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
            assert not any(name.split(".")[0] in freeze for name in graded)
            found[model] = {f"gradient of {name}": grad.clone() for name, grad in graded.items()}
            for k in range(2):
                trainer(k)
            found[model] |= {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return found


def test_the_number_of_ranks_changes_no_gradient(caches: Path) -> None:
    [alone] = ranks(1, train, caches)
    for seen in ranks(2, train, caches):
        for model, tensors in alone.items():
            assert seen[model].keys() == tensors.keys() and len(tensors) > 20
            for name, tensor in tensors.items():
                torch.testing.assert_close(
                    seen[model][name], tensor, rtol=1e-7, atol=1e-9, msg=lambda m, at=(model, name): f"{at}: {m}"
                )


@quick
@pytest.mark.parametrize("model", MODELS)
def test_published_weights_are_taken(model: str, caches: Path) -> None:
    """The last layer is new, and the first made for one channel; nothing else differs from what the library has."""
    with cached(caches):
        net = architectures.build(config(model), SHAPE, 7)
        [said] = transfer.prepare(config(model), net, SHAPE)
    given, ours = published(model), net.state_dict()
    assert given.keys() == ours.keys() and describe.rank_dependent_layers(net) == []
    differing = {name for name in given if not torch.equal(ours[name].to(given[name].dtype), given[name])}
    first = next(name for name, tensor in given.items() if tensor.dim() == 4)
    last = {name for name in given if given[name].shape[:1] == (1000,)}
    assert differing == {first} | last
    torch.testing.assert_close(ours[first].float(), given[first].sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert f"{first} made of 3 channels for 1; new: {', '.join(sorted(last, key=[*given].index))}" in said


@quick
@pytest.mark.parametrize("model", MODELS)
def test_it_computes_what_the_library_s_does(model: str, caches: Path) -> None:
    """In evaluation, of pixels that are normalized as the library says; and while it trains batch norm's the same."""
    shape = (3, 32, 32)
    with cached(caches):
        net = architectures.build(config(model, precision="fp32"), shape, 1000)
        transfer.prepare(config(model), net, shape)
    name = model.partition(":")[2]
    if model in TORCHVISION:
        theirs = torchvision.models.get_model(name)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    else:
        size = {"img_size": 32} if "vit" in name else {}
        theirs = timm.create_model(name, **size, **{k: eval(v) for k, v in (t.split("=") for t in MODELS[model])})
        mean, std = theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"]
    theirs.load_state_dict(published(model))
    images = torch.rand(4, *shape)
    normalized = torchvision.transforms.Normalize(mean, std)(images)
    for mode in (False, True):
        for one in (net.train(mode), theirs.train(mode)):
            for layer in one.modules():
                if isinstance(layer, nn.Dropout | SampleDropout) or type(layer).__name__ == "DropPath":
                    layer.eval()
        with torch.no_grad():
            torch.testing.assert_close(net(images), theirs(normalized), rtol=1e-3, atol=1e-4)


@quick
def test_layers_that_go_by_the_rank_are_replaced_or_named() -> None:
    def kinds(model: str, **more: Any) -> tuple[set[str], list[str]]:
        net = architectures.build(config(model, init_from=None, **more), SHAPE, 10)
        return {type(m).__name__ for m in net.modules()}, describe.rank_dependent_layers(net)

    found, dependent = kinds("torchvision:efficientnet_b0")
    assert {"GlobalBatchNorm2d", "SampleDropout", "SampleDropPath"} <= found and dependent == []
    assert not {"BatchNorm2d", "Dropout", "StochasticDepth"} & found
    found, dependent = kinds("timm:mobilenetv3_small_050", keep_batch_norm=True, model_args=["drop_path_rate=0.1"])
    assert "SampleDropPath" in found and "DropPath" not in found and dependent == ["BatchNormAct2d"]


@quick
@pytest.mark.parametrize(
    ("model", "arguments", "draws"),
    [
        ("timm:resnet18", ["drop_rate=0.2"], True),  # by F.dropout
        ("timm:vit_tiny_patch16_224", ["patch_size=4", "depth=1", "attn_drop_rate=0.2"], True),  # within one kernel
        ("timm:vit_tiny_patch16_224", ["patch_size=4", "depth=1", "drop_rate=0.2", "drop_path_rate=0.2"], False),
        ("torchvision:mobilenet_v3_small", [], False),
    ],
)
def test_numbers_that_a_model_draws_by_itself_are_noticed(model: str, arguments: list[str], draws: bool) -> None:
    net = architectures.build(config(model, init_from=None, model_args=arguments), SHAPE, 10)
    before = torch.get_rng_state(), {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert describe.draws_random_numbers(net, SHAPE) is draws and torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in net.state_dict().items())


@quick
def test_large_models_are_listed_by_their_blocks() -> None:
    for model in MODELS:
        net = architectures.build(config(model, init_from=None), SHAPE, 10)
        rows = [line.split() for line in describe.layers_table(net, SHAPE).splitlines()[1:]]
        assert len(rows) <= describe.MOST_ROWS + 1 and rows[-1] == ["total", f"{describe.count_parameters(net):,}"]
        outside = sum(p.numel() for p in net.parameters(recurse=False))  # as a transformer's places
        counted = [int(row[-1].replace(",", "")) for row in rows]
        assert sum(counted[:-1]) + outside == counted[-1], model


@quick
def test_stochastic_depth_drops_whole_images_by_their_key() -> None:
    layer = SampleDropPath(0.25)
    layer.row_keys = torch.arange(4000)
    out = layer(torch.ones(4000, 2, 3))
    assert all(len(one.unique()) == 1 for one in out) and sorted(out.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert 900 < (out[:, 0, 0] == 0).sum() < 1100
    layer.row_keys = layer.row_keys[1000:]
    assert torch.equal(layer(torch.ones(3000, 2, 3)), out[1000:])
    windows = SampleDropout(0.5)  # of two windows for each image
    windows.row_keys = torch.arange(50)
    assert torch.equal(windows(torch.ones(100, 7))[20:], _after(windows, torch.arange(10, 50), torch.ones(80, 7)))


def _after(layer: SampleDropout, keys: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    layer.row_keys = keys
    return layer(images)


@quick
@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ("timm:resnet18x", {}, "timm has none; close to it: timm:resnet18, "),
        ("torchvision:resnet18x", {}, "torchvision has none; close to it: torchvision:resnet18, "),
        ("torchvision:googlenet", {}, "returns more than its logits while it trains"),
        ("timm:vit_tiny_patch16_224", {}, "patches of 16x16, which 28x28 is no multiple of"),
        ("timm:resnet18", {"model_args": ["deep=1"]}, "unexpected keyword argument 'deep'"),
        ("torchvision.models:resnet18", {}, "takes no image_shape: write torchvision:resnet18"),
        ("timm.models.resnet:resnet18", {}, "takes no image_shape: write timm:resnet18"),
        ("timm:resnet18", {"micro_batch": 2}, "micro_batch would change batch norm's statistics"),
        ("timm:resnet18", {"hidden_units": 20}, "hidden_units=20 does nothing for model 'timm:resnet18'"),
        ("timm:test_resnet", {"init_from": "pretrained"}, "run `python -m fashion_ddp.weights timm:test_resnet`"),
        ("timm:resnet50t", {"init_from": "pretrained"}, "timm:resnet50t has no published weights"),
    ],
)
def test_mistakes_are_told(model: str, settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as told:
        cfg = make_config({"model": model} | settings)
        transfer.prepare(cfg, architectures.build(cfg, (1, 28, 28), 10), (1, 28, 28))
    assert said in str(told.value) and "\n" not in str(told.value)


@quick
def test_a_factory_that_would_take_the_image_shape_for_weights_is_not_called(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_factories.py").write_text("from torchvision.models import resnet18\n")
    with pytest.raises(UserError, match="too many positional arguments; it is called with"):
        architectures.build(make_config({"model": "my_factories:resnet18"}), (1, 28, 28), 10)


@quick
def test_damaged_weights_are_refused(caches: Path) -> None:
    with cached(caches):
        for model in ("torchvision:resnet18", "timm:convnext_atto.d2_in1k"):
            path = library.published(model).find()
            assert path is not None
            whole = path.read_bytes()
            path.write_bytes(whole[:-1])
            with pytest.raises(UserError, match="is damaged: its sha256 starts"):
                transfer.prepare(config(model), nn.Linear(1, 1), SHAPE)
            path.write_bytes(whole)


class Hub(http.server.SimpleHTTPRequestHandler):
    """Serves files as torch's server and the hub do. A path of the hub: /timm/NAME/resolve/main/model.safetensors."""

    def end_headers(self) -> None:
        file = Path(self.translate_path(self.path))
        if file.is_file():
            self.send_header("ETag", f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"')
            self.send_header("X-Repo-Commit", "1" * 40)
        elif "/resolve/" in self.path:
            self.send_header("X-Error-Code", "EntryNotFound")
        super().end_headers()

    def log_message(self, *words: Any) -> None: ...


@pytest.mark.slow
def test_weights_are_fetched_and_a_run_starts_from_them(tmp_path: Path) -> None:
    """From a server here: of torch's, which is asked for by an address in torchvision, the digest is another one."""
    model = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    served = tmp_path / "timm" / model.partition(":")[2] / "resolve" / "main"
    served.mkdir(parents=True)
    save_file(published(model), served / "model.safetensors")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Hub(*a, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch")}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "WANDB_MODE": "disabled",
    }

    def call(*words: str, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            check=False,
            env=env | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr

    try:
        code, said = call("fashion_ddp.weights", model)
        digest = hashlib.sha256((served / "model.safetensors").read_bytes()).hexdigest()
        assert code == 0 and f"sha256 {digest}" in said, said
        code, said = call("fashion_ddp.weights", "timm:resnet18")
        assert code == 2 and "could not be fetched" in said and "Traceback" not in said, said
    finally:
        server.shutdown()
    flags = ["--model", model, "--model-args", *MODELS[model], "--init-from", "pretrained", "--dataset", "synthetic"]
    flags += ["--device", "cpu", "--epochs", "1", "--run-dir", "run", "--hidden-units", "None"]
    code, said = call("fashion_ddp.train", *flags)
    assert code == 0 and "initial weights from" in said and "new: head.weight, head.bias" in said, said
    assert load_run(tmp_path / "run").model()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


@quick
def test_weights_of_no_library_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        weights.main(["resnet18"])
    assert "'resnet18' is no model of a library: write torchvision:NAME or timm:NAME" in capsys.readouterr().err


@quick
def test_a_file_of_torch_s_is_fetched_and_verified(tmp_path: Path, monkeypatch: Patch) -> None:
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    for name in (f"whole-{digest[:8]}.pth", "other-12345678.pth"):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    whole, other = (TorchFile((tmp_path / name).as_uri()) for name in (f"whole-{digest[:8]}.pth", "other-12345678.pth"))
    assert whole.find() is None and fetch(whole) == whole.find() and check_digest(whole, whole.path) == digest
    with pytest.raises(UserError, match="could not be fetched .*invalid hash value"):
        fetch(other)
    assert other.find() is None
