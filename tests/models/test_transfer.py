"""Weights to start from and parts that are not trained."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from faults import Fault, start
from safetensors.torch import load_file, save_file
from torch import nn
from trainer import Trainer

from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.world import open_world
from fashion_ddp.errors import UserError
from fashion_ddp.models import architectures, describe, transfer
from fashion_ddp.models.batch_norm import GlobalBatchNorm2d
from fashion_ddp.runs import claim, provenance
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.images import Part

quick = pytest.mark.quick
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """torchvision's ResNet-18 with unlikely statistics, in evaluation mode."""
    torch.manual_seed(7)
    model = torchvision.models.resnet18()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def weights(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "some.pth"
    torch.save(theirs.state_dict(), path)
    return path


def prepared(shape: architectures.Shape = (3, 32, 32), classes: int = 7, **settings: Any) -> tuple[nn.Module, str]:
    """The model of a run as training begins, and what is said of it."""
    cfg = make_config({"model": "torchvision:resnet18"} | settings)
    model = architectures.build(cfg, shape, classes)
    return model, "; ".join(transfer.prepare(cfg, model, shape))


@quick
def test_it_computes_what_torchvision_s_does(theirs: nn.Module, weights: Path) -> None:
    model, said = prepared(classes=1000, init_from=str(weights))
    assert model.state_dict().keys() == theirs.state_dict().keys() and "new" not in said
    images = torch.rand(2, 3, 40, 32)
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), theirs(normalise(images)), rtol=1e-4, atol=1e-4)
    kinds = {type(m).__name__ for m in model.modules()}
    assert "GlobalBatchNorm2d" in kinds and "BatchNorm2d" not in kinds and describe.rank_dependent_layers(model) == []


@quick
@pytest.mark.parametrize("channels", [1, 2])
def test_first_layer_and_head_are_made_for_the_data(channels: int, theirs: nn.Module, weights: Path) -> None:
    fresh, _ = prepared((channels, 28, 28), 7)
    model, said = prepared((channels, 28, 28), 7, init_from=str(weights))
    assert model.eval()(torch.rand(4, channels, 28, 28)).shape == (4, 7)
    given, ours = theirs.state_dict(), model.state_dict()
    same = {name for name in ours if given[name].shape == ours[name].shape}
    assert {*ours} - same == {"conv1.weight", "fc.weight", "fc.bias"}
    assert all(torch.equal(ours[name], given[name]) for name in same)
    assert all(torch.equal(ours[name], fresh.state_dict()[name]) for name in ("fc.weight", "fc.bias"))  # by the seed
    grey = torch.rand(2, 1, 28, 28)
    got = F.conv2d(grey.expand(-1, channels, -1, -1), ours["conv1.weight"])
    expected = F.conv2d(grey.expand(-1, 3, -1, -1), given["conv1.weight"])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    made = f"conv1.weight made of 3 channels for {channels}"
    assert said == f"initial weights from {weights}; {made}; new: fc.weight, fc.bias"


@quick
def test_forms_of_files(theirs: nn.Module, tmp_path: Path) -> None:
    state = theirs.state_dict()
    save_file(state, tmp_path / "plain.safetensors")
    torch.save({"state_dict": state}, tmp_path / "nested.pt")
    torch.save({f"module.{name}": t for name, t in state.items()}, tmp_path / "wrapped.pt")
    for path in tmp_path.iterdir():
        ours = prepared(init_from=str(path))[0].state_dict()
        assert torch.equal(ours["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"]), path


class Runs:
    """What a file must not be able to do."""

    def __reduce__(self) -> Any:
        return (Path("was_run").touch, ())


@quick
def test_weights_that_do_not_fit_are_named(weights: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save([1], "list.pt")
    torch.save({"weight": Runs()}, "runs.pt")
    Path("text.pth").write_text("<html>")
    Path("begun").mkdir()
    Path("begun/config.yaml").write_text("model: cnn\n")
    cases = {
        "absent.pth": "absent.pth is not there: name a file",
        ".": "is no run folder",
        "begun": "begun/model.safetensors is not there: the run is not finished",
        "list.pt": "holds no state_dict",
        "runs.pt": "cannot be read as weights",
        "text.pth": "cannot be read as weights",
        str(weights): "holds another model's weights: 0.weight absent for [25, 3, 3, 3], ",
    }
    for path, said in cases.items():
        with pytest.raises(UserError) as told:
            prepared(init_from=path, model="cnn")
        assert said in str(told.value) and "\n" not in str(told.value)
    assert not Path("was_run").exists()
    save_file(architectures.build(make_config({"model": "mlp"}), (1, 28, 28), 10).state_dict(), "mlp.safetensors")
    with pytest.raises(UserError, match=r"1.weight \[10, 784\] for \[10, 3072\]: choose the model"):
        prepared(model="mlp", init_from="mlp.safetensors")


@quick
def test_weights_are_taken_with_the_input_that_they_saw(tmp_path: Path) -> None:
    """An input that is normalized is so by this run's own images, whatever the weights saw."""
    for name, normalize in (("plain", False), ("normal", True)):
        model = architectures.build(make_config({"model": "mlp", "normalize": normalize}), (3, 32, 32), 10)
        if normalize:
            model.get_buffer("input_mean").fill_(0.25)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        given = {"model": "mlp", "normalize": True, "init_from": str(tmp_path / f"{name}.safetensors")}
        taken = prepared(classes=10, **given)[0].state_dict()
        assert all(torch.equal(taken[key], value) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match="its model saw normalized images: add --normalize"):
        prepared(classes=10, model="mlp", init_from=str(tmp_path / "normal.safetensors"))


@quick
def test_weights_and_frozen_parts_are_part_of_the_run(weights: Path, tmp_path: Path) -> None:
    cfg = make_config({"model": "torchvision:resnet18", "init_from": str(weights), "freeze": ["layer1", "conv1"]})
    assert claim.run_name(cfg) == "torchvision_resnet18-blog-seed42-init_fromsome.pth-freezeconv1+layer1"
    before = provenance.made_by(cfg, {})
    assert before["initial weights"] == hashlib.sha256(weights.read_bytes()).hexdigest() and before["torchvision"]
    copy = tmp_path / "some.pth"
    copy.write_bytes(weights.read_bytes())
    moved = make_config({"model": "torchvision:resnet18", "init_from": str(copy), "freeze": ["conv1", "layer1"]})
    assert provenance.identity(moved) == provenance.identity(cfg) and provenance.made_by(moved, {}) == before
    torch.save({"other": torch.zeros(1)}, copy)
    assert provenance.differences(before, provenance.made_by(moved, {})) == ["other initial weights"]


@quick
def test_frozen_parts_are_not_trained(weights: Path) -> None:
    parts = ["conv1", "bn1", "layer1"]
    model, said = prepared(init_from=str(weights), freeze=parts)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.split(".")[0] in parts}
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"frozen: bn1 conv1 layer1; {left:,} of {describe.count_parameters(model):,} parameters are trained" in said
    with open_world(make_config({"device": "cpu"})) as world:
        images = np.random.default_rng(0).integers(0, 255, (12, 3, 32, 32)).astype(np.uint8)
        cfg = make_config(
            {"model": "torchvision:resnet18", "device": "cpu", "batch_size": 6, "optimizer": "adamw", "lr": 0.01}
        )
        step = Trainer(cfg, world, model, Batches(cfg, world, Part(images, np.arange(12) % 7)))
        before = {name: t.clone() for name, t in model.state_dict().items()}
        assert sum(len(g["params"]) for g in step.optimizer.param_groups) == len([*model.parameters()]) - len(frozen)
        step(0)
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {n for n in before if n.split(".")[0] not in parts}  # statistics among them
    assert all(p.grad is None for name, p in model.named_parameters() if name in frozen)


@quick
def test_a_frozen_batch_norm_computes_as_in_evaluation_also_in_a_user_s_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    nn.init.uniform_(model[1].running_mean)
    x = torch.rand(5, 3, 8, 8)
    expected = model.eval()[:2](x)
    transfer._freeze(model.train(), ("0", "1"))
    assert type(model[1]) is GlobalBatchNorm2d and type(model[2]) is nn.BatchNorm2d
    assert torch.equal(model[:2](x), expected) and model[1].num_batches_tracked == 0
    assert describe.rank_dependent_layers(model) == ["BatchNorm2d"]


@quick
def test_parts_that_are_not_there_or_too_many() -> None:
    cases = {
        "layer": "no parameter's name starts with 'layer'; did you mean 'layer4'? choices: conv1, bn1, layer1",
        "conv1 layer1.conv": "no parameter's name starts with 'layer1.conv'",
        "conv1 bn1 layer1 layer2 layer3 layer4 fc": "leaves nothing to train",
    }
    for parts, said in cases.items():
        with pytest.raises(UserError) as told:
            prepared(freeze=parts.split())
        assert said in str(told.value)


@quick
def test_a_last_batch_of_one_image_leaves_batch_norm_finite() -> None:
    norm = GlobalBatchNorm2d(3)
    assert all(torch.isfinite(x).all() for x in (norm(torch.rand(1, 3, 1, 1)), *norm.buffers()))


def small_set(folder: Path) -> str:
    random = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = (random.integers(0, 100, (120, 3, 8, 8)) + 50 * labels[:, None, None, None]).astype(np.uint8)
    path = folder / "small.npz"
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return str(path)


@pytest.mark.slow
def test_a_run_from_another_s_weights_continues_to_the_same_bits(tmp_path: Path, weights: Path) -> None:
    words = [
        "--model",
        "torchvision:resnet18",
        "--hidden-units",
        "None",
        "--dataset",
        small_set(tmp_path),
        "--batch-size",
        "40",
    ]
    words += ["--init-from", str(weights), "--freeze", "conv1", "bn1", "layer1", "layer2", "--epochs", "2"]
    for name in ("whole", "parts", "more"):
        (tmp_path / name).mkdir()
    whole = start(2, tmp_path / "whole", words)
    assert set(whole.wait()) == {0}, whole.printed()
    cut = start(2, tmp_path / "parts", words, [Fault("step", "kill", count=5)])
    assert -9 in cut.wait(), cut.printed()
    again = start(2, tmp_path / "parts", words)
    assert set(again.wait()) == {0} and "continued after step" in again.printed(), again.printed()
    assert "initial weights from" in again.printed() and "frozen: bn1 conv1 layer1 layer2; " in again.printed()
    one, two = (load_file(tmp_path / name / "run" / "model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    first, frozen = torch.load(weights), ("conv1.", "bn1.", "layer1.", "layer2.")
    assert all(torch.equal(one[name], tensor) for name, tensor in first.items() if name.startswith(frozen))
    assert not torch.equal(one["layer4.0.conv1.weight"], first["layer4.0.conv1.weight"])
    summary = json.loads((tmp_path / "parts" / "run" / "summary.json").read_text())
    assert 0 < summary["parameters_trained"] < summary["parameters"] and summary["rank_invariant"] is True
    # The folder of a finished run gives weights too; its images are of the same size, its classes others.
    more = ["--model", "torchvision:resnet18", "--hidden-units", "None", "--dataset", "synthetic", "--epochs", "1"]
    more += ["--init-from", str(tmp_path / "parts" / "run"), "--freeze", "layer4", "--batch-size", "300"]
    last = start(2, tmp_path / "more", more, images=600)
    assert set(last.wait()) == {0} and "new: fc.weight, fc.bias" in last.printed(), last.printed()
