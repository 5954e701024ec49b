"""The report: one HTML file that opens offline, made only of what the run folder holds.

This file reads the artefacts and cuts them down to what can be shown at any number of classes; `pipeline/report/text.py` puts the
findings into words, `run_plots.py` draws and `report.html.j2` is the page. It computes no result of its own. A part without
artefact is left out.
"""

from __future__ import annotations

import json
import math
import re
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
from distill_at_scale.data.ingest import derived_splits
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.parquet import reading
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.synthetic_set import SyntheticSet
from distill_at_scale.pipeline.monitoring import timeline
from distill_at_scale.pipeline.report import charts, run_plots, timeline_chart
from distill_at_scale.pipeline.report import html as pages
from distill_at_scale.pipeline.report import text as wording
from distill_at_scale.pipeline.report.plot_spec import Plot, Series
from distill_at_scale.pruning.scoring import score_table
from distill_at_scale.pruning.selection.ranking import RANDOM
from distill_at_scale.storage.run_dir import STAGES, RunDir

VERSION = 2  # of the page; raise it where the page changes, so that the report of a finished run is written again
HISTOGRAMS, SNAPSHOT_CLASSES, SAMPLE_CLASSES, SAMPLES = 20, 10, 10, 5
REASONS, KINDS = 5, 12  # so many samples are listed one by one; of more, so many kinds of reasons
VARYING = re.compile(r"\d[\d,.]*|'[^']*'|\"[^\"]*\"")  # what differs between two reasons of one kind
IMAGE_CLASSES, IMAGE_ROWS, IMAGE_COLUMNS = 100, 20, 10  # classes at one image each; else classes and images
IMAGE_BYTES = 1_000_000  # that the page holds of all synthetic images together
CLIP_BYTES = 1_800_000  # of clips in each of the three parts that show some
CLIP_COLUMNS = 5
SYNTHETIC_SIDE, SMALL_SIDE = 112, 64  # larger pictures are reduced to this
SCORE_PARTS = {"train_seconds": "score: train the proxies", "score_seconds": "score: score all samples"}

Array = np.ndarray[Any, Any]


def write(run: RunDir, config: Config) -> Path:
    """Write `report.html` into the run folder, in one step.

    Raises UserError where the folder holds no prepared data or no synthetic set.
    """
    return pages.write(run / "report.html", "report.html.j2", contents(run, config))


def contents(run: RunDir, config: Config) -> dict[str, Any]:
    """Everything that the page shows."""
    prepared, made = PreparedDataset(run / "prepared"), synthetic_set.load(run / "synthetic")
    about, evaluation = _json(run / "run.json"), _json(run / "evaluation.json")
    records = {stage: record for stage in STAGES if stage != "report" and (record := run.record(stage))}
    settings = _settings(about, records, config)
    source = settings["data"]
    selection = _selection(run, prepared)
    return {
        "name": pages.name_of(source["path"], source["source"]),
        "card": made.card,
        "set_names": run_plots.SET_NAMES,
        "words": wording.words(prepared.shape, prepared.kind),
        "question": _question(made, prepared, selection),
        "method_facts": wording.method_facts(made.card, wording.words(prepared.shape, prepared.kind)["many"]),
        "answer": wording.answer(evaluation.get("summary", [])),
        "evaluation": _evaluation(evaluation, len(prepared.class_names)),
        "synthetic": _synthetic(made),
        "snapshots": _snapshots(made),
        "curve": _curve(run / "metrics.jsonl"),
        "selection": selection,
        "samples": _samples(run, prepared),
        "times": _times(records),
        "timeline": timeline_chart.part(timeline.read(run / timeline.NAME)),
        "data": prepared.meta,
        "transformed": derived_splits.sentence(prepared.meta) if "transform" in prepared.meta else None,
        "sampling": source.get("sampling"),
        **_set_aside(run / "rejected.parquet"),
        "settings": pages.as_yaml(settings),
        "about": about,
        "records": records,
    }


def _question(made: SyntheticSet, prepared: PreparedDataset, selection: Mapping[str, Any] | None) -> str:
    ipc, counts = made.card["images_per_class"], prepared.counts("train")
    kept = selection["share"] if selection else None
    return wording.question(prepared.shape, len(made.labels), ipc, counts, kept, prepared.kind)


def _evaluation(evaluation: Mapping[str, Any], classes: int) -> dict[str, Any] | None:
    if not (summary := evaluation.get("summary")):
        return None
    networks = list(dict.fromkeys(row["network"] for row in summary))
    ordered = sorted(summary, key=lambda row: networks.index(row["network"]))
    single: dict[tuple[str, str], list[float]] = {(row["set"], row["network"]): [] for row in summary}
    for row in evaluation["rows"]:
        single[row["set"], row["network"]].append(100 * row["top1"])
    bars = [run_plots.AccuracyBar(row, single[row["set"], row["network"]], wording.accuracy(row)) for row in ordered]
    bounds = any(row["set"] in ("kept", "full") for row in summary)
    controls = [network for network in networks if network.startswith(wording.CONTROL)]
    found = {"rows": ordered, "top5": classes > 5, "bounds": bounds, "controls": controls, "chance": 1 / classes}
    return {"chart": run_plots.accuracies(bars, 100 / classes), **found}


def _synthetic(made: SyntheticSet) -> dict[str, Any]:
    """The first samples of the first classes, as many classes as the budget of bytes allows."""
    labels, pixels = made.labels.numpy(), to_pixels(made.values().numpy())
    clips = pixels.ndim == 5
    columns = min(made.card["images_per_class"], CLIP_COLUMNS if clips else IMAGE_COLUMNS)
    side = min(pixels.shape[-1], SMALL_SIDE if clips and columns > 1 else SYNTHETIC_SIDE)
    classes = np.unique(labels)[: IMAGE_CLASSES if columns == 1 else IMAGE_ROWS].tolist()
    budget = CLIP_BYTES if clips else IMAGE_BYTES
    shown = _within(budget, side, (pixels[labels == label][:columns] for label in classes))
    rows = [(made.class_names[label], row) for label, row in zip(classes, shown, strict=False)]
    about = {"shape": pixels.shape[1:], "reduced": pixels.shape[-1] > side, "shown": _form(pixels.shape[1:])}
    return {"rows": rows, "columns": columns, **about}


def _within(budget: int, side: int, rows: Iterable[Iterable[Array]]) -> list[list[str]]:
    """Rows of pictures, as many whole ones as fit the budget of bytes, but at least one."""
    found: list[list[str]] = []
    for row in rows:
        pictures = [run_plots.picture(sample, side) for sample in row]
        budget -= sum(map(run_plots.size_of, pictures))
        if budget < 0 and found:
            break
        found.append(pictures)
    return found


def _form(shape: Sequence[int]) -> str:
    """How `run_plots.picture` shows samples of a shape."""
    return "palette" if len(shape) == 4 and shape[1] > 1 else "exact"


def _snapshots(made: SyntheticSet) -> dict[str, Any] | None:
    """The first sample of the first classes over the steps; of clips, fewer classes where they take too many bytes."""
    if not made.snapshots:
        return None
    names, steps = made.class_names[:SNAPSHOT_CLASSES], sorted(made.snapshots)
    shots = {step: to_pixels(shot.numpy()) for step, shot in made.snapshots.items()}
    first = [shots[s][:: max(1, len(shots[s]) // len(names))][: len(names)] for s in steps]
    columns = _within(CLIP_BYTES, SMALL_SIDE, zip(*first, strict=True))
    rows = list(zip(steps, zip(*columns, strict=True), strict=True))
    return {"names": names[: len(columns)], "rows": rows, "shown": _form(first[0].shape[1:])}


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
    return {"chart": run_plots.curve(found["loss"], top1), "top1": bool(top1)} if found["loss"] or top1 else None


def _selection(run: RunDir, prepared: PreparedDataset) -> dict[str, Any] | None:
    """The cut: what was asked and reached, and the distribution of the scores per class."""
    if not (run / "manifest.parquet").exists():
        return None
    table, facts = manifest.read(run / "manifest.parquet")
    labels, scores, kept = (table[name].to_numpy() for name in ("label", "score", "kept"))
    label, control = facts.get("criterion", "score"), facts.get("criterion") == RANDOM
    if control and (found := _scores(run)):
        _, scores, label = found  # a random number tells nothing; where the dropped samples lie does
    shown = np.unique(labels)[:HISTOGRAMS]
    parts = [run_plots.Distribution(prepared.class_names[c], scores[labels == c], kept[labels == c]) for c in shown]
    chart = run_plots.distributions(parts, f"{label}, one value per training sample")
    counts = {"kept": int(kept.sum()), "of": len(kept), "share": float(kept.mean()), "shown": len(shown)}
    searched = _searched(run) if facts.get("asked", {}).get("keep") == "auto" else None
    return {"chart": chart, "facts": facts, "control": control, "label": label, "searched": searched, **counts}


def _searched(run: RunDir) -> dict[str, Any] | None:
    """How select.keep: auto found its rate: the rates that were tried, and adaptive rates against one for all classes."""
    if not (found := _json(run / "auto.json")):
        return None
    curve = found["curve"]
    tried = Series(
        "short distillations", [one["keep"] for one in curve], [one["mean"] for one in curve],
        [one["std"] for one in curve], role="ours",
    )  # fmt: skip
    levels = (("unpruned", found["unpruned"]), ("sufficient", found["least"]))
    plot = Plot(
        "How the rate was found", "share kept", "top-1 accuracy", [tried], levels, (("taken", found["rate"]),), True
    )
    against = ""
    if "adaptive" in found:
        ours, fixed = (wording.accuracy(found[name]) for name in ("adaptive", "fixed"))
        against = f"With rates adapted to the classes it reached {ours}, with one rate for all {fixed}."
    return {**found, "chart": charts.draw(plot), "against": against}


def _scores(run: RunDir) -> tuple[Array, Array, str] | None:
    """Labels, scores and the criterion's name, in the order of manifest and shards; the long lists stay unread."""
    path = run / "scores.parquet"
    if not path.exists():
        return None
    table, about = score_table.read(path, ["label", "score"])
    name = next(iter(about.get("criteria") or about.get("useful", {})), "score")
    return table["label"].to_numpy(), table["score"].to_numpy(), name


def _samples(run: RunDir, prepared: PreparedDataset) -> dict[str, Any] | None:
    """The real samples with the lowest and the highest scores of the first classes."""
    if not (found := _scores(run)) or not (run / "manifest.parquet").exists():
        return None
    labels, scores, name = found
    kept = manifest.read(run / "manifest.parquet")[0]["kept"].to_numpy()
    classes = np.unique(labels)[:SAMPLE_CLASSES].tolist()
    rows = [{"name": prepared.class_names[c]} | _extremes(scores[labels == c], kept[labels == c]) for c in classes]
    tiles = [sorted(row["low"] + row["high"], key=lambda tile: tile["place"]) for row in rows]
    read = (
        to_pixels(prepared.take("train", c, [tile["place"] for tile in of]))
        for c, of in zip(classes, tiles, strict=True)
    )
    made = run_plots.gallery(chain.from_iterable(read), SMALL_SIDE, CLIP_BYTES)
    for tile, picture in zip(chain.from_iterable(tiles), made.pictures, strict=True):
        tile["image"] = picture
    return {"rows": rows, "name": name, "easy": name == "loss", "shown": made.shown}


def _extremes(scores: Array, kept: Array) -> dict[str, Any]:
    """Tiles of one class, yet without pictures: its lowest and its highest scores, and their places within the class."""
    order = np.argsort(scores, kind="stable").tolist()

    def tile(place: int) -> dict[str, Any]:
        score = f"{scores[place]:#.3g}".rstrip(".")
        return {"place": place, "score": score, "state": "kept" if kept[place] else "dropped"}

    return {"low": [tile(i) for i in order[:SAMPLES]], "high": [tile(i) for i in order[SAMPLES:][-SAMPLES:]]}


def _times(records: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds per stage, scoring in its two parts; a stage taken over from another run cost this one nothing."""
    rows = []
    for stage, record in records.items():
        parts = [(name, record[key]) for key, name in SCORE_PARTS.items() if key in record]
        for name, seconds in parts or [(stage, record["seconds"])]:
            rows.append({"name": name, "seconds": seconds, "reused": record.get("reused_from")})
    total = sum(row["seconds"] for row in rows if not row["reused"])
    return {"rows": rows, "total": total, "longest": max((row["seconds"] for row in rows), default=0) or 1}


def _set_aside(path: Path) -> dict[str, Any]:
    """The samples that are not used, and those that are although something is to be said about them."""
    with reading(path, "ingest"):
        listed = pq.ParquetFile(path).read().to_pylist() if path.exists() else []
    used = [row.get("used", False) for row in listed]
    parts = (("rejected", False), ("remarked", True))
    return {name: _reasons([row for row, u in zip(listed, used, strict=True) if u is which]) for name, which in parts}


def _reasons(listed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Single samples where they are few; else how many there are of each kind of reason, with one of them."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in listed:
        kinds.setdefault(VARYING.sub("…", row["reason"]), []).append(row)
    grouped = len(listed) > REASONS
    ordered = sorted(kinds.values(), key=len, reverse=True) if grouped else [[row] for row in listed]
    rows = [{"count": len(rows), **rows[0]} for rows in ordered[:KINDS]]
    return {"count": len(listed), "rows": rows, "grouped": grouped, "more": len(ordered) - len(rows)}


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
        inner[name] = value
    return nested


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
