"""The file that `init` writes: the chosen settings as commented YAML, and what the command says about them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from distill_at_scale.config.fields import flatten
from distill_at_scale.config.load import Config
from distill_at_scale.config.shipped import FOLDER, SCHEMA_LINE
from distill_at_scale.distillation import engine
from distill_at_scale.distillation.methods import METHODS
from distill_at_scale.pipeline.planning.plan import in_words
from distill_at_scale.pipeline.planning.starter_config import Starter

COLUMN = 40  # of the comments
ALWAYS = (  # keys that a newcomer wants to see, in this order, also with their default
    "run.dir", "run.seed", "data.source", "data.path", "data.size", "score.criterion", "score.trials", "score.epochs",
    "score.width", "select.keep", "distill.method", "distill.ipc", "distill.steps", "distill.width", "runtime.rule",
    "evaluate.networks", "evaluate.seeds", "evaluate.epochs", "evaluate.controls", "cluster.address",
)  # fmt: skip


def summary(starter: Starter, file: Path) -> list[str]:
    """What was written, what it will take, and the next commands."""
    config, here = starter.config, f"{starter.cores} cores, {f'{starter.gpus} GPUs' if starter.gpus else 'no GPU'}"
    lines = [
        f"wrote {file}: {config.distill.method}, {config.distill.ipc} per class, about {in_words(starter.seconds)} here "
        f"({here}, otherwise idle); published settings: about {in_words(_published_seconds(starter))}"
    ]
    if not starter.fits:
        lines.append(
            f"this does not fit the budget of {in_words(starter.budget)}: the smallest settings take "
            f"{in_words(starter.seconds)} ({_stages(starter)}); use a larger --budget, fewer classes (data.classes) or a GPU"
        )
    elif config.data.classes is not None:
        lines.append(
            f"only {len(config.data.classes)} of {starter.classes} classes fit the budget; for all of them remove "
            "data.classes from the file, and see `plan` for the time"
        )
    if (load := os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0) > starter.cores:
        used = f"load {load:.0f} on {starter.cores} cores"
        lines.append(f"other processes use this machine ({used}), so times are uncertain")
    lines += starter.problems
    name = shlex.quote(str(file))
    lines.append("next:")
    for command, meaning in (("validate", "read every sample, list the broken ones"), ("plan", "time and memory of each stage"),
                             ("run", "distil; repeat it to resume")):  # fmt: skip
        lines.append(f"  distill-at-scale {command} {name}".ljust(60) + f"# {meaning}")
    return lines


def render(starter: Starter, path: str, budget: str) -> str:
    """The YAML text."""
    config, inspection = starter.config, starter.inspection
    values = {**flatten(config), **{key: flatten(config).get(key) for key in ALWAYS}}
    defaults = flatten(Config())
    wanted = [key for key in ALWAYS if values[key] is not None or key in ("cluster.address",)]
    if inspection.kind == "tensors":
        wanted.remove("data.size")
    if config.criterion == "random":
        unused = ("score.trials", "score.epochs", "score.width", "evaluate.controls")
        wanted = [key for key in wanted if key not in unused]
    if values["distill.steps"] == 1:  # of a method without steps
        wanted.remove("distill.steps")
    changed = [key for key in values if values[key] != defaults.get(key) and key not in wanted]
    own = f"distill.{config.distill.method}"
    changed = [key for key in changed if key not in ("data.chunk",) and not key.startswith("data.classes.")]
    keys = _order([*wanted, *changed])
    header = [
        f"{SCHEMA_LINE}{FOLDER / 'schema.json'}",
        f"# Written by: distill-at-scale init --data {shlex.quote(path)} --budget {budget}",
        *(f"# {line.strip()}" for line in inspection.lines()),
        f"# Expected on this machine ({starter.cores} cores, {starter.gpus} GPUs, otherwise idle): {_stages(starter)};",
        f"# in all {in_words(starter.seconds)}. With the published settings, in the comments: "
        f"{in_words(_published_seconds(starter))}.",
    ]
    notes, lines = _notes(starter), list[str]()
    for section in dict.fromkeys(key.partition(".")[0] for key in keys):
        lines.append(f"{section}:")
        nested: list[str] = []
        for key in (key for key in keys if key.startswith(f"{section}.")):
            name = key.removeprefix(f"{section}.")
            target, indent = (nested, "    ") if key.startswith(f"{own}.") else (lines, "  ")
            text = f"{indent}{name.rpartition('.')[2] if target is nested else name}: {_scalar(values[key])}"
            comment = notes.get(key, "")
            target.append(f"{text.ljust(COLUMN)}   # {comment}" if comment else text)
        if nested:
            lines += [f"  {config.distill.method}:", *nested]
    return "\n".join([*header, "", *lines, ""])


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.strip().removesuffix("...").strip()


def _stages(starter: Starter) -> str:
    shown = [one for one in starter.estimates if one.stage not in ("select", "report")]
    return ", ".join(f"{one.stage} {in_words(one.seconds)}" for one in shown)


def _published_seconds(starter: Starter) -> float:
    return sum(one.seconds for one in starter.published_estimates)


def _notes(starter: Starter) -> dict[str, str]:
    """The comment of each key."""
    config, published = starter.config, starter.published
    kept = min(starter.inspection.counts)
    methods = ", ".join(name for name in METHODS if name != config.distill.method)
    notes = {
        "run.dir": "all output of the run; give another folder for other settings",
        "run.seed": "of every random draw",
        "data.source": "the layout of the data",
        "data.size": "side in pixels; a larger one needs more time and memory",
        "data.resize": "crop: the middle square; square: stretch",
        "data.channels": "1: grey; 3: colour",
        "data.frames": "frames per clip",
        "data.holdout": "share of each class for the test split, which the data lack",
        "data.train_split": "the only split that the data have",
        "data.classes": f"so that the first run fits; without this line: all {starter.classes:,}",
        "data.image_column": "the column with the encoded images",
        "data.label_column": "the column with the classes",
        "data.value_column": "the column with the arrays",
        "data.label_pattern": "the group label finds the class in the path of a file",
        "data.rate": "samples per second; sounds are resampled",
        "data.seconds": "nearly all are shorter or as long; longer ones are cut, shorter ones padded",
        "data.bands": "mel bands; 64: finer and slower",
        "score.criterion": "also el2n, grand, margin, density, …, or a list; random trains no proxies",
        "score.trials": "proxy networks behind the scores",
        "score.epochs": "epochs of each; little training gives good scores",
        "score.width": "channels of the proxies",
        "score.batch": "batch size of the proxies",
        "score.share": "share of each class that proxies are trained on",
        "score.network": "the proxies; a name or package.module:Object",
        "score.compile": "auto: torch.compile where networks are large; it starts slowly",
        "select.keep": _keep_note(starter, kept),
        "distill.method": f"also {methods}",
        "distill.ipc": "synthetic samples per class",
        "distill.steps": "more steps, better samples",
        "distill.width": "channels of the network to match and to evaluate with",
        "distill.network": "a name or package.module:Object",
        "distill.workers": "processes that share the classes",
        f"distill.{config.distill.method}.real_batch": "real samples per class and step",
        "runtime.rule": "loss: drop the largest losses of each real batch (runtime.drop: 0.3); faster, dm loses accuracy"
        if config.runtime.rule == "none"
        else "drops the largest losses of each real batch (runtime.drop: 0.3); none: uses all",
        "evaluate.networks": "networks to train on the set and test; several test how it transfers",
        "evaluate.seeds": "networks of each kind",
        "evaluate.epochs": "epochs of each",
        "evaluate.controls": "[unpruned]: distil again without pruning, to see what pruning changes",
        "distill.dm.augment": "arrays are not augmented",
        "cluster.address": "none: this process alone; null: Ray on this machine; HOST:PORT: a cluster",
        "cluster.gpus_per_worker": "GPUs per worker",
    }
    prices = {one.stage: f" ({one.stage} about {in_words(one.seconds)})" for one in starter.published_estimates}
    for key in _order(flatten(config)):
        value = flatten(published).get(key)
        value = _default(published, key) if value is None else value
        if value in (None, flatten(config)[key]) or key.startswith(("data.", "cluster.", "run.")):
            continue
        price = prices.pop(key.partition(".")[0], "")  # at the first key of its stage
        text = f"{value:,}" if isinstance(value, int) else _scalar(value)
        notes[key] = "; ".join(filter(None, [notes.get(key, ""), f"published: {text}{price}"]))
    return notes


def _order(keys: Iterable[str]) -> list[str]:
    """Keys in the order of the file."""
    places = {key: place for place, key in enumerate(ALWAYS)}
    return sorted(keys, key=lambda key: places.get(key, len(places)))


def _default(published: Config, key: str) -> Any:
    """The value of a key that is null in the published settings."""
    if key == "distill.steps":
        return engine.step_count(published)
    if key == "evaluate.epochs":
        return engine.method_class(published).protocol(published).epochs
    return None


def _keep_note(starter: Starter, least: int) -> str:
    config = starter.config
    if config.select.rate == 1:
        return "all: from ten per class on, and in small classes, keeping a part by loss costs accuracy"
    number = max(1, round(config.select.rate * least))
    return f"about {number:,} per class, those of the lowest loss; 1.0: all; auto: search"
