"""A source of the user's own: the documented example, and samples for which its `read` fails."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from distill_at_scale.cli import main
from distill_at_scale.config import load as config
from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.data.codecs.image import ImageDecoder
from distill_at_scale.data.ingest.chunks import Recipe, check_read, ingest_chunk, rejected_path
from distill_at_scale.data.ingest.plan import plan
from distill_at_scale.data.ingest.sample_types import TensorDecoder
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.sources.base import listing

README = Path(__file__).parents[2] / "distill_at_scale" / "data" / "README.md"
SETTINGS = {
    "run": {"dir": "out"}, "cluster": {"address": "none"},
    "data": {"source": "mine.source:Arrays", "path": "photos", "size": 8, "channels": 1},
}  # fmt: skip


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The example of data/README.md in its own folder, with ten pictures per class and split."""
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S) if "mine/source" in block
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "source.py").write_text(code, encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    chance = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for k in range(10):
                np.save(folder / f"{k}.npy", chance.integers(0, 256, (8, 8), np.uint8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name == "mine" or name.startswith("mine.")]:
        del sys.modules[name]


def broken(table) -> dict[str, str]:
    return {row["sample_id"]: row["reason"] for row in pq.read_table(table).to_pylist() if not row["used"]}


@pytest.mark.parametrize(("command", "table"), [("validate", "validation"), ("ingest", "rejected")])
def test_the_documented_source_sets_a_broken_file_aside_with_its_reason(example, command, table):
    (example / "photos/train/cat/3.npy").write_bytes(b"")
    np.save(example / "photos/train/dog/4.npy", np.zeros((3, 8, 8), np.float32))
    assert main([command, "mine.yaml"]) == (1 if command == "validate" else 0)
    line = 1 + (example / "mine/source.py").read_text(encoding="utf-8").splitlines().index(
        "        return [np.load(io.BytesIO(raw)) for raw in super().read(rows)]"
    )
    assert broken(example / "out" / f"{table}.parquet") == {
        "train/cat/3.npy": f"read of mine.source:Arrays failed: EOFError: No data left in file (mine.source, line {line})",
        "train/dog/4.npy": "an array of float32 [3, 8, 8]; the pixels of an image are uint8 [H, W], [H, W, 1] or [H, W, 3]",
    }


@pytest.mark.parametrize("command", ["validate", "ingest"])
def test_a_source_that_fails_for_every_sample_stops_the_command_with_the_line_of_its_code(example, command, capsys):
    code = (example / "mine/source.py").read_text(encoding="utf-8").replace("np.load(io", "np.laod(io")
    (example / "mine/source.py").write_text(code, encoding="utf-8")
    assert main([command, "mine.yaml"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "mine.source:Arrays gives no usable sample: all 8 that were tried failed" in message
    assert "AttributeError: module 'numpy' has no attribute 'laod'" in message
    assert f"(mine.source, line {1 + code[: code.index('laod')].count(chr(10))})" in message


def test_a_source_has_its_own_settings_and_they_decide_what_is_ingested(example, capsys):
    code = (example / "mine/source.py").read_text(encoding="utf-8")
    code = code.replace("[np.load(io.BytesIO(raw))", "[np.load(io.BytesIO(raw)) // self.by")
    code = code.replace("        self.files =", "        self.by = data.options['by']\n        self.files =")
    (example / "mine/source.py").write_text(code, encoding="utf-8")
    assert main(["ingest", "mine.yaml", "data.options={by: 4}"]) == 0
    pixels, _ = PreparedDataset(example / "out" / "prepared").load("train")
    assert pixels.max() < 64
    assert main(["ingest", "mine.yaml", "data.options={by: 4}"]) == 0
    assert "already done" in capsys.readouterr().out
    assert main(["ingest", "mine.yaml", "data.options={by: 2}"]) == 2


class Reading:
    """A source of five samples whose `read` returns or raises what `behave` says of a row number."""

    def __init__(self, behave):
        self.behave = behave

    def read(self, rows):
        return self.behave(rows["row"].to_pylist())


def reasons(tmp_path, behave, decoder=None) -> list[str]:
    """The reasons of five samples, "" for a usable one."""
    source, recipe = Reading(behave), Recipe(decoder or ImageDecoder(4, 1), None)
    names = [str(i) for i in range(5)]
    rows = listing(names, [0] * 5, names, range(5))
    ingest_chunk(source, recipe, rows, tmp_path / "part.arrow")
    listed = {
        row["sample_id"]: row["reason"] for row in pq.read_table(rejected_path(tmp_path / "part.arrow")).to_pylist()
    }
    return [listed.get(name, "") for name in names]


def each(one):
    return lambda rows: [one(i) for i in rows]


GOOD = np.zeros((4, 4), np.uint8)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (None, "returned NoneType; it must return bytes"),
        ([[0] * 4] * 4, "returned list; it must return bytes"),
        (np.zeros((4, 4, 2), np.uint8), "an array of uint8 [4, 4, 2]; the pixels of an image are"),
        (np.zeros((4, 4)), "an array of float64 [4, 4]; the pixels of an image are"),
        (np.zeros((0, 4), np.uint8), "an array of uint8 [0, 4]; the pixels of an image are"),
    ],
)  # fmt: skip
def test_an_item_of_a_wrong_type_or_shape_is_rejected_alone(tmp_path, item, reason):
    told = reasons(tmp_path, each(lambda i: item if i == 2 else GOOD))
    assert [bool(text) for text in told] == [False, False, True, False, False]
    assert reason in told[2]


def test_a_read_that_loses_an_item_of_a_batch_is_asked_for_each_sample(tmp_path):
    told = reasons(tmp_path, lambda rows: [GOOD for i in rows if i != 3])
    assert told[3].endswith("returned 0 items, not 1; it must return one item for each row")
    assert [bool(text) for text in told] == [False, False, False, True, False]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [4, 6])
def test_arrays_of_the_documented_shapes_are_read(tmp_path, channels, side):
    shapes = [(side, side), (side, side, 1), (side, side, 3), (side, side, 4), (side, side + 1)]
    assert reasons(tmp_path, each(lambda i: np.zeros(shapes[i], np.uint8)), ImageDecoder(4, channels)) == [""] * 5


def raising(error):
    def one(i):
        if i == 1:
            raise error
        return GOOD

    return each(one)


@pytest.mark.parametrize(
    "error",
    [ValueError("odd"), RuntimeError("odd"), OSError("image file is odd"), AssertionError("odd"), KeyError("odd")],
)
def test_whatever_read_raises_for_one_sample_rejects_this_sample(tmp_path, error):
    told = reasons(tmp_path, raising(error))
    assert re.fullmatch(
        rf"read of \S*test_own_source:Reading failed: {type(error).__name__}: .*odd.* \(\S*test_own_source, line \d+\)",
        told[1],
    )
    assert told[:1] + told[2:] == [""] * 4


@pytest.mark.parametrize(
    "error",
    [
        UserError("a wrong layout"), Unreachable("no bucket"), MemoryError(), OSError(errno.EIO, "Input/output error"),
        ConnectionResetError("reset"), TimeoutError("late"), OSError("AWS Error SLOW_DOWN during GetObject operation"),
    ],
)  # fmt: skip
def test_errors_that_concern_more_than_one_sample_stop_the_ingest(tmp_path, error):
    with pytest.raises(type(error)):
        reasons(tmp_path, raising(error))
    assert not (tmp_path / "part.arrow").exists()


def test_a_few_readable_samples_are_enough_to_start(tmp_path):
    names = [str(i) for i in range(100)]
    rows = listing(names, [0] * 100, names, range(100))
    recipe = Recipe(TensorDecoder((4, 4)), None)
    check_read(Reading(each(lambda i: GOOD if i == 99 else None)), recipe, rows)
    with pytest.raises(
        UserError, match=r"all 8 that were tried failed, the first of them '0' \(location '0'\): its shape"
    ):
        check_read(Reading(each(lambda i: GOOD[:2])), recipe, rows)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("def __init__(self): pass", "cannot be called with the section `data`"),
        ("class_names = None", "class_names of own:Own must be a list of texts"),
        ("class_names = [0, 1]", "class_names of own:Own must be a list of texts"),
        ("def splits(self): return None", "splits of own:Own must return"),
        ("def splits(self): return ['train', 'val']", "splits of own:Own must return"),
        ("def listing(self, split): return None", "listing of own:Own must return"),
        (
            "def listing(self, split): return listing(['x'], [2], ['x'], [0])",
            "has the label 2, but class_names has 2 classes",
        ),
    ],
)
def test_what_breaks_the_contract_is_named(tmp_path, monkeypatch, member, message):
    code = f"""
from distill_at_scale.data.sources.base import listing
class Own:
    class_names = ["a", "b"]
    def __init__(self, data): pass
    def splits(self): return ["train"]
    def listing(self, split): return listing(["x", "y"], [0, 1], ["x", "y"], [0, 0])
    def digest(self, split): return ""
    def read(self, rows): return [np.zeros((8, 8, 3), np.uint8) for _ in range(rows.num_rows)]
    {member}
"""
    (tmp_path / "own.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    with pytest.raises(UserError, match=re.escape(message)):
        plan(config.load({"data.source": "own:Own"}))
    monkeypatch.delitem(sys.modules, "own", raising=False)
