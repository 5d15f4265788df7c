"""What a run folder holds, every file, key and unit: what docs/results.md is made of.

`python docs/results.py > docs/results.md` makes it anew.
"""

from dataclasses import dataclass

from fashion_ddp.config import Config
from fashion_ddp.config.flags import documentation


@dataclass(frozen=True)
class Key:
    """One key of a file. In `name`, <...> stands for a name, [] for each entry of a list."""

    name: str
    unit: str
    meaning: str
    when: str = ""  # the run has it; always, where this is empty: one of WHEN


@dataclass(frozen=True)
class File:
    name: str
    meaning: str
    keys: tuple[Key, ...] = ()


WHEN = {
    "validation": "with `--validation`",
    "finished": "finished runs",
    "best": "finished runs that kept their best epoch",
    "early": "runs that `--patience` ended",
    "metrics": "with `--metrics`",
    "tta": "with `--tta`, after the last epoch",
    "unfinished": "runs that were stopped or failed",
    "stopped": "runs that were stopped",
    "W&B": "unless `--tracker none`",
    "accounting": "where SLURM's accounting answered",
    "cards": "the same, of runs on cards",
    "energy": "the same, where the cluster measures it",
}

EPOCH = (
    Key("epoch", "count", "this epoch, from 1"),
    Key("step", "count", "optimizer updates since the run began"),
    Key("lr", "", "learning rate of the last update"),
    Key("train/loss", "nats", "mean cross entropy over the epoch's training images, as the weights were at each step"),
    Key("train/accuracy", "fraction", "of the same"),
    Key("test/loss", "nats", "mean cross entropy over the test set; with --test-at end after the last epoch only"),
    Key("test/accuracy", "fraction", "of the same"),
    Key("test/top5", "fraction", "of the same: the label is among the five likeliest classes (from six classes up)"),
    Key("test/macro_f1", "fraction", "mean of the classes' F1"),
    Key("test/calibration_error", "fraction", "mean distance of confidence and accuracy, in 15 bins of confidence"),
    Key("test/<figure>", "", "each of yours", "metrics"),
    Key("val/loss", "nats", "over the training images that were held out", "validation"),
    Key("val/accuracy", "fraction", "of the same", "validation"),
    Key("val/<figure>", "", "as of the test set", "validation"),
    Key("test_tta/loss", "nats", "over the test set, of the mean of the logits of several views of an image", "tta"),
    Key("test_tta/accuracy", "fraction", "of the same; val_tta/* are of the images held out", "tta"),
    Key("test_tta/<figure>", "", "as of the test set", "tta"),
    Key("time/train_s", "seconds", "the epoch's training"),
    Key("time/eval_s", "seconds", "its evaluation"),
    Key("throughput/images_per_s", "images/s", "trained on in this epoch, over all ranks"),
)
PEAK = "most that a rank took: of its card, for tensors (not for CUDA itself, nor NCCL); or on a CPU of the machine"
SUMMARY = (
    Key("format", "count", "of this folder; a reader refuses another one than it knows"),
    Key("status", "text", "running, finished, stopped or failed; a reader says interrupted where the process is gone"),
    Key("error", "text", "what ended the run", "unfinished"),
    Key("stopped_by", "text", "the signal, or what else it was told", "stopped"),
    Key("model", "text", "as in config.yaml"),
    Key("recipe", "text", "as in config.yaml"),
    Key("changed.<setting>", "", "each setting that changes the result and is not the recipe's own"),
    Key("seed", "count", "as in config.yaml"),
    Key("world_size", "count", "ranks"),
    Key("rank_invariant", "true, false", "whether the result is the same on any number of ranks"),
    Key("dataset", "text", "as in config.yaml"),
    Key("classes[]", "text", "names, by label"),
    Key("device", "text", "rank 0's card, or cpu"),
    Key("threads", "count", "CPU threads of each rank"),
    Key("precision", "text", "as in config.yaml"),
    Key("cuda_graph", "true, false", "whether each step was launched as one CUDA graph"),
    Key("compiled", "true, false", "whether the passes of each step were compiled"),
    Key("batch_size", "images", "per update, over all ranks"),
    Key("epochs", "count", "asked for"),
    Key("image_shape[]", "count", "channels, height and width of the images"),
    Key("training_images", "count", "that are trained on"),
    Key("training_images_by_class[]", "count", "of each class, by label"),
    Key("test_images", "count", "of the test set"),
    Key("parameters", "count", "of the model"),
    Key("parameters_trained", "count", "of the model, but for what --freeze names"),
    Key("starts", "count", "processes that worked at the run, one after another"),
    Key("timings_mixed", "true, false", "whether they did so on different hardware, or beside other runs"),
    Key("side_by_side", "count", "runs that were trained at once on its machine, at most: above 1, times are shared"),
    Key("wandb_id", "text", "the run's name to W&B, also where it is told only later"),
    Key("wandb_mode", "text", "online, offline or disabled; null where W&B was left", "W&B"),
    Key("test_evaluations", "count", "how often the test set was looked at"),
    Key("kept_epoch", "count", "whose weights these are, and the figures train/*, val/* and test/*", "best"),
    Key("chosen_by", "text", "val/accuracy; of equals, val/loss decides", "best"),
    Key("stopped_early", "text", "after which epoch, and why", "early"),
    *(key for key in EPOCH if key.name != "throughput/images_per_s"),  # of the last epoch
    Key("throughput/images_per_s", "images/s", "of the last epoch; of a finished run, over all of its training"),
    Key("throughput/images_per_s_per_rank", "images/s", "the same by rank", "finished"),
    Key("time/startup_s", "seconds", "before the first epoch", "finished"),
    Key("time/train_total_s", "seconds", "training, all epochs: with the next, the tutorials' clock", "finished"),
    Key("time/eval_total_s", "seconds", "evaluation, all epochs", "finished"),
    Key("time/total_s", "seconds", "from the process's start to here, of all starts", "finished"),
    Key("time/first_step_s", "seconds", "the first update, which holds what is done only once", "finished"),
    Key("time/step_p50_ms", "ms", "of the other updates, the median", "finished"),
    Key("time/step_p95_ms", "ms", "of the same, what 95 % stay below", "finished"),
    Key("flops_per_image", "FLOPs", "of one forward pass; 2 per multiply-add", "finished"),
    Key("peak_memory_bytes", "bytes", PEAK, "finished"),
)
ENVIRONMENT = (
    Key("started", "time", "UTC, ISO 8601"),
    Key("command[]", "text", "the command line"),
    Key("made_by.code", "sha256", "of the source and recipes that compute a run"),
    Key("made_by.python", "version", ""),
    Key("made_by.torch", "version", ""),
    Key("made_by.accelerate", "version", ""),
    Key("made_by.numpy", "version", ""),
    Key("made_by.data.<file>", "md5", "of each file as published; of built-in data, of each array"),
    Key("git_commit", "text", "of the source, with +changes where files differ from it; null outside git"),
    Key("cuda", "version", "that torch was built for; null for none"),
    Key("world_size", "count", "ranks"),
    Key("backend", "text", "torch's class that carries tensors between the ranks, and NCCL's version; null without"),
    Key("ranks[].host", "text", "by rank: its machine"),
    Key("ranks[].device", "text", "its card, or cpu"),
    Key("ranks[].cpu", "text", "its processor"),
    Key("ranks[].threads", "count", "its CPU threads"),
    Key("side_by_side", "count", "runs that the launcher trained at once, at most, this one among them"),
    Key("data_source", "text", "the folder that the data was read from"),
    Key("data_on", "text", "where the images lay: `device`, or `host` where they were read ahead"),
    Key("left_out", "list", "pictures of it that could not be decoded, and why (--skip-broken)"),
    Key("precision", "text", "as in config.yaml"),
)
POINT = (
    Key("epoch", "count", "in which epoch, from 1"),
    Key("step", "count", "optimizer updates since the run began"),
    Key("loss", "nats", "mean cross entropy over the rows of the updates since the point before"),
    Key("accuracy", "fraction", "of the same"),
    Key("lr", "", "learning rate of this update"),
)
PREDICTIONS = (
    Key("logits", "[n, classes] float32", "of the test set's n images, in its order"),
    Key("logits_tta", "[n, classes] float32", "the mean of the logits over the views of an image", "tta"),
    Key("predicted", "[n] int64", "the class with the highest logit, as it was evaluated"),
    Key("labels", "[n] int64", "the true class"),
)
EXAMPLES = (
    Key("samples", "[k, C, H, W] uint8", "the first training images"),
    Key("sample_labels", "[k] int64", "their classes"),
    Key("image", "[C, H, W] uint8", "the first test image"),
    Key("image_label", "[] int64", "its class"),
    Key("maps.<layer>", "[c, h, w] float32", "what each convolution and pooling makes of it"),
    Key("grid_ids", "[9] int64", "places in the test set, the same in every run: what a grid of predictions shows"),
    Key("test_ids", "[k] int64", "these, the most confidently wrong, and some of each of the most confused pairs"),
    Key("test_images", "[k, C, H, W] uint8", "the images at test_ids"),
)
COST = (
    Key("cost/gathered", "time", "UTC, ISO 8601: what came later is not in it"),
    Key("cost/starts", "count", "of the run's jobs"),
    Key("cost/untimed_starts", "count", "of these, killed while they started: the next two leave them out"),
    Key("cost/starting_s", "seconds", "from the first rank's process to the first epoch, of all starts"),
    Key("cost/training_s", "seconds", "from there to the start's end; of one that was killed, to its last record"),
    Key("cost/repeated_steps", "count", "updates that were made again after a start from a checkpoint, as recorded"),
    Key("cost/repeated_s", "seconds", "as many, at the run's mean speed; null where no epoch was completed"),
    Key("cost/complete", "true, false", "whether the accounting had each start, to its end", "accounting"),
    Key("cost/queued_s", "seconds", "from submitted, or queued again, to the start, of all starts", "accounting"),
    Key("cost/core_hours", "hours", "of the CPUs that the starts were given", "accounting"),
    Key("cost/card_hours", "hours", "of the cards; null where the accounting counts none", "cards"),
    Key("cost/energy_j", "joules", "of the nodes, while the starts had them", "energy"),
)


def settings() -> tuple[Key, ...]:
    """config.yaml's keys: Config's fields, with their documentation."""
    return tuple(Key(name, field.kind, field.meaning) for name, field in documentation(Config).items())


def files() -> tuple[File, ...]:
    return (
        File("config.yaml", "The resolved settings; `--config` on it makes the same run.", settings()),
        File("summary.json", "One object: what a table needs.", SUMMARY),
        File(
            "metrics.jsonl",
            "One object per epoch. With --keep best or --patience it is known only later which is the last: what is "
            "evaluated once then stands in summary.json alone.",
            EPOCH,
        ),
        File("steps.jsonl", "About 100 objects per epoch.", POINT),
        File("environment.json", "A list with one object per start: where, on what and from what.", ENVIRONMENT),
        File("predictions.safetensors", "Of a finished run: its answers on the test set.", PREDICTIONS),
        File("examples.safetensors", "Of a finished run: what a report draws.", EXAMPLES),
        File("model.safetensors", "Of a finished run: the weights that it kept, under the model's own names."),
        File("model.txt", "The model's layers, as printed at the start. Beside it model.py: the source of your own."),
        File("checkpoints/", "What a run that was interrupted continues from; the newest two. For the trainer alone."),
        File("logs/", "One per rank: errors, the stack of a rank that hung; with --trace its trace of a few steps."),
        File("wandb/", "What W&B writes."),
        File("job.json, starts.jsonl", "Of a submitted run: its job; its starts, how they ended, and their seconds."),
        File(
            "cost.json", "Of a run that was submitted to SLURM, from its comparison on. report.json has it too.", COST
        ),
    )


HEAD = """# What a run folder holds

Made by `python docs/results.py > docs/results.md`; a test compares it with real runs.

Losses are cross entropies with the natural logarithm, accuracies fractions, times seconds by a clock that stops when
the device has finished. What is not finite is `null`. W&B has the same names.

```python
from fashion_ddp import load_run

run = load_run("runs/cnn-blog-seed42")
run.config["lr"], run.summary["test/accuracy"], run.metrics[-1]["test/loss"], run.steps[0]["loss"]
run.predictions["logits"]  # numpy, [n, classes]
model = run.model()  # evaluation mode, on the CPU; images [N, C, H, W] in [0, 1] to logits
```

A run with a model of your own wants it named again, `run.model(Net)`. A run that is not finished has what was written
so far; asking it for predictions or weights is an error. [examples/read_runs.py](../examples/read_runs.py) makes a
table of many runs."""


def page() -> str:
    """docs/results.md"""
    parts = [HEAD]
    for file in files():
        parts += [f"## {file.name}", file.meaning]
        if file.keys:
            rows = [(f"`{key.name}`", key.unit, key.meaning, WHEN.get(key.when, "")) for key in file.keys]
            lines = ["| key | unit or type | meaning | only |", "|---|---|---|---|"]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
