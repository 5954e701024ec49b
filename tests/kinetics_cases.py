"""Lists and folders of Kinetics, and what a source reads from them."""

from __future__ import annotations

from distill_at_scale.config.sections import DataSection
from distill_at_scale.data.sources import SOURCES

HEADER = "label,youtube_id,time_start,time_end,split,is_cc\n"
TRAIN = HEADER + (
    '"arm wrestling",-3B32lodo2M,28,38,train,0\n'
    "abseiling,_dbcJuKJQNs,0,10,train,0\n"
    '"petting animal (not cat)",aaaaaaaaaaa,7,17,train,1\n'
    "abseiling,gonegonegon,100,110,train,0\n"
)
VAL = HEADER + "abseiling,vvvvvvvvvvv,3,13,val,0\n"
CLIPS = {
    "train/arm wrestling/-3B32lodo2M_000028_000038.mp4": b"arm",
    "train/abseiling/_dbcJuKJQNs_000000_000010.webm": b"",
    "train/petting animal (not cat)/aaaaaaaaaaa_000007_000017.mkv": b"cat",
    "val/abseiling/vvvvvvvvvvv_000003_000013.mp4": b"val",
}
LABELS = {
    "train/abseiling/_dbcJuKJQNs_000000_000010.webm": 0,
    "train/arm wrestling/-3B32lodo2M_000028_000038.mp4": 1,
    "train/petting animal (not cat)/aaaaaaaaaaa_000007_000017.mkv": 2,
}


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


def kinetics(root, **keys):
    return SOURCES["kinetics"](DataSection(source="kinetics", path=str(root), **keys))
