"""Write the report's sentences: its verdict, what was compared, and the notes below the tables."""

from fashion_ddp.errors import pluralize
from fashion_ddp.report.pairs import Pair
from fashion_ddp.report.results import ACCURACY, Result
from fashion_ddp.report.rows import Comparison, Row, Section
from fashion_ddp.report.text import common_settings, interval_text, p_value_text, percent, settings_text


def title(comparison: Comparison) -> str:
    synthetic = [result.synthetic for result in comparison.results]
    mark = "SYNTHETIC data: " if all(synthetic) else "Partly SYNTHETIC data: " if any(synthetic) else ""
    return mark + "comparison of image classifiers" if mark else "Comparison of image classifiers"


def headline(comparison: Comparison) -> str:
    """Say in one sentence what was compared."""
    results = comparison.finished
    if not results:
        return f"None of {pluralize(len(comparison.unfinished), 'run')} is finished."
    models, recipes = {r.model for r in results}, sorted({r.recipe for r in results})
    seeds = [str(seed) for seed in sorted({r.record["seed"] for r in results})]
    text = f"{pluralize(len(results), 'finished run')} of {pluralize(len(models), 'model')} on "
    text += " and ".join(section.title for section in comparison.sections)
    text += f"; {'recipes' if len(recipes) > 1 else 'recipe'} {', '.join(recipes)}"
    if common := common_settings([r.changed for r in results]):
        text += f", with {settings_text(common)}"
    text += f"; {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(seeds)}"
    if comparison.unfinished:
        text += f"; {pluralize(len(comparison.unfinished), 'run')} not finished and not ranked"
    return text + "."


# --- The verdict ------------------------------------------------------------------------------------------------


def verdict(section: Section) -> tuple[str, str]:
    """Return two sentences: which row is best; and by how much, how surely, and on how many seeds.

    They claim no more than the data show.
    """
    if not section.ranked:
        return "No run has an accuracy that is finite.", "Nothing can be said."
    top, others = section.ranked[0], section.ranked[1:]
    reached = f"{percent(top.mean(ACCURACY) or 0)} %"
    if top.first.predictions:
        reached += f" of {len(top.first.predictions.labels):,} test images right"
    if not others:
        interval = top.interval()
        first = f"{top.label} gets {reached}."
        second = f"95 % interval: {interval_text(interval)} %. " if interval else ""
        second += "It stands alone: there is nothing to compare it with."
    elif section.best:
        few = f"On {pluralize(len(top.results), 'seed')}, " if len(top.results) < 3 else ""
        first = f"{few}{top.label} is the best of {len(others) + 1}: {reached}."
        second = f"That is {_difference_text(section.pairs[0, 1])} more than {others[0].label}, the next."
    else:
        first, second = f"No best can be named: {top.label} gets most, {reached}.", f"{_not_better(section)}."
    if section.synthetic:
        first = f"SYNTHETIC data, which says nothing about real images: {first}"
    return first, f"{second} {_seeds_sentence(section.ranked)}"


def caveats(section: Section) -> list[str]:
    """Say what must be known before a section's times and accuracies are used."""
    return [said for said in (_shared_times(section), _stopped_early(section), _seen_while_choosing(section)) if said]


def _shared_times(section: Section) -> str:
    """Name the runs that shared their machine, so that nobody takes speed or cost from their times; "" without any."""
    results = [r for row in section.rows for r in row.results]
    names = [r.name for r in results if r.concurrent_runs > 1]
    if not names:
        return ""
    which = "all runs" if len(names) == len(results) else _join_names(names)
    most = max(r.concurrent_runs for r in results)
    return (
        f"Times shared by up to {most} runs at once: {which}. Their training time and images/s are no measure of speed "
        "or cost, and not to be compared with those of a run that had the machine to itself."
    )


def _stopped_early(section: Section) -> str:
    """Name the runs that --patience ended before their last epoch, and when; "" without any."""
    results = [r for row in section.rows for r in row.results]
    names = [f"{r.name} ({early})" for r in results if (early := r.record.get("stopped_early"))]
    return f"Stopped early: {_join_names(names)}." if names else ""


def _seen_while_choosing(section: Section) -> str:
    """Name the rows that saw the test set after each epoch where their settings may be chosen among; "" for none."""
    rows = [row.label for row in section.rows if any(r.test_evaluations > 1 for r in row.results)]
    if not section.offers_choice or not rows:
        return ""
    return (
        f"The test set was evaluated more than once in the runs of {_join_names(rows)}. Who chooses one of these "
        "settings, or an epoch, by such figures gets too high an accuracy: choose by --validation, and let "
        "--test-at end open the test set once."
    )


def _difference_text(pair: Pair) -> str:
    """Say by how much one row is better than another, with interval and p value."""
    weakest = f" in the weakest of {pair.tested} pairs of runs" if pair.tested > 1 else ""
    interval = f"95 % interval {interval_text(pair.interval)}"
    return f"{percent(pair.difference)} points ({interval}; exact McNemar, Holm: {p_sentence(pair.p_holm)}{weakest})"


def _not_better(section: Section) -> str:
    """Name the rows that the first one is not shown to be better than."""
    rows, pairs = section.ranked, section.pairs
    untested = [index for index in range(1, len(rows)) if (0, index) not in pairs]
    undecided = [index for index in range(1, len(rows)) if index not in untested and not pairs[0, index].significant]
    sentences = []
    if undecided:
        first = undecided[0]
        than = f" more than {rows[first].label}" if len(undecided) > 1 else ""
        sentences.append(
            f"It is not shown to be better than {_join_names([rows[index].label for index in undecided])}: "
            f"{_difference_text(pairs[0, first])}{than}"
        )
    if untested:
        names = _join_names([rows[index].label for index in untested])
        sentences.append(f"It was not tested against {names}, for lack of predictions on the same images")
    return ". ".join(sentences)


def _join_names(names: list[str], most: int = 3) -> str:
    shown = names[:most] + ([f"{len(names) - most} others"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]


def _seeds_sentence(rows: list[Row]) -> str:
    """Say how many seeds the rows have, and what that leaves open."""
    counts = sorted({len(row.results) for row in rows})
    each = "" if len(rows) == 1 else " each"
    if counts == [1]:
        order = "figure" if len(rows) == 1 else "order"
        return f"1 seed{each}: another seed may change the {order}."
    if len(counts) == 1:
        return f"{counts[0]} seeds{each}."
    by_count = [
        f"{pluralize(n, 'seed')} of {_join_names([r.label for r in rows if len(r.results) == n])}" for n in counts
    ]
    return f"{'; '.join(by_count)}{': another seed may change the order' if counts[0] == 1 else ''}."


def p_sentence(p: float) -> str:
    shown = p_value_text(p)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"


# --- Notes ------------------------------------------------------------------------------------------------------

METHOD = [
    "Accuracy and loss: the weights that the run kept on the whole test set, every image counted once.",
    (
        "95 % interval of an accuracy. 1 seed: Wilson's score (1927), for other test images with these weights. "
        "From 3 seeds: Student's t (1908) over them, for other seeds on these images. 2 seeds: none."
    ),
    (
        "A difference: all models see the same test images, so they are compared image by image. p: McNemar's test "
        "(1947), exact binomial; with several seeds that of the weakest pair of runs (Berger 1982), so a small p means "
        "that each run of the one is better than each of the other. Adjusted for all pairs of a table by Holm (1979). "
        "Interval: paired bootstrap (Efron and Tibshirani 1993; Koehn 2004) of 2,000 draws of images and, with several "
        "seeds, of runs. With 1 seed both leave the seed's part out."
    ),
    "A row is marked as best only where p is below 0.05 and the interval above 0 against every other row.",
    (
        "The test set is for comparing, not for choosing: of many settings, the best on it is partly the luckiest. "
        "Choose by --validation."
    ),
    (
        "Macro F1: the mean of the classes' F1 (van Rijsbergen 1979). Calibration error: the mean distance between a "
        "model's confidence and its accuracy, over 15 bins of confidence (Guo et al. 2017)."
    ),
    (
        "Training time: the tutorials' clock, that is all epochs of training and the pass over the test set after "
        "each (time/train_total_s + time/eval_total_s), without start-up. images/s: training alone. Memory: the "
        "highest of any rank."
    ),
    "FLOPs per image: one forward pass, 2 per multiply-add of matrix products and convolutions.",
]


def method(comparison: Comparison) -> list[str]:
    """Return notes that explain the figures."""
    notes = list(METHOD)
    if any(len(row.results) > 1 for section in comparison.sections for row in section.rows):
        notes.append("Several seeds: the mean over n seeds, and the sample standard deviation (std) between them.")
    if any(r.record["published"] for r in comparison.finished):
        notes.append(
            "Published figures stand beside runs with the recipe's own settings only. The tutorials average the "
            "accuracies of batches, so that the last, smaller batch weighs too much; ours are exact."
        )
    if any(r.kept_epoch for r in comparison.finished):
        notes.append(
            "Epoch kept: the one of the highest accuracy on the validation set; of equals that of the lowest loss, and "
            "then the first. The test set had no part in it. Other runs keep the last epoch."
        )
    if any(r.run.cost for r in comparison.results):
        notes.append(COST)
    return notes


COST = (
    "Cost on the cluster: over all of a run's starts, also those of earlier jobs. Core and card hours: what SLURM gave "
    "to a start, busy or not, times how long it had it; what SLURM calls a CPU is a core here. Queued: from when a job "
    "was submitted or queued again to its start, for whatever reason. Starting, and training with its evaluations and "
    "saves: by the first rank's clock; of a start that was killed, until its last record. Repeated: the part of "
    "training that a start from a checkpoint did again, as steps at the run's mean speed. Energy, where the cluster "
    "measures it: of whole nodes, whoever shares them. Not counted: the comparison's own job, and jobs that ended "
    "before the run's first rank began."
)


def cost_sentences(comparison: Comparison) -> str:
    """Say what the submitted runs cost together, until when, and which part of it is not known; "" without any."""
    costs = [r.run.cost for r in comparison.results if r.run.cost]
    if not costs:
        return ""
    accounted = [cost for cost in costs if "cost/core_hours" in cost]
    cards = [cost["cost/card_hours"] for cost in accounted if "cost/card_hours" in cost]
    total = [pluralize(sum(cost["cost/starts"] for cost in costs), "start")]
    if accounted:
        total.append(f"{sum(cost['cost/core_hours'] for cost in accounted):,.2f} core hours")
    if cards and None not in cards:
        total.append(f"{sum(cards):,.2f} card hours")
    when = max(cost["cost/gathered"] for cost in costs)[:16].replace("T", " ")
    text = f"Together {_join_names(total)}, as of {when} UTC; a row of several seeds is their sum."
    if unasked := len(costs) - len(accounted):
        text += (
            f" SLURM's accounting did not answer for {pluralize(unasked, 'run')}: of these it is what they recorded."
        )
    if late := sum(not cost["cost/complete"] for cost in accounted):
        text += f" The accounting did not have all starts of {pluralize(late, 'run')} to their ends."
    if None in cards:
        text += " This cluster's accounting counts no cards: their hours are not known."
    if untimed := sum(cost["cost/untimed_starts"] for cost in costs):
        text += f" {pluralize(untimed, 'start')} left no times: starting took longer than is shown."
    return text


RELU = (
    "relu ends in a ReLU on its logits, as in the tutorials, and its accuracy varies by tens of points with the seed: "
    "a logit that the ReLU holds at 0 gets no gradient from that image, and one held at 0 on every training image "
    "never comes back, so that its class is lost. mlp is the same net without that last ReLU."
)


def dead_logits(comparison: Comparison) -> list[str]:
    """Explain relu, and say which logits are dead in each run of it; empty without such runs."""
    dead = [dead_logits_sentence(r) for r in comparison.finished if "dead_classes" in r.record]
    return [RELU, *dead] if any(r.model == "relu" for r in comparison.finished) else []


def findings(comparison: Comparison) -> list[str]:
    """Return what a reader must know about single runs before using their figures."""
    notes = []
    for r in comparison.finished:
        columns = [sum(column) for column in zip(*r.record.get("confusion", []), strict=True)]
        if sum(count > 0 for count in columns) == 1:
            notes.append(f"{r.name}: answers {r.classes[columns.index(max(columns))]} for every image.")
    notes += [
        f"{r.name}: what this model computes depends on the number of ranks."
        for r in comparison.finished
        if r.record.get("rank_invariant") is False
    ]
    notes += [
        f"{r.name}: continued on other hardware or beside other runs than it was begun, so its times are mixed and "
        "stand for neither."
        for r in comparison.finished
        if r.record.get("timings_mixed")
    ]
    return notes


def dead_logits_sentence(result: Result) -> str:
    """Say which logits are dead in a run of relu."""
    dead, unused, empty = (result.record[k] for k in ("dead_classes", "never_predicted", "images_without_logit"))
    text = f"{result.name}: relu: {len(dead)} of {len(result.record['confusion'])} logits are dead"
    if dead:
        text += f" ({', '.join(dead)}): never positive on any test image, so these classes can never win over another."
    else:
        text += " (each is positive on some test image)."
    text += f" Never predicted: {', '.join(unused)}." if unused else ""
    return text + (f" On {empty:,} images every logit is 0, and the first class is taken." if empty else "")
