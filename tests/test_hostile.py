"""Malicious files: each is refused with an error message before it costs memory or time, and no code runs."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_prepared
from PIL import Image
from rich.console import Console

from distill_at_scale.config import load as configuration
from distill_at_scale.config.sections import DataSection
from distill_at_scale.core import safetensors_io
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.data.archives.gunzip import Bomb, gunzip
from distill_at_scale.data.codecs.image import MAX_SCANS, ImageDecoder, SampleRejected
from distill_at_scale.data.codecs.worker_process import IsolatedFunction
from distill_at_scale.data.prepared.dataset import PreparedDataset
from distill_at_scale.data.sources.image.hf_parquet import HuggingFaceParquet
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.distillation.soft_labels import Teacher, TeacherFacts
from distill_at_scale.models import pretrained
from distill_at_scale.pruning.scoring import imported
from distill_at_scale.storage.run_dir import RunDir
from distill_at_scale.storage.stage_record import StageInputs

CPU = torch.device("cpu")
RAN: list[object] = []


def hostile_network(spec: object) -> torch.nn.Module:
    RAN.append(spec)
    return torch.nn.Linear(2, 2)


FACTS = TeacherFacts(f"{__name__}:hostile_network", (1, 2, 2), 2, 4, None, (1.0,), (0.0,))


def test_code_that_an_artefact_names_is_not_run(tmp_path):
    path = tmp_path / "teacher.safetensors"
    Teacher(FACTS, torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(UserError, match=r"custom code \('test_hostile:hostile_network'\)"):
        Teacher.load(path, CPU)
    assert not RAN
    Teacher.load(path, CPU, FACTS.network)  # the configuration names it
    assert len(RAN) == 1
    with pytest.raises(UserError, match="custom code"):
        replace(FACTS, network=f"frame:{FACTS.network}").trusted("convnet")


def test_names_of_our_own_networks_need_no_trust():
    for name in ("convnet_bn", "torchvision:resnet18", "frame:resnet18", "frame:torchvision:resnet18"):
        assert replace(FACTS, network=name).trusted(None).network == name


LAUGHS = [f"{name}: &{name} [{', '.join(['*' + before] * 10)}]" for before, name in pairwise("abcdefgh")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n".join(["a: &a [1, 2]", *LAUGHS]), "values with its aliases"),
        ("run: &a {dir: *a}", "values with its aliases"),
        ("[" * 5000, "not valid YAML"),
        ("run: {seed: " + "9" * 5000 + "}", "not valid YAML"),
        ("# " + "x" * 2**20, "no configuration"),
    ],
)
def test_bombs_of_yaml_are_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        configuration.load(tmp_path / "c.yaml")


def test_gzip_stops_at_its_limit():
    packed = gzip.compress(bytes(10**6))
    assert gunzip(packed, 10**6) == bytes(10**6)
    assert gunzip(packed + packed, 2 * 10**6) == bytes(2 * 10**6)
    with pytest.raises(Bomb, match="more than 999,999 bytes"):
        gunzip(packed, 10**6 - 1)
    with pytest.raises(EOFError):
        gunzip(packed[:-4], 10**6)


def test_a_jpeg_of_scans_without_end_is_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(
        buffer, "JPEG", progressive=True
    )
    whole = buffer.getvalue()
    last = whole.rindex(b"\xff\xda")
    ImageDecoder(8)(whole)
    with pytest.raises(SampleRejected, match=f"scans, more than {MAX_SCANS}"):
        ImageDecoder(8)(whole[:-2] + whole[last:-2] * MAX_SCANS + whole[-2:])


def data_set(folder: Path, image: pa.Array, labels: np.ndarray, **limits: int) -> HuggingFaceParquet:
    pq.write_table(pa.table({"image": image, "label": labels}), folder / "train-0.parquet")
    return HuggingFaceParquet(DataSection(source="parquet", path=str(folder), **limits))


def test_a_parquet_value_that_is_repeated_without_end_is_refused(tmp_path):
    image = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), pa.array([bytes(5_000)])).cast(
        pa.binary()
    )
    source = data_set(tmp_path, image, np.zeros(2000, np.int64), max_bytes=10_000)
    assert (tmp_path / "train-0.parquet").stat().st_size < 10_000
    rows = source.listing("train")
    with pytest.raises(UserError, match="unpacks to more than 160,000 bytes"):
        source.read(rows)


def test_a_parquet_file_of_more_rows_than_it_can_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"claims 1,000,000 rows in .* bytes"):
        data_set(tmp_path, pa.nulls(10**6, pa.binary()), np.zeros(10**6, np.int64))


def test_a_parquet_file_whose_columns_are_shorter_than_it_says_is_refused(tmp_path):
    source = data_set(tmp_path, pa.array([b"a"] * 8), np.zeros(8, np.int64))
    rows, file = source.listing("train"), tmp_path / "train-0.parquet"
    data = file.read_bytes()
    size = int.from_bytes(data[-8:-4], "little") + 8
    footer = data[-size:].replace(
        b"\x26\0\x1c", b"\x26\0\x3c", 1
    )  # the first column's own facts under an unknown number
    assert footer != data[-size:]
    file.write_bytes(data[:-size] + footer)
    with pytest.raises(UserError, match=r"holds 0 rows, not the 8 it claims; download it again"):
        source.read(rows)


def test_a_prepared_shard_of_another_shape_or_type_is_refused(tmp_path):
    prepared = write_prepared(tmp_path, np.zeros((4, 1, 2, 2), np.uint8), np.zeros(4, np.int64))
    (shard,) = (tmp_path / "train").glob("*")
    whole = pq.read_table(shard)
    for about in ({"shape": "[4]"}, {"shape": "[1, 2, 2]", "dtype": "O"}, {"shape": "[1, 2, 9223372036854775807]"}, {}):
        field = whole.schema.field(2).with_metadata(about)
        pq.write_table(whole.cast(pa.schema([*list(whole.schema)[:2], field])), shard)
        with pytest.raises(UserError, match="ingest again"):
            PreparedDataset(tmp_path).load("train")
    meta = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    for wrong in ({"shape": [10**9, 10**9]}, {"shape": ["1"]}, {"class_names": [1]}, {"counts": []},
                  {"counts": {"train": [4, 0]}}, {"counts": {"train": [-4]}}, {"counts": {"train": ["4"]}},
                  {"chunk": 0}, {"chunk": 2**40}, {"mean": ["0"]}, {"std": [float("nan")]}):  # fmt: skip
        (tmp_path / "dataset.json").write_text(json.dumps(meta | wrong), encoding="utf-8")
        with pytest.raises(UserError, match="damaged"):
            PreparedDataset(tmp_path)
    assert prepared.shape == (1, 2, 2)


def test_weights_that_claim_more_than_their_file_holds_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**10)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"claims 40,000,000,000 bytes of weights and has"):
        pretrained._read(tmp_path / "w.pt")


def test_a_packed_archive_of_weights_is_refused(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as whole,
        zipfile.ZipFile(tmp_path / "p.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(UserError, match="compressed zip archive"):
        pretrained._read(tmp_path / "p.pt")


@pytest.mark.parametrize("kind", ["npz", "json", "npy"])
def test_scores_that_are_bombs_or_pickles_are_refused(tmp_path, monkeypatch, kind):
    path = tmp_path / f"s.{kind}"
    if kind == "npz":
        monkeypatch.setattr(imported, "MAX_UNPACKED", 10**5)
        np.savez_compressed(path, np.zeros(10**6))
    elif kind == "json":
        path.write_text("[" * 10**5, encoding="utf-8")
    else:
        np.save(path, np.array([print], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"unpacks to|cannot be read"):
        imported.read("a", str(path))


@pytest.mark.parametrize("name", ["stages/distill.json", "../x", ".work/x", "/x", "a/../../x"])
def test_a_record_of_another_run_brings_in_artefacts_alone(tmp_path, name):
    inputs, other = StageInputs({"a": 1}, {}), RunDir(tmp_path / "other")
    other.create()
    (other / "a").write_text("1", encoding="utf-8")
    other.complete("ingest", inputs, [other / "a"], 1.0)
    path = other / "stages" / "ingest.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(record | {"outputs": {name: record["outputs"]["a"]}}), encoding="utf-8")
    run = RunDir(tmp_path / "run", reuse=other.path)
    run.create()
    with pytest.raises(UserError, match="outside its folder or not an artefact"):
        run.take_over("ingest", inputs)
    path.write_text('{"fingerprint": 3}', encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        run.take_over("ingest", inputs)


def test_a_link_of_another_run_is_not_taken_over_as_a_link(tmp_path):
    inputs, other = StageInputs({"a": 1}, {}), RunDir(tmp_path / "other")
    other.create()
    (tmp_path / "elsewhere").write_text("1", encoding="utf-8")
    (other / "a").symlink_to(tmp_path / "elsewhere")
    other.complete("ingest", inputs, [other / "a"], 1.0)
    run = RunDir(tmp_path / "run", reuse=other.path)
    run.create()
    assert run.take_over("ingest", inputs)
    assert not os.path.islink(run / "a")
    assert (run / "a").read_text(encoding="utf-8") == "1"


def test_what_steers_a_terminal_is_written_out():
    output = io.StringIO()
    Display(Console(file=output, width=200)).say("a\x1b[2Jb\x07\u202ec\nd\udcff")
    assert output.getvalue() == "a\\x1b[2Jb\\x07\\u202ec\nd\\udcff\n"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"class_names": "ab"}, "class_names"),
        ({"normalization": {"mean": [0.5], "std": [0.0]}}, "std above 0"),
        ({"normalization": {"mean": [float("nan")], "std": [1.0]}}, "finite"),
        ({"class_names": ["a"]}, "outside 0..0"),
    ],
)
def test_a_synthetic_set_whose_parts_disagree_is_refused(tmp_path, wrong, message):
    card = {"class_names": ["a", "b"], "normalization": {"mean": [0.5], "std": [0.25]}, "protocol": {}}
    safetensors_io.write(
        tmp_path / "synthetic.safetensors", {"images": torch.zeros(2, 1, 2, 2), "labels": torch.tensor([0, 1])}
    )
    (tmp_path / "card.json").write_text(json.dumps(card), encoding="utf-8")
    synthetic_set.load(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps(card | wrong), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        synthetic_set.load(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits are those of Linux")
def test_the_decoders_process_writes_no_file_and_gains_no_rights(tmp_path):
    child = IsolatedFunction("hostile_child:tries_to_write")
    answer, _ = child.call({"path": str(tmp_path / "x")}, b"", 60)
    child.close()
    assert answer == {"outcome": "File too large", "no_new_privileges": "1"}


def test_a_pickle_in_a_place_of_weights_is_not_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return RAN.append, ("ran",)

    for content in (pickle.dumps(Runs()), pickle.dumps({"state_dict": Runs()}, 2)):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(UserError, match="cannot be loaded safely"):
            pretrained._read(tmp_path / "w.pt")
    assert "ran" not in RAN
