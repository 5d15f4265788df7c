"""Say what a run's precision means: to Accelerate, to the products of float32 numbers, and to the layout of images."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

MIXED = ("fp16", "bf16")  # float32 weights; products in half precision, chosen layer by layer by torch's autocast
TENSOR_CORES = ("tf32", *MIXED)  # computed by a card's tensor cores, whose convolutions want channels last


def mixed_precision(precision: str) -> str:
    """Return Accelerate's word for a precision."""
    return precision if precision in MIXED else "no"


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Set, within, how a card multiplies float32 numbers, in matrix products and convolutions: as TF32, or in full.

    torch's default is neither: TF32 in convolutions alone, and in some containers in both.
    """
    before = _use_tf32(precision == "tf32", precision == "tf32")
    try:
        yield
    finally:
        _use_tf32(*before)


def _use_tf32(in_matrix_products: bool, in_convolutions: bool) -> tuple[bool, bool]:
    """Set where a card uses TF32, and return where it did before."""
    import torch

    with warnings.catch_warnings():
        # torch 2.10 calls these names old. Its new ones leave a state in which it refuses to read the old ones, as
        # torch.compile and cudnn.flags do.
        warnings.filterwarnings("ignore", message=".*new API settings to control TF32.*", category=UserWarning)
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = in_matrix_products, in_convolutions
    return before


def channels_last(precision: str, device: str) -> bool:
    """Return whether convolutions are faster with channels last, on a device of this type ("cpu" or "cuda")."""
    return device == "cpu" or precision in TENSOR_CORES
