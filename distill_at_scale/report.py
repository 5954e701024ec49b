"""The report: one HTML file that opens offline, made only of what the run folder holds.

This file reads the artefacts, cuts them down to what can be shown at any number of classes and puts the findings into
words; `figures.py` draws and `report.html.j2` is the page. It computes no result of its own. A part without artefact is
left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq
import yaml

from distill_at_scale import figures, synthetic
from distill_at_scale.config import Config, flatten
from distill_at_scale.data.shards import Prepared
from distill_at_scale.data.storage import shown
from distill_at_scale.pruning import manifest
from distill_at_scale.pruning.static import RANDOM
from distill_at_scale.rundir import STAGES, RunDir, digest, publish
from distill_at_scale.synthetic import SyntheticSet

HISTOGRAMS, SNAPSHOT_CLASSES, SAMPLE_CLASSES, SAMPLES, REASONS = 20, 10, 10, 5, 5
IMAGE_CLASSES, IMAGE_ROWS, IMAGE_COLUMNS = 100, 20, 10  # classes at one image each; else classes and images
IMAGE_BYTES = 1_000_000  # uncompressed, of all synthetic images that are shown
SYNTHETIC_SIDE, SMALL_SIDE = 112, 64  # larger pictures are reduced to this
NBSP = "\u00a0"
SCORE_PARTS = {"train_seconds": "score: train the proxies", "score_seconds": "score: score all samples"}

Array = np.ndarray[Any, Any]
Summary = Mapping[str, Any]


def write(run: RunDir, config: Config) -> Path:
    """Write `report.html` into the run folder, in one step.

    Raises UserError where the folder holds no prepared data or no synthetic set.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page.filters |= {"accuracy": accuracy, "share": share, "shape": shape, "duration": duration, "comma": "{:,}".format}
    text = page.get_template("report.html.j2").render(contents(run, config))
    with publish(run / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return run / "report.html"


def version() -> str:
    """Changes when the page itself does, so that an old report is written anew."""
    here = Path(__file__).parent
    return digest([(here / name).read_text() for name in ("report.py", "figures.py", "report.html.j2")])


def contents(run: RunDir, config: Config) -> dict[str, Any]:
    """Everything that the page shows."""
    prepared, made = Prepared(run / "prepared"), synthetic.load(run / "synthetic")
    about, evaluation = _json(run / "run.json"), _json(run / "evaluation.json")
    records = {stage: record for stage in STAGES if stage != "report" and (record := run.record(stage))}
    settings = _settings(about, records, config)
    source = settings["data"]
    selection = _selection(run, prepared)
    return {
        "name": _name(source["path"] or "") or source["source"],
        "card": made.card,
        "colors": figures.COLORS,
        "set_names": figures.SET_NAMES,
        "question": question(made, prepared, selection["share"] if selection else None),
        "answer": answer(evaluation.get("summary", [])),
        "evaluation": _evaluation(evaluation, len(prepared.class_names)),
        "synthetic": _synthetic(made),
        "snapshots": _snapshots(made),
        "curve": _curve(run / "metrics.jsonl"),
        "selection": selection,
        "samples": _samples(run, prepared),
        "times": _times(records),
        "data": prepared.meta,
        "rejected": _rejected(run / "rejected.parquet"),
        "settings": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100),
        "about": about,
        "records": records,
    }


def question(made: SyntheticSet, prepared: Prepared, kept: float | None) -> str:
    """What the evaluation asks, with this run's numbers."""
    ipc, images = made.card["images_per_class"], len(made.labels)
    real = sum(min(ipc, n) for n in prepared.counts("train"))
    source = "" if kept is None else f" from {share(kept)} of the training set"
    return (
        f"Do {images:,} synthetic images ({ipc} per class), distilled{source}, train a better network than "
        f"{real:,} random real images?"
    )


def answer(summary: Sequence[Summary]) -> dict[str, str]:
    """The verdict on the first network as a word and a sentence; with several networks, what the others say."""
    pairs = _pairs(summary)
    if not pairs:
        return {"verdict": "open", "word": "Not evaluated", "text": "the run holds no test on real data", "others": ""}
    network, (ours, real) = next(iter(pairs.items()))
    kind, points = verdict(ours, real), 100 * (ours["mean"] - real["mean"])
    seeds = f"n = {ours['n']}" if ours["n"] == real["n"] else f"n = {ours['n']} and {real['n']}"
    text = f"{accuracy(ours)} against {accuracy(real)} top-1 ({seeds}{f', {network}' if len(pairs) > 1 else ''})"
    word = {"yes": "Yes", "no": "No", "unclear": "Not distinguishable"}[kind]
    if kind != "unclear":
        text += f", {abs(points):.1f} points {'more' if points > 0 else 'less'}"
    if ours["std"] is None or real["std"] is None:
        word = f"{'No difference' if kind == 'unclear' else word}, on a single seed"
        text += "; with one seed the spread is unknown, so chance is not ruled out"
    elif kind == "unclear":
        spread = 100 * math.hypot(ours["std"], real["std"])
        text += f"; the difference of {abs(points):.1f} points is within the combined deviation of {spread:.1f}"
    return {"verdict": kind, "word": word, "text": text, "others": _others(pairs)}


def verdict(ours: Summary, real: Summary) -> str:
    """yes, no, or unclear where the means differ by no more than the root of the summed variances."""
    difference = ours["mean"] - real["mean"]
    if abs(difference) <= math.hypot(ours["std"] or 0, real["std"] or 0):
        return "unclear"
    return "yes" if difference > 0 else "no"


def _pairs(summary: Sequence[Summary]) -> dict[str, tuple[Summary, Summary]]:
    """network -> (distilled, random real), in the order of the evaluation."""
    sets = {(row["set"], row["network"]): row for row in summary}
    networks = [network for name, network in sets if name == "distilled" and ("random_real", network) in sets]
    return {network: (sets["distilled", network], sets["random_real", network]) for network in networks}


def _others(pairs: Mapping[str, tuple[Summary, Summary]]) -> str:
    names: dict[str, list[str]] = {}
    for network, (ours, real) in pairs.items():
        names.setdefault(verdict(ours, real), []).append(network)
    words = {"yes": "better with", "no": "worse with", "unclear": "not distinguishable with"}
    parts = "; ".join(f"{words[kind]} {', '.join(found)}" for kind, found in names.items())
    return f"Over {len(pairs)} networks, the distilled set is {parts}." if len(pairs) > 1 else ""


def _evaluation(evaluation: Mapping[str, Any], classes: int) -> dict[str, Any] | None:
    if not (summary := evaluation.get("summary")):
        return None
    networks = list(dict.fromkeys(row["network"] for row in summary))
    ordered = sorted(summary, key=lambda row: networks.index(row["network"]))
    single: dict[tuple[str, str], list[float]] = {(row["set"], row["network"]): [] for row in summary}
    for row in evaluation["rows"]:
        single[row["set"], row["network"]].append(100 * row["top1"])
    bars = [figures.Bar(row, single[row["set"], row["network"]], accuracy(row)) for row in ordered]
    bounds = any(row["set"] in ("kept", "full") for row in summary)
    return {"chart": figures.accuracies(bars, 100 / classes), "rows": ordered, "top5": classes > 5, "bounds": bounds}


def _synthetic(made: SyntheticSet) -> dict[str, Any]:
    """The first images of the first classes, as many as the budget of bytes allows."""
    labels, pixels = made.labels.numpy(), made.pixels().numpy()
    channels, side = pixels.shape[-3], min(pixels.shape[-1], SYNTHETIC_SIDE)
    columns = min(made.card["images_per_class"], IMAGE_COLUMNS)
    most = IMAGE_CLASSES if columns == 1 else IMAGE_ROWS
    classes = max(1, min(most, IMAGE_BYTES // (channels * side * side * columns)))
    rows = [
        (made.class_names[label], [figures.picture(image, side) for image in pixels[labels == label][:columns]])
        for label in np.unique(labels)[:classes]
    ]
    return {"rows": rows, "columns": columns, "shape": pixels.shape[1:], "reduced": pixels.shape[-1] > side}


def _snapshots(made: SyntheticSet) -> dict[str, Any] | None:
    """The first image of the first classes over the steps."""
    if not made.snapshots:
        return None
    names = made.class_names[:SNAPSHOT_CLASSES]
    first = {step: s.numpy()[:: max(1, len(s) // len(names))][: len(names)] for step, s in made.snapshots.items()}
    rows = [(step, [figures.picture(image, SMALL_SIDE) for image in first[step]]) for step in sorted(first)]
    return {"names": names, "rows": rows}


def _curve(path: Path) -> dict[str, Any] | None:
    """The distillation's log; a step that was repeated after a resume counts once, as it was done last."""
    found: dict[str, list[tuple[int, float]]] = {"loss": [], "top1": []}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):  # a line cut short by an interruption
            entry = json.loads(line)
            for key in found.keys() & entry.keys():
                if entry["stage"] == "distill" and math.isfinite(entry[key]):
                    while found[key] and found[key][-1][0] >= entry["step"]:
                        found[key].pop()
                    found[key].append((entry["step"], entry[key]))
    top1 = [(step, 100 * value) for step, value in found["top1"]]
    return {"chart": figures.curve(found["loss"], top1), "top1": bool(top1)} if found["loss"] or top1 else None


def _selection(run: RunDir, prepared: Prepared) -> dict[str, Any] | None:
    """The cut: what was asked and reached, and the distribution of the scores per class."""
    if not (run / "manifest.parquet").exists():
        return None
    table, facts = manifest.read(run / "manifest.parquet")
    labels, scores, kept = (table[name].to_numpy() for name in ("label", "score", "kept"))
    label, control = facts.get("criterion", "score"), facts.get("criterion") == RANDOM
    if control and (found := _scores(run)):
        _, scores, label = found  # a random number tells nothing; where the dropped samples lie does
    shown = np.unique(labels)[:HISTOGRAMS]
    parts = [figures.Distribution(prepared.class_names[c], scores[labels == c], kept[labels == c]) for c in shown]
    chart = figures.distributions(parts, f"{label}, one value per training sample")
    counts = {"kept": int(kept.sum()), "of": len(kept), "share": float(kept.mean()), "shown": len(shown)}
    return {"chart": chart, "facts": facts, "control": control, "label": label, **counts}


def _scores(run: RunDir) -> tuple[Array, Array, str] | None:
    """Labels, scores and the criterion's name, in the order of manifest and shards; the long lists stay unread."""
    path = run / "scores.parquet"
    if not path.exists():
        return None
    names, table = pq.read_schema(path).names, pq.read_table(path, columns=["label", "score"])
    name = next((n for n in names if f"{n}_values" in names), "score")
    return table["label"].to_numpy(), table["score"].to_numpy(), name


def _samples(run: RunDir, prepared: Prepared) -> dict[str, Any] | None:
    """The real samples with the lowest and the highest scores of the first classes."""
    if not (found := _scores(run)) or not (run / "manifest.parquet").exists():
        return None
    labels, scores, name = found
    kept = manifest.read(run / "manifest.parquet")[0]["kept"].to_numpy()
    shown = np.unique(labels)[:SAMPLE_CLASSES]
    rows = [_extremes(prepared, int(c), scores[labels == c], kept[labels == c]) for c in shown]
    return {"rows": rows, "name": name, "easy": name == "loss"}


def _extremes(prepared: Prepared, label: int, scores: Array, kept: Array) -> dict[str, Any]:
    """Tiles of one class: its lowest and its highest scores; only the row groups that hold them are read."""
    order = np.argsort(scores, kind="stable")
    low, high = order[:SAMPLES].tolist(), order[SAMPLES:][-SAMPLES:].tolist()
    places = sorted(low + high)
    tiles = {
        place: {"image": figures.picture(pixels, SMALL_SIDE), "score": f"{scores[place]:#.3g}".rstrip("."),
                "state": "kept" if kept[place] else "dropped"}
        for place, pixels in zip(places, prepared.take("train", label, places), strict=True)
    }  # fmt: skip
    return {"name": prepared.class_names[label], "low": [tiles[i] for i in low], "high": [tiles[i] for i in high]}


def _times(records: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds per stage, scoring in its two parts; a stage taken over from another run cost this one nothing."""
    rows = []
    for stage, record in records.items():
        parts = [(name, record[key]) for key, name in SCORE_PARTS.items() if key in record]
        for name, seconds in parts or [(stage, record["seconds"])]:
            rows.append({"name": name, "seconds": seconds, "reused": record.get("reused_from")})
    total = sum(row["seconds"] for row in rows if not row["reused"])
    return {"rows": rows, "total": total, "longest": max((row["seconds"] for row in rows), default=0) or 1}


def _rejected(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"count": 0, "rows": []}
    table = pq.read_table(path)
    return {"count": table.num_rows, "rows": table.slice(0, REASONS).to_pylist()}


def _settings(about: Mapping[str, Any], records: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The configuration by section; where a stage recorded what it resolved or ran with, that."""
    flat = flatten(config) | flatten(about.get("config", {}))
    for record in records.values():
        flat |= record["config"]
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = _public(value)
    return nested


def _name(path: str) -> str:
    """The last part of a path or URI, never of its credentials or options."""
    return Path(shown(path).partition("?")[0] if "://" in path else path).name


def _public(value: Any) -> Any:
    """A setting as it may be shown: addresses in it lose their credentials."""
    if isinstance(value, list):
        return [_public(part) for part in value]
    return shown(value) if isinstance(value, str) and "://" in value else value


def accuracy(row: Summary, suffix: str = "") -> str:
    """mean ± standard deviation of a summary's row in per cent; `suffix` "_top5" for top-5."""
    mean, std = 100 * row[f"mean{suffix}"], row[f"std{suffix}"]
    return f"{mean:.1f}{NBSP}%" if std is None else f"{mean:.1f}{NBSP}±{NBSP}{100 * std:.1f}{NBSP}%"


def share(fraction: float | str) -> str:
    """A fraction in per cent with three digits; a word such as "auto" as it is."""
    return fraction if isinstance(fraction, str) else f"{100 * fraction:.3g}{NBSP}%"


def shape(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))


def duration(seconds: float) -> str:
    """Seconds as a reader says them: 0.04 s, 7.2 s, 12 min, 3 h 5 min."""
    if seconds < 90:
        return f"{seconds:.{1 if seconds >= 1 else 2}f}{NBSP}s"
    minutes = round(seconds / 60)
    return f"{minutes}{NBSP}min" if minutes < 90 else f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
