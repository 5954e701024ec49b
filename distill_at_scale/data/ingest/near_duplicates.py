"""Near-duplicates of `data.transform`: every training sample several times, all but the first jittered a little.

What a sample becomes depends on its id, the number of the copy and the seed alone. The samples stream through, sorted by
class and id. Left out: when it is done, and what dataset.json says of it (`data/ingest/derived_splits.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core import rng
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.codecs.image import encode
from distill_at_scale.data.prepared import format as shards
from distill_at_scale.data.prepared.dataset import PreparedDataset

READ_BYTES = 32 * 2**20  # of near-duplicates in memory at once
SHIFT, CONTRAST, BRIGHTNESS, NOISE = 1 / 8, 0.2, 0.1, 0.02  # of the side; of 1; of the scale; of the scale
TENSOR_NOISE = 0.05  # of the training values' standard deviation

Array = np.ndarray[Any, Any]


def jitter(sample: Array, draw: np.random.Generator) -> Array:
    """A near-duplicate of uint8 pixels [C, H, W] or [T, C, H, W]: moved, brighter or darker, of other contrast, noisy.

    It moves by at most an eighth of each side (what comes in repeats the edge); every frame of a clip the same way.
    """
    moved = _shifted(sample, *(_shift(draw, side) for side in sample.shape[-2:])).astype(np.float32)
    contrast = 1 + draw.uniform(-CONTRAST, CONTRAST)
    light = 255 * draw.uniform(-BRIGHTNESS, BRIGHTNESS)
    noise = 255 * NOISE * draw.standard_normal(sample.shape[-3:], np.float32)
    found = (moved - moved.mean()) * np.float32(contrast) + moved.mean() + np.float32(light) + noise
    return np.clip(np.rint(found), 0, 255).astype(np.uint8)


def _shift(draw: np.random.Generator, side: int) -> int:
    most = int(side * SHIFT)
    return int(draw.integers(-most, most + 1))


def _shifted(sample: Array, down: int, right: int) -> Array:
    height, width = sample.shape[-2:]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return sample[..., rows[:, None], columns]


def duplicated(prepared: PreparedDataset, data: DataSection, seed: int) -> Iterator[pa.Table]:
    """Samples and their near-duplicates, sorted by class and id; some source samples are in memory at a time."""
    span = max(1, READ_BYTES // (prepared.sample_bytes * data.copies))
    for label in range(len(prepared.class_names)):
        ids = prepared.ids("train", label)
        numbers = np.repeat(np.arange(data.copies), len(ids))
        named = pa.concat_arrays([ids, *(pc.binary_join_element_wise(ids, str(k), "#") for k in range(1, data.copies))])
        order = pc.sort_indices(named).to_numpy()
        _check_distinct(named.take(pa.array(order)))
        for start in range(0, len(order), span * data.copies):
            rows = order[start : start + span * data.copies]
            yield _copied(prepared, label, named.take(pa.array(rows)), rows % len(ids), numbers[rows], data, seed)


def _check_distinct(names: pa.Array) -> None:
    twice = pc.equal(names.slice(1), names.slice(0, max(0, len(names) - 1)))
    if twice.true_count:
        raise UserError(
            f"data.transform = near_duplicates would name two samples {names[pc.index(twice, True).as_py()].as_py()!r}; "
            "rename the sample of this id, or leave the transform out"
        )


def _copied(
    prepared: PreparedDataset, label: int, names: pa.Array, places: Array, copies: Array, data: DataSection, seed: int
) -> pa.Table:
    """Rows by name, of the sample at a place of the class and its copy number; number 0 is stored as it was."""
    unique, inverse = np.unique(places, return_inverse=True)
    stored = _stored(prepared, label, unique)
    samples, ids = prepared.pixels(stored), stored["sample_id"].to_pylist()
    spread = np.array(prepared.std, np.float32).reshape(-1, *(1,) * (len(prepared.shape) - 1))
    name = stored.column_names[-1]
    originals = stored[name].combine_chunks()
    values: list[Any] = []
    for source, copy in zip(inverse.tolist(), copies.tolist(), strict=True):
        if copy == 0:
            values.append(originals[source].as_py())
            continue
        draw = rng.numpy_generator(seed, "near duplicate", ids[source], copy)
        if prepared.kind == "tensors":
            noise = TENSOR_NOISE * spread * draw.standard_normal(prepared.shape, np.float32)
            values.append((samples[source] + noise).astype(np.float32).tobytes())
        else:
            made = jitter(samples[source], draw)
            values.append(encode(shards.stack_frames(made), data.quality) if name == "jpeg" else made.tobytes())
    columns = [names, pa.array(np.full(len(names), label, np.int32)), pa.array(values, stored.schema[-1].type)]
    return pa.table(columns, schema=stored.schema.remove_metadata())


def _stored(prepared: PreparedDataset, label: int, places: Array) -> pa.Table:
    """Rows at some places (ascending) of a class, as they are stored."""
    parts, start = [], 0
    for group in prepared.groups("train"):
        if group.label != label:
            continue
        first, last = np.searchsorted(places, [start, start + group.rows])
        if first < last:
            parts.append(prepared.read(group, "train").take(pa.array(places[first:last] - start)))
        start += group.rows
    return pa.concat_tables(parts)
