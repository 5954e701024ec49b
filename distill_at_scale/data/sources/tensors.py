"""Arrays of numbers (signals, spectra, feature vectors) in Parquet files laid out as for `parquet`: `train-*.parquet`,
`test-*.parquet` with `data.value_column` and `data.label_column`.

A value is a (nested, perhaps fixed-size) list of numbers or an Arrow tensor of fixed shape. All values have the shape of the
first one, with 1 to 4 axes, channels first (`[C, L]` for a signal, `[C, H, W]` for a field). The decoder rejects others.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.prepared.format import MAX_AXES, Array
from distill_at_scale.data.sources.image.hf_parquet import HuggingFaceParquet


class Tensors(HuggingFaceParquet):
    tensors = True
    column_key = "data.value_column"
    column_types = "lists of numbers or a tensor of fixed shape"
    column_content = "the arrays"

    def __init__(self, config: DataSection) -> None:
        super().__init__(config)
        self.column = config.value_column

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first valid training sample; raises UserError if none has 1 to 4 axes."""
        for name in self.files["train"]:
            file, ends = self._opened(name)
            for group in range(file.num_row_groups):
                first_row = int(ends[group]) - file.metadata.row_group(group).num_rows
                for value in self._group_of(name, first_row)[1]:
                    array = to_array(value)
                    if array.dtype != object and 0 < array.ndim <= MAX_AXES and array.size:
                        return array.shape
        problem = f"{self.store.place()}: no value of the column {self.column!r} is an array of 1 to {MAX_AXES} axes"
        raise UserError(f"{problem}; set {self.column_key} to the column that holds them")

    def _parquet_columns(self, kind: pa.DataType) -> list[str]:
        """(Nested) lists of numbers, or tensors of them."""
        if not isinstance(kind, pa.FixedShapeTensorType) and not _is_list(kind):
            return []
        kind = kind.value_type
        while _is_list(kind):
            kind = kind.value_type
        return [self.column] if pa.types.is_integer(kind) or pa.types.is_floating(kind) else []

    def _to_raw(self, values: pa.ChunkedArray, name: str) -> list[Any]:
        return [to_array(value) for value in values]


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def to_array(value: pa.Scalar) -> Array:
    """A value as an array of its own type; an empty array of type object if its lists are ragged or have nulls."""
    broken = np.empty(0, object)
    if not value.is_valid:
        return broken
    if isinstance(value.type, pa.FixedShapeTensorType):
        numbers, axes = value.value.values, value.type.permutation
        if numbers.null_count:
            return broken
        array = numbers.to_numpy().reshape(value.type.shape)
        return array if axes is None else array.transpose(axes)
    shape, inner = [len(value.values)], value.values
    while _is_list(inner.type):
        lengths = set(np.unique(inner.value_lengths().to_numpy(zero_copy_only=False)).tolist()) if len(inner) else {0}
        if inner.null_count or len(lengths) != 1:
            return broken
        shape.append(int(lengths.pop()))
        inner = inner.flatten()
    return broken if inner.null_count else inner.to_numpy().reshape(shape)
