"""What a step on a card asks of it, call by call, for every kind of configuration (steps.py takes them)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import command, made_once
from stand_in import HERE, environment

Observed = list[dict[str, Any]]


@pytest.fixture(scope="module", params=["every", pytest.param("few", marks=pytest.mark.slow)])
def observed(
    request: pytest.FixtureRequest, stand_in_library: Path, tmp_path_factory: pytest.TempPathFactory
) -> Observed:
    """Every configuration, and a few of them with the newer NCCL backend of torch 2.15."""
    env = environment(stand_in_library) | {"FAKE_CUDA_CARD": "hopper"}
    env |= {"TORCH_DIST_USE_NCCL2": "1" if request.param == "few" else "0"}
    env["PYTHONPATH"] += f":{HERE.parent}"

    def observe(file: Path) -> None:
        done = command("python", str(HERE / "steps.py"), request.param, cwd=tmp_path_factory.mktemp("steps"), **env)
        assert done.returncode == 0, done.stderr
        file.write_text(done.stdout)

    file = made_once(stand_in_library.with_name(f"{request.param}.observed"), observe)
    return [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]


def offenders(
    observed: Observed, graph: bool, part: str, wrong: Callable[[dict[str, int]], bool], ahead: bool = False
) -> list[Any]:
    """The configurations, with or without a graph, of which the counts of a part are wrong; and these counts. `ahead`:
    those whose images are read ahead, by a thread whose calls are counted, too."""
    cases = [one for one in observed if one["graph"] == graph and ("data_on" in one["given"]) == ahead]
    assert len(cases) >= (1 if ahead else 4)
    return [(one["given"], one["no_graph"], one[part]) for one in cases if wrong(one[part])]


def test_a_capture_makes_no_call_that_cuda_forbids_and_launches_nothing_beside_it(observed: Observed) -> None:
    def wrong(capture: dict[str, int]) -> bool:
        broken = any(what.startswith(("forbidden", "beside a capture", "capture failed")) for what in capture)
        return broken or capture.get("capture ended") != 1 or not capture.get("NCCL in a capture")

    assert not offenders(observed, True, "capture", wrong)


def test_a_step_is_one_launch_without_a_copy_or_a_wait(observed: Observed) -> None:
    # The one event tells when the step began (training/timing.py).
    assert not offenders(observed, True, "steps", lambda steps: steps != {"graph launch": 5, "event recorded": 5})


def test_a_step_whose_images_are_read_ahead_copies_them_once_more_and_waits_for_nobody(observed: Observed) -> None:
    def wrong(steps: dict[str, int]) -> bool:
        launches = steps.get("graph launch"), steps.get("copy on the device"), "kernel" in steps
        return launches != (5, 5, False) or "stream synchronize" in steps or "device synchronize" in steps

    assert not offenders(observed, True, "steps", wrong, ahead=True)


def test_a_step_kernel_by_kernel_waits_for_nothing_and_brings_nothing_back(observed: Observed) -> None:
    def wrong(steps: dict[str, int]) -> bool:
        return any("synchronize" in what or what == "copy device to host" for what in steps) or not steps["kernel"]

    assert not offenders(observed, False, "steps", wrong)


def test_an_epoch_that_was_drawn_ahead_is_taken_without_a_wait(observed: Observed) -> None:
    for graph in (True, False):
        assert not offenders(observed, graph, "between", lambda counts: any("synchronize" in what for what in counts))


def test_graphs_are_let_go_before_nccl_ends(observed: Observed) -> None:
    def wrong(end: dict[str, int]) -> bool:
        return "NCCL end that would hang" in end or not end.get("ncclCommDestroy")

    assert not offenders(observed, True, "end", wrong)
