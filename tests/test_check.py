"""What a doubtful user is told about the machine, and the probe of ranks."""

from pathlib import Path

import pytest
from conftest import command, forked

from fashion_ddp import check
from fashion_ddp.distributed import machine, probe

quick = pytest.mark.quick
Capsys = pytest.CaptureFixture[str]


def found_in(printed: str) -> dict[str, str]:
    """What was found, by its name."""
    return {line[:12].strip(): line[12:] for line in printed.splitlines()}


@quick
def test_a_machine_without_cards_can_train(data_dir: Path, hostile_home: Path, tmp_path: Path) -> None:
    done = forked("fashion_ddp.check", cwd=tmp_path, FASHION_DDP_DATA_DIR=str(data_dir))
    found = found_in(done.stdout)
    assert done.returncode == 0 and done.stdout.endswith("training can start here\n") and not list(tmp_path.iterdir())
    assert found["device"] == "a run takes the CPU: there is no NVIDIA card"
    assert "fp32" in found["precision"] and found["precision"].endswith("not tf32, fp16")
    assert f"reads {hostile_home}/.cache/huggingface/accelerate/default_config.yaml" in found["accelerate"]
    assert found["data"].startswith(f"fashion_mnist in {data_dir}")
    assert "torch 2." in found["versions"] and ", commit " in found["versions"]


@quick
def test_cards_that_torch_cannot_use_are_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    monkeypatch.setattr(machine, "_cards_present", lambda: 1)
    with pytest.raises(SystemExit) as end:
        check.main()
    out, err = capsys.readouterr()
    device = found_in(out)["device"]
    assert end.value.code == 1 and device.startswith("PROBLEM: ") and "the driver is probably older" in device
    assert err == "error: training cannot start here: 1 problem, see above\n"


@quick
def test_what_is_missing_or_in_the_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    (tmp_path / "libcudart.so.12").touch()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    variables = {"LD_LIBRARY_PATH": f":{tmp_path}:/nowhere", "FASHION_DDP_DATA_DIR": "/nowhere", "PATH": "/nowhere"}
    variables |= {"WANDB_API_KEY": "5ecre7", "WANDB_PROJECT": "mine", "SLURM_JOB_ID": "7"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check.main()
    printed = "".join(capsys.readouterr())
    found = found_in(printed)
    assert "5ecre7" not in printed
    assert found["libraries"].startswith(f"{tmp_path} on LD_LIBRARY_PATH comes before torch's own libcudart.so.12")
    assert "train-images-idx3-ubyte.gz" in found["data"] and "python -m fashion_ddp.data" in found["data"]
    assert ", online (WANDB_PROJECT=mine)" in found["W&B"] and found["SLURM"] == "none of its commands is installed"
    monkeypatch.delenv("WANDB_API_KEY")
    check.main()
    assert ", offline: there is no key" in found_in(capsys.readouterr().out)["W&B"]
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    check.main()
    assert ", online (" in found_in(capsys.readouterr().out)["W&B"]


@pytest.mark.slow
def test_ranks_that_can_talk_say_how_fast(tmp_path: Path) -> None:
    done = command("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "fashion_ddp.check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" on ")[0] for line in lines[:2]] == ["rank 0 of 2", "rank 1 of 2"]
    assert [line.partition(":")[0] for line in lines[2:4]] == [f"all-reduce of {name}" for name in probe.SIZES]
    assert lines[4:] == ["the 2 ranks can train together"] and not list(tmp_path.iterdir())
