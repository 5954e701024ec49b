"""Arrays of any meaning (signals, spectra, feature vectors) in Parquet files laid out as for `parquet`: `train-*.parquet`,
`test-*.parquet` with `data.value_column` and `data.label_column`.

A value is a (nested, perhaps fixed-size) list of numbers or an Arrow tensor of fixed shape. All have the shape of the first
one, with 1 to 4 axes; the first axis counts as channels (`[C, L]` of a signal, `[C, H, W]` of a field). What deviates is
rejected by the decoder.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.image.hf_parquet import HuggingFaceParquet

MOST_AXES = 4
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)

Array = np.ndarray[Any, Any]


class Tensors(HuggingFaceParquet):
    tensors = True
    column_key = "data.value_column"
    wanted = "lists of numbers or a tensor of fixed shape"
    held = "the arrays"

    def __init__(self, config: DataSection) -> None:
        super().__init__(config)
        self.column = config.value_column

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the first training sample that has one.

        Raises UserError where none has 1 to 4 axes.
        """
        for name in self.files["train"]:
            file, ends = self._opened(name)
            for group in range(file.num_row_groups):
                row = int(ends[group]) - file.metadata.row_group(group).num_rows
                for value in self._images(name, row)[1]:
                    found = array_of(value)
                    if found.dtype != object and 0 < found.ndim <= MOST_AXES and found.size:
                        return found.shape
        raise UserError(
            f"{self.store.place()}: no value of the column {self.column!r} is an array of 1 to {MOST_AXES} axes; "
            f"set {self.column_key} to the column that holds them"
        )

    def _leaf(self, kind: pa.DataType) -> str | None:
        return self.column if holds_numbers(kind) else None

    def _raw(self, values: pa.ChunkedArray) -> list[Any]:
        return [array_of(value) for value in values]


def holds_numbers(kind: pa.DataType) -> bool:
    """(Nested) lists of numbers, or tensors of them."""
    if isinstance(kind, pa.FixedShapeTensorType):
        kind = kind.value_type
        return pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if not any(is_kind(kind) for is_kind in LISTS):
        return False
    while any(is_kind(kind) for is_kind in LISTS):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def array_of(value: pa.Scalar) -> Array:
    """One value as an array of its own type; of type object where its lists differ in length or lack numbers."""
    broken = np.empty(0, object)
    if not value.is_valid:
        return broken
    if isinstance(value.type, pa.FixedShapeTensorType):
        shape, order = value.type.shape, value.type.permutation
        flat = value.value.values
        if flat.null_count:
            return broken
        found = flat.to_numpy().reshape(shape)
        return found if order is None else found.transpose(order)
    shape_found: list[int] = [len(value.values)]
    inner = value.values
    while any(is_kind(inner.type) for is_kind in LISTS):
        lengths = set(np.unique(inner.value_lengths().to_numpy(zero_copy_only=False)).tolist()) if len(inner) else {0}
        if inner.null_count or len(lengths) != 1:
            return broken
        shape_found.append(int(lengths.pop()))
        inner = inner.flatten()
    return broken if inner.null_count else inner.to_numpy().reshape(shape_found)
