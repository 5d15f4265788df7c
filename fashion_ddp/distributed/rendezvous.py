"""Wait for rank 0 before the rendezvous, and explain why a rendezvous failed."""

import contextlib
import os
import random
import re
import socket
import time
from collections.abc import Mapping

from fashion_ddp.distributed.machine import TORCHRUN, MachineError, RankPlacement

RENDEZVOUS_TIMEOUT = 120.0  # seconds within which rank 0 must answer


class MissingRankError(MachineError):
    """Another rank did not come. Every rank that waited prints it, because rank 0 may be the one that is missing."""

    of_rank = True


def wait_for_rank_zero(
    placement: RankPlacement, env: Mapping[str, str] = os.environ, timeout: float = RENDEZVOUS_TIMEOUT
) -> None:
    """Wait until rank 0, if it is on another machine, accepts connections; at most `timeout` seconds.

    torch would wait without a word, as long as for any collective. Raises MachineError, which names rank 0's machine,
    where it has no address or does not answer.
    """
    if placement.local_world_size == placement.world_size:
        return
    host, port = env["MASTER_ADDR"], int(env.get("MASTER_PORT", "29500"))
    limit = time.monotonic() + timeout
    try:
        socket.getaddrinfo(host, port)
        while placement.rank > 0:
            try:
                return socket.create_connection((host, port), timeout=5).close()
            except OSError as error:
                if time.monotonic() > limit:
                    raise MachineError(
                        f"rank 0's machine {host!r} did not answer at port {port} for {timeout:.0f} s ({error}): a "
                        "firewall is between the two, or that name means another network; or train on one node"
                    ) from None
            time.sleep(0.2)
    except socket.gaierror as error:
        raise MachineError(
            f"rank 0's machine {host!r} is not found by name ({error}): correct DNS or /etc/hosts, or train on one node"
        ) from None


def free_port() -> int:
    """Return a TCP port for the rendezvous that no program listens on now.

    It is below the range that Linux uses for outgoing connections (from 32,768), so that no connection takes it before
    the ranks meet. Raises MachineError where none is free.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise MachineError("no port from 20000 to 32000 is free for ranks to meet at: end a program that listens there")


def explain_failure(
    error: BaseException, placement: RankPlacement, env: Mapping[str, str] = os.environ
) -> MachineError | None:
    """Return what torch's error at the rendezvous means, by its text; None for an unknown one."""
    text, port = str(error), env.get("MASTER_PORT", "29500")
    if "EADDRINUSE" in text:
        return MachineError(
            f"port {port}, where ranks were to meet, is taken, perhaps by another training: start this one with "
            f"{TORCHRUN}, which finds a free port, or give another (--master-port of torchrun, MASTER_PORT)"
        )
    if came := re.search(r"Timed out after (\d+) seconds waiting for clients. (\d+)/(\d+)", text):
        return MissingRankError(
            f"{came[2]} of {came[3]} ranks came to port {port} within {came[1]} s: see the messages of the others, or "
            "of what starts them; every rank must be started, with its own RANK"
        )
    if "client socket has timed out" in text:
        return MissingRankError(
            f"rank {placement.rank} found no rank 0 at port {port} of {env['MASTER_ADDR']}: see the messages of "
            "rank 0, or of its launcher"
        )
    return None
