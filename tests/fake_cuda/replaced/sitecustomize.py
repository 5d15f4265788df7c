"""All that is replaced so that unmodified commands run to their end where kernels compute nothing.

Python imports this file when it starts, because its folder is on PYTHONPATH. Each function below changes one module,
right after that is imported, and says why. Nothing else of torch or of the package is touched.
"""

import contextlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

REPLACEMENTS: dict[str, Callable[[Any], None]] = {}


def after_import_of(name: str) -> Callable[[Callable[[Any], None]], None]:
    """Let a function change a module as soon as it is imported."""

    def register(replace: Callable[[Any], None]) -> None:
        REPLACEMENTS[name] = replace

    return register


@after_import_of("torch.backends.cudnn")
def no_cudnn(cudnn: Any) -> None:
    """cuDNN asks the driver for what the stand-in lacks. Without it, convolutions are kernels like all others."""
    cudnn.torch._C._set_cudnn_enabled(False)


@after_import_of("torch.distributed.distributed_c10d")
def objects_through_the_store(distributed: Any) -> None:
    """Objects between ranks travel as tensors whose sizes the card compares. Here the store at which ranks met hands
    them on, once the card has done what it had to, as those tensors would wait for it."""
    import pickle

    import torch

    calls = iter(range(10**9))

    def all_gather_object(values: list[Any], value: Any, group: Any = None) -> None:
        if distributed.get_backend() == "nccl":
            torch.cuda.synchronize()
        store, call = distributed._get_default_store(), next(calls)
        store.set(f"object {call} of rank {distributed.get_rank()}", pickle.dumps(value))
        for rank in range(distributed.get_world_size()):
            values[rank] = pickle.loads(store.get(f"object {call} of rank {rank}"))

    def broadcast_object_list(values: list[Any], src: int = 0, **_: Any) -> None:
        every: list[Any] = [None] * distributed.get_world_size()
        all_gather_object(every, values if distributed.get_rank() == src else None)
        values[:] = every[src]

    distributed.all_gather_object = all_gather_object
    distributed.broadcast_object_list = broadcast_object_list


@after_import_of("fashion_ddp.training.cuda_graph")
def no_difference(cuda_graph: Any) -> None:
    """The proof of a graph compares what steps change, which is nothing here; the comparison waits for the card."""
    import torch

    cuda_graph.difference = lambda recorded, ordinary: torch.cuda.synchronize()  # which returns None: no difference


@after_import_of("fashion_ddp.training.sync")
def losses_of_one(sync: Any) -> None:
    """What a sync point reads decides when to stop, to save, and how long to go on: its rows become ones in the host's
    memory. They still travel over NCCL, which adds them up, with all that ranks tell each other."""
    reduce, all_reduce = sync.SyncPoint._reduce, sync.all_reduce
    sync.SyncPoint._reduce = lambda self, rows: reduce(self, rows.cpu().fill_(1))
    sync.all_reduce = lambda message: all_reduce(message.cuda()).cpu()


@after_import_of("fashion_ddp.training.evaluate")
def scores_of_a_guess(evaluate: Any) -> None:
    """An evaluation counts, on the card, that it saw every image once, and its answers become files."""
    import torch

    evaluation = evaluate.Evaluation.__call__

    def guess(self: Any, model: Any, *tta: str) -> Any:
        with contextlib.suppress(AssertionError):
            evaluation(self, model, *tta)
        logits = torch.zeros(self.count, self.classes)
        return [evaluate.Scores(2.3, 0.1, logits, logits.argmax(1)) for _ in tta or ["none"]]

    evaluate.Evaluation.__call__ = guess


@after_import_of("fashion_ddp.distributed.probe")
def ones_to_add(probe: Any) -> None:
    """The probe of the ranks adds up ones, which a kernel would write. A copy writes them here."""
    import torch

    all_reduce = probe.all_reduce
    probe.all_reduce = lambda tensor: all_reduce(tensor.copy_(torch.ones(tensor.shape)))


class Replacer(importlib.abc.MetaPathFinder):
    """Finds the modules that are changed, as all others would, and changes them once they are there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in REPLACEMENTS:
            return None
        replace = REPLACEMENTS.pop(name)  # so that the next line finds it elsewhere
        spec = importlib.util.find_spec(name)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_replace(module: Any) -> None:
                execute(module)
                replace(module)

            spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Replacer())
