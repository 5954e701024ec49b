"""The report of a run: one HTML file that opens offline, made from the artefacts in the run folder only.

This module reads the artefacts and selects what fits on a page for any number of classes. `text.py` writes the sentences,
`run_plots.py` draws, `report.html.j2` is the page. A part whose artefact is missing is not shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from distill_at_scale.config.fields import flatten
from distill_at_scale.config.load import Config
from distill_at_scale.core.images import to_pixels
from distill_at_scale.core.statistics import summary
from distill_at_scale.data.ingest import derived_splits
from distill_at_scale.data.ingest.reasons import kinds_of
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.parquet import reading
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.result_checks import dropped_share
from distill_at_scale.distillation.summary import TESTED, differences, tested
from distill_at_scale.distillation.synthetic_set import SyntheticSet
from distill_at_scale.pipeline.monitoring import timeline
from distill_at_scale.pipeline.report import charts, comparison, html, run_plots, text, timeline_chart
from distill_at_scale.pipeline.report.plot_spec import Plot, Role, Series
from distill_at_scale.pipeline.report.style import SET_NAMES, both_widths
from distill_at_scale.pruning.scoring import score_table
from distill_at_scale.pruning.selection.ranking import RANDOM
from distill_at_scale.storage.filesystem import last_name
from distill_at_scale.storage.run_dir import STAGES, RunDir

VERSION = 6  # of the page; raise it when the page changes, so that finished runs write their report again
HISTOGRAMS, SNAPSHOT_CLASSES, SAMPLE_CLASSES, SAMPLES = 20, 10, 10, 5
REASONS, KINDS = 5, 12  # at most REASONS rejected samples are listed one by one; more are grouped into KINDS kinds
IMAGE_CLASSES, IMAGE_ROWS, IMAGE_COLUMNS = 100, 20, 10  # classes at one image per class; else classes, images per class
IMAGE_BYTES = 1_000_000  # of all synthetic images on the page
CLIP_BYTES = 1_800_000  # of clips in each of the three parts that show clips
CLIP_COLUMNS = 5
SYNTHETIC_SIDE, SMALL_SIDE = 112, 64  # pixels; larger pictures are reduced
SCORE_PARTS = {"train_seconds": "score: train the proxies", "score_seconds": "score: score all samples"}
CLASSES_IN_FULL, CLASSES_AT_AN_END = 20, 10  # of the accuracy per class; of more classes the worst and the best

Array = np.ndarray[Any, Any]
Points = list[tuple[int, float]]
Facts = Mapping[str, Any]


def write(run: RunDir, config: Config) -> Path:
    """Write `report.html` atomically. Raises UserError if the folder has no prepared data or no synthetic set."""
    return html.write(run / "report.html", "report.html.j2", contents(run, config))


def contents(run: RunDir, config: Config) -> dict[str, Any]:
    """All values that the page shows, by name in the template."""
    prepared, synthetic = PreparedDataset(run / "prepared"), synthetic_set.load(run / "synthetic")
    run_facts, evaluation = _json(run / "run.json"), _json(run / "evaluation.json")
    records = {stage: record for stage in STAGES if stage != "report" and (record := run.record(stage))}
    settings = _settings(run_facts, records, config)
    source, selection = settings["data"], _selection(run, prepared)
    ipc, kept = synthetic.card["images_per_class"], selection["share"] if selection else None
    words, on = text.words(prepared.shape, prepared.kind), tested(evaluation, sum(prepared.counts("test")))
    return {
        "name": last_name(source["path"] or "") or source["source"],
        "card": synthetic.card,
        "set_names": SET_NAMES,
        "words": words,
        "question": text.question(words, len(synthetic.labels), ipc, prepared.counts("train"), kept),
        "method_facts": text.method_facts(synthetic.card, words["many"], dropped_share(run / "metrics.jsonl")),
        "answer": text.answer(evaluation.get("summary", []), **on),
        "one_distillation": text.ONE_DISTILLATION,
        "evaluation": _evaluation(evaluation, len(prepared.class_names), TESTED[on["split"]]),
        "pruning": _pruning(evaluation, records, selection, synthetic.card),
        "comparison": comparison.of_run(run / "compare" / "compare.json"),
        "per_class": _per_class(evaluation.get("summary", []), prepared.class_names),
        "usage": text.usage(synthetic.card, words, run.named, source.get("resize", "square")),
        "synthetic": _synthetic(synthetic),
        "snapshots": _snapshots(synthetic),
        "curve": _curve(run / "metrics.jsonl"),
        "selection": selection,
        "samples": _samples(run, prepared),
        "times": _times(records),
        "timeline": timeline_chart.part(timeline.read(run / timeline.NAME)),
        "data": prepared.meta,
        "transformed": derived_splits.describe(prepared.meta) if "transform" in prepared.meta else None,
        "sampling": source.get("sampling"),
        **_rejected(run / "rejected.parquet"),
        "settings": html.as_yaml(settings),
        "about": run_facts,
        "records": records,
    }


def _evaluation(evaluation: Mapping[str, Any], classes: int, split: str) -> dict[str, Any] | None:
    if not (summary := evaluation.get("summary")):
        return None
    bars, networks = accuracy_bars(evaluation), list(dict.fromkeys(row["network"] for row in summary))
    gaps = {(gap["against"], gap["network"]): gap for gap in differences(summary)}
    return {
        "chart": both_widths(run_plots.accuracies(bars, 100 / classes, split)),
        "tested": split,
        "rows": [{**bar.row, "gap": _gap(gaps.get((bar.row["set"], bar.row["network"])))} for bar in bars],
        "top5": classes > 5,
        "timed": any("seconds" in row for row in summary),
        "bounds": any(row["set"] in ("kept", "full") for row in summary),
        "controls": [network for network in networks if network.startswith(text.CONTROL)],
        "chance": 1 / classes,
    }


def accuracy_bars(evaluation: Mapping[str, Any]) -> list[run_plots.AccuracyBar]:
    """The bars of the accuracy chart from the content of evaluation.json, networks in the order of their first row."""
    summary = evaluation["summary"]
    networks = list(dict.fromkeys(row["network"] for row in summary))
    seeds: dict[tuple[str, str], list[float]] = {(row["set"], row["network"]): [] for row in summary}
    for row in evaluation["rows"]:
        seeds[row["set"], row["network"]].append(100 * row["top1"])
    rows = sorted(summary, key=lambda row: networks.index(row["network"]))
    return [run_plots.AccuracyBar(row, seeds[row["set"], row["network"]], text.accuracy(row)) for row in rows]


def _gap(gap: Mapping[str, Any] | None) -> dict[str, str] | None:
    """A difference as cells of a table: value, interval, and the class for its colour."""
    if gap is None:
        return None
    interval = "" if gap["low"] is None else f"{text.points(gap['low'])} to {text.points(gap['high'])}"
    verdict = text.verdict(gap) if interval else "unclear"
    return {"value": text.points(gap["mean"]), "interval": interval,
            "verdict": {"yes": "better", "no": "worse", "unclear": ""}[verdict]}  # fmt: skip


def _pruning(evaluation: Facts, records: Facts, selection: Facts | None, card: Facts) -> dict[str, Any] | None:
    """The run and its controls, for the first network; `rows` is empty if no control was distilled."""
    summary, controls = evaluation.get("summary", []), evaluation.get("controls", {})
    if selection is None or not summary:
        return None
    network, gaps = summary[0]["network"], {gap["against"]: gap for gap in differences(summary)}
    drops = card.get("runtime", {}).get("rule", "none") not in ("none", "not applicable")
    seconds = records.get("distill", {}).get("seconds")
    sizes = {"distilled": {"kept": selection["kept"], "seconds": seconds}, **controls}
    lines = [row for row in summary if row["network"] == network and row["set"] in sizes] if controls else []
    return {
        "prunes": drops or selection["kept"] < selection["of"],
        "network": network,
        "rows": [{**line, **sizes[line["set"]], "gap": _gap(gaps.get(line["set"]))} for line in lines],
        "sentences": text.pruning(summary, seconds, controls),
    }


def _per_class(summary: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
    """Top-1 of each class for the first network: distilled, unpruned and random real; of many classes the worst and best."""
    lines = [row for row in summary if row["network"] == summary[0]["network"] and "per_class" in row]
    by_set = {row["set"]: row["per_class"] for row in lines}
    if len(by_set.get("distilled", ())) != len(names):
        return None
    tested = [label for label, value in enumerate(by_set["distilled"]) if value is not None]
    worst_first = sorted(tested, key=lambda label: by_set["distilled"][label])
    shown = tested
    if len(tested) > CLASSES_IN_FULL:
        shown = worst_first[:CLASSES_AT_AN_END] + worst_first[-CLASSES_AT_AN_END:]
    if not shown:
        return None
    labels = [f"{names[label]}" if names.count(names[label]) == 1 else f"{names[label]} ({label})" for label in shown]
    roles: dict[str, Role] = {"distilled": "ours", "unpruned": "unpruned", "random_real": "random"}
    values = {name: [by_set[name][label] for label in shown] for name in roles if name in by_set}
    series = [Series(SET_NAMES[name], labels, row, kind="points", role=roles[name]) for name, row in values.items()]
    worst, best = worst_first[0], worst_first[-1]
    return {
        "chart": charts.both_widths(Plot("", "", "top-1 accuracy of the class", series)),
        "network": summary[0]["network"],
        "n": lines[0]["n"],
        "ends": [(names[label], text.share(by_set["distilled"][label])) for label in (worst, best)],
        "all": len(shown) == len(tested),
        "classes": len(tested),
        "shown": CLASSES_AT_AN_END,
    }


def _synthetic(synthetic: SyntheticSet) -> dict[str, Any]:
    """The first samples of the first classes, as many classes as the byte budget allows."""
    labels, pixels = synthetic.labels.numpy(), to_pixels(synthetic.values().numpy())
    clips = pixels.ndim == 5
    columns = min(synthetic.card["images_per_class"], CLIP_COLUMNS if clips else IMAGE_COLUMNS)
    side = min(pixels.shape[-1], SMALL_SIDE if clips and columns > 1 else SYNTHETIC_SIDE)
    classes = np.unique(labels)[: IMAGE_CLASSES if columns == 1 else IMAGE_ROWS].tolist()
    budget = CLIP_BYTES if clips else IMAGE_BYTES
    pictures = _within(budget, side, (pixels[labels == label][:columns] for label in classes))
    return {
        "rows": [(synthetic.class_names[label], row) for label, row in zip(classes, pictures, strict=False)],
        "columns": columns,
        "shape": pixels.shape[1:],
        "reduced": pixels.shape[-1] > side,
        "shown": _form(pixels.shape[1:]),
    }


def _within(budget: int, side: int, rows: Iterable[Iterable[Array]]) -> list[list[str]]:
    """Rows of pictures: as many complete rows as fit the byte budget, at least one."""
    result: list[list[str]] = []
    for row in rows:
        pictures = [run_plots.picture(sample, side) for sample in row]
        budget -= sum(map(run_plots.size_of, pictures))
        if budget < 0 and result:
            break
        result.append(pictures)
    return result


def _form(shape: Sequence[int]) -> str:
    """The form that `run_plots.picture` gives samples of a shape."""
    return "palette" if len(shape) == 4 and shape[1] > 1 else "exact"


def _snapshots(synthetic: SyntheticSet) -> dict[str, Any] | None:
    """The first sample of the first classes over the steps; fewer classes if clips take too many bytes."""
    if not synthetic.snapshots:
        return None
    names, steps = synthetic.class_names[:SNAPSHOT_CLASSES], sorted(synthetic.snapshots)
    shots = {step: to_pixels(shot.numpy()) for step, shot in synthetic.snapshots.items()}
    first = [shots[s][:: max(1, len(shots[s]) // len(names))][: len(names)] for s in steps]
    columns = _within(CLIP_BYTES, SMALL_SIDE, zip(*first, strict=True))
    rows = list(zip(steps, zip(*columns, strict=True), strict=True))
    return {"names": names[: len(columns)], "rows": rows, "shown": _form(first[0].shape[1:])}


def _curve(path: Path) -> dict[str, Any] | None:
    loss, top1 = distillation_log(path)
    return {"chart": both_widths(run_plots.curve(loss, top1)), "top1": bool(top1)} if loss or top1 else None


def distillation_log(path: Path) -> tuple[Points, Points]:
    """(step, loss) and (step, top-1 in per cent) from metrics.jsonl; empty where nothing was logged.

    A step that was repeated after a resume counts once, with its last values.
    """
    series: dict[str, list[tuple[int, float]]] = {"loss": [], "top1": []}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):  # an interruption cut the line
            entry = json.loads(line)
            for key in series.keys() & entry.keys():
                if entry["stage"] == "distill" and math.isfinite(entry[key]):
                    while series[key] and series[key][-1][0] >= entry["step"]:
                        series[key].pop()
                    series[key].append((entry["step"], entry[key]))
    return series["loss"], [(step, 100 * value) for step, value in series["top1"]]


def _selection(run: RunDir, prepared: PreparedDataset) -> dict[str, Any] | None:
    """What the selection asked for and reached, and the distribution of the scores per class."""
    if not (run / "manifest.parquet").exists():
        return None
    facts, (parts, label) = manifest.facts(run / "manifest.parquet"), score_distributions(run, prepared)
    kept = manifest.read(run / "manifest.parquet", ["kept"])[0]["kept"].to_numpy()
    return {
        "chart": both_widths(run_plots.distributions(parts, f"{label}, one value per training sample")),
        "facts": facts,
        "control": facts.get("criterion") == RANDOM,
        "label": label,
        "searched": _searched(run) if facts.get("asked", {}).get("keep") == "auto" else None,
        "kept": int(kept.sum()),
        "of": len(kept),
        "share": float(kept.mean()),
        "shown": len(parts),
    }


def score_distributions(run: RunDir, prepared: PreparedDataset) -> tuple[list[run_plots.Distribution], str]:
    """The scores of the first classes with what is kept of them, and the name of the scores."""
    table, facts = manifest.read(run / "manifest.parquet")
    labels, scores, kept, ranks = (table[name].to_numpy() for name in ("label", "score", "kept", "rank"))
    label = facts.get("criterion", "score")
    if label == RANDOM and (columns := _scores(run)):
        _, scores, label = columns  # the random numbers mean nothing: show the scores of dropped and kept samples
    ranked = ranks != manifest.HELD_OUT
    labels, scores, kept = labels[ranked], scores[ranked], kept[ranked]
    classes = np.unique(labels)[:HISTOGRAMS]
    names = prepared.class_names
    return [run_plots.Distribution(names[c], scores[labels == c], kept[labels == c]) for c in classes], label


def _searched(run: RunDir) -> dict[str, Any] | None:
    """How select: auto chose: each candidate in its last round, and the accuracies of all rounds over the share kept."""
    if not (search := _json(run / "auto.json")) or not search["chosen"]:
        return None
    rows, series = dict[str, dict[str, Any]](), []
    for number, one in enumerate(search["rounds"], 1):
        figures = [summary(row["accuracies"]) for row in one["tried"]]
        for row, figure in zip(one["tried"], figures, strict=True):
            rows[row["name"]] = {**row, **figure, "round": number, "accuracy": text.accuracy(figure)}
        x = [row["kept"] / search["of"] for row in one["tried"][1:]]
        y, error = ([figure[key] for figure in figures[1:]] for key in ("mean", "std"))
        role: Role = "ours" if number == len(search["rounds"]) else "other"
        series.append(Series(f"round {number}: {one['steps']} steps", x, y, error, "points", role))
    levels, marks = [("everything", rows["everything"]["mean"])], [("chosen", search["kept"] / search["of"])]
    plot = Plot("Search for a selection", "share kept", "top-1 accuracy", series, levels, marks, True)
    ordered = sorted(rows.values(), key=lambda row: (-row["round"], row["decision"] != "chosen", -row["mean"]))
    return {**search, "chart": charts.both_widths(plot), "rows": ordered}


def _scores(run: RunDir) -> tuple[Array, Array, str] | None:
    """Labels, scores and the criterion's name, in the order of manifest and shards. The per-epoch lists are not read."""
    if not (path := run / "scores.parquet").exists():
        return None
    table, facts = score_table.read(path, ["label", "score"])
    name = next(iter(facts.get("criteria") or facts.get("useful", {})), "score")
    return table["label"].to_numpy(), table["score"].to_numpy(), name


def _samples(run: RunDir, prepared: PreparedDataset) -> dict[str, Any] | None:
    """The real samples with the lowest and the highest scores of the first classes."""
    if not (columns := _scores(run)) or not (run / "manifest.parquet").exists():
        return None
    labels, scores, name = columns
    kept = manifest.read(run / "manifest.parquet")[0]["kept"].to_numpy()
    classes = np.unique(labels)[:SAMPLE_CLASSES].tolist()
    rows = [{"name": prepared.class_names[c]} | _extremes(scores[labels == c], kept[labels == c]) for c in classes]
    tiles = [sorted(row["low"] + row["high"], key=lambda tile: tile["place"]) for row in rows]
    places = [[tile["place"] for tile in own] for own in tiles]
    pixels = (to_pixels(prepared.take("train", c, own)) for c, own in zip(classes, places, strict=True))
    gallery = run_plots.gallery(chain.from_iterable(pixels), SMALL_SIDE, CLIP_BYTES)
    for tile, picture in zip(chain.from_iterable(tiles), gallery.pictures, strict=True):
        tile["image"] = picture
    return {"rows": rows, "name": name, "easy": name == "loss", "shown": gallery.shown}


def _extremes(scores: Array, kept: Array) -> dict[str, Any]:
    """The samples of one class with the lowest and highest scores, by their places in the class, without pictures."""
    order = np.argsort(scores, kind="stable").tolist()

    def tile(place: int) -> dict[str, Any]:
        score = f"{scores[place]:#.3g}".rstrip(".")
        return {"place": place, "score": score, "state": "kept" if kept[place] else "dropped"}

    return {"low": [tile(i) for i in order[:SAMPLES]], "high": [tile(i) for i in order[SAMPLES:][-SAMPLES:]]}


def _times(records: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds per stage, scoring and an evaluation with controls in two parts each. A stage taken over from another run does
    not count in the total.
    """
    rows = []
    for stage, record in records.items():
        parts = [(name, record[key]) for key, name in SCORE_PARTS.items() if key in record]
        if (seconds := record.get("control_seconds")) is not None:
            rest = max(0.0, record["seconds"] - seconds)
            parts = [("evaluate: distil the controls", seconds), ("evaluate: train and test networks", rest)]
        for name, seconds in parts or [(stage, record["seconds"])]:
            rows.append({"name": name, "seconds": seconds, "reused": record.get("reused_from")})
    total = sum(row["seconds"] for row in rows if not row["reused"])
    return {"rows": rows, "total": total, "longest": max((row["seconds"] for row in rows), default=0) or 1}


def _rejected(path: Path) -> dict[str, Any]:
    """`rejected`: samples that are not used; `remarked`: samples that are used with a remark. Up to `REASONS` samples
    are listed one by one; more are counted by kind of reason, each kind with an example.
    """
    with reading(path, "ingest"):
        listed = pq.ParquetFile(path).read().to_pylist() if path.exists() else []
    result = {}
    for name, used in (("rejected", False), ("remarked", True)):
        samples = [row for row in listed if row.get("used", False) is used]
        grouped = len(samples) > REASONS
        kinds = kinds_of([row["reason"] for row in samples])
        groups = list(kinds.values()) if grouped else [[place] for place in range(len(samples))]
        rows = [{"count": len(places), **samples[places[0]]} for places in groups[:KINDS]]
        result[name] = {"count": len(samples), "rows": rows, "grouped": grouped, "more": len(groups) - len(rows)}
    return result


def _settings(run_facts: Mapping[str, Any], records: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The configuration by section, with the values that finished stages recorded."""
    flat = flatten(config) | flatten(run_facts.get("config", {}))
    for record in records.values():
        flat |= record["config"]
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return nested


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
