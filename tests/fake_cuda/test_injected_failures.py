"""What a user sees where NCCL, a capture, a replay or memory fails: one message, and how to go on."""

import pytest
from stand_in import StandIn

pytestmark = pytest.mark.slow


def test_nccls_own_words_are_told_where_ranks_cannot_join(stand_in: StandIn) -> None:
    ends, printed = stand_in.train(2, FAKE_CUDA_FAIL="nccl-init")
    assert 0 not in ends
    assert printed.count("No space left on device") == 1 and "NCCL_SHM_DISABLE=1" in printed, printed
    assert "Traceback" not in printed


def test_two_ranks_on_one_card_are_told_so(stand_in: StandIn) -> None:
    ends, printed = stand_in.train(2, CUDA_VISIBLE_DEVICES="1")
    assert 0 not in ends
    assert printed.count("Duplicate GPU detected") == 1 and "Traceback" not in printed, printed


@pytest.mark.parametrize(
    "env, words",
    [
        ({"FAKE_CUDA_FAIL": "nccl-capture"}, "nccl"),  # in the backward pass, in the midst of DDP's reduction
        ({"FAKE_CUDA_FAIL": "capture", "FAKE_CUDA_FAIL_RANK": "1"}, "CUDA error: "),  # in the forward pass
    ],
    ids=["NCCL on all ranks", "a kernel on one rank"],
)
def test_where_a_capture_fails_the_run_goes_on_kernel_by_kernel(
    stand_in: StandIn, env: dict[str, str], words: str
) -> None:
    ends, printed = stand_in.train(2, **env)
    assert ends == [0, 0], printed
    assert not stand_in.summary()["cuda_graph"]
    assert "launched kernel by kernel: torch cannot record it (" + words in printed, printed
    assert not any(one.get("NCCL end that would hang") for one in stand_in.counts())


@pytest.mark.parametrize(
    "where, words",
    [
        ("nccl-capture-hangs", "all wait for rank 1"),
        ("replay-hangs", "no rank is behind the others"),  # the others have launched the same graph
    ],
)
def test_a_hang_in_capture_or_replay_ends_in_time_with_words(stand_in: StandIn, where: str, words: str) -> None:
    ends, printed = stand_in.train(2, "--timeout", "10", FAKE_CUDA_FAIL=where, FAKE_CUDA_FAIL_RANK="1")
    assert 0 not in ends
    assert "nothing happened for 10 s (--timeout)" in printed and words in printed, printed
    assert "--no-cuda-graph" in printed
    stacks = [(stand_in.run / "logs" / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert all("cuda_graph.py" in one for one in stacks)


def test_a_card_that_is_full_is_told_with_what_to_do(stand_in: StandIn) -> None:
    ends, printed = stand_in.train(1, FAKE_CUDA_FREE_BYTES=str(24 * 2**20))
    assert 0 not in ends
    assert "memory" in printed and "Traceback" not in printed, printed
