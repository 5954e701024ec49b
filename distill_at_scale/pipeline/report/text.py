"""The report's sentences and numbers: the question, the answer, facts about the set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_at_scale.config.registry import FRAME
from distill_at_scale.core.images import FRAMES_PER_SECOND
from distill_at_scale.distillation.summary import differences, few_tested

CONTROL = FRAME  # prefix of networks that see one frame of a clip
NBSP = "\u00a0"
ONE_DISTILLATION = "One distillation only: deviations and intervals (Welch) cover networks, not distillations."

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


def method_facts(card: Mapping[str, Any], many: str, dropped: float | None = None) -> list[str]:
    """Sentences about the set that its pictures do not show: formation, labels, learned rate, runtime pruning.

    `dropped` is the measured share of the real batches that runtime pruning left out.
    """
    protocol, runtime = card.get("protocol", {}), card.get("runtime", {"rule": "none"})
    facts: list[str] = []
    if (factor := card.get("formation", 1)) > 1:
        facts.append(f"Each holds {factor} × {factor} training {many}, which are cut out and enlarged before training.")
    if crop := protocol.get("crop"):
        facts.append(f"Networks are trained on random crops of {share(crop[0])} to {share(crop[1])} of each.")
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
        measured = "a share that was not measured" if dropped is None else f"{share(dropped)} (measured)"
        asked = f"configured: {share(runtime['drop'])}"
        facts.append(f"Runtime pruning by rule {runtime['rule']} left out {measured} of the real batches; {asked}.")
    return facts


def answer(summary: Sequence[Summary], samples: int = 0, split: str = "test") -> dict[str, str]:
    """The verdict for the first network as a word and a sentence; `others` summarises the other networks.

    `samples` of `split` were tested (0: unknown); a few of them allow no verdict.
    """
    sets = {(row["set"], row["network"]): row for row in summary}
    gaps = {gap["network"]: gap for gap in differences(summary) if gap["against"] == "random_real"}
    # one-frame controls count only if there is nothing else
    networks = [network for network in gaps if not network.startswith(CONTROL)] or list(gaps)
    if not networks:
        return {"verdict": "open", "word": "Not evaluated", "text": "the run has no test on real data", "others": ""}
    network, gap = networks[0], gaps[networks[0]]
    ours, real = sets["distilled", network], sets["random_real", network]
    seeds = f"n = {ours['n']}" if ours["n"] == real["n"] else f"n = {ours['n']} and {real['n']}"
    word = {"yes": "Yes", "no": "No", "unclear": "Not distinguishable"}[verdict(gap)]
    text = f"{accuracy(ours)} against {accuracy(real)} top-1 ({seeds}{f', {network}' if len(networks) > 1 else ''})"
    if gap["low"] is None:
        word = f"{'No difference' if word == 'Not distinguishable' else word}, on a single seed"
        text += f", {points(gap['mean'])} points; with one seed the spread is unknown, so chance cannot be ruled out"
    else:
        text += f", {points(gap['mean'])} points ({interval(gap)})"
    if samples and (note := few_tested(samples, split)):
        return {"verdict": "unclear", "word": "Too few tested samples", "text": f"{text}; {note}", "others": ""}
    others: dict[str, list[str]] = {}
    for name in networks:
        others.setdefault(verdict(gaps[name]), []).append(name)
    phrases = {"yes": "better with", "no": "worse with", "unclear": "not distinguishable with"}
    parts = "; ".join(f"{phrases[key]} {', '.join(names)}" for key, names in others.items())
    sentence = f"Over {len(networks)} networks, the distilled set is {parts}." if len(networks) > 1 else ""
    return {"verdict": verdict(gap), "word": word, "text": text, "others": sentence}


def pruning(summary: Sequence[Summary], seconds: float | None, controls: Mapping[str, Any]) -> list[str]:
    """Sentences on what pruning changed, for the first network: against the unpruned and the random_keep control.

    `seconds` is the time of the run's distillation, `controls` has that of each control.
    """
    sentences = []
    for gap in differences(summary):
        name = gap["against"]
        if gap["network"] != summary[0]["network"] or name not in controls:
            continue
        what = "Pruning" if name == "unpruned" else "The choice of the kept samples, instead of a random one,"
        change = f"{what} changed top-1 by {points(gap['mean'])} points"
        change += f" ({interval(gap)})" if gap["low"] is not None else " (one seed: the spread is unknown)"
        if verdict(gap) == "unclear" or gap["low"] is None:
            change += ", which is not distinguishable from no change"
        if name == "unpruned" and seconds is not None:
            change += f"; the distillation took {duration(seconds)} instead of {duration(controls[name]['seconds'])}"
        sentences.append(f"{change}.")
    return sentences


def usage(card: Mapping[str, Any], noun: Mapping[str, Any], place: str, resize: str = "square") -> str:
    """A Python script that trains a network on the set; it runs as it stands. `place` is the run folder.

    `resize` is data.resize of the run, for a set of an early version, whose card does not have it.
    """
    protocol, many = card.get("protocol", {}), noun["many"]
    optimizer = "SGD(network.parameters(), p.lr, p.momentum, weight_decay=p.weight_decay)"
    scheduler = "MultiStepLR(optimizer, [p.epochs // 2 + 1], gamma=0.1)"
    if protocol.get("optimizer") == "adamw":
        optimizer = "AdamW(network.parameters(), p.lr, weight_decay=p.weight_decay)"
        scheduler = "CosineAnnealingLR(optimizer, p.epochs)"
    argument = "" if "resize" in card or card.get("kind") == "tensors" else f"resize={resize!r}"
    loss = f"loss = F.cross_entropy(network({many}), targets)"
    if protocol.get("temperature", 1.0) != 1:
        logits = f"(network({many}) / p.temperature).log_softmax(1)"
        loss = f'loss = F.kl_div({logits}, targets, reduction="batchmean") * p.temperature**2'
    return f"""\
import torch
import torch.nn.functional as F

import distill_at_scale as das

s = das.load({place!r})  # {len(card["class_names"])} classes, {many} of {shape(card.get("shape", ()))}
p = s.protocol
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear({len(card["class_names"])}))  # put yours here
network(s.images[:2])
optimizer = torch.optim.{optimizer}
scheduler = torch.optim.lr_scheduler.{scheduler}
loader = s.train_loader()
for epoch in range(p.epochs):
    for {many}, targets in loader:
        {loss}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step()

dataset = s.as_dataset()  # ({noun["one"]}, label), for a DataLoader of your own
transform = s.test_transform({argument})  # apply it to real test {many}
"""


def verdict(gap: Summary) -> str:
    """ "yes" if a difference is above zero, "no" if it is below, "unclear" if its interval contains zero.

    Without an interval (a single seed) the sign decides.
    """
    low, high = (gap["mean"], gap["mean"]) if gap["low"] is None else (gap["low"], gap["high"])
    return "yes" if low > 0 else "no" if high < 0 else "unclear"


def interval(gap: Summary) -> str:
    """The confidence interval of a difference in points."""
    return f"{100 * gap['confidence']:.0f}{NBSP}% interval {points(gap['low'])} to {points(gap['high'])}"


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
