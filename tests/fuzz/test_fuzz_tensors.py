"""Broken safetensors, synthetic sets, state dicts of torch and pickles of CIFAR.

Of what is accepted, a second reader of the header finds the same names, types, shapes and bytes; nothing that a pickle
names is run; and no weights are larger than their file can hold.
"""

from __future__ import annotations

import io
import json
import pickle
import random
from pathlib import Path

import mutating
import numpy as np
import torch
from safetensors.torch import save

from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.archives import safe_pickle
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.models import pretrained

CODES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8", torch.float16: "F16", torch.int32: "I32"}
PLAIN = (dict, list, tuple, str, bytes, bytearray, int, float, bool, type(None), np.ndarray)


def parted(data: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(data[:8], "little")
    return data[8 : 8 + size], data[8 + size :]


def broken_header(data: bytes, chance: random.Random) -> bytes:
    """A header that is broken inside, with its right length in front: shapes, types, places, names."""
    header, body = parted(data)
    kind = chance.randrange(3)
    if kind == 0:
        header = chance.choice(mutating.BLIND)(header, chance)
    elif kind == 1:
        header = header.replace(
            chance.choice((b"F32", b"I64", b"U8")), chance.choice((b"F64", b"I8", b"BOOL", b"F4")), 1
        )
    else:
        digits = [i for i, c in enumerate(header) if 48 <= c < 58] or [0]
        at = chance.choice(digits)
        header = header[:at] + chance.choice((b"0", b"9", b"-1", b"18446744073709551615", b"1e3")) + header[at + 1 :]
    return len(header).to_bytes(8, "little") + header + body


def check_against_header(loaded: dict[str, torch.Tensor], data: bytes) -> None:
    header, body = parted(data)
    declared = json.loads(header)
    declared.pop("__metadata__", None)
    assert loaded.keys() == declared.keys()
    for name, tensor in loaded.items():
        first, last = declared[name]["data_offsets"]
        assert list(tensor.shape) == declared[name]["shape"]
        assert CODES.get(tensor.dtype, declared[name]["dtype"]) == declared[name]["dtype"]
        assert tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == body[first:last]


def a_set() -> dict[str, torch.Tensor]:
    return {"images": torch.linspace(-1, 1, 2 * 16).view(2, 1, 4, 4), "labels": torch.tensor([0, 1])}


def test_broken_safetensors_are_refused_or_hold_what_they_declare(tmp_path: Path):
    path = tmp_path / "a.safetensors"

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            loaded = safetensors_io.load(path)
        except UserError:
            return False
        check_against_header(loaded, data)
        return True

    more = {"b": torch.arange(6, dtype=torch.uint8), "c": torch.zeros(0, 3), "d": torch.tensor(1.5)}
    mutating.run("safetensors", 0.06, [save(a_set()), save(more, {"facts": "{}"})], attempt, [broken_header] * 4)


def test_broken_synthetic_sets_are_refused_or_can_be_used(tmp_path: Path):
    card = {
        "class_names": ["a", "b"],
        "normalization": {"mean": [0.5], "std": [0.25]},
        "protocol": {},
        "kind": "images",
    }
    seeds = [save(a_set()) + b"\n\n" + json.dumps(card).encode()]

    def attempt(data: bytes) -> bool:
        held, _, text = data.rpartition(b"\n\n")
        (tmp_path / "synthetic.safetensors").write_bytes(held)
        (tmp_path / "card.json").write_bytes(text)
        try:
            loaded = synthetic_set.load(tmp_path)
            pixels = loaded.pixels()
        except UserError:
            return False
        assert pixels.dtype == torch.uint8
        assert pixels.shape == loaded.images.shape
        assert int(loaded.labels.max()) < len(loaded.class_names)
        return True

    mutating.run("synthetic", 0.04, seeds, attempt, [lambda data, chance: broken_text(data, chance)] * 6)


def broken_text(data: bytes, chance: random.Random) -> bytes:
    """The card alone, some value of it replaced."""
    held, _, text = data.rpartition(b"\n\n")
    values = (b"null", b"[]", b"-1", b"1e999", b'"x"', b"{}", b"[0.0]", b"99999999999999999999", b"NaN", b"[[[[]]]]")
    for old in chance.sample((b'["a", "b"]', b"[0.5]", b"[0.25]", b"{}", b'"images"', b'"a"'), 2):
        text = text.replace(old, chance.choice(values), 1)
    return held + b"\n\n" + text


def test_broken_state_dicts_are_refused_or_finite_and_no_larger_than_their_file(tmp_path: Path):
    path, buffer, old = tmp_path / "w.pt", io.BytesIO(), io.BytesIO()
    state = {"conv.weight": torch.ones(4, 3), "conv.bias": torch.zeros(4), "count": torch.tensor(3)}
    torch.save(state, buffer)
    torch.save({"state_dict": state}, old, _use_new_zipfile_serialization=False)

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            loaded, _ = pretrained._read(path)
        except UserError:
            return False
        assert all(torch.isfinite(value).all() for value in loaded.values() if value.is_floating_point())
        assert sum(value.numel() * value.element_size() for value in loaded.values()) <= pretrained.MAX_EXPANSION * len(
            data
        )
        return True

    mutating.run("states", 0.04, [buffer.getvalue(), old.getvalue()], attempt, [])


def test_broken_pickles_yield_plain_data_alone():
    batch = {
        "data": np.arange(12, dtype=np.uint8).reshape(3, 4),
        "labels": [0, 1, 2],
        "names": ["a", b"b", (1.5, None)],
    }
    seeds = [pickle.dumps(batch, protocol) for protocol in (2, 4, 5)]

    def attempt(data: bytes) -> bool:
        try:
            loaded = safe_pickle.load(data)
        except Exception:  # a damaged pickle raises nearly anything; the source turns it into a UserError
            return False
        check_plain(loaded)
        return True

    mutating.run("pickles", 0.05, seeds, attempt, [])


def check_plain(value: object) -> None:
    assert type(value) in PLAIN
    for inner in (
        [*value.keys(), *value.values()]
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    ):
        check_plain(inner)
    assert not isinstance(value, np.ndarray) or value.dtype != object
