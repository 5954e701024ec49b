"""The results of a sweep in words: the recommendation, its confidence and its cost. Computes and draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_at_scale.experiments.sweep import analysis
from distill_at_scale.experiments.sweep.analysis import Accuracy, Configuration, Recommendation
from distill_at_scale.pipeline.report import text as report_text
from distill_at_scale.pipeline.report.text import NBSP, duration, points, share
from distill_at_scale.storage.redact import public

CONTROLS = {"unpruned": "unpruned", "random": "random selection"}
OVER_RANDOM = {"better": "selection beats random", "worse": "random beats selection", "open": "not distinguishable"}


def accuracy(result: Accuracy) -> str:
    """Mean ± standard deviation in per cent."""
    return report_text.accuracy({"mean": result.mean, "std": result.std})


def size(result: Accuracy) -> str:
    """Distillations × networks, or their sum where the distillations had different numbers of networks."""
    seeds, networks = len(result.means), result.networks
    return f"{seeds}{NBSP}×{NBSP}{networks[0]}" if len(set(networks)) == 1 else f"{result.n} of {seeds} distillations"


def spread(result: Accuracy) -> str:
    """What the standard deviation of a small n does not cover; empty for several distillations."""
    if result.n == 1:
        return "One distillation and one network: the spread is unknown, so chance is not ruled out."
    if len(result.means) == 1:
        return (
            "The deviation is over networks trained on one distilled set; how much another distillation would differ was not "
            "measured (sweep.seeds)."
        )
    return ""


def value(setting: Any) -> str:
    """The value of a key as text."""
    if setting is None:
        return "–"
    return f"{setting:g}" if isinstance(setting, float) else str(public(setting))


def short(keys: Sequence[str]) -> dict[str, str]:
    """Dotted keys to their last part, where no other key ends with it."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def label(keys: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Settings in a few words; a criterion or method needs no name."""
    parts = [(key, value(setting)) for key, setting in keys.items() if setting is not None]
    plain = ("select.criterion", "distill.method")
    return ", ".join(text if key in plain else f"{names[key]} {text}" for key, text in parts)


def describe(one: Configuration) -> str:
    """A configuration in a few words: the rate, and the other swept keys."""
    names = short(list(one.keys))
    if one.control:
        rate = "" if one.control == "unpruned" else f", {share(one.rate)} kept"
        parts = (f"{CONTROLS.get(one.control, one.control)}{rate}", label(analysis.context(one), names))
    else:
        kept = f"{share(one.rate)} kept" if one.kept < one.of else "all samples"
        parts = (kept, label({key: setting for key, setting in one.keys.items() if key not in analysis.KEEP}, names))
    return ", ".join(filter(None, parts))


def verdict(result: Recommendation) -> str:
    """yes: pruning pays; no: it does not; unclear otherwise."""
    if result.saved is None or result.chosen.accuracy.n == 1:
        return "unclear"
    if result.chosen.control == "unpruned":
        return "no"
    better = result.over_unpruned is not None and result.over_unpruned.verdict == "better"
    return "yes" if result.saved > 0 and better else "unclear"


def headline(result: Recommendation, shared: Recommendation | None = None, named: bool = True) -> dict[str, str]:
    """The answer as a word, a sentence and a verdict; `shared` is the recommendation for shared scoring.

    `named` adds the swept keys other than the rate.
    """
    one, controls = result.chosen, []
    later = shared is not None and shared.chosen.control is None
    if one.control == "unpruned":
        word = "Keep everything, for a single distillation" if later else "Keep everything"
    else:
        word = f"Keep {share(one.rate)} of the training samples" if one.kept < one.of else "Keep all training samples"
    rest = describe(one).partition(", ")[2] if named else ""
    if result.unpruned and one.control != "unpruned":
        controls.append(f"{accuracy(result.unpruned.accuracy)} unpruned in {duration(result.unpruned.cost)}")
    if result.random:
        controls.append(f"{accuracy(result.random.accuracy)} with as many drawn at random")
    against = f", against {' and '.join(controls)}" if controls else ""
    ours = f"{accuracy(one.accuracy)} top-1 (n = {size(one.accuracy)}) in {duration(one.cost)}"
    scored = ", scoring included" if one.scoring_seconds else ""
    kind = "unclear" if later and verdict(result) == "no" else verdict(result)
    return {"word": word, "text": f"{f'{rest}: ' if rest else ''}{ours}{scored}{against}", "verdict": kind}


def reasons(result: Recommendation, shared: Recommendation | None = None) -> list[str]:
    """Sentences: why this one, its differences from the controls, its savings, and the choice for shared scoring."""
    one, best = result.chosen, result.best
    if one is best:
        sentences = ["It has the best accuracy of all, and none within one standard deviation of it costs less."]
    else:
        low = best.accuracy.mean - (best.accuracy.std or 0)
        sentences = [
            f"It is the cheapest within one standard deviation of the best ({describe(best)}: {accuracy(best.accuracy)} in "
            f"{duration(best.cost)}, so at least {100 * low:.1f}{NBSP}%)."
        ]
    if (random := result.cheaper_random) is not None:
        sentences.append(
            f"Within the same deviation and cheaper still is {describe(random)}: {accuracy(random.accuracy)} in "
            f"{duration(random.cost)}; a random draw needs no scoring."
        )
    if one.kept < one.of and one.control is None:
        against = "Against random selection at the same rate"
        if not result.random:
            sentences.append("No random control has its rate, so what the criterion adds is open.")
        elif not result.over_random:
            gap = points(one.accuracy.mean - result.random.accuracy.mean)
            sentences.append(f"{against}: {gap} points, of a single evaluation, so chance is not ruled out.")
        else:
            sentences.append(f"{against}: {interval(result.over_random)}, {OVER_RANDOM[result.over_random.verdict]}.")
    if result.over_unpruned:
        sentences.append(f"Against the unpruned control: {interval(result.over_unpruned)}.")
    sentences.append(saving(result))
    if shared and shared.chosen is not one and shared.unpruned is not None and shared.saved_shared is not None:
        sentences.append(
            f"Where the {shared.chosen.sharing} trials of a sweep share scoring, the cheapest within the same deviation is "
            f"{describe(shared.chosen)}: {accuracy(shared.chosen.accuracy)}; it "
            f"{_saved(shared.saved_shared, shared.unpruned.cost)} for each distillation."
        )
    sentences.append(spread(one.accuracy))
    return [sentence for sentence in sentences if sentence]


def interval(result: analysis.AccuracyDifference) -> str:
    """A difference in points with its confidence interval."""
    counts = " and ".join(map(str, result.counts))
    single = "" if result.over == "distillations" else " of single distillations"
    return (
        f"{points(result.value)} points (95{NBSP}% interval {points(result.low)} to {points(result.high)}, Welch over {counts} "
        f"{result.over}{single})"
    )


def saving(result: Recommendation) -> str:
    """Net time against the unpruned control, with the full cost of scoring and with a part of it."""
    one = result.chosen
    if one.control == "unpruned" or result.unpruned is None or result.saved is None or result.saved_shared is None:
        return "" if result.unpruned else "No unpruned control was run, so what it saves is open."
    full, part = _saved(result.saved, result.unpruned.cost), _saved(result.saved_shared, result.unpruned.cost)
    if not one.scoring_seconds:
        return f"Net, it {full} for one distillation; no scores are needed."
    text = (
        f"Net, it {full} for one distillation with all of scoring charged ({duration(one.scoring_seconds)}), and {part} where "
        f"scoring is shared by the {one.sharing} trials of this sweep that stand on it"
    )
    pays = result.pays_after
    if pays is None:
        return f"{text}; a distillation itself is no faster, so scoring never pays."
    return f"{text}; scoring has paid after {pays} {'distillation' if pays == 1 else 'distillations'}."


def _saved(seconds: float, of: float) -> str:
    part = f" ({100 * abs(seconds) / of:.0f}{NBSP}%)" if of else ""
    return f"{'saves' if seconds >= 0 else 'costs'} {duration(abs(seconds))}{'' if seconds >= 0 else ' more'}{part}"
