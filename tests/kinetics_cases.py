"""Lists and folders of Kinetics, and what a source reads from them."""

from __future__ import annotations

HEADER = "label,youtube_id,time_start,time_end,split,is_cc\n"


def put(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def labels(source, split="train"):
    table = source.listing(split)
    return dict(zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True))


def aside(source, split="train"):
    return sorted((row["sample_id"], row["label"], row["reason"]) for row in source.set_aside(split).to_pylist())
