"""What a precision means to torch: how float32 numbers are multiplied, and what it is called elsewhere."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from fashion_ddp.distributed.precision import mixed_precision, products

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def torchs_own() -> Iterator[None]:
    """torch's default afterwards, whatever the environment says: TF32 in convolutions alone."""
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("before", [True, False])
def test_products_of_float32_are_in_full_but_for_tf32(precision: str, before: bool) -> None:
    # Some containers start with TF32 everywhere (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE).
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = before
    as_tf32 = precision == "tf32"
    parts = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    with warnings.catch_warnings(action="error"), products(precision):
        assert [part.fp32_precision == "tf32" for part in parts] == [as_tf32] * 2
        # What others of torch read, which it refuses where its old and new settings do not agree.
        assert torch.backends.cuda.matmul.allow_tf32 is as_tf32 and torch.backends.cudnn.allow_tf32 is as_tf32
        assert torch.get_float32_matmul_precision() == ("high" if as_tf32 else "highest")
        with torch.backends.cudnn.flags(enabled=False):
            pass
    assert torch.backends.cuda.matmul.allow_tf32 is before and torch.backends.cudnn.allow_tf32 is before


def test_accelerate_knows_mixed_precision_only() -> None:
    words = {"fp32": "no", "tf32": "no", "fp64": "no", "fp16": "fp16", "bf16": "bf16"}
    assert {precision: mixed_precision(precision) for precision in words} == words
