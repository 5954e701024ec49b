"""Broken configurations and records of another run: accepted ones are whole, and no record reaches out of its folder."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import mutating

from distill_at_scale.config import load as configuration
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.stage_record import StageInputs

TEXT = b"""run: {dir: runs/x, seed: 3}
data:
  source: parquet
  path: data/x
  classes: [cat, "dog", 'cow']
  holdout: 0.2
score: &score {criterion: loss, trials: 2, epochs: 2, lr: 1e-3}
select: {keep: 0.1, criterion: {loss: 0.7, el2n: 0.3}}
distill: {method: dm, ipc: 1}
"""
WORDS = (
    *(
        b"&a ",
        b"*a",
        b"*score",
        b"[",
        b"]",
        b"{",
        b"}",
        b": ",
        b"- ",
        b"!!python/object:os.system ",
        b"!!binary x",
        b".inf",
    ),
    *(b"9" * 5000, b"0x" + b"f" * 5000, b"2026-99-99", b"null", b"\t", b"\xff", b"<<: *score\n", b"? ", b"[" * 2000),
    b"&a [*a, *a, *a]",
)
OUTSIDE = ("../x", "/etc/hostname", "stages/distill.json", ".work/x", "", ".", "a/../../x", "prepared/\0", "prepared/a")


def worded(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice(WORDS) + data[at:]


def lined(data: bytes, chance: random.Random) -> bytes:
    return b"\n".join(mutating.shuffled(data.split(b"\n"), chance))


def test_broken_configurations_are_refused_or_whole(tmp_path: Path):
    path = tmp_path / "c.yaml"

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            loaded = configuration.load(path)
        except UserError:
            return False
        assert configuration.validate(loaded.model_dump()) == loaded
        assert isinstance(loaded, Config)
        return True

    mutating.run("configs", 0.05, [TEXT], attempt, [worded, worded, lined])


def test_no_broken_record_reads_files_outside_its_run(tmp_path: Path):
    inputs = StageInputs({"a": 1}, {"b": "c"})
    other = RunDir(tmp_path / "other")
    other.create()
    (other / "prepared").mkdir()
    (other / "prepared" / "a").write_bytes(b"12345")
    (tmp_path / "x").write_bytes(b"12345")
    other.complete("ingest", inputs, [other / "prepared"], 1.0)
    record = (other / "stages" / "ingest.json").read_bytes()

    def renamed(data: bytes, chance: random.Random) -> bytes:
        return data.replace(b'"prepared/a"', json.dumps(chance.choice(OUTSIDE)).encode(), 1)

    def attempt(data: bytes) -> bool:
        attempt.count += 1
        run = RunDir(tmp_path / f"run{attempt.count}", reuse=other.path)
        run.create()
        (other / "stages" / "ingest.json").write_bytes(data)
        try:
            taken = run.take_over("ingest", inputs)
        except UserError:
            taken = False
        there = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}
        assert there <= {"stages/ingest.json", "prepared/a"} if taken else not there, there
        assert not any(os.path.islink(run / name) for name in there)
        return taken

    attempt.count = 0
    mutating.run("records", 0.03, [record], attempt, [renamed] * 6)
