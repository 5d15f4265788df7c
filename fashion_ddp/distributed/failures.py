"""Say in words what an error of NCCL or of a card means and what to try, and end a rank that waits too long."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fashion_ddp.console import say
from fashion_ddp.distributed import machine
from fashion_ddp.distributed.machine import MachineError
from fashion_ddp.errors import TrainingFailed

CONTINUES = "the same command continues from the last checkpoint"
LOST_RANK = "another rank ended before its time; its own words, or its launcher's, tell why"
SILENCE = "nothing happened for"  # begins what a rank says that waited for others in vain
ADVICE = """\
the ranks cannot talk to each other. What to try, one by one:
  NCCL_P2P_DISABLE=1            cards of a machine that cannot reach each other's memory: IOMMU or ACS is on
  NCCL_SHM_DISABLE=1            a container with little shared memory (--shm-size)
  NCCL_SOCKET_IFNAME=eth0       several machines: the network that they share, as `ip address` names it
  GLOO_SOCKET_IFNAME=eth0       the same for CPU ranks
  a firewall between machines   ranks meet at MASTER_PORT, and then use ports that the system chooses
  NCCL_DEBUG=INFO               says how far it came"""

BEHIND = 5.0  # seconds after rank 0 at which the others end, which began to wait at about the same time

# In an error of NCCL: another rank, or the store of the rendezvous, is gone or silent.
GONE = "ncclRemoteError|remote process|Connection closed by|Connection reset by peer|Broken pipe|store->|time(d )?out"
CARD_FULL = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def lost_ranks(error: str) -> bool:
    """Return whether a run failed because ranks of it were killed or hang, by the error in its summary."""
    return LOST_RANK in error or error.startswith(SILENCE)


class CannotJoin(MachineError):
    """Ranks cannot join each other. The rank that finds it prints it, because rank 0 may find nothing."""

    of_rank = True


class RankFailed(TrainingFailed):
    """Training failed on one rank, which prints it, because rank 0 may find nothing."""

    of_rank = True


def nccl_words(error: BaseException) -> str | None:
    """Return NCCL's own words, its kind of error and what it said last, from an error of torch.

    None for an error that is not NCCL's, or says only that another rank is gone.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or "NCCL" not in text or re.search(GONE, text):
        return None
    kind = re.search(r"(nccl[A-Z]\w+): (.+)", text)
    if kind is None:  # torch's newer backend gives neither a kind nor what NCCL said last
        return text.splitlines()[0].strip()
    last = re.search(r"Last error:\s+(.+)", text)
    return f"{kind[1]}: {(last[1] if last else kind[2]).strip()}"


def explain_joining(words: str, rank: int) -> CannotJoin:
    """Return what NCCL's words mean where ranks join each other."""
    if re.search("Duplicate GPU|using the same GPU", words):
        pair = re.search(r"rank (\d+) and rank (\d+)", words)
        who = f"ranks {pair[1]} and {pair[2]}" if pair else "several ranks"
        return CannotJoin(
            f"{who} share one card ({words}): start one rank for each card (--num_processes, --nproc-per-node), and on "
            "SLURM let each task see all cards of its machine, or one of its own"
        )
    return CannotJoin(f"rank {rank}: {words}; {ADVICE}")


def explain_full_card(error: BaseException) -> str | None:
    """Return in words that the memory of this rank's card is full; None for another error."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not any(sign in text for sign in CARD_FULL):
        return None
    import torch

    card = "the card"
    if torch.cuda.is_initialized():
        card = f"{torch.cuda.get_device_name()} (cuda:{torch.cuda.current_device()})"
    asked, free = re.search(r"Tried to allocate ([\d.]+ \w+)", text), re.search(r"of which ([\d.]+ \w+) is free", text)
    sizes = f" ({asked[1]} were asked for, {free[1]} free)" if asked and free else ""
    return (
        f"the memory of {card} is full{sizes}: add --micro-batch 32, which computes the same in smaller pieces (not "
        "with batch norm), take a smaller --batch-size, or end what else uses the card (nvidia-smi names it)"
    )


@contextmanager
def time_limit(rank: int, what: str, seconds: float) -> Iterator[None]:
    """End this process with advice if the block takes longer. (torch waits in C, where no exception reaches it.)"""

    def give_up() -> None:
        text = f"rank {rank} on {machine.host_name()}: {what} did not end within {seconds:.0f} s"
        say(f"error: {text}; {ADVICE if rank == 0 else 'see the advice of rank 0'}")
        os._exit(1)

    # Rank 0 first, which has the advice: its end would be news to the others, and theirs to it.
    timer = threading.Timer(seconds if rank == 0 else seconds + BEHIND, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
