"""What a CUDA graph is, on a CPU: one step's operations, recorded with every number from the host fixed, and replayed.

All that is missing is the card. As in a capture, nothing may be read by the host, and no other rank is spoken to while
the recording lasts; as in a replay, every operation finds its operands, and leaves its result, where it did before.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fashion_ddp.distributed.world import entering_collective
from fashion_ddp.training.cuda_graph import CountingStep, Launch

READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


class CpuGraph(TorchDispatchMode):
    """Records what is done within `with`; `replay` does it again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.alone = dist.new_group([dist.get_rank()], use_local_synchronization=True).boxed()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        if func.namespace == "c10d":  # recorded only: as far as this recording goes, the rank has no others
            result = func(*(self.alone if _is_group(arg) else arg for arg in args), **kwargs)
        else:
            result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                if func.namespace == "c10d":
                    again[-1].wait()
                    continue
                returns = func._schema.returns
                results, agains = ((r,) if len(returns) == 1 else r for r in (result, again))
                for returned, old, new in zip(returns, results or (), agains or (), strict=True):
                    if returned.alias_info is None:  # else it lies there already
                        for old_one, new_one in zip(*map(_tensors, (old, new)), strict=True):
                            old_one.copy_(new_one)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, torch.Tensor)]


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def record(counting: CountingStep) -> Launch:
    """Record a step, as cuda_graph does on a card."""
    graph = CpuGraph()
    with graph:
        counting.take()

    def launch() -> None:
        entering_collective()
        graph.replay()

    return launch
