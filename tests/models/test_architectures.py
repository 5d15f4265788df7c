"""Architectures: their weights, shapes and cost, global batch norm, and models of the user's own."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fashion_ddp.config import Config
from fashion_ddp.config.layers import make_config
from fashion_ddp.errors import UserError
from fashion_ddp.models import architectures, describe
from fashion_ddp.models.batch_norm import GlobalBatchNorm2d
from fashion_ddp.models.dropout import SampleDropout

pytestmark = pytest.mark.quick

IMAGE = (1, 28, 28)


def build(**settings: Any) -> nn.Module:
    return architectures.build(make_config(settings), IMAGE, 10)


def tutorial(model: str, hidden: int) -> list[nn.Module]:
    """The tutorials' layers that have weights, created in the order of their forward pass."""
    if model in ("linear", "relu", "mlp"):
        return [nn.Linear(784, hidden), nn.Linear(hidden, 10)]
    convolutions = [nn.Conv2d(into, hidden, 3, padding=1) for into in (1, hidden, hidden, hidden)]
    return [*convolutions, nn.Linear(hidden * 7 * 7, 10)]


def test_parameters() -> None:
    def count(**settings: Any) -> int:
        return describe.count_parameters(build(**settings))

    assert count(model="mlp", hidden_units=32) == 784 * 32 + 32 + 32 * 10 + 10
    # One convolution of c into h channels: 9ch + h.
    assert count(model="cnn", hidden_units=4, conv_blocks=3) == (36 + 4) + 5 * (9 * 16 + 4) + 4 * 3 * 3 * 10 + 10
    assert count(model="cnn", hidden_units=4, batch_norm=True) == (36 + 4) + 3 * 148 + 1960 + 10 + 4 * 8


@pytest.mark.parametrize(
    ("settings", "hidden"),
    [({"model": "linear"}, 10), ({"model": "relu", "recipe": "lab"}, 10), ({"model": "mlp"}, 10)]
    + [({"model": "cnn"}, 25), ({"model": "cnn", "recipe": "lab", "seed": 7}, 10)],
)
def test_initial_weights_are_the_tutorials(settings: dict[str, Any], hidden: int) -> None:
    torch.manual_seed(settings.get("seed", 42))
    expected = [p for layer in tutorial(settings["model"], hidden) for p in layer.parameters()]
    torch.rand(5)  # whatever was drawn before
    ours = list(build(**settings).parameters())
    assert len(ours) == len(expected) and all(map(torch.equal, ours, expected))


def test_double_precision_starts_from_the_same_weights() -> None:
    single, double = (build(model="cnn", precision=precision) for precision in ("fp32", "fp64"))
    for ours, theirs in zip(single.parameters(), double.parameters(), strict=True):
        assert theirs.dtype == torch.float64 and torch.equal(ours.double(), theirs)


def test_batch_norm_leaves_the_other_weights() -> None:
    plain, normed = build(model="cnn"), build(model="cnn", batch_norm=True)
    kept = [m for m in normed.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    expected = [m for m in plain.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(kept, expected, strict=True))
    kinds = [type(m).__name__ for m in normed.children()]
    assert kinds[:6] == ["Conv2d", "GlobalBatchNorm2d", "ReLU"] * 2 and kinds.count("GlobalBatchNorm2d") == 4


NORMALIZED = ["deep_mlp", "small_resnet", "airbench", "wide_resnet"]


@pytest.mark.parametrize("name", ["linear", "relu", "mlp", "cnn", *NORMALIZED])
@pytest.mark.parametrize(("shape", "classes"), [((1, 28, 28), 10), ((3, 32, 20), 7)])
def test_models_fit_the_data(name: str, shape: architectures.Shape, classes: int) -> None:
    model = architectures.build(make_config({"model": name}), shape, classes)
    assert model(torch.rand(5, *shape)).shape == (5, classes) and model.training


@pytest.mark.parametrize("cut", ["micro_batch", "reduction_shards"])
def test_the_batch_of_a_model_with_batch_norm_is_not_cut(cut: str) -> None:
    for settings in ({"model": "small_resnet"}, {"model": "cnn", "batch_norm": True}):
        with pytest.raises(UserError, match=f"{cut} would change batch norm's statistics"):
            build(**settings, **{cut: 2})
    build(model="cnn", **{cut: 2})


def test_the_parameters_that_the_docstrings_name() -> None:
    told = {
        name: re.findall(r"([\d,]{6,}) parameters", architectures.ARCHITECTURES[name].__doc__ or "")
        for name in NORMALIZED
    }
    assert {name: [f"{describe.count_parameters(build(model=name)):,}"] for name in NORMALIZED} == told
    assert describe.count_parameters(build(model="small_resnet")) < 100_000


def test_depth_and_width_of_the_deep_models() -> None:
    """WRN-d-k has d - 4 convolutions in 3 groups, 3 projections and a first one; k = hidden_units / 16."""
    for depth, width in ((10, 16), (28, 32)):
        model = build(model="wide_resnet", depth=depth, hidden_units=width, dropout=0.3)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        projections = [m for m in convolutions if m.kernel_size == (1, 1)]
        assert len(convolutions) - len(projections) == depth - 4 + 1 and len(projections) == 3 - (width == 16)
        assert convolutions[-1].out_channels == 4 * width
    with pytest.raises(UserError, match="depth=12: wide_resnet has 6 n \\+ 4 layers"):
        build(model="wide_resnet", depth=12)
    layers = [m for m in build(model="deep_mlp", depth=2, hidden_units=7).modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in layers] == [(784, 7), (7, 7), (7, 10)]


def test_airbench_s_convolutions_begin_as_the_identity() -> None:
    x = torch.rand(2, 24, 5, 5)
    first = [m for m in build(model="airbench").modules() if isinstance(m, nn.Conv2d)][1]
    assert torch.equal(first(x)[:, :24], x)


def test_what_each_model_computes() -> None:
    """linear is linear, relu gives no negative logit, mlp does; relu and mlp are one net up to there."""
    x = torch.randn(64, *IMAGE)
    linear, relu, mlp = (build(model=name) for name in ("linear", "relu", "mlp"))
    zero = linear(torch.zeros(1, *IMAGE))
    torch.testing.assert_close(linear(x) + linear(2 * x), linear(3 * x) + zero, rtol=0, atol=1e-5)
    assert (mlp(x) < 0).any() and torch.equal(relu(x), mlp(x).relu())


def test_blocks_need_an_image_left() -> None:
    build(model="cnn", conv_blocks=4)
    with pytest.raises(UserError, match="conv_blocks=5 halves a 28x28 image to nothing: at most 4"):
        build(model="cnn", conv_blocks=5)


@pytest.mark.parametrize(
    ("name", "flops"),
    [("relu", 784 * 10 + 10 * 10), ("cnn", 784 * 9 * 25 + 784 * 9 * 25**2 + 2 * 196 * 9 * 25**2 + 490 * 25)],
)
def test_flops(name: str, flops: int) -> None:
    model = build(model=name)
    assert describe.flops_per_image(model, IMAGE) == 2 * flops and model.training


def test_summary_lists_the_layers() -> None:
    lines = [line.split() for line in describe.layers_table(build(model="cnn", recipe="lab"), IMAGE).splitlines()]
    assert lines[:3] == [["layer", "output", "parameters"], ["Conv2d", "10x28x28", "100"], ["ReLU", "10x28x28", "0"]]
    assert lines[5] == ["MaxPool2d", "10x14x14", "0"] and len(lines) == 14
    assert lines[-2:] == [["Linear", "10", "4,910"], ["total", "7,740"]]


def test_summary_takes_every_model() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.unused = nn.Linear(784, 10), nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.shared(x.flatten(1)) + self.shared(x.flatten(1))

    text = describe.layers_table(Odd(), IMAGE)
    assert text.count("Linear") == 2 and re.search(r"total +7,863$", text)


def test_feature_maps_are_the_layers_outputs() -> None:
    model, image = build(model="cnn", recipe="lab").eval(), torch.rand(IMAGE)
    maps = describe.feature_maps(model, image)
    assert list(maps) == ["0.Conv2d", "2.Conv2d", "4.MaxPool2d", "5.Conv2d", "7.Conv2d", "9.MaxPool2d"]
    x = image[None]
    for at, layer in enumerate(model.children()):
        x = layer(x)
        if (name := f"{at}.{type(layer).__name__}") in maps:
            assert torch.equal(maps[name], x[0]) and not maps[name].requires_grad
    assert describe.feature_maps(build(model="linear"), image) == {}
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ([nn.Dropout2d(), nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1))], ["BatchNorm2d", "Dropout2d"]),
        ([nn.BatchNorm1d(3), nn.AlphaDropout()], ["AlphaDropout", "BatchNorm1d"]),
        ([nn.SyncBatchNorm(3)], ["SyncBatchNorm"]),  # it counts the rows that only fill a rank's share
        ([GlobalBatchNorm2d(3), SampleDropout(), nn.LayerNorm(3), nn.GroupNorm(1, 3)], []),
    ],
)
def test_layers_that_see_one_ranks_rows_are_named(layers: list[nn.Module], names: list[str]) -> None:
    assert describe.rank_dependent_layers(nn.Sequential(*layers)) == names


def test_our_models_do_not_depend_on_the_ranks() -> None:
    with_layers = {"batch_norm": True}, {"model": "deep_mlp", "dropout": 0.2}, {"model": "wide_resnet", "dropout": 0.2}
    for more in ({"model": "linear"}, {"model": "relu"}, {"model": "mlp"}, *with_layers):
        assert describe.rank_dependent_layers(build(**more)) == []


@pytest.mark.parametrize(("absent", "whole"), [([], False), ([], True), ([3, 6], False)])
def test_batch_norm_is_torchs_over_the_rows_that_count(absent: list[int], whole: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = nn.BatchNorm2d(3).double(), GlobalBatchNorm2d(3).double()
    ours.whole_batch = whole
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    weights = torch.ones(7, dtype=torch.float64)
    weights[absent] = 0
    here = weights == 1
    if absent:
        ours.row_weights = weights
    for _ in range(3):
        x = (5 + 3 * torch.randn(7, 3, 4, 5, dtype=torch.float64)).requires_grad_()
        y = x.detach()[here].requires_grad_()
        out, expected = ours(x)[here], theirs(y)
        upstream = torch.randn_like(expected)
        out.backward(upstream)
        expected.backward(upstream)
        assert x.grad is not None
        pairs = [(out, expected), (x.grad[here], y.grad)]
        pairs += [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
        pairs += list(zip(ours.buffers(), theirs.buffers(), strict=True))
        for got, wanted in pairs:
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        assert not x.grad[~here].any()
    assert ours.num_batches_tracked == 3
    x = torch.randn(4, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)
    assert ours.num_batches_tracked == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_keeps_the_type_of_its_input(dtype: torch.dtype) -> None:
    x = 100 + torch.randn(16, 3, 8, 8).to(dtype)
    theirs, ours = nn.BatchNorm2d(3), GlobalBatchNorm2d(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out, expected = ours(x), theirs(x)
    assert out.dtype == dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=2e-2)


MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, image_shape, classes, hidden_units=4):
        super().__init__()
        channels, height, width = image_shape
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, hidden_units), nn.Dropout(),
                                    nn.Linear(hidden_units, classes))
    def forward(self, x):
        return self.layers(x)

class Pair(nn.Linear):
    def forward(self, x):
        return x, x

flat = nn.Flatten
function = lambda image_shape, classes: nn.Sequential(flat(), nn.Linear(784, classes))
eleven = lambda image_shape, classes: nn.Sequential(flat(), nn.Linear(784, 11))
one_number = lambda image_shape, classes: nn.Sequential(flat(), nn.Linear(784, classes), flat(0))
pair = lambda image_shape, classes: Pair(784, classes)
no_module = lambda image_shape, classes: "net"
takes_nothing = lambda: flat()
wrong_inputs = lambda image_shape, classes: nn.Sequential(flat(), nn.Linear(100, classes))
no_weights = lambda image_shape, classes: nn.Sequential(flat(), nn.AdaptiveAvgPool1d(classes))

class Early(nn.Module):
    def __init__(self, image_shape, classes):
        self.layer = nn.Flatten()

constant = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's in the current folder, which is not yet importable."""
    name = f"nets_{re.sub(r'[^a-z0-9]', '_', tmp_path.name.lower())}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"broken_{name}.py").write_text("import no_such_package\n")
    (tmp_path / f"faulty_{name}.py").write_text("import re\nre.no_such_function\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # what build() adds to it goes with the test
    return name


def test_a_model_of_ones_own(own: str) -> None:
    assert build(model=f"{own}:function", recipe="lab")(torch.rand(2, *IMAGE)).shape == (2, 10)
    net = build(model=f"{own}:Net", hidden_units=6, precision="fp64")
    assert describe.count_parameters(net) == 785 * 6 + 7 * 10 and next(net.parameters()).dtype == torch.float64
    assert describe.rank_dependent_layers(net) == ["Dropout"]
    again = build(model=f"{own}:Net", hidden_units=6, precision="fp64")
    assert all(map(torch.equal, net.parameters(), again.parameters()))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("{own}:eleven", "[2, 1, 28, 28] to [2, 11]: it must return logits of shape [2, 10]"),
        ("{own}:one_number", "to [20]: it must return logits of shape [2, 10]"),
        ("{own}:pair", "logits of shape [2, 10]"),
        ("{own}:no_module", "returned a str, not a torch.nn.Module"),
        ("{own}:Absent", "has no 'Absent': check the name after the colon"),
        ("no.such.module:Net", "there is no module 'no'"),
        ("{own}.deeper:Net", "there is no module"),
        ("{own}:takes_nothing", "called with ((1, 28, 28), 10)"),
        ("{own}:constant", "'int' object is not callable"),
        ("{own}:wrong_inputs", "mat1 and mat2 shapes cannot be multiplied (2x784 and 100x10)"),
        ("{own}:no_weights", "no parameters"),
    ],
)
def test_a_model_that_cannot_be_trained(own: str, model: str, said: str) -> None:
    name = model.format(own=own)
    with pytest.raises(UserError) as told:
        architectures.build(Config(model=name), IMAGE, 10)
    assert f"model {name}" in str(told.value) and said in str(told.value) and "\n" not in str(told.value)


def test_a_setting_that_ones_own_model_does_not_take(own: str) -> None:
    with pytest.raises(UserError, match="unexpected keyword argument 'hidden_units'.*10, hidden_units=6"):
        build(model=f"{own}:function", hidden_units=6)


def test_an_error_of_ones_own_is_told_with_its_line(own: str) -> None:
    Path("deep").mkdir()
    Path("deep", f"typo_{own}.py").write_text("x = 1\ndef net(image_shape, classes)\n")
    faulty = {
        f"faulty_{own}:Net": f"importing faulty_{own}: AttributeError: .* .faulty_{own}.py, line 2.: correct",
        f"deep.typo_{own}:net": f"SyntaxError: expected ':' .deep/typo_{own}.py, line 2.: correct it",
        f"broken_{own}:Net": f"no module 'no_such_package' .broken_{own}.py, line 1.: run where",
        "no_such_module:Net": "no module 'no_such_module': run where",  # no line of the user's asked for it
        f"{own}:Early": rf"AttributeError: .* .{own}.py, line \d+.; it is called with",
    }
    for name, said in faulty.items():
        with pytest.raises(UserError, match=said):
            build(model=name)


@pytest.mark.parametrize(
    ("precision", "device", "last"),
    [("fp32", "cpu", True), ("fp64", "cpu", True), ("fp32", "cuda", False)]
    + [(precision, "cuda", True) for precision in ("tf32", "fp16", "bf16")],
)
def test_convolutions_lie_channels_last_where_that_is_faster(precision: str, device: str, last: bool) -> None:
    net = architectures.build(make_config({"model": "cnn", "precision": precision}), IMAGE, 10, trained_on=device)
    weights = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d)][
        1:
    ]  # one channel has no order
    assert all(weight.is_contiguous(memory_format=torch.channels_last) == last for weight in weights)
