"""The moving average beside its sum written out, and the model that lends its place to it."""

import pytest
import torch
from torch import nn

from fashion_ddp.training.ema import Average

pytestmark = pytest.mark.quick

DECAY = 0.9


def net() -> nn.Module:
    """With buffers of numbers, and one that counts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("updates", [1, 2, 30])
def test_the_average_is_of_all_updates_and_of_nothing_before(updates: int) -> None:
    model = net()
    average = Average(DECAY, [p for p in model.parameters() if p.requires_grad], model)
    seen = []
    for _ in range(updates):
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn_like(parameter) if parameter.requires_grad else parameter)
        model(torch.randn(8, 3))
        average.update()
        seen.append(tensors(model))
    with average.in_place():
        averaged = tensors(model)
    shares = [(1 - DECAY) * DECAY ** (updates - t) / (1 - DECAY**updates) for t in range(1, updates + 1)]
    assert sum(shares) == pytest.approx(1)
    for name, tensor in averaged.items():
        expected = sum(share * one[name] for share, one in zip(shares, seen, strict=True))
        if name in ("0.bias", "1.num_batches_tracked"):  # is not trained, and no number to average
            expected = seen[-1][name]
        torch.testing.assert_close(tensor, torch.as_tensor(expected), rtol=1e-5, atol=1e-6, msg=name)
    if updates == 1:
        assert all(torch.equal(averaged[name], seen[0][name]) for name in averaged)


def test_the_model_gets_its_weights_back_whatever_happens() -> None:
    model = net()
    average = Average(DECAY, [*model.parameters()], model)
    average.update()
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data += 1
    before = tensors(model)
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert not torch.equal(model[0].weight, before["0.weight"])
        raise ZeroDivisionError
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [tensor.data_ptr() for tensor in after.values()] == places  # where a graph knows them
