"""Scores that were made elsewhere (score.imported: {name: file}): read, proved to fit the training split, and joined by id.

By position: JSON (a list, or an object "0": value, as the authors of arXiv 2305.18381 publish theirs), .npy, or .npz with
one array. Position i is sample i of the training split in the order of the source's own listing, before classes are
chosen, samples held out, and everything sorted; or sample i of what is then left, told apart by the count. A rejected
sample keeps its position. By id: CSV or Parquet with the columns sample_id and NAME (or score). Numbers [n, trials] are
averaged. Left out: what the names of the values mean, which is the business of whoever made them.
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
from distill_at_scale.pruning.scoring.columns import ExtraColumn

Array = np.ndarray[Any, Any]
SUFFIXES = (".json", ".npy", ".npz", ".csv", ".parquet")
RESERVED = ("sample_id", "label", "score", "random", "kept", "rank")  # names that a column of the tables has already
MOST_UNPACKED = 2**32  # bytes of an .npz: five trials of a hundred million samples
NAME = re.compile(r"[A-Za-z]\w*")
AS_TEXT = pyarrow.csv.ConvertOptions(column_types={"sample_id": pa.string()})  # 0001 is no number, and NA not missing


@dataclass(frozen=True)
class ImportedScores:
    """What a file holds: numbers float64 [n] (NaN where it says null) and, unless they go by position, their ids [n]."""

    numbers: Array
    ids: pa.ChunkedArray | None = None


@dataclass(frozen=True)
class Positions:
    """What position i means: ids in the order of the source's own listing."""

    config: Config
    plan: ingest.IngestPlan | None = None  # where it has been made already

    @cached_property
    def left(self) -> pa.ChunkedArray:
        """Of the training split as it is prepared: with its classes, without what is held out."""
        return (self.plan or ingest.plan(self.config)).listings["train"]["sample_id"]

    @cached_property
    def whole(self) -> pa.ChunkedArray:
        """Of the split as the source has it."""
        split = "train" if self.config.data.train_split == "train" else "test"
        return ingest.open_source(self.config.data).listing(split)["sample_id"]

    def of(self, count: int, key: str) -> pa.ChunkedArray:
        """The ids that so many positions stand for.

        Raises UserError with both counts where there are none.
        """
        if count == len(self.left):
            return self.left
        if count == len(self.whole):
            return self.whole
        chosen = f", {len(self.left)} of them chosen by this configuration" if len(self.left) != len(self.whole) else ""
        raise UserError(
            f"{key} holds {count} scores, the training split has {len(self.whole)} samples{chosen}; give one score for every "
            "sample in the order of the source's listing (null for one that was rejected), or a table with sample_id"
        )


def check_names(score: ScoreSection, criteria: Mapping[str, Any]) -> None:
    """Raises UserError for a name that is no name, is that of a criterion, or is unknown, and for a file of no known kind."""
    for name, file in score.imported.items():
        if not NAME.fullmatch(name) or name.endswith("_values"):
            raise UserError(f"score.imported: {name!r} is no name for scores; take letters, digits and underscores")
        if name in criteria or name in RESERVED:
            raise UserError(
                f"score.imported: {name!r} is the name of a criterion or column already; choose another name"
            )
        if Path(file).suffix.lower() not in SUFFIXES:
            raise UserError(f"score.imported.{name} = {file!r} is of no known kind; give one of {', '.join(SUFFIXES)}")
    for name in score.imported_useful:
        if name not in score.imported:
            raise UserError(f"score.imported_useful names {name!r}, which is not in score.imported; add its file there")


def check(config: Config, plan: ingest.IngestPlan | None = None) -> None:
    """Read every file and count, before anything is computed; `plan` is that of the ingest, where it has been made.

    Raises UserError for what is missing, is not numbers, or is not as many as there are samples.
    """
    positions = Positions(config, plan)
    for name, file in config.score.imported.items():
        if (given := read(name, file)).ids is None:
            positions.of(len(given.numbers), _key(name, file))


def digest_of(name: str, file: str) -> str:
    """The content hash of a file.

    Raises UserError where it is missing.
    """
    return str(file_digest(_existing(name, file))["sha256"])


def columns(config: Config, ids: pa.Array) -> dict[str, ExtraColumn]:
    """A column for every name, of the training samples `ids` (as the prepared data are sorted).

    Raises UserError for a wrong count, for ids that are missing or unknown, and for scores that are not finite.
    """
    positions, useful = Positions(config), config.score.imported_useful
    found = {}
    for name, file in config.score.imported.items():
        numbers = joined(read(name, file), ids, positions, _key(name, file))
        found[name] = ExtraColumn(useful.get(name, "low"), ids, numbers, {"imported": True})
    return found


def joined(given: ImportedScores, ids: pa.Array, positions: Positions, key: str) -> Array:
    """The numbers in the order of `ids`, float32 [n].

    Raises UserError as `columns` does.
    """
    known = positions.of(len(given.numbers), key) if given.ids is None else given.ids
    known = known.combine_chunks()
    places = pc.index_in(ids, known)
    if missing := places.null_count:
        first = ids.filter(pc.is_null(places))[0].as_py()
        raise UserError(
            f"{key} lacks {missing} of {len(ids)} training samples, the first is {first!r}; add their scores"
        )
    if given.ids is not None:
        _refuse_strangers(known, ids, positions, key)
    with np.errstate(over="ignore"):
        numbers = given.numbers[places.to_numpy()].astype(np.float32)
    if (bad := np.flatnonzero(~np.isfinite(numbers))).size:
        raise UserError(
            f"{key}: the score of sample {ids[int(bad[0])].as_py()!r} (position {places[int(bad[0])].as_py()}) is not a finite "
            f"32-bit number, as are {len(bad)} in all; every training sample needs one"
        )
    return numbers


def read(name: str, file: str) -> ImportedScores:
    """Raises UserError where the file is missing, damaged, of another kind, or does not hold numbers."""
    path, key = _existing(name, file), _key(name, file)
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            return ImportedScores(_numbers(_of_json(json.loads(path.read_text()), key), key))
        if suffix in (".npy", ".npz"):
            _refuse_bomb(path, key)
            return ImportedScores(_numbers(_of_numpy(np.load(path, allow_pickle=False), key), key))
        table = pyarrow.csv.read_csv(path, convert_options=AS_TEXT) if suffix == ".csv" else pq.ParquetFile(path).read()
    except (ValueError, OSError, EOFError, RecursionError, MemoryError, zipfile.BadZipFile, pa.ArrowInvalid) as error:
        raise UserError(f"{key} cannot be read: {' '.join(str(error).split())}; write it again") from None
    return _of_table(table, name, key)


def _refuse_bomb(path: Path, key: str) -> None:
    """An .npz is a zip archive, and a few of its bytes can stand for any number."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MOST_UNPACKED:
            raise UserError(
                f"{key} unpacks to {size:,} bytes, more than {MOST_UNPACKED:,}; give a .npy or Parquet file"
            )


def _of_json(found: Any, key: str) -> Any:
    """A list as it is; of an object the values at "0" .. "n - 1"."""
    if not isinstance(found, dict):
        return found
    first = next((i for i in range(len(found)) if str(i) not in found), None)
    if first is not None:
        raise UserError(f'{key} is an object without "{first}", though it holds {len(found)} values; its keys must be "0", '
                        '"1", ... by position')  # fmt: skip
    return [found[str(i)] for i in range(len(found))]


def _of_numpy(found: Any, key: str) -> Any:
    if isinstance(found, np.ndarray):
        return found
    with found:
        if len(found.files) != 1:
            raise UserError(f"{key} holds {len(found.files)} arrays ({', '.join(found.files)}); give a file with one")
        return found[found.files[0]]


def _numbers(found: Any, key: str) -> Array:
    """float64 [n]; [n, trials] is averaged."""
    try:
        numbers = np.asarray(found)
    except ValueError:
        raise UserError(
            f"{key} holds lists of different lengths; give one number, or as many, for every sample"
        ) from None
    if numbers.dtype == object and all(value is None or isinstance(value, int | float) for value in numbers.flat):
        numbers = numbers.astype(np.float64)
    if numbers.dtype.kind not in "iuf":
        wrong = _no_number(found)
        raise UserError(
            f"{key} holds what is no number{f', for example {wrong!r}' if wrong else ''}; give one per sample"
        )
    if numbers.ndim not in (1, 2) or not numbers.size:
        raise UserError(f"{key} has the shape {list(numbers.shape)}; give [samples] or [samples, trials]")
    numbers = numbers.astype(np.float64)
    return numbers if numbers.ndim == 1 else numbers.mean(axis=1)


def _no_number(found: Any) -> Any:
    values = found if isinstance(found, list) else [found]
    return next((v for v in values if v is not None and (isinstance(v, bool) or not isinstance(v, int | float))), None)


def _of_table(table: pa.Table, name: str, key: str) -> ImportedScores:
    """By id: the column of the name, or `score`."""
    column = name if name in table.column_names else "score"
    if lacking := [c for c in ("sample_id", column) if c not in table.column_names]:
        wanted = lacking[0] if lacking[0] == "sample_id" else f"{name} or score"
        raise UserError(f"{key} has no column {wanted}, only {', '.join(table.column_names)}; add it")
    kind = table[column].type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise UserError(f"{key}: the column {column} holds {kind}, no numbers; give one per sample")
    ids = table["sample_id"].cast(pa.string())
    if ids.null_count:
        raise UserError(f"{key}: {ids.null_count} rows have no sample_id; add or remove them")
    counted = pc.value_counts(ids)
    if len(counted) != len(ids):
        twice = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")[0].as_py()
        raise UserError(f"{key} holds the sample {twice!r} more than once; keep one of its rows")
    return ImportedScores(table[column].cast(pa.float64()).to_numpy().astype(np.float64), ids)


def _refuse_strangers(known: pa.Array, ids: pa.Array, positions: Positions, key: str) -> None:
    """Ids of samples that the source has, though they are not used here (rejected, held out, of other classes), may stay."""
    strangers = known.filter(pc.invert(pc.is_in(known, ids)))
    if len(strangers):
        strangers = strangers.filter(pc.invert(pc.is_in(strangers, positions.whole.combine_chunks())))
    if len(strangers):
        raise UserError(
            f"{key} holds {len(strangers)} ids that are no training samples of this data set, the first is "
            f"{strangers[0].as_py()!r}; is it of another data set?"
        )


def _existing(name: str, file: str) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{_key(name, file)} does not exist; give the path of the file with these scores")
    return path


def _key(name: str, file: str) -> str:
    return f"score.imported.{name} = {file!r}"
