"""What an NVIDIA card shows in a few minutes: that all works on it, how fast, how exactly, and in how much memory.

    PYTHONPATH=. python benchmarks/card.py --minutes 8 --data-dir DIR

For one card of any kind, where torch, torchvision, Accelerate and pytest are installed; fashion_ddp need not be. Its
steps (benchmarks/card_steps.py) come in the order of what they tell. Each has its share of the minutes, and what it
finds is written into --out at once: a machine that goes away, or Ctrl-C, leaves what was done. A step that fails or
runs out of its time is recorded as such, and the next begins. In the end --page is made of the results.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import page

from fashion_ddp import data
from fashion_ddp.config import Config
from fashion_ddp.distributed import machine
from fashion_ddp.errors import UserError
from fashion_ddp.files import write_whole

HERE = Path(__file__).parent.absolute()
CHECKOUT = HERE.parent
CASES = ["cnn-25", "linear-10", "cnn-10", "relu-10"]  # the most telling first
PRECISIONS = ["fp32", "tf32", "bf16", "fp16"]
# A step may take its weight's share of the time that is left for it and those after it.
STEPS = {"describe": 1, "smoke": 3, "tests": 6, "track": 6, "precision": 3, "memory": 2, "rounds": 1}
STARTED = time.monotonic()
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDING = 5.0  # seconds for the page
PATIENCE = 5.0  # seconds that a process gets to be gone
LINES = 20  # kept of what a step printed that failed


def run(command: list[str], limit: float, keep: Callable[[list[Any]], None]) -> dict[str, Any]:
    """Run a step for `limit` seconds at most, and hand each finding that it prints to `keep`. Return how it ended."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # What interrupts waits until the step can be killed: in the midst of a start it would leave it behind. A signal
        # mask would not do: another thread of this process would take the signal.
        interrupted: list[int] = []
        heeded = [number for number in INTERRUPTS if signal.getsignal(number) == signal.default_int_handler]
        for number in heeded:
            signal.signal(number, lambda number, _: interrupted.append(number))
        process = subprocess.Popen(
            command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        # A thread, as a process that hangs in the driver cannot be killed, and would be read from for ever.
        reader = threading.Thread(target=read, args=(process.stdout, keep), daemon=True)
        reader.start()
        try:
            for number in heeded:
                signal.signal(number, signal.default_int_handler)
            if interrupted:
                raise KeyboardInterrupt
            code = process.wait(limit)
            ended = f"failed (exit code {code})" if code else "done"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        finally:
            kill(process)
            reader.join(PATIENCE)
        log.seek(0)
        lines = [] if ended == "done" else log.read().splitlines()[-LINES:]
    return {"ended": ended, "seconds": round(time.monotonic() - start, 1), "limit": round(limit, 1), "lines": lines}


def read(findings: Iterable[str], keep: Callable[[list[Any]], None]) -> None:
    """Hand on what a step prints: a finding per line."""
    for line in findings:
        if line.endswith("\n"):  # a process that is killed may leave half a line
            keep(json.loads(line))


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a step's session, and what its processes started: torchrun puts its ranks into sessions of their own."""
    family = living()
    doomed = [one for one, _, session in family if session == process.pid]
    for one in doomed:  # which grows
        doomed += [child for child, parent, _ in family if parent == one and child not in doomed]
    for one in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    until = time.monotonic() + PATIENCE
    while {one for one, _, _ in living()}.intersection(doomed) and time.monotonic() < until:
        time.sleep(0.02)
    process.poll()


def living() -> list[tuple[int, int, int]]:
    """Every living process (of Linux), its parent, and its session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if state not in "ZX":
                found.append((int(stat.parent.name), int(parent), int(session)))
    return found


def find_data(data_dir: Path | None) -> Path:
    """The folder of Fashion-MNIST's four files, which are verified. Raises UserError."""
    folder = data.locate("fashion_mnist", data_dir)
    if folder is None and data_dir is None:
        folder = data.fetch("fashion_mnist")
    data.load("fashion_mnist", data_dir)
    assert folder
    return folder


def without_names(text: str) -> str:
    """A text for everybody: without this machine's name, and where things lie on it."""
    names = {str(CHECKOUT): "CHECKOUT", sys.prefix: "PYTHON", tempfile.gettempdir(): "TMP", str(Path.home()): "HOME"}
    for name, word in names.items():
        text = text.replace(f"{name}/", f"{word}/")
    return text.replace(f" on {socket.gethostname()}:", " on HOST:").replace(f"{socket.gethostname()}: ", "HOST: ")


def measure(args: argparse.Namespace, scratch: str, results: dict[str, Any]) -> None:
    """Go through the steps. `scratch`: a folder with unpacked data. `results` grows, and is written when it does."""

    def write() -> None:
        write_whole(args.out, without_names(json.dumps(results, indent=1)) + "\n")

    def keep(finding: list[Any]) -> None:
        section, name, found = finding
        results.setdefault(section, {})[name] = found
        write()
        print(f"  {section}: {name}", flush=True)

    chosen = {name: getattr(args, name) for name in ("cases", "models", "precisions", "epochs", "repeats", "tests")}
    options = json.dumps(chosen | {"scratch": scratch, "out": str(args.out)})
    for place, (step, weight) in enumerate(STEPS.items()):
        left = max(0.0, 60 * args.minutes - ENDING - (time.monotonic() - STARTED))
        limit = left * weight / sum(list(STEPS.values())[place:])
        print(f"{step}, at most {limit:.0f} s", flush=True)
        results["steps"][step] = {"ended": "interrupted", "lines": []}  # for as long as nothing else is known
        write()
        results["steps"][step] = run([sys.executable, str(HERE / "card_steps.py"), step, options], limit, keep)
        write()
        print(f"  {results['steps'][step]['ended']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="it never takes more; by default 8")
    parser.add_argument("--data-dir", type=Path, help="the folder of Fashion-MNIST's four files")
    parser.add_argument("--cases", nargs="+", default=CASES, help="model-hidden_units; the first in each precision")
    parser.add_argument("--models", nargs="+", help="what takes its first steps; by default every model of ours")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, help="by default each")
    parser.add_argument("--epochs", type=int, default=3, help="of each run of the closed track")
    parser.add_argument("--repeats", type=int, default=100, help="rounds of the closed track, if there is time")
    parser.add_argument("--tests", default="tests/test_gpu.py", help="a file of tests, or one of them")
    parser.add_argument("--out", type=Path, default=page.RESULTS / "card.json")
    parser.add_argument("--page", type=Path, default=CHECKOUT / "docs" / "performance.md")
    args = parser.parse_args()
    args.out = args.out.absolute()
    for number in INTERRUPTS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, signal.default_int_handler)
    from bench import made, unpack  # not at the top: torch is loaded here, and its seconds count

    try:
        if machine.choose_device(Config(), machine.RankPlacement()) == "cpu":
            raise UserError(
                "torch finds no NVIDIA card: check nvidia-smi, or measure this CPU with benchmarks/bench.py"
            )
        source = find_data(args.data_dir)
    except UserError as error:
        sys.exit(f"error: {error}")
    # The steps are programs, in other folders too, that import fashion_ddp and look for the data.
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *(path for path in given if path)])
    os.environ["FASHION_DDP_DATA_DIR"] = str(source)
    results = made() | {"minutes": args.minutes, "epochs": args.epochs, "steps": {}}
    with tempfile.TemporaryDirectory() as scratch:
        unpack(source, Path(scratch))
        try:
            measure(args, scratch, results)
        except KeyboardInterrupt:
            sys.exit("interrupted")
        finally:
            written = json.loads(args.out.read_text())
            args.page.write_text(page.page(written))
            print(page.on_card(written))


if __name__ == "__main__":
    main()
