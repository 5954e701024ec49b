"""Selection at scale: a long score table against reading it only, ImageNet-1K's losses, and exactness.

    python jobs/benchmarks/selection.py [FOLDER] [--rows 100000000] [--classes 1000] [--keep 0.1] [--scope class]

Generates in FOLDER (default: a temporary one) a score table of skewed classes with ids like
train/n01440764/n01440764_00012345.JPEG, and the scored part files of 1,281,167 samples x 25 losses. Every row of the result
is a process of its own, with its own peak memory:

- roof: decode the columns that selection needs (sample_id, label, one criterion), with one and with two threads
- roof, with writing: decode the same columns in one thread and encode them as a manifest in another; nothing else
- select: scores.parquet -> manifest.parquet, the manifest (one row per sample) written and published
- aggregate, select: the part files -> scores.parquet -> manifest.parquet, for ImageNet-1K
- exact: a table of 5 million rows with many ties; every kept row and every rank against one numpy lexsort

All files are in the page cache; imports are not timed. Prints a table and one JSON object with wall and CPU seconds, peak
memory, ratios to the roof, hardware and commit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.config.load import validate
from distill_at_scale.config.sections import SelectSection
from distill_at_scale.core.prefetch import prefetch
from distill_at_scale.data.prepared import manifest
from distill_at_scale.data.prepared.parquet import BATCH, RowGroupWriter
from distill_at_scale.pruning.selection import quotas
from distill_at_scale.pruning.selection import select as static

IMAGENET, LOSSES, PIECE = 1_281_167, (5, 5), 1024
EXACT_ROWS = 5_000_000
COLUMNS = ["sample_id", "label", "loss"]
SCHEMA = pa.schema([("sample_id", pa.string()), ("label", pa.int32()), ("loss", pa.float32()), ("score", pa.float32())])

Array = np.ndarray[Any, Any]


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as spare:
        folder = options.folder or Path(spare)
        folder.mkdir(parents=True, exist_ok=True)
        results = _long(options, folder) | _imagenet(folder, options) | _exact(folder)
    for name, result in results.items():
        cells = "  ".join(f"{key} {value}" for key, value in result.items())
        print(f"{name:<34} {cells}")
    print(json.dumps({"rows": options.rows, "classes": options.classes, "keep": options.keep, "scope": options.scope,
                      "results": results, **_about()}, indent=1))  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="folder for the synthetic tables; reused if present")
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--scope", choices=("class", "global"), default="class")
    return parser.parse_args()


def _long(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / f"scores-{options.rows}-{options.classes}.parquet"
    if not path.exists():
        _alone(make_table, path, options.rows, options.classes)
    result = {
        "roof, 1 thread": _alone(read_columns, path, 1),
        "roof, 2 threads": _alone(read_columns, path, 2),
        "roof, with writing": _alone(read_and_write, path),
        f"select, scope {options.scope}": _alone(select, path, options.keep, options.scope),
        "kept ids read back": _alone(read_kept, path.with_suffix(".manifest")),
    }
    chosen = result[f"select, scope {options.scope}"]
    for name in ("roof, 1 thread", "roof, 2 threads", "roof, with writing"):
        chosen[f"{name} / select"] = round(result[name]["seconds"] / chosen["seconds"], 3)
    return result


def _imagenet(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    pieces, scores = folder / f"pieces-{PIECE}", folder / "imagenet.parquet"
    if not pieces.exists():
        _alone(make_pieces, pieces)
    result = {"ImageNet-1K x 25: aggregate": _alone(aggregate, pieces, scores),
             "ImageNet-1K: select": _alone(select, scores, options.keep, options.scope)}  # fmt: skip
    total = round(sum(row["seconds"] for row in result.values()), 2)
    return result | {"ImageNet-1K: both": {"seconds": total}}


def _exact(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / f"ties-{EXACT_ROWS}.parquet"
    if not path.exists():
        _alone(make_table, path, EXACT_ROWS, 300, 3)
    return {f"exact, scope {scope}": _alone(compare, path, scope) for scope in ("class", "global")}


def _alone(work: Callable[..., dict[str, Any] | None], *arguments: Any) -> dict[str, Any]:
    """What a fresh process needed for it: seconds of wall and CPU, peak memory, and what the work returned."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_measured, work, arguments).result()


def _measured(work: Callable[..., dict[str, Any] | None], arguments: tuple[Any, ...]) -> dict[str, Any]:
    pa.array([0]).to_numpy()  # makes pyarrow import pandas, if it is there
    began, cpu = time.perf_counter(), time.process_time()
    result = work(*arguments) or {}
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_gib": round(peak, 2), **result}


def read_columns(path: Path, threads: int) -> None:
    """Decode every row group and let it go; each thread has a share of the row groups and a reader of its own."""

    def share(first: int) -> None:
        file = pq.ParquetFile(path, pre_buffer=False)
        for group in range(first, file.num_row_groups, threads):
            file.read_row_group(group, COLUMNS, use_threads=False)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))


def read_and_write(path: Path) -> None:
    """The columns as they are, with two more of a manifest's, through the same reader and writer."""
    with manifest.writing(path.with_suffix(".copy")) as out:
        for batch in prefetch(pq.ParquetFile(path, pre_buffer=False).iter_batches(BATCH, columns=list(COLUMNS)), 16):
            ranks = pa.array(np.arange(batch.num_rows, dtype=np.int32))
            kept = pa.nulls(batch.num_rows, pa.bool_()).fill_null(False)
            out.append(pa.table([*batch.columns, ranks, kept], schema=manifest.SCHEMA))
    path.with_suffix(".copy").unlink()


def select(path: Path, keep: float, scope: str) -> dict[str, Any]:
    section = SelectSection.model_validate({"keep": keep, "scope": scope})
    with manifest.writing(path.with_suffix(".manifest")) as out:
        out.facts = static.select(path, out, section, "loss", True, 1, 0)
    return {"kept": out.facts["kept"], "largest_class_kept": max(out.facts["kept_per_class"])}


def read_kept(path: Path) -> dict[str, Any]:
    return {"ids": len(manifest.kept(path))}


def aggregate(pieces: Path, scores: Path) -> dict[str, Any]:
    from distill_at_scale.pruning.scoring.score_table import write_scores

    ids = pq.read_table(pieces / "ids.parquet")["sample_id"].combine_chunks()
    paths = sorted(pieces.glob("piece-*.parquet"))
    expected = [ids.slice(k * PIECE, PIECE) for k in range(len(paths))]
    began, cpu = time.perf_counter(), time.process_time()
    write_scores(scores, paths, expected, validate({"score": {"trials": LOSSES[0], "epochs": LOSSES[1]}}))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "pieces": len(paths)}  # without importing torch


def compare(path: Path, scope: str) -> dict[str, Any]:
    """Both ends of the scale against one sort of everything by (label,) score, label and sample id."""
    table = pq.read_table(path, columns=COLUMNS)
    labels, loss = table["label"].to_numpy(), table["loss"].to_numpy()
    ids = np.asarray(table["sample_id"].combine_chunks().cast(pa.large_binary()).to_numpy(zero_copy_only=False), "S")
    equal = True
    for order, values in (("low", loss), ("high", -loss)):
        out: list[pa.Table] = []
        section = SelectSection.model_validate({"keep": 0.13, "scope": scope, "order": order})
        facts = static.select(path, out, section, "loss", True, 0, 0)
        result = pa.concat_tables(out)
        ranked = np.lexsort((ids, values, labels))
        counts = np.bincount(labels)
        ranks = np.empty(len(labels), np.int64)
        ranks[ranked] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
        if scope == "class":
            kept = ranks < np.array([quotas.quota(0.13, int(n), 0) for n in counts])[labels]
        else:
            kept = np.zeros(len(labels), bool)
            kept[np.lexsort((ids, labels, values))[: facts["kept"]]] = True
        equal &= np.array_equal(result["rank"].to_numpy(), ranks) and np.array_equal(result["kept"].to_numpy(), kept)
    return {"equal": bool(equal), "distinct_scores": len(np.unique(loss)), "of": len(labels)}


def make_table(path: Path, rows: int, classes: int, decimals: int | None = None) -> None:
    """A score table as `score` leaves it, made class by class; the classes' sizes fall as 1 / rank."""
    weights = 1 / (np.random.default_rng(0).permutation(classes) + 1.0)
    sizes = np.maximum(1, np.floor(weights / weights.sum() * rows)).astype(int)
    sizes[int(np.argmax(sizes))] += rows - sizes.sum()
    with manifest.publish(path) as temporary:
        encoding: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["label"]}
        with RowGroupWriter(temporary, SCHEMA, "scores", 2**16, **encoding) as out:
            for label, size in enumerate(sizes):
                out.append(_class_table(label, int(size), decimals))
            out.facts = {"useful": {"loss": "low"}}


def _class_table(label: int, size: int, decimals: int | None = None) -> pa.Table:
    chance = np.random.default_rng([1, label])
    loss = chance.gamma(2.0, 1.0, size).astype(np.float32)
    loss = loss if decimals is None else loss.round(decimals)
    labels = np.full(size, label, np.int32)
    return pa.table({"sample_id": _ids(label, size, chance), "label": labels, "loss": loss, "score": loss})


def _ids(label: int, size: int, chance: np.random.Generator) -> pa.Array:
    """Sorted ids of one class: random numbers of eight digits, as a photo site's, none twice."""
    step = max(1, 10**8 // size)
    numbers = np.arange(size) * step + chance.integers(0, step, size) + 10**8
    digits = pc.utf8_slice_codeunits(pa.array(numbers).cast(pa.string()), 1)
    wnid = f"n{1440764 + 977 * label:08d}"
    return pc.binary_join_element_wise(f"train/{wnid}/{wnid}_", digits, ".JPEG", "")


def make_pieces(folder: Path) -> None:
    """Scored pieces of ImageNet's cardinality, 1000 classes of 732 to 1300 samples, and the ids that they must hold."""
    temporary = folder.with_suffix(".partial")
    temporary.mkdir(exist_ok=True)
    table, start = pa.concat_tables(_scored_classes()).combine_chunks(), 0
    for number, start in enumerate(range(0, table.num_rows, PIECE)):
        pq.write_table(table.slice(start, PIECE), temporary / f"piece-{number:06d}.parquet")
    pq.write_table(table.select(["sample_id"]), temporary / "ids.parquet")
    temporary.rename(folder)


def _scored_classes() -> Iterator[pa.Table]:
    sizes = np.minimum(1300, np.random.default_rng(2).integers(732, 8000, 1000))
    sizes = np.diff(np.round(np.cumsum(sizes) * (IMAGENET / sizes.sum())).astype(int), prepend=0)
    for label, size in enumerate(sizes):
        table, chance = _class_table(label, int(size)), np.random.default_rng([3, label])
        losses = chance.gamma(2.0, 1.0, int(size) * LOSSES[0] * LOSSES[1]).astype(np.float32)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(losses), LOSSES[0] * LOSSES[1])
        yield pa.table({"sample_id": table["sample_id"], "label": table["label"], "loss": lists})


def _about() -> dict[str, Any]:
    from distill_at_scale.core.environment import environment

    about = environment()
    return {"hardware": about["hardware"], "versions": about["versions"], "commit": about["commit"]}


if __name__ == "__main__":
    main()
