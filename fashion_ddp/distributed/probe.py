"""Check, in half a minute, that each rank of a launcher finds its device and that the ranks can talk to each other."""

import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fashion_ddp.config import Config
from fashion_ddp.console import say
from fashion_ddp.distributed import machine, rendezvous
from fashion_ddp.distributed.world import World, all_reduce, open_world
from fashion_ddp.errors import TrainingFailed

TIME_LIMIT = 20.0  # seconds for what normally takes milliseconds
SIZES = {"118 KB, the gradient of cnn": 29_460, "40 MB": 10_000_000}
ADVICE = """\
the ranks cannot talk to each other. What to try, one by one:
  NCCL_P2P_DISABLE=1            cards of a machine that cannot reach each other's memory: IOMMU or ACS is on
  NCCL_SHM_DISABLE=1            a container with little shared memory (--shm-size)
  NCCL_SOCKET_IFNAME=eth0       several machines: the network that they share, as `ip address` names it
  GLOO_SOCKET_IFNAME=eth0       the same for CPU ranks
  a firewall between machines   ranks meet at MASTER_PORT, and then use ports that the system chooses
  NCCL_DEBUG=INFO               says how far it came"""


@contextmanager
def time_limit(rank: int, what: str, seconds: float) -> Iterator[None]:
    """End this process with advice if the block takes longer. (torch waits in C, where no exception reaches it.)"""

    def give_up() -> None:
        text = f"rank {rank} on {socket.gethostname()}: {what} did not end within {seconds:.0f} s"
        say(f"error: {text}; {ADVICE if rank == 0 else 'see the advice of rank 0'}")
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def describe_rank(world: World) -> str:
    """Return a line on this rank: its number, host and device, the device's free memory and who uses it."""
    text = f"rank {world.rank} of {world.size} on {socket.gethostname()}: {world.device}"
    if world.device.type != "cuda":
        return f"{text}, {world.threads} threads"
    free, total = torch.cuda.mem_get_info(world.device)
    uuid = str(torch.cuda.get_device_properties(world.device).uuid)
    processes = machine.run_and_read_lines(
        "nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader"
    )
    held = [line.partition(", ")[2] for line in processes if uuid in line and f" {os.getpid()}," not in line]
    return f"{text}, {world.device_name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free" + (
        f", held by {'; '.join(held)}" if held else ""
    )


def time_all_reduces(world: World, size: int) -> list[float]:
    """Return the seconds of ten all-reduces of `size` float32, after one that sets up the connections.

    Raises TrainingFailed where a sum is wrong.
    """
    seconds = []
    for _ in range(11):
        tensor = torch.ones(size, device=world.device)
        world.all_gather_object(None)  # so that all ranks begin at the same time
        start = time.perf_counter()
        total = float(all_reduce(tensor)[0])
        seconds.append(time.perf_counter() - start)
        if total != world.size:
            raise TrainingFailed(f"an all-reduce over {world.size} ranks of ones gave {total:g}")
    return seconds[1:]


def main() -> None:
    """Print what each rank has, and how long all-reduces take. Raises TrainingFailed where a sum is wrong."""
    rank = int(os.environ.get("RANK", "0"))
    joining = time_limit(rank, "joining the other ranks", TIME_LIMIT + rendezvous.RENDEZVOUS_TIMEOUT)
    with joining, open_world(Config()) as world:
        with time_limit(rank, "the first exchange", TIME_LIMIT):
            lines = world.all_gather_object(describe_rank(world))
        if rank == 0:
            say("\n".join(lines))
        for name, size in SIZES.items():
            with time_limit(rank, f"an all-reduce of {name}", TIME_LIMIT):
                median = statistics.median(time_all_reduces(world, size))
            if rank == 0:
                say(f"all-reduce of {name}: {1e6 * median:,.0f} microseconds (median of 10)")
    if rank == 0:
        say(f"the {world.size} ranks can train together")
