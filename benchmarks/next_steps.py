"""What each of the tutorials' next steps brings, on their own cnn: alone, and one on top of the other.

    python benchmarks/next_steps.py                   a night on 2 cores; says first how long; finished runs are reused
    python benchmarks/next_steps.py --only alone      or together

The base is the lab notebook's cnn. Alone: the base with one change. Together: changes in the order of STACK, of which
one stays where it raises the mean accuracy on 5,000 training images that were held out. Every run opens the test set
once, after its last epoch; nothing is chosen by it. Two runs at once, of one thread each. Writes
benchmarks/results/next_steps.json, of which next_steps_page.py makes docs/next-steps.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import made

from fashion_ddp import data
from fashion_ddp.config.layers import make_config
from fashion_ddp.console import entry_point, say
from fashion_ddp.errors import CommandFailed
from fashion_ddp.report.pairs import compare_pairs
from fashion_ddp.report.results import Predictions, Result, read_results
from fashion_ddp.report.rows import Row
from fashion_ddp.report.statistics import holm
from fashion_ddp.runs.reading import load_run
from launch import pool  # noqa: TID251 - trains as `make compare JOBS=2` does
from launch.processes import LocalRun  # noqa: TID251
from launch.share import MachineShare, divide_in_subprocess  # noqa: TID251

CHECKOUT = Path(__file__).parent.parent
RESULTS = CHECKOUT / "benchmarks" / "results" / "next_steps.json"
Settings = dict[str, Any]

BASE: Settings = {"model": "cnn", "recipe": "lab"}
COMMON: Settings = {"validation": 5000, "test_at": "end", "tta": "flip+shift", "tracker": "none", "device": "cpu"}


@dataclass(frozen=True)
class Change:
    """One next step: `settings` on top of others. None takes a setting away, for a model that does not have it."""

    name: str
    settings: Settings = field(default_factory=dict)
    views: bool = False  # judged with test-time augmentation


ALONE = [
    Change("10 epochs", {"epochs": 10}),
    Change("32 units for 10", {"hidden_units": 32}),
    Change("3 blocks for 2", {"conv_blocks": 3}),
    Change("batch normalisation", {"batch_norm": True}),
    Change("rate 0.05 for 0.1", {"lr": 0.05}),
    Change("rate 0.2 for 0.1", {"lr": 0.2}),
    Change("momentum", {"optimizer": "momentum", "lr": 0.01}),
    Change("Nesterov's momentum", {"optimizer": "momentum", "nesterov": True, "lr": 0.01}),
    Change("Adam", {"optimizer": "adam", "lr": 0.002}),
    Change("AdamW", {"optimizer": "adamw", "lr": 0.002, "weight_decay": 0.05}),
    Change("Muon", {"optimizer": "muon", "lr": 0.01, "adam_lr": 0.002}),
    Change("linear decay", {"schedule": "linear"}),
    Change("cosine decay", {"schedule": "cosine"}),
    Change("one cycle", {"schedule": "one_cycle", "lr": 0.2}),
    Change("warm-up of half an epoch", {"warmup_epochs": 0.5}),
    Change("weight decay", {"weight_decay": 5e-4}),
    Change("weight decay, not on biases", {"weight_decay": 5e-4, "decay_biases": False}),
    Change("label smoothing", {"label_smoothing": 0.1}),
    Change("normalized inputs", {"normalize": True}),
    Change("shift by up to 1", {"shift": 1}),
    Change("flip", {"flip": 0.5}),
    Change("alternating flip", {"alternating_flip": True}),
    Change("random erasing", {"erase": 0.25}),
    Change("Cutout 8", {"cutout": 8}),
    Change("mixup", {"mixup": 0.2}),
    Change("CutMix", {"cutmix": 1.0}),
    Change("moving average of the weights", {"ema": 0.999}),
    Change("test-time augmentation", views=True),
]
STACK = [
    Change("linear decay", {"schedule": "linear"}),
    Change("batch normalisation", {"batch_norm": True}),
    Change("32 units", {"hidden_units": 32}),
    Change("bf16", {"precision": "bf16"}),
    Change("Muon, batches of 128", {"optimizer": "muon", "lr": 0.03, "adam_lr": 0.004, "batch_size": 128}),
    Change("normalized inputs", {"normalize": True}),
    Change("label smoothing", {"label_smoothing": 0.1}),
    Change("weight decay, not on biases", {"weight_decay": 0.02, "decay_biases": False}),
    Change("10 epochs", {"epochs": 10}),
    Change("alternating flip", {"alternating_flip": True}),
    Change("shift by up to 1", {"shift": 1}),
    Change("Cutout 8", {"cutout": 8}),
    Change("mixup", {"mixup": 0.2}),
    Change("CutMix", {"cutmix": 1.0}),
    Change("moving average of the weights", {"ema": 0.999}),
    Change("airbench's shape", {"model": "airbench", "hidden_units": None, "batch_norm": None}),
    Change("test-time augmentation", views=True),
]


class Study:
    """Runs of many settings, several seeds of each, in one folder; finished ones are taken as they are."""

    def __init__(self, seeds: Sequence[int], runs_dir: Path, more: Settings):
        self.seeds, self.common = seeds, COMMON | {"runs_dir": runs_dir} | more

    def runs(self, settings: Settings) -> list[LocalRun]:
        """Return the runs of some settings, one for each seed."""
        every = {n: v for n, v in (BASE | settings | self.common).items() if v is not None}
        return [self._run(every | {"seed": seed}) for seed in self.seeds]

    def _run(self, settings: Settings) -> LocalRun:
        flags: list[str] = []
        for name, value in settings.items():
            flag = name.replace("_", "-")
            flags += (
                [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
            )
        # Code may change in a night; what a run is made of stands in its folder.
        return LocalRun(make_config(settings), (*flags, "--reuse"))

    def train(self, several: Sequence[Settings]) -> None:
        """Train what is not finished, seed after seed, so that a change of the machine meets all settings."""
        by_seed = zip(*(self.runs(settings) for settings in several), strict=True)
        todo = [run for runs in by_seed for run in runs if not finished(run)]
        if not todo:
            return
        dataset = data.load("fashion_mnist", todo[0].cfg.data_dir)
        shape = dataset.image_shape, len(dataset.classes), len(dataset.train_labels)
        divide_in_subprocess(2, 1, todo[0].argv, [run.argv for run in todo], shape)  # says how long it will take
        if pool.train(todo, MachineShare(ranks=1, threads=(1,) * len(todo), cards=(None, None))):
            raise CommandFailed("not all runs are finished: the same command continues")

    def results(self, settings: Settings) -> list[Result]:
        return read_results([run.folder for run in self.runs(settings)])


def finished(run: LocalRun) -> bool:
    return (run.folder / "config.yaml").is_file() and load_run(run.folder).summary.get("status") == "finished"


def mean_and_std(results: list[Result], figure: str) -> tuple[float, float]:
    row = Row("", results)
    return row.mean(figure) or 0.0, row.std(figure) or 0.0


def seen_in_views(result: Result) -> Result:
    """The run with what it answers with test-time augmentation."""
    saved = result.run.predictions
    accuracies = {f"{name}/accuracy": result.record[f"{name}_tta/accuracy"] for name in ("test", "val")}
    predictions = Predictions.of(saved["labels"], saved["logits_tta"], saved["logits_tta"].argmax(1))
    return Result(result.run, result.record | accuracies, predictions)


def row(change: Change, settings: Settings, ours: list[Result], before: list[Result]) -> dict[str, Any]:
    """What a change gives, beside the runs `before` it: accuracies are fractions, the gain in points."""
    val, test = mean_and_std(ours, "val/accuracy"), mean_and_std(ours, "test/accuracy")
    found: dict[str, Any] = {"name": change.name, "settings": settings, "n": len(ours), "val": val, "test": test}
    record = ours[0].record
    steps = [r.record["time/step_p50_ms"] * -(-r.record["training_images"] // r.record["batch_size"]) for r in ours]
    found["train_s"] = min(steps) * record["epochs"] / 1000  # of the run that others disturbed least
    found |= {name: record[name] for name in ("parameters", "flops_per_image", "epochs")}
    if before is not ours:
        better = mean_and_std(before, "test/accuracy")[0] <= test[0]
        [pair] = compare_pairs([ours, before] if better else [before, ours]).values()
        sign = 1 if better else -1
        found["gain"] = 100 * sign * pair.difference
        found["interval"] = sorted(100 * sign * end for end in pair.interval)
        found["p"] = pair.p
    return found


def with_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adjust the p values of a table's rows for their number."""
    tested = [one for one in rows if "p" in one]
    for one, p in zip(tested, holm([one["p"] for one in tested]), strict=True):
        one["p_holm"] = p
    return rows


def alone(study: Study) -> list[dict[str, Any]]:
    """Each change on the base."""
    study.train([{}, *(change.settings for change in ALONE if not change.views)])
    base = study.results({})
    rows = [row(Change("the base"), {}, base, base)]
    for change in ALONE:
        ours = study.results(change.settings)
        rows.append(row(change, change.settings, [*map(seen_in_views, ours)] if change.views else ours, base))
    return with_holm(rows)


def together(study: Study) -> list[dict[str, Any]]:
    """One change after the other; one that does not raise the accuracy on the held-out images is taken back."""
    kept: Settings = {}
    study.train([kept])
    best = study.results(kept)
    rows = [row(Change("the base"), {}, best, best)]
    for change in STACK:
        tried = kept | change.settings
        study.train([tried])
        ours = study.results(tried)
        ours = [*map(seen_in_views, ours)] if change.views else ours
        rows.append(row(change, change.settings, ours, best))
        rows[-1]["kept"] = rows[-1]["val"][0] > mean_and_std(best, "val/accuracy")[0]
        say(f"{change.name}: {100 * rows[-1]['val'][0]:.2f} % held out, {'kept' if rows[-1]['kept'] else 'taken back'}")
        if rows[-1]["kept"]:
            kept, best = tried, ours
    return with_holm(rows)


@entry_point
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("alone", "together"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/next_steps"))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file; what --only leaves out is kept in it")
    given = parser.parse_args(argv)
    study = Study(given.seeds, given.runs_dir, {"data_dir": given.data_dir} if given.data_dir else {})
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name, part in (("alone", alone), ("together", together)):
        if given.only in (None, name):
            found[name] = {"made": made(), "rows": part(study)}
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
