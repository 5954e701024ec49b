"""Scores computed elsewhere (score.imported: {name: file}): read, checked against the training split, and joined by id.

JSON, .npy and .npz go by position in the source's listing of the training split: before classes are chosen and samples are
held out, or after it, whichever the number of scores fits. CSV and Parquet go by sample_id. Trials [n, trials] are averaged.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from distill_at_scale.config.load import Config
from distill_at_scale.config.sections import ScoreSection
from distill_at_scale.core.atomic_files import file_digest
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.pruning.scoring import score_table
from distill_at_scale.pruning.scoring.columns import ExtraColumn

Array = np.ndarray[Any, Any]
SUFFIXES = (".json", ".npy", ".npz", ".csv", ".parquet")
RESERVED = ("sample_id", "label", "score", "random", "kept", "rank")  # other columns of the tables
MAX_UNPACKED = 2**32  # bytes of an .npz: five trials of a hundred million samples
AGAINST = -0.3  # rank correlation below which an imported score is remarked on
MAX_COMPARED = 10**6  # samples
NAME = re.compile(r"[A-Za-z]\w*")
AS_TEXT = pyarrow.csv.ConvertOptions(column_types={"sample_id": pa.string()})  # 0001 stays text, and NA is an id


@dataclass(frozen=True)
class ImportedScores:
    """The content of a file: numbers float64 [n] (NaN for null), and their ids [n] unless they go by position."""

    numbers: Array
    ids: pa.ChunkedArray | None = None


@dataclass(frozen=True)
class Positions:
    """Ids by position, in the order of the source's listing."""

    config: Config
    plan: ingest.IngestPlan | None = None  # made here if missing

    @cached_property
    def prepared(self) -> pa.ChunkedArray:
        """The training split as prepared: only the chosen classes, without held-out samples."""
        return (self.plan or ingest.plan(self.config)).listings["train"]["sample_id"]

    @cached_property
    def source(self) -> pa.ChunkedArray:
        """The whole training split of the source."""
        split = "train" if self.config.data.train_split == "train" else "test"
        return ingest.open_source(self.config.data).listing(split)["sample_id"]

    def ids(self, count: int, key: str) -> pa.ChunkedArray:
        """The ids at positions 0 .. count - 1.

        Raises UserError, with both counts, if `count` fits neither the prepared split nor the source.
        """
        if count == len(self.prepared):
            return self.prepared
        if count == len(self.source):
            return self.source
        chosen = f", {len(self.prepared)} of them chosen by this configuration"
        raise UserError(
            f"{key} holds {count} scores, the training split has {len(self.source)} samples"
            f"{chosen if len(self.prepared) != len(self.source) else ''}; provide one score per sample in the order of the "
            "source's listing (null for a rejected one), or a table with sample_id"
        )


def check_names(score: ScoreSection, criteria: Mapping[str, Any]) -> None:
    """Raises UserError for an invalid, reserved or unknown name, and for an unknown file type."""
    for name, file in score.imported.items():
        if not NAME.fullmatch(name) or name.endswith("_values"):
            raise UserError(f"score.imported: {name!r} is not a valid name; use letters, digits and underscores")
        if name in criteria or name in RESERVED:
            raise UserError(f"score.imported: {name!r} is already the name of a criterion or column; rename it")
        if Path(file).suffix.lower() not in SUFFIXES:
            raise UserError(f"score.imported.{name} = {file!r} has an unknown file type; use {', '.join(SUFFIXES)}")
    for name in score.imported_useful:
        if name not in score.imported:
            raise UserError(f"score.imported_useful names {name!r}, which is not in score.imported; add its file there")


def check(config: Config, plan: ingest.IngestPlan | None = None) -> None:
    """Reads all files and compares counts, before anything is computed; `plan` is the ingest plan, if there is one yet.

    Raises UserError for a file that is missing or does not hold one number per sample.
    """
    positions = Positions(config, plan)
    for name, file in config.score.imported.items():
        if (scores := read(name, file)).ids is None:
            positions.ids(len(scores.numbers), _key(name, file))


def digest_of(name: str, file: str) -> str:
    """The content hash of a file. Raises UserError if it is missing."""
    return str(file_digest(_existing(name, file))["sha256"])


def columns(config: Config, ids: pa.Array) -> dict[str, ExtraColumn]:
    """One column per name, for the training samples `ids` in the order of the prepared data.

    Raises UserError for a wrong count, missing or unknown ids, and scores that are not finite.
    """
    positions, useful = Positions(config), config.score.imported_useful
    extra = {}
    for name, file in config.score.imported.items():
        scores, key = read(name, file), _key(name, file)
        known = positions.ids(len(scores.numbers), key) if scores.ids is None else scores.ids
        known = known.combine_chunks()
        rows = pc.index_in(ids, known)
        if missing := rows.null_count:
            first = ids.filter(pc.is_null(rows))[0].as_py()
            raise UserError(f"{key} lacks {missing} of {len(ids)} training samples, first {first!r}; add their scores")
        if scores.ids is not None:
            # samples of the source that are not used here (rejected, held out, of other classes) may stay
            unknown = known.filter(pc.invert(pc.is_in(known, ids)))
            if len(unknown):
                unknown = unknown.filter(pc.invert(pc.is_in(unknown, positions.source.combine_chunks())))
            if len(unknown):
                raise UserError(
                    f"{key} holds {len(unknown)} ids that are not training samples of this data set, the first is "
                    f"{unknown[0].as_py()!r}; check that it belongs to this data set"
                )
        with np.errstate(over="ignore"):
            numbers = scores.numbers[rows.to_numpy()].astype(np.float32)
        if (bad := np.flatnonzero(~np.isfinite(numbers))).size:
            first = int(bad[0])
            raise UserError(
                f"{key}: the score of sample {ids[first].as_py()!r} (position {rows[first].as_py()}) is not a finite 32-bit "
                f"number, {len(bad)} in all; provide a finite score for every training sample"
            )
        if len(numbers) > 1 and numbers.min() == numbers.max():
            raise UserError(
                f"{key}: all {len(numbers)} training samples have the score {numbers[0]:g}, which ranks nothing; check the file"
            )
        extra[name] = ExtraColumn(useful.get(name, "low"), ids, numbers, {"imported": True})
    return extra


def remarks(config: Config, table: Path) -> list[str]:
    """A line for each imported score that ranks samples against the first computed criterion of the score table."""
    facts = score_table.facts(table)
    useful = facts["useful"]
    computed = [name for name in useful if name not in config.score.imported]
    if not config.score.imported or not computed or pq.read_metadata(table).num_rows > MAX_COMPARED:
        return []
    from scipy.stats import spearmanr  # takes a second to import

    scores, _ = score_table.read(table, [computed[0], *config.score.imported])
    lines = []
    for name in config.score.imported:
        agreement = float(spearmanr(scores[computed[0]].to_numpy(), scores[name].to_numpy()).statistic)
        agreement *= 1 if useful[name] == useful[computed[0]] else -1
        if agreement < AGAINST:
            other = {"low": "high", "high": "low"}[useful[name]]
            lines.append(
                f"  score.imported.{name} ranks samples against {computed[0]} (rank correlation {agreement:.2f}); if its "
                f"useful end is {other}, set score.imported_useful: {{{name}: {other}}}"
            )
    return lines


def read(name: str, file: str) -> ImportedScores:
    """Raises UserError if the file is missing, damaged, of another type, or does not hold numbers."""
    path, key = _existing(name, file), _key(name, file)
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):  # by position, "0" .. "n - 1"
                if missing := [i for i in map(str, range(len(content))) if i not in content]:
                    raise UserError(
                        f'{key} is an object without "{missing[0]}", though it holds {len(content)} values; its keys must be '
                        '"0", "1", ... by position'
                    )
                content = [content[str(i)] for i in range(len(content))]
            return ImportedScores(_numbers(content, key))
        if suffix in (".npy", ".npz"):
            if zipfile.is_zipfile(path):  # an .npz: few bytes can unpack to very many
                with zipfile.ZipFile(path) as archive:
                    size = sum(entry.file_size for entry in archive.infolist())
                if size > MAX_UNPACKED:
                    raise UserError(f"{key} unpacks to {size:,} bytes, more than {MAX_UNPACKED:,}; use .npy or Parquet")
            content = np.load(path, allow_pickle=False)
            if not isinstance(content, np.ndarray):
                with content as archive:
                    names = archive.files
                    if len(names) != 1:
                        raise UserError(f"{key} holds {len(names)} arrays ({', '.join(names)}); save only one")
                    content = archive[names[0]]
            return ImportedScores(_numbers(content, key))
        table = pyarrow.csv.read_csv(path, convert_options=AS_TEXT) if suffix == ".csv" else pq.ParquetFile(path).read()
    except UserError:
        raise
    except (ValueError, OSError, EOFError, RecursionError, MemoryError, zipfile.BadZipFile, pa.ArrowInvalid) as error:
        raise UserError(f"{key} cannot be read: {' '.join(str(error).split())}; write it again") from None
    return _by_id(table, name, key)


def _numbers(content: Any, key: str) -> Array:
    """float64 [n]; [n, trials] is averaged."""
    try:
        numbers = np.asarray(content)
    except ValueError:
        raise UserError(f"{key} holds lists of different lengths; use the same number of trials per sample") from None
    if numbers.dtype == object and all(value is None or isinstance(value, int | float) for value in numbers.flat):
        numbers = numbers.astype(np.float64)
    if numbers.dtype.kind not in "iuf":
        values = content if isinstance(content, list) else [content]
        wrong = [v for v in values if v is not None and (isinstance(v, bool) or not isinstance(v, int | float))]
        example = f", for example {wrong[0]!r}" if wrong and wrong[0] else ""
        raise UserError(f"{key} holds values that are not numbers{example}; provide one number per sample")
    if numbers.ndim not in (1, 2) or not numbers.size:
        raise UserError(f"{key} has the shape {list(numbers.shape)}; it must be [samples] or [samples, trials]")
    numbers = numbers.astype(np.float64)
    return numbers if numbers.ndim == 1 else numbers.mean(axis=1)


def _by_id(table: pa.Table, name: str, key: str) -> ImportedScores:
    column = name if name in table.column_names else "score"
    if missing := [c for c in ("sample_id", column) if c not in table.column_names]:
        wanted = missing[0] if missing[0] == "sample_id" else f"{name} or score"
        raise UserError(f"{key} has no column {wanted}, only {', '.join(table.column_names)}; add it")
    dtype = table[column].type
    if not (pa.types.is_floating(dtype) or pa.types.is_integer(dtype)):
        raise UserError(f"{key}: the column {column} holds {dtype}, not numbers; provide one number per sample")
    ids = table["sample_id"].cast(pa.string())
    if ids.null_count:
        raise UserError(f"{key}: {ids.null_count} rows have no sample_id; add or remove them")
    counts = pc.value_counts(ids)
    if len(counts) != len(ids):
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0].as_py()
        raise UserError(f"{key} holds the sample {repeated!r} more than once; keep one of its rows")
    return ImportedScores(table[column].cast(pa.float64()).to_numpy().astype(np.float64), ids)


def _existing(name: str, file: str) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{_key(name, file)} does not exist; set the path of the file with these scores")
    return path


def _key(name: str, file: str) -> str:
    return f"score.imported.{name} = {file!r}"
