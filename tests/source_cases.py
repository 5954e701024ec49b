"""Small images in Parquet files and in folders, and their sources."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from distill_at_scale.config.sections import DataSection
from distill_at_scale.data.sources import SOURCES


def png(level: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, labels, paths=None, names=None, image="image", label="label", kind=None, rows_per_group=None):
    """A file in Hugging Face's layout; image i is flat grey of level i."""
    fields = [("bytes", pa.binary())] + ([("path", pa.string())] if paths is not None else [])
    rows = [{"bytes": png(i), **({"path": paths[i]} if paths is not None else {})} for i in range(len(labels))]
    schema = pa.schema([(image, pa.struct(fields)), (label, kind or pa.int64())])
    if names:
        features = {label: {"_type": "ClassLabel", "names": names}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table([pa.array(rows, schema.field(0).type), pa.array(labels, kind)], schema=schema), path, rows_per_group
    )


def parquet(root, **keys):
    return SOURCES["parquet"](DataSection(source="parquet", path=str(root), **keys))


def imagefolder(root):
    return SOURCES["imagefolder"](DataSection(source="imagefolder", path=str(root)))


def touch(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i))
