"""What a step on a card does to the card, call by call, for every kind of configuration (steps.py)."""

import json
from typing import Any

import pytest
from conftest import command
from stand_in import environment

STEPS = 5


@pytest.fixture(scope="module", params=["0", "1"], ids=["old NCCL backend", "new NCCL backend"])
def observed(request, library, tmp_path_factory) -> list[dict[str, Any]]:
    env = environment(library) | {"FAKE_CUDA_CARD": "hopper", "TORCH_DIST_USE_NCCL2": request.param}
    here = str(request.path.parent)
    env["PYTHONPATH"] += f":{request.path.parents[1]}:{here}"
    done = command("python", f"{here}/steps.py", cwd=tmp_path_factory.mktemp("steps"), **env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
