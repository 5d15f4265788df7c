"""Dropout whose masks belong to images: how much it drops, that drops are independent, and whose they are."""

import pytest
import torch

from fashion_ddp.models.dropout import SampleDropout, random_bits

pytestmark = pytest.mark.quick


def keys(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(rows, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed))


def layer(p: float = 0.5, rows: torch.Tensor | None = None, number: int = 0) -> SampleDropout:
    made = SampleDropout(p)
    made.row_keys, made.number = rows, number
    return made


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_as_much_is_dropped_as_was_asked_for_in_each_row_and_unit(p: float) -> None:
    kept = layer(p, keys(2000))(torch.ones(2000, 1001)) > 0
    deviation = (p * (1 - p)) ** 0.5
    for shares, n in (
        (kept.double().mean(0), 2000),
        (kept.double().mean(1), 1001),
        (kept.double().mean(), 2000 * 1001),
    ):
        off = (shares - (1 - p)) * n**0.5 / deviation
        assert float(off.abs().max()) < 5  # of 2000 draws, the furthest is at about 3.5 standard deviations
        assert off.dim() == 0 or 0.9 < float(off.std()) < 1.1


def test_drops_of_different_rows_units_layers_and_epochs_are_independent() -> None:
    rows, units = 4000, 101
    tables = [random_bits(keys(rows, seed), number, units) for seed, number in ((0, 0), (0, 1), (0, 2), (1, 0))]
    for draws in (torch.cat(tables, dim=1), random_bits(keys(400), 0, 4000).T):
        for threshold in (0, -26214):  # p = 0.5 and 0.1
            kept = (draws >= threshold).double()
            correlation = torch.corrcoef(kept.T).fill_diagonal_(0) * len(kept) ** 0.5
            assert float(correlation.abs().max()) < 6  # of 80,000 pairs, the furthest is at about 4.5
            assert 0.98 < float(correlation.square().mean()) < 1.02
    # Not in pairs alone: the parity of what two rows drop of two units.
    bits = tables[0] >= 0
    parity = bits[:-1, :-1] ^ bits[1:, :-1] ^ bits[:-1, 1:] ^ bits[1:, 1:]
    assert abs(float(parity.double().mean()) - 0.5) * 2 * parity.numel() ** 0.5 < 4


@pytest.mark.parametrize("shape", [(6, 7), (6, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_is_kept_is_scaled_and_so_is_its_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.rand(shape) + 0.5).to(dtype).requires_grad_()  # not 0: that would not tell what is dropped
    y = layer(0.25, keys(6))(x)
    kept = y != 0
    assert 0 < int(kept.sum()) < kept.numel() and y.dtype == dtype
    torch.testing.assert_close(y, torch.where(kept, x / 0.75, 0))
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, torch.where(kept, 1 / 0.75, 0.0).to(dtype))


def test_a_row_s_drops_are_its_key_s_wherever_it_stands_and_however_it_lies() -> None:
    rows, x = keys(10), torch.ones(10, 3, 4, 5)
    whole = layer(0.5, rows)(x)
    order = torch.randperm(10)
    assert torch.equal(layer(0.5, rows[order])(x), whole[order])
    assert torch.equal(layer(0.5, rows[7:])(x[7:]), whole[7:])
    assert torch.equal(layer(0.5, rows)(x.to(memory_format=torch.channels_last)), whole)
    assert not torch.equal(layer(0.5, rows, number=1)(x), whole)


def test_nothing_is_dropped_in_evaluation_or_with_probability_0() -> None:
    x = torch.randn(4, 5)
    assert layer(0.0, keys(4))(x) is x and layer(0.9, keys(4)).eval()(x) is x


def test_random_numbers_are_drawn_only_where_nobody_sets_keys() -> None:
    before, x = torch.get_rng_state(), torch.ones(50, 50)
    layer(0.5, keys(50))(x)
    assert torch.equal(torch.get_rng_state(), before)
    alone = layer(0.5)
    assert not torch.equal(alone(x), alone(x)) and not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_probability_that_is_none_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and less than 1"):
        SampleDropout(p)
