"""Which epoch validation chooses and when it ends a run; and the model that lends its place to the best weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fashion_ddp.config.layers import make_config
from fashion_ddp.distributed.machine import RankPlacement
from fashion_ddp.distributed.world import World
from fashion_ddp.training.choice import Choice
from fashion_ddp.training.evaluate import Scores

pytestmark = pytest.mark.quick


def choice(model: nn.Module, **given: Any) -> Choice:
    world = World(SimpleNamespace(device=torch.device("cpu")), RankPlacement())
    return Choice(make_config({"validation": 1, "epochs": 9} | given), world, model)


def scores(accuracy: float, loss: float) -> dict[str, Scores]:
    """Of an epoch whose test figures would choose the opposite."""
    logits, predicted = torch.zeros(1, 2), torch.zeros(1)
    return {"test": Scores(-loss, 1 - accuracy, logits, predicted), "val": Scores(loss, accuracy, logits, predicted)}


NAN = float("nan")


# Accuracy and loss of each epoch, the epoch that is kept, and those that are trained with a patience of 2.
@pytest.mark.parametrize(
    ("epochs", "kept", "trained"),
    [
        ([(0.5, 3), (0.6, 4), (0.7, 5), (0.8, 6)], 4, 4),
        ([(0.5, 3), (0.4, 2), (0.4, 1), (0.9, 0)], 4, 3),
        ([(0.5, 3), (0.5, 2), (0.5, 2), (0.5, 3)], 2, 4),  # the loss decides between equals, and then the first
        ([(0.5, 3), (0.4, 2), (0.6, 3), (0.6, 3), (0.5, 1), (0.5, 1)], 3, 5),
        ([(0.5, NAN), (0.5, 3), (0.5, NAN), (0.0, 1)], 2, 4),
    ],
)
def test_the_best_on_the_validation_set_is_kept(epochs: list[tuple[float, float]], kept: int, trained: int) -> None:
    best, patient, neither = (choice(nn.Linear(1, 1), **given) for given in ({"keep": "best"}, {"patience": 2}, {}))
    assert not any(best.judge(number, scores(*one)) for number, one in enumerate(epochs, start=1))
    assert best.outcome(len(epochs)) == {"kept_epoch": kept, "chosen_by": "val/accuracy"}
    ends = [patient.judge(number, scores(*one)) for number, one in enumerate(epochs, start=1)]
    assert (ends.index(True) + 1 if any(ends) else len(epochs)) == trained
    early = {"stopped_early": f"after epoch {trained}, no better validation in 2 epochs"}
    assert patient.outcome(trained) == early and patient.outcome(9) == {}  # which are all that were asked for
    assert not neither.judge(1, {}) and neither.outcome(1) == {}


def test_the_model_has_the_best_weights_and_buffers_only_where_it_lends_its_place() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model.register_buffer("none_of_the_files", torch.zeros(()), persistent=False)
    tensors = [*model.parameters(), *model.buffers()]
    last, best = choice(model, patience=1), choice(model, keep="best")
    for epoch, accuracy in enumerate((0.4, 0.9, 0.5), start=1):
        with torch.no_grad():
            for tensor in tensors:
                tensor.fill_(epoch)
        assert not best.judge(epoch, scores(accuracy, 1.0))
    with pytest.raises(ZeroDivisionError), best.in_place():
        assert all(bool((tensor == 2).all()) for tensor in tensors)
        raise ZeroDivisionError
    assert all(bool((tensor == 3).all()) for tensor in tensors)
    assert last.weights == last.buffers == []  # where the last are kept, nothing is held beside them
