"""Train in a process that is another's: of a program, or of a notebook."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fashion_ddp.distributed import signals, tuning
from fashion_ddp.private import private
from fashion_ddp.redact import restrict_umask


@contextmanager
def as_found() -> Iterator[None]:
    """Let a run have this process within, and leave it as it was found.

    Its signal handlers, environment, umask, CPU threads and random numbers are put back. Accelerate forgets the ranks,
    so that the next run, or its notebook_launcher, makes its own.
    """
    with tuning.gc_paused():
        import torch
        from accelerate.state import AcceleratorState

    environment, umask, threads = dict(os.environ), restrict_umask(), torch.get_num_threads()
    try:
        with signals.listening(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        private(AcceleratorState, "_reset_state")(reset_partial_state=True)
        torch.set_num_threads(threads)
        os.umask(umask)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        gc.unfreeze()
        if torch.cuda.is_initialized():  # what torch keeps of a card would count as taken
            gc.collect()
            torch.cuda.empty_cache()
