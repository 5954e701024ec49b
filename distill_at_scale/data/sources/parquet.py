"""Hugging Face's image layout: Parquet files `train-*.parquet`, `test-*.parquet` with `image: struct<bytes, path>` and
`label`.

Class names come from the metadata that the datasets library writes into the schema. A sample's id is `image.path`
where it is present and unique within the split, else `<file>:<row>`. Files may also lie in a folder per split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_at_scale.config import DataSection
from distill_at_scale.data.sources.base import data_root, listing, split_of
from distill_at_scale.errors import UserError
from distill_at_scale.rundir import digest


class HuggingFaceParquet:
    def __init__(self, config: DataSection) -> None:
        self.config, self.root = config, data_root(config)
        self.files: dict[str, list[Path]] = {}
        for path in sorted(self.root.rglob("*.parquet")):
            relative = path.relative_to(self.root)
            split = split_of(path.name) or next((s for part in relative.parts[:-1] if (s := split_of(part))), "train")
            self.files.setdefault(split, []).append(path)
        validation = [
            path for path in self.files.get("test", []) if "val" in path.relative_to(self.root).as_posix().lower()
        ]
        if validation:
            self.files["test"] = validation  # where there are both, test often comes without labels
        if "train" not in self.files:
            raise UserError(f"{self.root} holds no training Parquet files (train-*.parquet)")
        self.class_names = self._class_names()
        self._open: tuple[str, int, pa.Table] | None = None

    def splits(self) -> list[str]:
        return [split for split in ("train", "test") if split in self.files]

    def listing(self, split: str) -> pa.Table:
        """Raises UserError for a missing column, an unlabelled row, or a split without rows; names file and row."""
        paths: list[str | None] = []
        labels: list[int] = []
        locations: list[str] = []
        rows: list[int] = []
        for file in self.files[split]:
            name = file.relative_to(self.root).as_posix()
            table = self._read_columns(file)
            count = table.num_rows
            paths += table[0].to_pylist() if table.num_columns > 1 else [None] * count
            labels += self._labels(table, name)
            locations += [name] * count
            rows += range(count)
        if not rows:
            raise UserError(f"the {split} files in {self.root} hold no rows")
        usable = None not in paths and len(set(paths)) == len(paths)
        ids = [str(p) for p in paths] if usable else [f"{f}:{r}" for f, r in zip(locations, rows, strict=True)]
        return listing(ids, labels, locations, rows)

    def digest(self, split: str) -> str:
        """Hash of every file's footer: its schema, and sizes and statistics of all column chunks."""
        footers = []
        for file in self.files[split]:
            with open(file, "rb") as handle:
                handle.seek(-8, 2)
                length = int.from_bytes(handle.read(4), "little")
                handle.seek(-8 - length, 2)
                footers.append([file.name, hashlib.sha256(handle.read(length)).hexdigest(), file.stat().st_size])
        return digest(footers)

    def read(self, rows: pa.Table) -> Sequence[bytes | np.ndarray[Any, Any]]:
        """Reads each row group once when rows come in file order; the last one stays open between calls."""
        return [self._row(f, r) for f, r in zip(rows["location"].to_pylist(), rows["row"].to_pylist(), strict=True)]

    def _row(self, name: str, row: int) -> bytes:
        if self._open is None or self._open[0] != name or not 0 <= row - self._open[1] < self._open[2].num_rows:
            self._open = self._row_group(name, row)
        return self._open[2][0][row - self._open[1]].as_py() or b""

    def _row_group(self, name: str, row: int) -> tuple[str, int, pa.Table]:
        file, start = pq.ParquetFile(self.root / name), 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if row < start + count:
                return name, start, file.read_row_group(group, columns=[f"{self.config.image_column}.bytes"]).flatten()
            start += count
        raise UserError(f"{self.root / name} has no row {row}; did the file change after it was listed?")

    def _schema(self, file: Path) -> pa.Schema:
        try:
            return pq.read_schema(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{file} is not a readable Parquet file: {error}. Download it again.") from None

    def _read_columns(self, file: Path) -> pa.Table:
        """The columns image.path (where it exists) and label."""
        schema, image, label = self._schema(file), self.config.image_column, self.config.label_column
        for key, column in (("data.image_column", image), ("data.label_column", label)):
            if column not in schema.names:
                raise UserError(f"{file} has no column {column!r}; set {key} to one of: {', '.join(schema.names)}")
        kind = schema.field(image).type
        fields = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        if "bytes" not in fields:
            raise UserError(f"{file}: column {image!r} must be a struct with the field bytes, it is {kind}")
        columns = [f"{image}.path", label] if "path" in fields else [label]
        table = pq.read_table(file, columns=columns, partitioning=None).flatten()
        return table.select([*(name for name in table.column_names if name != label), label])

    def _labels(self, table: pa.Table, name: str) -> list[int]:
        labels = table[table.num_columns - 1].to_pylist()
        for row, label in enumerate(labels):
            if not isinstance(label, int) or not 0 <= label < len(self.class_names):
                raise UserError(
                    f"{name}, row {row}: the label {label!r} is not one of 0..{len(self.class_names) - 1}; "
                    "remove the row or the split"
                )
        return labels

    def _class_names(self) -> list[str]:
        schema = self._schema(self.files["train"][0])
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = metadata.get("info", {}).get("features", {}).get(self.config.label_column, {})
        if names := feature.get("names"):
            return [str(name) for name in names]
        tables = [self._read_columns(file) for file in self.files["train"]]
        labels = {label for table in tables for label in table[table.num_columns - 1].to_pylist()}
        numbers = [label for label in labels if isinstance(label, int)]
        return [str(label) for label in range(max(numbers, default=0) + 1)]
