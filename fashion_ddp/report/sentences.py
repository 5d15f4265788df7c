"""What the report says in words: its title, what was compared, and the notes under the tables."""

from fashion_ddp.errors import counted
from fashion_ddp.report.results import Result
from fashion_ddp.report.rows import Comparison


def title(comparison: Comparison) -> str:
    synthetic = [result.synthetic for result in comparison.results]
    mark = "SYNTHETIC data: " if all(synthetic) else "Partly SYNTHETIC data: " if any(synthetic) else ""
    return mark + "comparison of image classifiers" if mark else "Comparison of image classifiers"


def headline(comparison: Comparison) -> str:
    """What was compared, in one sentence."""
    results = comparison.finished
    if not results:
        return f"None of {counted(len(comparison.unfinished), 'run')} is finished."
    models, recipes = {r.model for r in results}, sorted({r.recipe for r in results})
    seeds = [str(seed) for seed in sorted({r.record["seed"] for r in results})]
    text = f"{counted(len(results), 'finished run')} of {counted(len(models), 'model')} on "
    text += " and ".join(section.title for section in comparison.sections)
    text += f"; {_listed('recipe', recipes)}; {_listed('seed', seeds)}"
    if comparison.unfinished:
        text += f"; {counted(len(comparison.unfinished), 'run')} not finished and not ranked"
    return text + "."


def _listed(noun: str, values: list[str]) -> str:
    return noun + ("s " if len(values) > 1 else " ") + ", ".join(values)


def notes(comparison: Comparison) -> list[str]:
    """How the figures are meant, and what the runs themselves give reason to say."""
    said = [
        "Accuracy and loss: the last epoch's weights on the whole test set, every image counted once.",
        "Training time: the tutorials' clock, that is all epochs of training and the pass over the test set after "
        + "each (time/train_total_s + time/eval_total_s), without start-up. images/s: training alone.",
        "FLOPs per image: one forward pass, 2 per multiply-add of matrix products and convolutions.",
    ]
    if any(len(row.results) > 1 for section in comparison.sections for row in section.rows):
        said.append("Several seeds: the mean over n seeds, and the sample standard deviation (std) between them.")
    if any(r.record["published"] for r in comparison.finished):
        said.append(
            "Published figures stand beside runs with the recipe's own settings only. The tutorials average the "
            "accuracies of batches, so that the last, smaller batch weighs too much; ours are exact."
        )
    if any(r.model == "relu" for r in comparison.finished):
        said.append(
            "relu: its accuracy varies by tens of points with the seed. The ReLU on the logits does this: a logit that "
            "it holds at 0 gets no gradient from that image, and one held at 0 on every training image never comes "
            "back. mlp is the same without it."
        )
    said += [_dead(r) for r in comparison.finished if "dead_classes" in r.record]
    said += [
        f"{r.name}: what this model computes depends on the number of ranks."
        for r in comparison.finished
        if r.record.get("rank_invariant") is False
    ]
    said += [
        f"{r.name}: continued on other hardware than it was begun on, so its times are mixed and stand for neither."
        for r in comparison.finished
        if r.record.get("timings_mixed")
    ]
    return said


def _dead(result: Result) -> str:
    dead, unused, empty = (result.record[k] for k in ("dead_classes", "never_predicted", "images_without_logit"))
    text = f"{result.name}: relu: {len(dead)} of {len(result.record['confusion'])} logits are dead"
    if dead:
        text += f" ({', '.join(dead)}): never positive on any test image, so these classes can never win over another."
    else:
        text += " (positive for no test image)."
    text += f" Never predicted: {', '.join(unused)}." if unused else ""
    return text + (f" On {empty:,} images every logit is 0, and the first class is taken." if empty else "")
