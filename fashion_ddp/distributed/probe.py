"""Check, in half a minute, that each rank of a launcher finds its device and that the ranks can talk to each other."""

import os
import statistics
import time

import torch

from fashion_ddp.config import Config
from fashion_ddp.console import say
from fashion_ddp.distributed import machine
from fashion_ddp.distributed.failures import time_limit
from fashion_ddp.distributed.world import World, all_reduce, open_world
from fashion_ddp.errors import TrainingFailed

JOIN_LIMIT = 60.0  # seconds for the first exchange, and half as many more for ranks that start later
TIME_LIMIT = 20.0  # seconds for what normally takes milliseconds
SIZES = {"118 KB, the gradient of cnn": 29_460, "40 MB": 10_000_000}


def describe_rank(world: World) -> str:
    """Return a line on this rank: its number, host and device, the device's free memory and who uses it."""
    text = f"rank {world.rank} of {world.size} on {machine.host_name()}: {world.device}"
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
    with open_world(Config(timeout=JOIN_LIMIT)) as world:
        rank = world.rank
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
