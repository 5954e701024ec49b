"""The report's sentences and numbers: the question, the answer, facts about the set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill_at_scale.core.images import FRAMES_PER_SECOND
from distill_at_scale.models.spec import FRAME

CONTROL = FRAME  # prefix of networks that see one frame of a clip
NBSP = "\u00a0"

Summary = Mapping[str, Any]


def words(sizes: Sequence[int], kind: str | None = None) -> dict[str, Any]:
    """What the page calls a sample of this shape; "tensors" are neither image nor clip. `frames` is None except for clips."""
    if kind == "tensors":
        one = "signal" if len(sizes) <= 2 else "array"
        return {"one": one, "many": f"{one}s", "of": "", "frames": None, "rate": None}
    if len(sizes) == 3:
        return {"one": "image", "many": "images", "of": "", "frames": None, "rate": None}
    of = f" of {sizes[0]} frames"
    return {"one": "clip", "many": "clips", "of": of, "frames": sizes[0], "rate": FRAMES_PER_SECOND}


def question(noun: Mapping[str, Any], samples: int, ipc: int, counts: Sequence[int], kept: float | None) -> str:
    """The question that the evaluation answers. `noun` is from `words`, `counts` are the real samples per class."""
    many, real = noun["many"], sum(min(ipc, n) for n in counts)
    source = "" if kept is None else f" from {share(kept)} of the training set"
    synthetic = f"{samples:,} synthetic {many}{noun['of']} ({ipc} per class), distilled{source}"
    return f"Do {synthetic}, train a better network than {real:,} random real {many}?"


def method_facts(card: Mapping[str, Any], many: str) -> list[str]:
    """Sentences about the set that its pictures do not show: formation, labels, learned rate, runtime pruning."""
    protocol, runtime = card.get("protocol", {}), card.get("runtime", {"rule": "none"})
    facts: list[str] = []
    if (factor := card.get("formation", 1)) > 1:
        facts.append(f"Each holds {factor} × {factor} training {many}, which are cut out and enlarged before training.")
    if protocol.get("labels") == "soft":
        facts.append("Their soft labels were learned with them.")
    if labels := card.get("soft_labels"):
        facts.append(
            f"A teacher ({card['teacher']['origin']}) gave a soft label to each of their views in {labels['epochs']} "
            f"epochs; the labels take {labels['bytes_per_image']:,.0f} bytes per {many.removesuffix('s')}."
        )
    if rate := card.get("student_lr"):
        facts.append(f"The students' learning rate, {rate['learned']:.4g}, was learned with them.")
    if runtime["rule"] == "not applicable":
        facts.append(f"Runtime pruning is not applicable: {runtime['reason']}.")
    elif runtime["rule"] != "none":
        facts.append(f"Runtime pruning by rule {runtime['rule']} dropped {share(runtime['drop'])} of each real batch.")
    return facts


def answer(summary: Sequence[Summary]) -> dict[str, str]:
    """The verdict for the first network as a word and a sentence; `others` summarises the other networks."""
    sets = {(row["set"], row["network"]): row for row in summary}
    networks = [network for name, network in sets if name == "distilled" and ("random_real", network) in sets]
    # one-frame controls count only if there is nothing else
    networks = [network for network in networks if not network.startswith(CONTROL)] or networks
    pairs = {network: (sets["distilled", network], sets["random_real", network]) for network in networks}
    if not pairs:
        return {"verdict": "open", "word": "Not evaluated", "text": "the run has no test on real data", "others": ""}
    network, (ours, real) = next(iter(pairs.items()))
    kind, points = verdict(ours, real), 100 * (ours["mean"] - real["mean"])
    seeds = f"n = {ours['n']}" if ours["n"] == real["n"] else f"n = {ours['n']} and {real['n']}"
    text = f"{accuracy(ours)} against {accuracy(real)} top-1 ({seeds}{f', {network}' if len(pairs) > 1 else ''})"
    word = {"yes": "Yes", "no": "No", "unclear": "Not distinguishable"}[kind]
    if kind != "unclear":
        text += f", {abs(points):.1f} points {'more' if points > 0 else 'less'}"
    if ours["std"] is None or real["std"] is None:
        word = f"{'No difference' if kind == 'unclear' else word}, on a single seed"
        text += "; with one seed the spread is unknown, so chance cannot be ruled out"
    elif kind == "unclear":
        spread = 100 * math.hypot(ours["std"], real["std"])
        text += f"; the difference of {abs(points):.1f} points is within the combined deviation of {spread:.1f}"
    others: dict[str, list[str]] = {}
    for name, pair in pairs.items():
        others.setdefault(verdict(*pair), []).append(name)
    phrases = {"yes": "better with", "no": "worse with", "unclear": "not distinguishable with"}
    parts = "; ".join(f"{phrases[key]} {', '.join(names)}" for key, names in others.items())
    sentence = f"Over {len(pairs)} networks, the distilled set is {parts}." if len(pairs) > 1 else ""
    return {"verdict": kind, "word": word, "text": text, "others": sentence}


def verdict(ours: Summary, real: Summary) -> str:
    """ "yes", "no", or "unclear" if the means differ by at most the root of the summed variances."""
    difference = ours["mean"] - real["mean"]
    if abs(difference) <= math.hypot(ours["std"] or 0, real["std"] or 0):
        return "unclear"
    return "yes" if difference > 0 else "no"


def accuracy(row: Summary, suffix: str = "") -> str:
    """Mean ± standard deviation of a summary row in per cent; suffix "_top5" for top-5."""
    mean, std = 100 * row[f"mean{suffix}"], row[f"std{suffix}"]
    return f"{mean:.1f}{NBSP}%" if std is None else f"{mean:.1f}{NBSP}±{NBSP}{100 * std:.1f}{NBSP}%"


def share(fraction: float | str) -> str:
    """A fraction in per cent with three digits; a word such as "auto" stays."""
    return fraction if isinstance(fraction, str) else f"{100 * fraction:.3g}{NBSP}%"


def count(number: float, name: str) -> str:
    """A number with its noun: 1 step, 2 steps."""
    return f"{number:g} {name}{'' if number == 1 else 's'}"


def points(fraction: float) -> str:
    """A difference of accuracies in points, with its sign."""
    rounded = round(100 * fraction, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def shape(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))


def duration(seconds: float) -> str:
    """Seconds for a reader: 0.04 s, 7.2 s, 12 min, 3 h 5 min."""
    if seconds < 90:
        return f"{seconds:.{1 if seconds >= 1 else 2}f}{NBSP}s"
    minutes = round(seconds / 60)
    return f"{minutes}{NBSP}min" if minutes < 90 else f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"
