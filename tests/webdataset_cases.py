"""Small WebDataset shards, and what a source reads from them."""

from __future__ import annotations

import io
import json
import tarfile

from distill_at_scale.config.sections import DataSection
from distill_at_scale.data.sources.image.webdataset import WebDataset


def tar_of(members):
    """A tar of (name, bytes) pairs, which may repeat."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write(root, shard, *members):
    """A shard of (name, content) pairs; content is bytes, text, or an object for a json file."""
    raw = [
        (n, c if isinstance(c, bytes) else c.encode() if isinstance(c, str) else json.dumps(c).encode())
        for n, c in members
    ]
    (root / shard).parent.mkdir(parents=True, exist_ok=True)
    (root / shard).write_bytes(tar_of(raw))


def sample(key, label, image=b"jpeg"):
    return [(f"{key}.jpg", image), (f"{key}.cls", str(label))]


def source_of(path, **keys):
    """A source; a URI stands for remote storage, also where it leads to this disk."""
    source = WebDataset(DataSection(source="webdataset", path=str(path), **keys))
    source.store.local = "://" not in str(path)
    return source


def labels_of(source, split="train"):
    """{id: class name}"""
    table = source.listing(split)
    return {
        i: source.class_names[label]
        for i, label in zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True)
    }
