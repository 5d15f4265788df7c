"""examples/notebook.ipynb: its cells, run one after another, train what they say; and it is kept without outputs."""

import json
from pathlib import Path

import pytest
from conftest import CHECKOUT, command

from fashion_ddp import load_run

CELLS = json.loads((CHECKOUT / "examples" / "notebook.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.mark.quick
def test_no_output_is_kept() -> None:
    assert [(cell["outputs"], cell["execution_count"]) for cell in CODE] == [([], None)] * len(CODE)


@pytest.mark.slow
def test_the_cells_train_on_one_rank_and_on_two(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "cells.py").write_text("\n".join("".join(cell["source"]) for cell in CODE))
    done = command("python", "cells.py", cwd=tmp_path, PYTHONPATH=str(CHECKOUT), FASHION_DDP_DATA_DIR=str(data_dir))
    assert done.returncode == 0, done.stderr
    runs = {path.name: load_run(path).summary for path in (tmp_path / "runs").iterdir()}
    assert {name: (one["status"], one["world_size"]) for name, one in runs.items()} == {
        **dict.fromkeys(("linear-blog-seed42", "mlp-blog-seed0", "mlp-blog-seed1"), ("finished", 1)),
        "linear-two-ranks": ("finished", 2),
    }
    alone, together = (runs[name]["test/accuracy"] for name in ("linear-blog-seed42", "linear-two-ranks"))
    assert together == pytest.approx(alone, abs=1e-3)
    assert done.stdout.endswith(f"ranks: 1, test accuracy {alone:.2%}\nranks: 2, test accuracy {together:.2%}\n")
