"""A sweep's findings in words: what is recommended, how sure that is, what it costs. Nothing is computed or drawn here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_at_scale.experiments.sweep.analysis import (
    KEEP,
    Accuracy,
    AccuracyDifference,
    Configuration,
    Recommendation,
)
from distill_at_scale.pipeline.report.text import NBSP, duration, points, share
from distill_at_scale.storage.redact import public

CONTROLS = {"unpruned": "unpruned", "random": "random selection"}


def accuracy(found: Accuracy) -> str:
    """Mean ± standard deviation in per cent."""
    std = "" if found.std is None else f"{NBSP}±{NBSP}{100 * found.std:.1f}"
    return f"{100 * found.mean:.1f}{std}{NBSP}%"


def size(found: Accuracy) -> str:
    """Distillations × networks, or their sum where the distillations had different numbers of networks."""
    seeds, networks = len(found.means), found.networks
    return f"{seeds}{NBSP}×{NBSP}{networks[0]}" if len(set(networks)) == 1 else f"{found.n} of {seeds} distillations"


def spread(found: Accuracy) -> str:
    """What the deviation does not tell, for a small n; empty where it tells what it should."""
    if found.n == 1:
        return "One distillation and one network: the spread is unknown, so chance is not ruled out."
    if len(found.means) == 1:
        return (
            "The deviation is over networks trained on one distilled set; how much another distillation would differ was not "
            "measured (sweep.seeds)."
        )
    return ""


def value(found: Any) -> str:
    """A setting as a reader says it."""
    if found is None:
        return "–"
    return f"{found:g}" if isinstance(found, float) else str(public(found))


def short(keys: Sequence[str]) -> dict[str, str]:
    """The last part of every dotted key, where that names one of them only."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def label(keys: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Settings in a few words; of a criterion the value says enough."""
    parts = [(key, value(found)) for key, found in keys.items() if found is not None]
    return ", ".join(
        text if key in ("select.criterion", "distill.method") else f"{names[key]} {text}" for key, text in parts
    )


def describe(one: Configuration) -> str:
    """A configuration in a few words: the rate, and what else was swept."""
    names = short(list(one.keys))
    rest = label({key: found for key, found in one.keys.items() if key not in KEEP}, names)
    if one.control:
        control = CONTROLS.get(one.control, one.control)
        context = {k: v for k, v in one.keys.items() if not k.startswith(("select.", "runtime."))}
        rate = "" if one.control == "unpruned" else f", {share(one.rate)} kept"
        return ", ".join(filter(None, (f"{control}{rate}", label(context, names))))
    kept = f"{share(one.rate)} kept" if one.kept < one.of else "all samples"
    return ", ".join(filter(None, (kept, rest)))


def verdict(found: Recommendation) -> str:
    """yes: pruning pays; no: it does not; unclear where that is open."""
    if found.saved is None or found.chosen.accuracy.n == 1:
        return "unclear"
    if found.chosen.control == "unpruned":
        return "no"
    better = found.over_unpruned is not None and found.over_unpruned.verdict == "better"
    return "yes" if found.saved > 0 and better else "unclear"


def headline(found: Recommendation, shared: Recommendation | None = None, named: bool = True) -> dict[str, str]:
    """The answer as a word and a sentence, with its verdict; `shared` is the recommendation where scoring is shared.

    `named`: with what was swept beside the rate.
    """
    one, parts = found.chosen, []
    later = shared is not None and shared.chosen.control is None
    if one.control == "unpruned":
        word = "Keep everything, for a single distillation" if later else "Keep everything"
    else:
        word = f"Keep {share(one.rate)} of the training samples" if one.kept < one.of else "Keep all training samples"
    rest = describe(one).partition(", ")[2] if named else ""
    if found.unpruned and one.control != "unpruned":
        parts.append(f"{accuracy(found.unpruned.accuracy)} unpruned in {duration(found.unpruned.cost)}")
    if found.random:
        parts.append(f"{accuracy(found.random.accuracy)} with as many drawn at random")
    against = f", against {' and '.join(parts)}" if parts else ""
    ours = f"{accuracy(one.accuracy)} top-1 (n = {size(one.accuracy)}) in {duration(one.cost)}"
    scored = ", scoring included" if one.scoring_seconds else ""
    kind = "unclear" if later and verdict(found) == "no" else verdict(found)
    return {"word": word, "text": f"{f'{rest}: ' if rest else ''}{ours}{scored}{against}", "verdict": kind}


def reasons(found: Recommendation, shared: Recommendation | None = None) -> list[str]:
    """Why this one, how it compares and what it saves, in sentences; and what to take where scoring is shared."""
    sentences = [why(found), cheaper(found)]
    if found.chosen.kept < found.chosen.of and found.chosen.control is None:
        sentences.append(against_random(found))
    if found.over_unpruned:
        sentences.append(f"Against the unpruned control: {interval(found.over_unpruned)}.")
    sentences += [saving(found), once_scored(found, shared), spread(found.chosen.accuracy)]
    return [sentence for sentence in sentences if sentence]


def why(found: Recommendation) -> str:
    one, best = found.chosen, found.best
    if one is best:
        return "It has the best accuracy of all, and none within one standard deviation of it costs less."
    low = best.accuracy.mean - (best.accuracy.std or 0)
    return (
        f"It is the cheapest within one standard deviation of the best ({describe(best)}: {accuracy(best.accuracy)} in "
        f"{duration(best.cost)}, so at least {100 * low:.1f}{NBSP}%)."
    )


def cheaper(found: Recommendation) -> str:
    if (one := found.cheaper_random) is None:
        return ""
    return (
        f"Within the same deviation and cheaper still is {describe(one)}: {accuracy(one.accuracy)} in {duration(one.cost)}; "
        "a random draw needs no scoring."
    )


def once_scored(found: Recommendation, shared: Recommendation | None) -> str:
    """The recommendation where scoring is shared, if it is another one."""
    if shared is None or shared.chosen is found.chosen or shared.unpruned is None or shared.saved_shared is None:
        return ""
    one = shared.chosen
    return (
        f"Where the {one.sharing} trials of a sweep share scoring, the cheapest within the same deviation is {describe(one)}: "
        f"{accuracy(one.accuracy)}; it {_saved(shared.saved_shared, shared.unpruned.cost)} for each distillation."
    )


def against_random(found: Recommendation) -> str:
    if not found.random:
        return "No random control has its rate, so what the criterion adds is open."
    if not found.over_random:
        value = points(found.chosen.accuracy.mean - found.random.accuracy.mean)
        return f"Against random selection at the same rate: {value} points, of a single evaluation, so chance is not ruled out."
    words = {"better": "selection beats random", "worse": "random beats selection", "open": "not distinguishable"}
    return (
        f"Against random selection at the same rate: {interval(found.over_random)}, {words[found.over_random.verdict]}."
    )


def interval(found: AccuracyDifference) -> str:
    """A difference in points with its confidence interval."""
    counts = " and ".join(map(str, found.counts))
    single = "" if found.over == "distillations" else " of single distillations"
    return (
        f"{points(found.value)} points (95{NBSP}% interval {points(found.low)} to {points(found.high)}, Welch over {counts} "
        f"{found.over}{single})"
    )


def saving(found: Recommendation) -> str:
    """Net time against the unpruned control, with all of scoring and with a part of it."""
    one = found.chosen
    if one.control == "unpruned" or found.unpruned is None or found.saved is None or found.saved_shared is None:
        return "" if found.unpruned else "No unpruned control was run, so what it saves is open."
    text = f"{_saved(found.saved, found.unpruned.cost)} for one distillation with all of scoring charged"
    if not one.scoring_seconds:
        return f"Net, it {_saved(found.saved, found.unpruned.cost)} for one distillation; no scores are needed."
    text += f" ({duration(one.scoring_seconds)}), and {_saved(found.saved_shared, found.unpruned.cost)} where scoring is shared"
    text += f" by the {one.sharing} trials of this sweep that stand on it"
    pays = found.pays_after
    if pays is None:
        return f"Net, it {text}; a distillation itself is no faster, so scoring never pays."
    return f"Net, it {text}; scoring has paid after {pays} {'distillation' if pays == 1 else 'distillations'}."


def _saved(seconds: float, of: float) -> str:
    part = f" ({100 * abs(seconds) / of:.0f}{NBSP}%)" if of else ""
    return f"{'saves' if seconds >= 0 else 'costs'} {duration(abs(seconds))}{'' if seconds >= 0 else ' more'}{part}"
