"""What submitted runs cost: what sacct prints is read, and what it does not know yet, or no longer, harms nothing.

A real sacct is in test_slurm.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from reports import make_run

from launch import accounting, starts

pytestmark = pytest.mark.quick

# What sacct of SLURM 22.05 printed: two jobs were preempted and one queued again by hand, all begun again, and two
# others had only waited. (The energy was written into its database: no meter was there.)
SACCT = """\
2|1796103532|1796103533|1796103540|7|billing=2,cpu=2,energy=360000,node=2|360000
1_0|1796103532|1796103533|1796103536|3|billing=1,cpu=1,gres/gpu=2,node=1|
1_1|1796103532|1796103533|1796103540|7|billing=1,cpu=1,energy=360000,gres/gpu=2,node=1|360000
1_0|1796103536|1796103543|1796103573|30|billing=1,cpu=1,gres/gpu=2,node=1|0
2|1796103540|1796103546|1796103586|40|billing=2,cpu=2,node=2|0
1_1|1796103540|1796103546|{end}|30|billing=1,cpu=1,gres/gpu=2,node=1|0
5|1796103568|1796103569|1796103569|0||0
6_[0,2-3]|1796103568|Unknown|Unknown|0||0
"""


def test_what_sacct_prints_is_read() -> None:
    found = accounting.parse(SACCT.format(end="Unknown"))
    assert [one.job for one in found] == ["2", "1_0", "1_1", "1_0", "2", "1_1"]  # who waited only had nothing
    assert found[3] == accounting.Allocation("1_0", True, queued_s=7, elapsed_s=30, cores=1, cards=2, energy_j=0)
    assert found[4].cards is None and found[4].cores == 2 and found[0].energy_j == 360000 and not found[5].ended
    by_type = accounting.parse("3|1|2|4|2|cpu=8,gres/gpu:a100=2,gres/gpu:h200=1,mem=1.50G,node=1|")
    assert [one.cards for one in by_type] == [3]
    with pytest.raises(ValueError, match="not enough values"):
        accounting.parse("slurm: something else\n")


class Accounting:
    """A cluster's accounting: a program that prints each of these answers once, and fails when it has no more."""

    def __init__(self, folder: Path):
        self.folder = folder
        program = folder / "sacct"
        program.write_text(
            f"#!/bin/sh\ncd {folder}\nfor next in [0-9]; do /bin/cat $next && exec /bin/rm $next; done\n"
            "printf 'sacct: error: failed to open connection\\nsacct: error: Connection refused' >&2\nexit 1\n"
        )
        program.chmod(0o755)

    def answers(self, *texts: str) -> None:
        for number, text in enumerate(texts):
            (self.folder / str(number)).write_text(text)


@pytest.fixture
def sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Accounting:
    (folder := tmp_path / "programs").mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(accounting, "PAUSE", 0)
    return Accounting(folder)


STOPPED = {"end": "SIGTERM", "starting_s": 3.0, "trained_s": 4.0}
FINISHED = {"end": "finished", "starting_s": 5.0, "trained_s": 20.0, "repeats": 469}


def submitted(folder: Path, *its_starts: dict[str, Any], job: str = "1_1", executor: str = "slurm") -> Path:
    """A run of three epochs as its jobs leave it."""
    make_run(folder, model="linear")
    (folder / "job.json").write_text(json.dumps({"executor": executor, "job": job}))
    begun(folder, *its_starts, job=job)
    return folder


def begun(folder: Path, *its_starts: dict[str, Any], job: str = "1_1") -> None:
    each = {"job": job, "step": 0, "repeats": 0, "time": "2026-12-01T05:38:53"}
    (folder / starts.FILE).write_text("".join(json.dumps(each | start) + "\n" for start in its_starts))


def cost_of(folder: Path) -> dict[str, Any]:
    return {name.removeprefix("cost/"): value for name, value in json.loads((folder / "cost.json").read_text()).items()}


OWN = {"starts": 2, "untimed_starts": 0, "starting_s": 8.0, "training_s": 24.0, "repeated_steps": 469}
OWN |= {"repeated_s": 4.5}  # an epoch of them
FROM_SACCT = {"core_hours": 37 / 3600, "card_hours": 74 / 3600, "queued_s": 7, "energy_j": 360000, "complete": True}


def test_the_accounting_is_asked_until_it_knows_the_end_and_an_answer_is_kept(
    sacct: Accounting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = submitted(tmp_path / "one", STOPPED, FINISHED)
    two = submitted(tmp_path / "two", STOPPED, FINISHED, job="2")
    local = submitted(tmp_path / "local", FINISHED, job="5", executor="local")
    sacct.answers("", SACCT.format(end="Unknown"), SACCT.format(end="1796103576"))
    accounting.write_costs([one, two, local])
    cost = cost_of(one)
    assert cost.pop("gathered").startswith("20") and cost == OWN | FROM_SACCT
    assert cost_of(two)["core_hours"] == 94 / 3600 and "card_hours" not in cost_of(two)
    assert not (local / "cost.json").exists()
    accounting.write_costs([one, two])  # nobody answers, and nobody is asked
    assert cost_of(one).items() > FROM_SACCT.items() and capsys.readouterr().out == ""


def test_where_nobody_answers_it_is_what_the_run_recorded(
    sacct: Accounting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted(tmp_path / "one", STOPPED, FINISHED)
    accounting.write_costs([run])
    assert cost_of(run).keys() == {"gathered", *OWN}
    said = capsys.readouterr().out
    assert said.endswith("known from their own records only: sacct: error: Connection refused\n")
    assert said.count("\n") == 1
    sacct.answers("sacct: what is this?\n")
    accounting.write_costs([run])
    assert cost_of(run).keys() == {"gathered", *OWN} and "is not understood" in capsys.readouterr().out
    (sacct.folder / "sacct").unlink()
    accounting.write_costs([run])
    assert cost_of(run).keys() == {"gathered", *OWN} and "sacct is not here" in capsys.readouterr().out


def test_what_the_accounting_does_not_have_is_not_made_up(
    sacct: Accounting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "PATIENCE", 0)
    run = submitted(tmp_path / "one", STOPPED, FINISHED, job="2")
    begun(run, STOPPED, {"time": "2038-01-01T00:00:00"}, FINISHED | {"repeats": 0}, job="2")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"device": "NVIDIA H200"}))
    sacct.answers(SACCT.format(end="Unknown"))
    accounting.write_costs([run])
    cost = cost_of(run)
    assert (cost["starts"], cost["complete"], cost["untimed_starts"], cost["card_hours"]) == (3, False, 1, None)
    assert cost["repeated_steps"] == 0 and cost["starting_s"] == 8.0
