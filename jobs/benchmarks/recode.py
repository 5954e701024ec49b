"""A copy of a Hugging Face Parquet data set whose JPEGs are decoded and encoded once more, to see what coding costs.

    python jobs/benchmarks/recode.py data/cifar10 runs/cifar10_recoded [--split train] [--quality 50]

`--quality keep` uses each image's own quantisation tables. Files of other splits are copied as they are.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encode(data: bytes, quality: str) -> bytes:
    image, file = Image.open(io.BytesIO(data)), io.BytesIO()
    if quality == "keep":
        image.save(file, "JPEG", quality="keep")  # the same tables and subsampling
    else:
        image.save(file, "JPEG", quality=int(quality))
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--split", default="", help="recode only the files whose names start so")
    parser.add_argument("--quality", default="keep", help="of JPEG, or keep")
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    for path in sorted(options.source.glob("*.parquet")):
        if not path.name.startswith(options.split):
            shutil.copyfile(path, options.target / path.name)
            continue
        table = pq.read_table(path)
        images = [{**row, "bytes": encode(row["bytes"], options.quality)} for row in table["image"].to_pylist()]
        column = pa.array(images, table.schema.field("image").type)
        pq.write_table(
            table.set_column(table.schema.get_field_index("image"), "image", column), options.target / path.name
        )
        before, after = (sum(len(row["bytes"]) for row in rows) for rows in (table["image"].to_pylist(), images))
        print(f"{path.name}: {table.num_rows:,} images, {before:,} bytes before, {after:,} after")


if __name__ == "__main__":
    main()
