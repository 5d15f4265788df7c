"""Where ranks meet, and what they say where they do not: of real sockets and of torch's own errors."""

import datetime
import socket
import threading
from pathlib import Path

import pytest
from conftest import forked
from torch.distributed import DistError, TCPStore

from fashion_ddp.distributed.machine import MachineError, RankPlacement
from fashion_ddp.distributed.rendezvous import explain_failure, free_port, wait_for_rank_zero
from fashion_ddp.errors import UserError

pytestmark = pytest.mark.quick

SECOND = RankPlacement(rank=1, world_size=2, local_rank=0, local_world_size=1)
SECONDS = datetime.timedelta(seconds=1)


def test_the_first_rank_of_another_machine_is_waited_for() -> None:
    port = free_port()
    with socket.socket() as first:
        first.bind(("127.0.0.1", port))
        threading.Timer(0.3, first.listen).start()
        wait_for_rank_zero(SECOND, {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})


@pytest.mark.parametrize(
    ("host", "said"),
    [("no-such-host.invalid", "is not found by name"), ("127.0.0.1", "did not answer at port {port} for 0 s")],
)
def test_a_machine_that_does_not_answer_is_named(host: str, said: str) -> None:
    port = free_port()
    with pytest.raises(MachineError) as caught:
        wait_for_rank_zero(SECOND, {"MASTER_ADDR": host, "MASTER_PORT": str(port)}, timeout=0)
    assert f"rank 0's machine {host!r} {said.format(port=port)}" in str(caught.value)


def test_ranks_of_one_machine_wait_for_nothing() -> None:
    wait_for_rank_zero(RankPlacement(1, 2, 1, 2), {"MASTER_ADDR": "no-such-host.invalid"}, timeout=0)


def test_a_port_that_is_taken_is_told_in_one_line(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--dataset", "synthetic", "--tracker", "none", "--run-dir", "run"]
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        place |= {"MASTER_PORT": str(port)}
        ended = forked("fashion_ddp.train", *words, cwd=tmp_path, **place)
    [line] = [line for line in ended.stderr.splitlines() if not line.startswith("[W")]  # of torch's own
    assert ended.returncode == 2
    assert line.startswith(f"error: {socket.gethostname()}: port {port}, where ranks were to meet, is taken")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("first", "said"),
    [(True, "1 of 2 ranks came to port {port} within 2 s"), (False, "rank 1 found no rank 0 at port {port} of ")],
)
def test_a_rank_that_does_not_come_is_told_by_who_waited(first: bool, said: str) -> None:
    port, here = free_port(), RankPlacement(0 if first else 1, 2, 0 if first else 1, 2)
    with pytest.raises(DistError) as caught:
        TCPStore("127.0.0.1", port, 2, first, SECONDS)
    told = explain_failure(caught.value, here, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    assert isinstance(told, UserError) and said.format(port=port) in str(told)
    assert getattr(told, "of_rank", False)  # else rank 1 would say nothing


def test_other_errors_mean_what_they_say() -> None:
    assert explain_failure(RuntimeError("Connection reset by peer"), SECOND, {}) is None
