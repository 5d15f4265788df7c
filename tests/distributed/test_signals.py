"""Told to stop, by a signal or by the launcher's death: saved, ended together, and continued by the same command."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKOUT
from faults import SMALL, STEPS, Fault, start, summary, wrong
from gates import ACCELERATE, PYTHON, TORCHRUN, Started, gate, living

from fashion_ddp.distributed import signals

EX_TEMPFAIL = 75
FEW = ["--checkpoint-every", "1000"]  # so that a checkpoint is one that a stop has saved


def saved(folder: Path) -> list[int]:
    """The steps at which the checkpoints of a run were saved."""
    return sorted(int(path.stem.removeprefix("step-")) for path in (folder / "run" / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of the run that nothing stopped, by number of ranks; made when it is first asked for."""

    @functools.cache
    def make(world_size: int) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        assert start(world_size, folder, every_step=False).wait() == [0] * world_size
        return folder

    return make


def assert_stopped(folder: Path, reason: str, times: int = 1) -> None:
    """That a run says so, in its folder and once for each time on the screen."""
    assert summary(folder)["status"] == "stopped"
    assert summary(folder)["error"].startswith(f"stopped ({reason}) and saved in epoch ")
    printed = "".join(path.read_text() for path in [*folder.glob("printed*"), *folder.glob("screen")])
    assert printed.count("stopped (") == printed.count("the same command continues") == times
    assert "Traceback" not in printed and not [p for p in folder.rglob(".*") if p.name.startswith(".step-")]


# --- Ranks together ---------------------------------------------------------------------------------------------------


def test_a_signal_to_any_rank_stops_all_at_one_step_and_the_same_command_continues(
    tmp_path: Path, whole: Callable[[int], Path]
) -> None:
    stops = {  # the step, the ranks that are told, by what, and what they say was the reason
        3: ([1], ["USR2"], "SIGUSR2"),
        8: ([0, 1], ["TERM", "TERM", "USR1", "INT", "INT", "TERM"], "SIGTERM"),  # the second INT comes at once
        26: ([1], ["INT"], "SIGINT"),
    }
    for times, (step, (ranks, names, reason)) in enumerate(stops.items(), start=1):
        before = max([0, *(s for s in stops if s < step)])
        faults = [Fault("step", name, rank=rank, count=step - before) for rank in ranks for name in names]
        run = start(2, tmp_path, FEW, faults)
        assert run.wait() == [EX_TEMPFAIL, EX_TEMPFAIL], run.printed()
        assert saved(tmp_path) == sorted(stops)[:times][-2:]
        assert_stopped(tmp_path, reason, times)
    assert start(2, tmp_path, FEW).wait() == [0, 0]
    assert wrong(tmp_path, whole(2)) == []
    assert summary(tmp_path)["status"] == "finished" and "error" not in summary(tmp_path)


@pytest.mark.slow
def test_signals_are_remembered_wherever_they_come(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    # Counted so that what a start writes is over: it is a checkpoint that is being written.
    saving = [("save", 3), ("fsync", 15), ("before a rename", 9), ("after a rename", 9), ("saved", 2)]
    # The first forward passes are of the warm-up, while Step is built.
    start_up = [("parse", 1), ("rendezvous", 1), ("load", 1), ("claim", 1), ("forward", 1)]
    training = [("forward", 5), ("sync point", 2), ("after the sync point", 2), ("append", 2), ("evaluation", 1)]
    names = ["TERM", "INT", "USR1", "USR2"]
    before = 0
    for at, (point, count) in enumerate([*saving, *start_up, *training]):
        every = "1000" if (point, count) in start_up else "0"
        rank = 0 if point == "append" or (point, count) in saving else at % 2
        name = names[at % 4]
        run = start(2, tmp_path, ["--checkpoint-every", every], [Fault(point, name, rank, count)])
        assert run.wait() == [EX_TEMPFAIL, EX_TEMPFAIL], (point, count, run.printed())
        assert_stopped(tmp_path, f"SIG{name}", at + 1)
        now = max(saved(tmp_path))
        assert now == before + 1 if (point, count) in start_up else now > before
        if (point, count) in saving:  # not before the first step, and not at an epoch's end
            assert now >= before + 2 and now // STEPS == before // STEPS
        before = now
    assert start(2, tmp_path).wait() == [0, 0]
    assert wrong(tmp_path, whole(2)) == []


@pytest.mark.slow
def test_a_run_that_is_all_but_done_when_told_finishes(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    faults = [Fault("evaluation", "TERM", 1, count=3), Fault("evaluated", "INT", 0, count=3)]
    faults += [Fault("results", "USR1", 0), Fault("end", "USR2", 0), Fault("end", "TERM", 0)]
    run = start(2, tmp_path, FEW, faults)
    assert run.wait() == [0, 0], run.printed()
    assert summary(tmp_path)["status"] == "finished" and wrong(tmp_path, whole(2)) == []


def test_a_second_interrupt_ends_a_rank_at_once_even_where_it_waits_for_one_that_stands_still(tmp_path: Path) -> None:
    run = start(2, tmp_path, FEW, [Fault("step", "stand still", rank=1, count=5)])
    steps, end = tmp_path / "run" / "steps.jsonl", time.monotonic() + 60
    try:
        while not (steps.exists() and len(steps.read_text().splitlines()) == 4):
            assert run.processes[0].is_alive() and time.monotonic() < end, run.printed()
            time.sleep(0.05)
        while run.processes[0].is_alive():  # the first is heard, and none within two seconds of it
            assert time.monotonic() < end, run.printed()
            run.send(signal.SIGINT, rank=0)
            time.sleep(0.2)
    finally:
        run.send(signal.SIGKILL, rank=1)
    assert run.wait() == [128 + signal.SIGINT, -signal.SIGKILL]
    assert run.printed().count("interrupt again") == run.printed().count("interrupted twice") == 1


def test_ranks_stop_where_the_launcher_is_not_there_any_more(tmp_path: Path) -> None:
    run = start(2, tmp_path, FEW, FASHION_DDP_LAUNCHER="1")  # as their parent had been, if it had died
    assert run.wait() == [EX_TEMPFAIL, EX_TEMPFAIL], run.printed()
    assert_stopped(tmp_path, "the launcher died")


# --- Processes as people start them -----------------------------------------------------------------------------------


def until_gone(run: Started, pids: list[int]) -> None:
    run.until(lambda: not any(living(pid) for pid in pids))


@pytest.mark.slow
def test_a_plain_process_is_stopped_from_its_first_import(tmp_path: Path) -> None:
    with Started(tmp_path, [*PYTHON, *SMALL, *FEW], gate("torch")) as run:
        [pid] = run.at_gate()
        os.kill(pid, signal.SIGUSR1)
        run.told()
        assert run.wait() == EX_TEMPFAIL, run.printed()
    assert saved(tmp_path) == [1]
    assert_stopped(tmp_path, "SIGUSR1")


# Of each launcher: its ranks, and what it is sent, with its exit code then and the run's reason. accelerate does not
# hand signals on: its rank notices that it is gone. SIGINT is typed in the test of Ctrl-C.
DIED = "the launcher died"
HANDED_ON = [(one, 1, one.name) for one in (signal.SIGTERM, signal.SIGHUP)]
STOPS: dict[str, tuple[list[str], int, list[tuple[int, int, str]]]] = {
    "torchrun": (TORCHRUN, 2, [*HANDED_ON, (signal.SIGKILL, -9, DIED)]),
    "accelerate": (ACCELERATE, 1, [(signal.SIGTERM, -15, DIED)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", STOPS)
def test_the_same_command_of_a_launcher_continues_however_it_was_stopped(
    launcher: str, tmp_path: Path, whole: Callable[[int], Path]
) -> None:
    words, world_size, stops = STOPS[launcher]
    words = [*words, *SMALL, *FEW]
    for number, code, reason in stops:
        with Started(tmp_path, words, gate("sync point")) as run:
            ranks = run.at_gate(world_size)
            run.process.send_signal(number)
            if reason == DIED:
                run.process.wait()
            else:
                run.told(world_size)
            assert run.wait() == code
            until_gone(run, ranks)
        assert summary(tmp_path)["error"].startswith(f"stopped ({reason}) and saved in epoch 1")
    assert run.printed().count("stopped (") == len(stops) and "fashion_ddp/" not in run.printed()  # in no traceback
    with Started(tmp_path, words) as run:
        assert run.wait() == 0
    assert wrong(tmp_path, whole(world_size)) == []


@pytest.mark.slow
def test_a_run_in_the_background_goes_on_when_its_shell_ends(tmp_path: Path) -> None:
    line = " ".join(["nohup", *PYTHON, *SMALL, "& wait"])
    with Started(tmp_path, ["sh", "-c", line], gate("sync point")) as run:
        [pid] = run.at_gate()
        run.process.kill()
        run.process.wait()
        for number in (signal.SIGHUP, signal.SIGINT):  # of the terminal, to all that it started
            os.kill(pid, number)
        run.let_through()
        until_gone(run, [pid])
    assert summary(tmp_path)["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        ([*PYTHON, *SMALL], EX_TEMPFAIL),
        ([*TORCHRUN, *SMALL], 1),
        ([*ACCELERATE, *SMALL], -signal.SIGINT),
        (
            ["bash", "-c", f"trap : INT; {' '.join(PYTHON + SMALL)} 2>&1 | tee log; exit ${{PIPESTATUS[0]}}"],
            EX_TEMPFAIL,
        ),
    ],
    ids=["python", "torchrun", "accelerate", "tee"],
)
def test_ctrl_c_on_a_terminal_saves_and_ends_without_a_traceback(
    words: list[str], exit_code: int, tmp_path: Path
) -> None:
    with Started(tmp_path, words, gate("sync point"), terminal=True) as run:
        ranks = run.at_gate(2 if "torchrun" in words[0] else 1)
        run.type(b"\x03")
        run.told(len(ranks))
        assert run.wait() == exit_code, run.printed()
        until_gone(run, ranks)
    assert summary(tmp_path)["error"].startswith("stopped (SIGINT) and saved in epoch 1")
    assert "fashion_ddp/" not in run.printed() and "BrokenPipe" not in run.printed()
    if "python" in words[0]:
        assert "Traceback" not in run.printed() and "the same command continues" in run.printed()
    assert (tmp_path / "log").exists() == ("tee" in words[-1])


# --- One process, without a run ---------------------------------------------------------------------------------------


def listening(code: str, **env: str) -> subprocess.Popen[str]:
    """A process that runs `code`, with what it needs at hand, and prints."""
    head = "import os, signal, sys, time\nfrom fashion_ddp.distributed import signals\nme = os.getpid()\n"
    head += "for one in (signal.SIGINT, signal.SIGHUP): signal.signal(one, signal.SIG_DFL)\n"
    words = [sys.executable, "-c", head + textwrap.dedent(code)]
    surroundings = {k: v for k, v in os.environ.items() if k != "RANK"} | env
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=CHECKOUT, env=surroundings, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


HEARD = {
    "every signal, and a second call forgets none": """
        signals.listen()
        for one in signals.SIGNALS[:3]: os.kill(me, one)
        signals.listen()
        for one in signals.SIGNALS[3:]: os.kill(me, one)
        assert len(signals.received()) == 5 and signals.stop_requests() == [True] * 5 + [False]
        """,
    "in the main thread alone": """
        import threading
        threading.excepthook = lambda told: refused.append(told.exc_type)
        refused, thread = [], threading.Thread(target=signals.listen)
        thread.start()
        thread.join()
        signals.listen()
        os.kill(me, signal.SIGTERM)
        assert (refused, signals.received()) == ([ValueError], [signal.SIGTERM])
        """,
    "not what nohup or a shell shut off for its background, and no more than that": """
        for one in signals.SIGNALS[:3]: signal.signal(one, signal.SIG_IGN)
        signals.listen()
        for one in signals.SIGNALS: os.kill(me, one)
        assert signals.received() == [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
        """,
    "those held while a process started, when it listens": """
        import subprocess
        signals.listen()
        child = "import signal; from fashion_ddp.distributed import signals; input(); signals.listen(); "
        child += "assert len(signals.received()) == 5 and not signal.pthread_sigmask(signal.SIG_BLOCK, [])"
        with signals.blocked():
            os.kill(me, signal.SIGUSR2)
            process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, text=True)
        for one in signals.SIGNALS: process.send_signal(one)
        process.communicate("go on")
        assert (process.returncode, signals.received()) == (0, [signal.SIGUSR2])
        """,
    "none in the thread that watches, whose handler might outlive Python": """
        signals.listen()
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)  # in this thread
        for one in signals.SIGNALS: os.kill(me, one)
        time.sleep(0.1)
        assert (len(signal.sigpending()), signals.received()) == (5, [])
        """,
    "more than can be taken in, without a block or a warning": """
        signals._watch = lambda readable: time.sleep(60)
        signals.listen()
        for _ in range(70_000): os.kill(me, signal.SIGUSR1)
        assert signals.received() == [signal.SIGUSR1]
        """,
}


@pytest.mark.quick
@pytest.mark.parametrize("what", HEARD)
def test_a_process_that_listens_hears(what: str) -> None:
    done = listening(HEARD[what])
    assert (*done.communicate(), done.returncode) == ("", "", 0)


@pytest.mark.quick
def test_interrupts_soon_after_the_first_are_one_with_it() -> None:
    done = listening(
        """
        signals.SECOND_INTERRUPT = 60.0
        signals.listen()
        for _ in range(5):
            os.kill(me, signal.SIGINT)
            time.sleep(0.1)
        assert signals.received() == [signal.SIGINT]
        """
    )
    said = done.communicate()[1]
    assert done.returncode == 0 and said.count("interrupt again to end at once") == said.count("interrupted") == 1


@pytest.mark.quick
def test_the_exit_code_stays_while_python_takes_itself_apart() -> None:
    done = listening(
        """
        class Late:
            def __del__(self, kill=os.kill, me=me, signals=signals.SIGNALS):
                for one in signals: kill(me, one)
                print("deleted", flush=True)
        signals.listen()
        late = Late()
        sys.exit(75)
        """
    )
    assert done.communicate()[0] == "deleted\n" and done.returncode == 75


@pytest.mark.quick
def test_a_storm_of_signals_over_a_process_s_end_changes_neither_its_exit_code_nor_what_it_prints() -> None:
    for _ in range(20):  # one in five printed a traceback while handlers alone were taken away
        done = listening("signals.listen(); print(1, flush=True); time.sleep(0.05); sys.exit(75)")
        assert done.stdout and done.stdout.readline()
        while done.poll() is None:
            for one in signals.SIGNALS[2:]:
                done.send_signal(one)
        assert (done.returncode, *done.communicate()) == (75, "", "")


@pytest.mark.quick
def test_an_interrupt_whose_reader_is_gone_ends_all_the_same_and_takes_a_launcher_s_children_with_it() -> None:
    done = listening(
        """
        import subprocess
        signals.SECOND_INTERRUPT = 0.2
        signals.listen()
        signals.children = [subprocess.Popen(["sleep", "300"], stdout=subprocess.DEVNULL)]
        print(signals.children[0].pid, flush=True)
        time.sleep(100)
        """
    )
    assert done.stdout and done.stderr
    child = int(done.stdout.readline())
    done.stderr.close()
    while done.poll() is None:
        done.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert done.returncode == 128 + signal.SIGINT
    end = time.monotonic() + 60
    while living(child):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.quick
def test_a_rank_without_its_launcher_that_comes_to_no_sync_point_ends() -> None:
    code = "signals.ORPHAN_TIMEOUT = 0.5\nsignals.listen()\ntime.sleep({})"
    orphan = listening(code.format(100), FASHION_DDP_LAUNCHER="1")
    launched = listening(code.format(2), TORCHELASTIC_RUN_ID="1")  # whose parent, this process, lives
    assert "Traceback" not in orphan.communicate()[1] and orphan.returncode == 1
    assert launched.wait() == 0
