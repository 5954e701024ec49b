"""The data of a dry run: a few real samples, in a prepared set of their own whose classes are large enough for full batches."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_at_scale.config.load import Config
from distill_at_scale.core.progress import Display
from distill_at_scale.data.ingest.plan import IngestPlan
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.pipeline.executors.local import LocalExecutor
from distill_at_scale.pipeline.stages import ingest
from distill_at_scale.pipeline.stages.context import RunContext
from distill_at_scale.storage.stage_record import StageInputs

REAL = 64  # different samples per class, at most; further ones repeat them
CHUNK = 256  # samples of a scoring chunk, at most


def some_rows(table: pa.Table, labels: np.ndarray[Any, Any], count: int) -> pa.Table:
    """About `count` rows of a listing, with labels 0, 1, ... for `labels`: runs of neighbours, as they are read together."""
    own = table["label"].to_numpy()
    mask, run = np.zeros(len(own), bool), max(1, count // len(labels))
    for label in labels:
        first = int((own == label).argmax())
        mask[first : first + run] = True
    mask[: max(0, count - int(mask.sum()))] = True
    rows = table.filter(pa.array(mask & np.isin(own, labels)))
    return rows.set_column(1, "label", pa.array(np.searchsorted(labels, rows["label"].to_numpy()), pa.int32()))


class DecodeTime:
    """An observer: seconds in which chunks were decoded."""

    name, seconds = "decode time", 0.0

    def __call__(self, event: Any) -> None:
        self.seconds += event.seconds if event.what == "work" else 0.0

    def close(self) -> None: ...


def ingested(config: Config, listing: IngestPlan, folder: Path, classes: int, count: int) -> tuple[int, float, float]:
    """Run the stage ingest on about `count` samples of `classes` classes; samples, seconds, and those of decoding."""
    present = np.unique(listing.listings["train"]["label"].to_numpy())
    labels = present[np.unique(np.linspace(0, len(present) - 1, min(classes, len(present))).astype(int))]
    share = {split: table.num_rows / listing.samples for split, table in listing.listings.items()}
    parts = {s: some_rows(t, labels, max(1, round(count * share[s]))) for s, t in listing.listings.items()}
    names = [listing.class_names[label] for label in labels]
    small = replace(listing, class_names=names, listings={s: t for s, t in parts.items() if t.num_rows}, aside={})
    run = config.run.model_copy(update={"dir": str(folder), "reuse": None, "redo": None})
    data = config.data.model_copy(update={"transform": "none", "whiten": "none"})
    score = config.score.model_copy(update={"criterion": "random"})
    config = config.model_copy(update={"run": run, "data": data, "score": score})
    decode = DecodeTime()
    context = RunContext(config, LocalExecutor, Display.silent(), observers=lambda config: [decode])
    context.plan, context.warned = small, True
    context.dir.create()
    began = time.perf_counter()
    try:
        ingest.run(context, StageInputs({}, {}))
    finally:
        context.close()
    return small.samples, time.perf_counter() - began, decode.seconds


def write(folder: Path, source: PreparedDataset, classes: int, each: int, kept: int, tests: int) -> None:
    """Write folder/prepared, with `each` samples of the first classes, and folder/manifest.parquet, which keeps `kept`."""
    prepared, counts, names = folder / "prepared", dict[str, list[int]](), source.class_names[:classes]
    prepared.mkdir(parents=True)
    for file in source.folder.iterdir():  # the matrix of data.whiten
        if file.is_file() and file.name != "dataset.json":
            shutil.copy(file, prepared)
    for split, size in (("train", each), ("test", -(-tests // classes))):
        tables = list[pa.Table]()
        for label in range(len(names)):
            wanted = np.arange(min(REAL, source.counts(split)[label], size))
            rows = [*source.take_rows(split, label, wanted)] if len(wanted) else []
            table = pa.concat_tables(rows).take(pa.array(np.arange(size) % len(wanted))) if rows else None
            if table is not None:
                ids = pa.array([f"{label:06d}/{k:06d}" for k in range(size)])
                tables.append(table.set_column(0, table.schema.field(0), ids))
            counts[split] = [*counts.get(split, []), size if rows else 0]
        if tables:
            itemsize, jpeg = source.dtype.itemsize, bool(source.meta.get("jpeg"))
            group = shards.group_rows(source.shape, jpeg, source.meta.get("chunk", CHUNK), itemsize)
            shards.write_shards(prepared / split, tables, tables[0].schema, group)
        else:
            counts.pop(split)
    chunk = min(CHUNK, source.meta.get("chunk", CHUNK))
    shards.write_meta(prepared, source.meta | {"class_names": names, "counts": counts, "chunk": chunk}, "dry run")
    write_manifest(folder, len(names), each, kept)


def write_manifest(folder: Path, classes: int, each: int, kept: int) -> None:
    labels, places = np.repeat(np.arange(classes, dtype=np.int32), each), np.tile(np.arange(each), classes)
    ids = pa.array([f"{label:06d}/{k:06d}" for label, k in zip(labels.tolist(), places.tolist(), strict=True)])
    columns = [ids, labels, np.zeros(len(labels), np.float32), places.astype(np.int32), places < kept]
    facts = {"kept_per_class": [min(kept, each)] * classes, "kept": classes * min(kept, each), "of": len(labels)}
    manifest.write(folder / "manifest.parquet", pa.table(columns, schema=manifest.SCHEMA), facts)
