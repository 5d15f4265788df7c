"""Unmodified commands from their start to their end on cards, as launchers and SLURM start them."""

import json
import os

import pytest
from conftest import CHECKOUT, free_port
from stand_in import TINY, StandIn, finish

pytestmark = pytest.mark.slow

TRAIN = ["-m", "fashion_ddp.train", *TINY]


def trained(stand_in: StandIn, ranks: int, captures: int = 1) -> None:
    """Assert that so many ranks trained with a graph, made no mistake that the library noticed, and parted in order."""
    assert stand_in.summary()["cuda_graph"]
    counts = stand_in.counts()
    assert len([one for one in counts if one.get("NCCL in a capture")]) == ranks * captures
    for one in counts:
        wrong = ("forbidden", "beside a capture", "capture failed", "NCCL end that would hang", "ncclCommAbort")
        assert not [what for what in one if what.startswith(wrong)]
        assert one.get("NCCL communicator") == one.get("ncclCommDestroy")


def test_accelerate_launch_with_our_file_trains_on_four_cards(stand_in: StandIn) -> None:
    launcher = ["accelerate", "launch", "--config_file", str(CHECKOUT / "launch" / "accelerate_config.yaml")]
    ends, printed = finish([stand_in.start(4, *launcher, *TRAIN)])
    assert ends == [0], printed
    trained(stand_in, ranks=4)


def test_two_machines_of_two_cards_train_together(stand_in: StandIn) -> None:
    # One real machine, on which each launcher sees two cards.
    words = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    launchers = [
        stand_in.start(4, "torchrun", *words, "--node-rank", node, *TRAIN, CUDA_VISIBLE_DEVICES=cards)
        for node, cards in {"0": "0,1", "1": "2,3"}.items()
    ]
    ends, printed = finish(launchers)
    assert ends == [0, 0], printed
    trained(stand_in, ranks=4)


def test_ranks_that_see_one_card_each_train_are_stopped_and_continue(stand_in: StandIn) -> None:
    command = [*TINY, "--epochs", "2"]  # of 12 steps
    for stop_at, end in {"10": 75, "": 0}.items():
        ends, printed = finish(stand_in.start_ranks(2, *command, own_card=True, FAKE_CUDA_STOP_AT=stop_at))
        assert ends == [end, end], printed
    # Each step stands in the record once, whichever process took it.
    lines = (stand_in.run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    trained(stand_in, ranks=2, captures=2)


def test_a_card_alone_needs_no_ranks(stand_in: StandIn) -> None:
    ends, printed = finish([stand_in.start(1, "python", *TRAIN)])
    assert ends == [0], printed
    assert stand_in.summary()["cuda_graph"]


def test_the_check_of_the_ranks_adds_up_on_cards(stand_in: StandIn) -> None:
    ends, printed = finish(stand_in.start_ranks(2, program="fashion_ddp.check"))
    assert ends == [0, 0] and "the 2 ranks can train together" in printed, printed


def test_three_runs_from_one_server_share_two_cards_by_mps(stand_in: StandIn) -> None:
    programs = stand_in.folder / "programs"
    programs.mkdir()
    control = programs / "nvidia-cuda-mps-control"
    control.write_text('#!/bin/sh\necho "$* $(test -n "$1" || cat)" "${CUDA_VISIBLE_DEVICES-all}" >> mps.log\n')
    control.chmod(0o755)
    local = ["-m", "launch.local", "--models", "linear", "mlp", "relu", "--jobs", "3"]
    flags = [word for word in TINY if word not in ("--run-dir", "run", "--model", "linear")]
    path = f"{programs}:{os.environ['PATH']}"
    ends, printed = finish([stand_in.start(2, "python", *local, *flags, PATH=path, CUDA_VISIBLE_DEVICES="1,0")])
    assert ends == [0], printed
    assert "runs on the same card share it by MPS" in printed
    assert [f"] {model}-blog-seed42-" in printed for model in ("linear", "mlp", "relu")] == [True] * 3
    assert printed.count("begins on card 1;") == 2 and printed.count("begins on card 0;") == 1
    assert (stand_in.folder / "mps.log").read_text() == "-d  all\n quit all\n"
    summaries = [json.loads(path.read_text()) for path in stand_in.folder.glob("runs/*/summary.json")]
    assert [one["side_by_side"] for one in summaries] == [3] * 3 and all(one["cuda_graph"] for one in summaries)
