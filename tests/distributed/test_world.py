"""What a rank makes of the others: DDP that is always there, and the backend that carries words between them."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ranks
from torch.nn.parallel import DistributedDataParallel

from fashion_ddp.config import Config
from fashion_ddp.distributed.world import World, open_world

pytestmark = pytest.mark.quick


def leave_unwrapped(world: World) -> None:
    """Let Accelerate do what it does with one rank on a card: wrap nothing."""
    prepare = world.accelerator.prepare_model
    world.accelerator.prepare_model = lambda model, evaluation_mode: prepare(model, evaluation_mode=True)


def gradients(by_accelerate: bool) -> tuple[bool, list[float], dict[str, Any]]:
    """Whether a model is wrapped, its gradient after a pass within no_sync and after one more, and DDP's settings."""
    with open_world(Config(device="cpu")) as world:
        if not by_accelerate:
            leave_unwrapped(world)
        model = world.wrap(torch.nn.Linear(1, 1, bias=False))
        found = []
        for _ in range(2):
            image = torch.full((1, 1), 1.0 + world.rank)
            with world.no_sync(model) if not found else torch.enable_grad():
                model(image).sum().backward()
            found.append(float(next(model.parameters()).grad))
        settings = {name: getattr(model, name, None) for name in ("broadcast_buffers", "gradient_as_bucket_view")}
        return isinstance(model, DistributedDataParallel), found, settings


@pytest.mark.parametrize("by_accelerate", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rank_of_a_group_is_wrapped_in_ddp_whether_or_not_accelerate_does_it(
    world_size: int, by_accelerate: bool
) -> None:
    # Rank r's image is r + 1, and so is its gradient of a pass. Within no_sync it stays its own; then the mean of all
    # that was added up comes to all.
    mean = 2 * sum(range(1, world_size + 1)) / world_size
    settings = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    assert ranks(world_size, gradients, by_accelerate) == [
        (True, [rank + 1.0, mean], settings) for rank in range(world_size)
    ]


@pytest.mark.parametrize(("given", "used"), [({}, "0"), ({"TORCH_DIST_USE_NCCL2": "1"}, "1")])
def test_torch_is_told_which_nccl_backend_before_it_is_imported(given: dict[str, str], used: str) -> None:
    code = "import fashion_ddp.train, os, sys; print(os.environ['TORCH_DIST_USE_NCCL2'], 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "TORCH_DIST_USE_NCCL2"} | given
    printed = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout
    assert printed.split() == [used, "False"]


def backend() -> str | None:
    with open_world(Config(device="cpu")) as world:
        return world.backend


def test_which_backend_ran_is_known() -> None:
    assert ranks(2, backend) == ["ProcessGroupGloo"] * 2
    assert backend() is None
