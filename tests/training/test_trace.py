"""A trace of a few steps, of every rank, in the format that the usual viewers open."""

import json
from pathlib import Path

import pytest
from faults import Fault, start

from fashion_ddp.training.trace import SKIPPED, STEPS


@pytest.mark.slow
def test_each_rank_writes_one_and_a_start_that_continues_another(tmp_path: Path) -> None:
    run = start(2, tmp_path, ["--trace"], [Fault("step", "TERM", count=30)])
    assert set(run.wait()) == {75}
    logs = tmp_path / "run" / "logs"
    first = f"trace-step{SKIPPED + 1}-rank"
    assert {path.name for path in logs.glob("trace-*")} == {f"{first}0.json", f"{first}1.json"}
    for rank in (0, 1):
        events = json.loads((logs / f"{first}{rank}.json").read_text())["traceEvents"]
        names = [event["name"] for event in events if event.get("ph") == "X"]
        assert len({name for name in names if name.startswith("ProfilerStep#")}) == STEPS
        assert {"aten::convolution", "aten::convolution_backward", "gloo:all_reduce"} <= set(names)
    assert start(2, tmp_path, ["--trace"]).wait() == [0, 0]
    assert len(list(logs.glob("trace-*"))) == 4
