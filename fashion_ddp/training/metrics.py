"""Figures beside loss and accuracy: torchmetrics, computed once per evaluation from the logits of all ranks.

All ranks have the same logits [n, classes], so each computes the same figures, and none has to be summed over ranks. It
does so on the host and with one thread: sums of float32 in another order, on a card or by several threads, would make
them differ between numbers of ranks.
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

from fashion_ddp import user_code
from fashion_ddp.errors import UserError

TOP5_FROM = 6  # classes; of five, the five best are all


def build(name: str | None, classes: int) -> MetricCollection:
    """Return the figures of a run: ours, and those of the user's function `name` (package.module:function), if any.

    Raises UserError where that function cannot be used, or its figures are no numbers.
    """
    figures = MetricCollection(
        {
            "macro_f1": MulticlassF1Score(classes, average="macro", validate_args=False),
            # As the report draws it: the mean distance of confidence and accuracy in 15 bins (Guo et al., ICML 2017).
            "calibration_error": MulticlassCalibrationError(classes, n_bins=15, norm="l1", validate_args=False),
        }
    )
    if classes >= TOP5_FROM:
        figures.add_metrics({"top5": MulticlassAccuracy(classes, top_k=5, average="micro", validate_args=False)})
    if name is not None:
        figures.add_metrics(_of_the_user(name, classes, taken=[str(one) for one in figures]))
    for metric in figures.values(copy_state=False):
        metric.distributed_available_fn = _alone  # else it would gather what each rank has already, and count it again
    return figures


def compute(figures: MetricCollection, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return each figure of the logits [n, classes] beside the labels [n]; NaN where not all logits are finite."""
    if not logits.isfinite().all():  # torchmetrics would give numbers that look like a model's
        return dict.fromkeys(map(str, figures), math.nan)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures.reset()
        figures.update(logits.cpu(), labels.cpu())
        return {name: float(value) for name, value in figures.compute().items()}
    finally:
        torch.set_num_threads(threads)


def _alone() -> bool:
    return False


def _of_the_user(name: str, classes: int, taken: list[str]) -> dict[str, Metric | MetricCollection]:
    """Return the figures that the user's function gives, each tried with logits."""
    function = user_code.load(name, "metrics")
    logits, labels = torch.eye(classes).repeat(2, 1), torch.arange(2 * classes) % classes
    try:
        given = function(classes)
        if not isinstance(given, MetricCollection):
            raise TypeError(f"it must return a torchmetrics MetricCollection, not {type(given).__name__}")
        for one, value in given(logits, labels).items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise TypeError(f"{one} must be one number, as with average='macro'")
            if one in taken:
                raise ValueError(f"{one} is a figure of ours: give it another name")
        return {one: metric for one, metric in given.items(copy_state=False) if isinstance(metric, Metric)}
    except Exception as error:
        raise UserError(
            f"metrics {name} cannot be used: {user_code.describe_error(error)}; it is called with the number of "
            "classes, and what it returns with logits [n, classes] and labels [n]"
        ) from error
