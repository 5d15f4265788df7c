"""The page on speed, docs/performance.md, made of benchmarks/results/*.json and nothing else.

python benchmarks/page.py > docs/performance.md
python benchmarks/page.py scaling       the tables of docs/scaling.md

bench_cnn and scaling_cnn hold cases that were measured in a sitting of their own, with --cases and --out.
"""

import json
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = """\
# How fast, and where the time goes

Made by [benchmarks/page.py](../benchmarks/page.py) from [benchmarks/results](../benchmarks/results). `make bench` and
`make bench-scaling` measure it on your machine. Ratios are of runs made in turn in one sitting: medians, and in
brackets the smallest and the largest. Nothing comes from a GPU unless it says so; more than one machine, and four
cards, are not measured yet.

## Against the tutorials' loop

The same model, batch, optimizer and epochs. `plain` is the tutorials' loop (torchvision's dataset, `ToTensor`,
DataLoader, one process), `accelerate` the same with Accelerate's prepared DataLoader
([both](../benchmarks/tutorial.py)), `ours` one process of ours, and a rank of one thread per core.
T_train is the tutorials' clock, the epochs with a test pass each; T_cold a whole process, from the shell to its exit.
On a machine that is busy the tutorials' loop suffers more than ours: beside other work it took 53 s for `linear`.

{bench}

## From the shell to the report

Whole comparisons on the CPU ([comparisons.py](../benchmarks/comparisons.py)), with W&B offline. A rank that is started
by itself imports torch, Accelerate and W&B; one from [the server](../launch/fork_server.py) is forked with them loaded.
One process of all cores is what `make compare` gives a run by itself; `at once` is `JOBS=`, whose times are marked as
shared. The last column is the whole time less one start, divided by what the runs' training and testing took.

{comparisons}

## On a card

A step of these networks is dozens of kernels of a few microseconds, and the host takes longer to launch them one by
one than the card to run them. So on an NVIDIA card the whole step (batch, augmentation, forward and backward pass,
all-reduce, update, record) is recorded once as a CUDA graph and launched as one
([cuda_graph.py](../fashion_ddp/training/cuda_graph.py)).
Before it is used it must repeat two ordinary steps of the run; where it cannot be recorded, does not do the same, or
is not proven (a model that draws random numbers, as dropout does), steps are launched kernel by kernel, and the run's
first lines say why. `--no-cuda-graph` asks for that. Where there is a card, `python -m pytest tests/test_gpu.py` proves
all this. `python benchmarks/card.py --minutes 8` does that and measures: what tells most comes first, and each finding
is written down as soon as it is there. The proofs need pytest: `make setup DEV=1`.

{on_card}

## Where a step goes

Microseconds of a step in one process of {threads} thread. `barest`: a step that only learns, with one batch that lies
ready and an update by hand, taken in turn with the whole ones. `kernels alone`: what torch's kernels take for the
step's matrix products and convolutions, each called again and again with nothing between; no loop around them goes
below. Then what the machine allows: the same
operations at the rate of its best matrix product or convolution ({gflops:.0f} GFLOP/s), which share of the step that
is, and the bytes that all operations read and write at the rate of a copy that fits no cache ({gbytes:.0f} GB/s; most
of a step's do fit).

{parts}

## With --compile

On a CPU `--compile` records the forward and backward pass, and on one rank plain SGD's update, and compiles them as one
function ([compiled.py](../fashion_ddp/training/compiled.py)). Gathering the batch stays outside, where torch's own
kernel is twice as fast as the compiler's. Before it is used, a compiled pass must repeat ordinary ones within rounding;
what cannot be compiled (a model that draws random numbers or asks for its values, batch norm over several ranks) trains
as ever, and the run's first lines say why. What is left of a small step is the batch and the matrix products, below
which no loop goes; of a large one they are nearly all, so `cnn` gains nothing. Microseconds of a step as above, in the
same sitting; `times faster` is of blocks of steps in turn. It was to be twice as fast for `linear` at batch 128, and is
not: there the batch and the products alone are two thirds of the compiled step.

{compiled}

Compiling takes 6 to 20 s at a first start, and about 2 in a comparison whose runs share a model, so it pays for long
runs of small models. Against the tutorials' loop, in a slow phase of this machine, in which that loop took six times as
long as above, and ours 2.5 times:

{bench_compiled}

## More ranks

One thread each; strong: the same batch of 128, weak: 128 images per rank. `as separate runs`: as many runs of one rank
with the same share of the batch, side by side, with nothing to say to each other: the difference is what ranks lose by
waiting for each other.

{scaling}
"""
FILES = ("bench", "bench_cnn", "scaling", "scaling_cnn", "step_parts")
VERSIONS = {"driver": "driver", "cuda": "CUDA", "cudnn": "cuDNN", "nccl": "NCCL"}
PRECISION = """\
Distances are of the first batch at the initial weights, relative, from float64 on the CPU. `best product`: of two
large matrices in that precision."""
UNSEEN = "Neither its speed nor its proofs were seen on a card so far: not measured."


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def cases(kind: str) -> dict[str, Any]:
    """Of both sittings."""
    return read(kind)["cases"] | read(f"{kind}_cnn")["cases"]


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio(values: list[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*values)


def origin(result: dict[str, Any]) -> str:
    about = result["machine"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "accelerate", "python"))
    where = about.get("card") or f"{about['cores']} cores of {about['processor']}"
    return f"{result['date']}, {where}, {versions}, commit {(result['commit'] or 'unknown')[:8]}."


def on_card(result: dict[str, Any]) -> str:
    """What was found on a card, or that nothing was."""
    if not result:
        return UNSEEN
    card = result.get("card", {})
    known = ", ".join(f"{what} {card[key]}" for key, what in VERSIONS.items() if card.get(key))
    parts = [f"{origin(result)} {known}".strip()]
    cut = [f"`{step}` ({one['ended']})" for step, one in result["steps"].items() if one["ended"] != "done"]
    if cut := [text for text in cut if text != "`rounds` (out of time)"]:  # they take what time there is
        parts.append(f"Not whole, as it was cut short or failed: {', '.join(cut)}.")
    parts += [part(result) for part in (smoke, tests, track, shares, precisions, memory)]
    return "\n\n".join(part for part in parts if part)


def reason(lines: list[str]) -> str:
    """Why something failed: of its last lines the one that says so, and not a launcher's after it."""
    asserted = [line.removeprefix("E ") for line in lines if line.startswith("E  ")]  # by pytest, then where from
    saying = [line for line in lines if re.match(r"(error: |[\w.]+(Error|Failed|Exception): )", line)]
    return f"`{(asserted[:1] or saying or lines)[-1].strip()}`"


def smoke(result: dict[str, Any]) -> str:
    """How each model took its first steps."""
    rows = []
    for name, one in sorted(result.get("smoke", {}).items()):
        said = [line.removeprefix("step ").strip() for line in one.get("said", []) if line.startswith("step ")]
        how = said or ["trained"] if "said" in one else [f"failed: {reason(one['failed'])}"]
        rows.append([name, how[0], one.get("backend") or ""])
    return table(["first steps", "the step was", "gradients went by"], rows) if rows else ""


def tests(result: dict[str, Any]) -> str:
    found = result.get("tests", {})
    counts = Counter(one["outcome"] for one in found.values())
    lines = [f"Tests on the card: {', '.join(f'{n} {outcome}' for outcome, n in counts.items()) or 'none ended'}."]
    lines += [f"- `{name}`: {reason(one['why'])}" for name, one in found.items() if one["outcome"] == "failed"]
    return "\n".join(lines)


def track(result: dict[str, Any]) -> str:
    """The closed track."""
    compared = [ways(result["track"], result["epochs"])] if "track" in result else []
    failed = [f"- {name} failed: {reason(lines)}" for name, lines in result.get("track failed", {}).items()]
    return "\n\n".join([*compared, *(["\n".join(failed)] if failed else [])])


def shares(result: dict[str, Any]) -> str:
    """What a step reaches of the card's best rates in the same precision."""
    exact = result.get("precision", {}).get("fp32", {})
    rows = []
    for case, one in exact.get("counts", {}).items():
        runs = result.get("track", {}).get(f"{case} blog", {}).get("ours", {"runs": []})["runs"]
        if runs:
            step, rates = statistics.median(run["step_s"] for run in runs), exact["rates"]
            row = [case, f"{1e6 * step:,.0f}"]
            for what in ("flops", "bytes"):
                rate, best = one[what] / step, rates[f"{what}_per_s"]
                row.append(f"{rate / 1e9:,.0f} of {best / 1e9:,.0f} ({rate / best:.1%})")
            rows.append(row)
    titles = ["a step as one graph, fp32", "microseconds", "GFLOP/s, of the best product's", "GB/s, of the best copy's"]
    return table(titles, rows) if rows else ""


def precisions(result: dict[str, Any]) -> str:
    """What each precision brings, and costs."""
    rows, refused = [], []
    for name, one in result.get("precision", {}).items():
        if "failed" in one:
            refused.append(f"- {name}: {reason(one['failed'])}")
            continue
        rates = [f"{one['rates']['flops_per_s'] / 1e12:,.1f}", f"{one['rates']['bytes_per_s'] / 1e9:,.0f}"]
        for case, apart in one["distances"].items():
            run = one.get(case, {})
            trained = [f"{1e6 * run['step_s']:,.0f}", f"{run['accuracy']:.2%}"] if "step_s" in run else ["", ""]
            distances = [f"{apart[what]:.1e}" for what in ("logits", "gradient")]
            rows.append([f"{name}, {case}", *distances, *trained, *rates])
    titles = ["precision", "logits' distance", "gradient's distance", "step, microseconds", "accuracy, 1 epoch"]
    titles += ["best product, TFLOP/s", "copy, GB/s"]
    parts = [PRECISION + "\n\n" + table(titles, rows)] if rows else []
    return "\n\n".join([*parts, *(["\n".join(refused)] if refused else [])])


def memory(result: dict[str, Any]) -> str:
    """What a run takes of the card."""
    rows = []
    for name, one in result.get("memory", {}).items():
        sizes = [f"{one[what] / 1e6:,.0f}" for what in ("torch_bytes", "taken_bytes") if what in one]
        rows.append([name, *(sizes or [f"failed: {reason(one['failed'])}", ""])])
    titles = ["memory, MB", "the most that torch took", "the most that the card had less free"]
    return table(titles, rows) if rows else ""


def bench(*names: str) -> str:
    parts = []
    for result in map(read, names):
        parts.append(ways(result["cases"], result["epochs"]) + "\n\n" + origin(result))
    return "\n\n".join(parts)


def ways(cases: dict[str, Any], epochs: int) -> str:
    """The ways to train each case, as a table."""
    rows = []
    for case, found in cases.items():
        for way, one in found.items():
            clocks = [f"{one['train_s']:.2f}", ratio(one["train_s_ratio"]), f"{one['cold_s']:.2f}"]
            rows.append([f"{case}, {way}", *clocks, ratio(one["cold_s_ratio"]), str(len(one["runs"]))])
    trained = f"{epochs} epoch{'s' * (epochs > 1)}"
    return table([trained, "T_train s", "times faster", "T_cold s", "times faster", "n"], rows)


def step_parts(result: dict[str, Any]) -> str:
    names = list(next(iter(result["cases"].values()))["parts_s"])
    rows = [
        [case, *(f"{1e6 * one['parts_s'][name]:,.0f}" for name in names)]
        + [f"{1e6 * one[name]:,.0f}" for name in ("step_s", "barest_s")]
        + [f"{one['step_s'] / one['barest_s']:.2f}"]
        + [f"{1e6 * one[name]:,.0f}" for name in ("kernels_s", "arithmetic_s")]
        + [f"{one['share']:.0%}", f"{1e6 * one['bytes'] / one['bytes_per_s']:,.0f}"]
        for case, one in result["cases"].items()
    ]
    limits = ["barest", "times barest", "kernels alone", "its arithmetic", "share of whole", "its bytes"]
    titles = ["model and recipe", *names, "whole", *limits]
    return table(titles, rows) + "\n\n" + origin(result)


def compiled(result: dict[str, Any]) -> str:
    """What compiled passes bring."""
    rows = []
    for case, one in result["cases"].items():
        left = one["parts_s"]["batch"] + one["kernels_s"]
        times = [f"{1e6 * seconds:,.0f}" for seconds in (one["step_s"], one["compiled_s"], left)]
        rows.append([case, *times, ratio(one["compiled_faster"])])
    return table(["model and recipe", "whole", "compiled", "batch and kernels alone", "times faster"], rows)


def comparisons(result: dict[str, Any]) -> str:
    """How long whole comparisons take."""
    parts = []
    for case, ways in result["cases"].items():
        rows = [
            [way, f"{one['wall_s']:.1f}", ratio(one["wall_s_ratio"]), ratio(one["times_what_trained"])]
            + [str(len(one["runs"]))]
            for way, one in ways.items()
        ]
        parts.append(table([case, "s", "of the first", "times what trained", "n"], rows))
    return "\n\n".join([*parts, origin(result)])


def scaling(*names: str) -> str:
    parts = []
    titles = ["", "images/s", "times one rank", "as separate runs", "efficiency", "all-reduce, of a step", "n"]
    for result in map(read, names):
        rows = [
            [f"{case} rank{'s' * (not case.endswith(' 1'))}", f"{one['images_per_s']:,.0f}", ratio(one["speed_up"])]
            + [ratio(one["speed_up_apart"]), f"{one['efficiency']:.0%}", f"{one['all_reduce_share']:.0%}"]
            + [str(len(one["runs"]))]
            for case, one in result["cases"].items()
        ]
        parts.append(table(titles, rows) + "\n\n" + origin(result))
    return "\n\n".join(parts)


def second_core() -> str:
    """What a second core brings to one run, as a table."""
    rows, cores = [], read("bench")["machine"]["cores"]
    for case, ways in cases("bench").items():
        alone, both = ways["ours"]["runs"], ways["ours, a rank per core"]["runs"]
        found = [one["train_s"] / two["train_s"] for one, two in zip(alone, both, strict=True)]
        spread = [statistics.median(found), min(found), max(found)]
        what = f"{case}, {cores} ranks of 1 thread against 1 process of {cores}"
        rows.append([what, ratio(spread), str(len(found))])
    for case, one in cases("scaling").items():
        model, kind, ranks = case.split()
        batch = {"strong": "the same batch of 128", "weak": "128 images on each"}[kind]
        if ranks != "1":
            what = f"{model} blog, {ranks} ranks of 1 thread against 1, {batch}"
            rows.append([what, ratio(one["speed_up"]), str(len(one["runs"]))])
    return table(["a second core", "times faster", "n"], rows)


def what_helps() -> str:
    """What does more than another core, as a table."""
    rows = []
    for case, ways in cases("bench").items():
        what = f"{case}, resident data and no DataLoader, against the tutorials' loop"
        rows.append([what, ratio(ways["ours"]["train_s_ratio"]), str(len(ways["ours"]["runs"]))])
    for model in ("linear-10", "relu-10"):
        small, large = (read("step_parts")["cases"][f"{model} {recipe}"]["step_s"] for recipe in ("lab", "blog"))
        rows.append([f"{model}, images a second in steps of 128 against steps of 32", f"{4 * small / large:.2f}", "1"])
    return table(["what helps", "times faster", "n"], rows)


def measured() -> str:
    """The tables of docs/scaling.md."""
    origins = dict.fromkeys(origin(read(name)) for name in FILES)
    return "\n\n".join([second_core(), what_helps(), *origins]) + "\n"


def page(card: dict[str, Any] | None = None) -> str:
    """The page. `card`: what benchmarks/card.py found; by default what it wrote, where it did."""
    if card is None:
        card = read("card") if (RESULTS / "card.json").exists() else {}
    parts = read("step_parts")
    gflops = max(one["flops_per_s"] for one in parts["cases"].values()) / 1e9
    gbytes = max(one["bytes_per_s"] for one in parts["cases"].values()) / 1e9
    found = {"bench": bench("bench", "bench_cnn"), "on_card": on_card(card)}
    found["comparisons"] = comparisons(read("comparisons"))
    found["bench_compiled"] = bench("bench_compiled")
    found |= {"parts": step_parts(parts), "compiled": compiled(parts), "scaling": scaling("scaling", "scaling_cnn")}
    return PAGE.format(threads=parts["threads"], gflops=gflops, gbytes=gbytes, **found)


if __name__ == "__main__":
    print(measured() if sys.argv[1:] == ["scaling"] else page(), end="")
