"""Near-duplicates of `data.transform`: each training sample several times, all but the first slightly jittered.

A copy depends on the sample's id, the copy's number and the seed alone. Samples stream through, sorted by class and id;
`derived_splits.py` writes them.
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
from distill_at_scale.data.codecs.image import Array, encode
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.prepared.format import stack_frames
from distill_at_scale.data.sources.base import first_duplicate

READ_BYTES = 32 * 2**20  # of near-duplicates in memory at once
SHIFT, CONTRAST, BRIGHTNESS, NOISE = 1 / 8, 0.2, 0.1, 0.02  # of the side; of 1; of the scale; of the scale
TENSOR_NOISE = 0.05  # of the training values' standard deviation


def jitter(sample: Array, draw: np.random.Generator) -> Array:
    """A near-duplicate of uint8 pixels [C, H, W] or [T, C, H, W]: shifted, with other brightness and contrast, and noise.

    It shifts by at most an eighth of each side, repeating the edge; all frames of a clip shift alike.
    """
    height, width = sample.shape[-2:]
    down, right = (int(draw.integers(-int(side * SHIFT), int(side * SHIFT) + 1)) for side in (height, width))
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    shifted = sample[..., rows[:, None], columns].astype(np.float32)
    contrast = 1 + draw.uniform(-CONTRAST, CONTRAST)
    light = 255 * draw.uniform(-BRIGHTNESS, BRIGHTNESS)
    noise = 255 * NOISE * draw.standard_normal(sample.shape[-3:], np.float32)
    jittered = (shifted - shifted.mean()) * np.float32(contrast) + shifted.mean() + np.float32(light) + noise
    return np.clip(np.rint(jittered), 0, 255).astype(np.uint8)


def duplicated(prepared: PreparedDataset, data: DataSection, seed: int) -> Iterator[pa.Table]:
    """Samples and their near-duplicates, sorted by class and id, at most READ_BYTES at a time."""
    span = max(1, READ_BYTES // (prepared.sample_bytes * data.copies))
    for label in range(len(prepared.class_names)):
        ids = prepared.ids("train", label)
        numbers = np.repeat(np.arange(data.copies), len(ids))
        names = pa.concat_arrays([ids, *(pc.binary_join_element_wise(ids, str(k), "#") for k in range(1, data.copies))])
        order = pc.sort_indices(names).to_numpy()
        if (name := first_duplicate(pa.chunked_array([names]))) is not None:
            problem = f"data.transform = near_duplicates would name two samples {name!r}"
            raise UserError(f"{problem}; rename the sample of this id, or leave the transform out")
        for start in range(0, len(order), span * data.copies):
            rows = order[start : start + span * data.copies]
            yield _copied(prepared, label, names.take(pa.array(rows)), rows % len(ids), numbers[rows], data, seed)


def _copied(
    prepared: PreparedDataset, label: int, names: pa.Array, places: Array, copies: Array, data: DataSection, seed: int
) -> pa.Table:
    """Rows called `names`: copy number `copies` of the class's samples at `places`; copy 0 is the stored sample."""
    unique, inverse = np.unique(places, return_inverse=True)
    stored = pa.concat_tables(prepared.take_rows("train", label, unique))
    samples, ids = prepared.pixels(stored), stored["sample_id"].to_pylist()
    spread = np.array(prepared.std, np.float32).reshape(-1, *(1,) * (len(prepared.shape) - 1))
    column = stored.column_names[-1]
    originals = stored[column].combine_chunks()
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
            jittered = jitter(samples[source], draw)
            values.append(encode(stack_frames(jittered), data.quality) if column == "jpeg" else jittered.tobytes())
    columns = [names, pa.array(np.full(len(names), label, np.int32)), pa.array(values, stored.schema[-1].type)]
    return pa.table(columns, schema=stored.schema.remove_metadata())
