"""Where ranks meet, and in plain words why they did not."""

import contextlib
import os
import random
import re
import socket
import time
from collections.abc import Mapping

from fashion_ddp.distributed.machine import TORCHRUN, MachineError, Place

RENDEZVOUS = 120.0  # seconds within which rank 0 must answer


class NotMet(MachineError):
    """Where another rank did not come, each one that waited tells it: the one that speaks for them may be missing."""

    of_rank = True


def reach_first(here: Place, env: Mapping[str, str] = os.environ, patience: float = RENDEZVOUS) -> None:
    """Wait until rank 0, on another machine, answers where ranks meet. Raises MachineError, which names that machine.

    torch would wait for it without a word, and as long as for any collective.
    """
    if here.local_world_size == here.world_size:
        return
    host, port = env["MASTER_ADDR"], int(env.get("MASTER_PORT", "29500"))
    limit = time.monotonic() + patience
    try:
        socket.getaddrinfo(host, port)
        while here.rank > 0:
            try:
                return socket.create_connection((host, port), timeout=5).close()
            except OSError as error:
                if time.monotonic() > limit:
                    raise MachineError(
                        f"rank 0's machine {host!r} did not answer at port {port} for {patience:.0f} s ({error}): a "
                        "firewall is between the two, or that name means another network; or train on one node"
                    ) from None
            time.sleep(0.2)
    except socket.gaierror as error:
        raise MachineError(
            f"rank 0's machine {host!r} is not found by name ({error}): mend DNS or /etc/hosts, or train on one node"
        ) from None


def free_port() -> int:
    """A TCP port for ranks to meet at, where nobody listens now.

    Below those that Linux gives to outgoing connections (from 32,768), one of which may be given away between this look
    and the meeting.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise MachineError("no port from 20000 to 32000 is free for ranks to meet at: end what listens there")


def explained(error: BaseException, here: Place, env: Mapping[str, str] = os.environ) -> MachineError | None:
    """What torch's error at the meeting means; None where it is none of these. It gives only a text to tell by."""
    text, port = str(error), env.get("MASTER_PORT", "29500")
    if "EADDRINUSE" in text:
        return MachineError(
            f"port {port}, where ranks were to meet, is taken, as by another training: start this one with {TORCHRUN}, "
            "which looks for a free one, or give another (--master-port of torchrun, MASTER_PORT)"
        )
    if came := re.search(r"Timed out after (\d+) seconds waiting for clients. (\d+)/(\d+)", text):
        return NotMet(
            f"{came[2]} of {came[3]} ranks came to port {port} within {came[1]} s: the words of the others, or of what "
            "starts them, tell why; all must be started, each with a RANK of its own"
        )
    if "client socket has timed out" in text:
        return NotMet(
            f"rank {here.rank} found no rank 0 at port {port} of {env['MASTER_ADDR']}: its own words, or its "
            "launcher's, tell why"
        )
    return None
