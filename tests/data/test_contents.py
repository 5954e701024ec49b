"""Data that changed after it was ingested, though all names and sizes are the same."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run, tiny_config
from PIL import Image

from distill_at_scale.core.errors import UserError
from distill_at_scale.data.ingest import contents
from distill_at_scale.data.ingest import plan as ingest
from distill_at_scale.data.ingest.chunks import content_hash
from distill_at_scale.pipeline.executors import tasks

CHANGED = "has another content than when it was ingested, though name and size are the same"


def bmp(level: int) -> bytes:
    """A flat grey picture; all have the same size."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), level, np.uint8)).save(buffer, "BMP")
    return buffer.getvalue()


def write_folder(root: Path, levels=range(8)) -> Path:
    for i, level in enumerate(levels):
        path = root / "train" / "ab"[i % 2] / f"{i}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bmp(level))
    return root


def write_tar(root: Path, levels=range(8)) -> Path:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / "train-0.tar", "w") as archive:
        for i, level in enumerate(levels):
            for name, content in ((f"{i}.bmp", bmp(level)), (f"{i}.cls", str(i % 2).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return root


def write_parquet(root: Path, levels=range(8)) -> Path:
    root.mkdir(exist_ok=True)
    rows = [{"bytes": bmp(level), "path": f"{i}.bmp"} for i, level in enumerate(levels)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": [i % 2 for i in range(len(rows))]})
    pq.write_table(table, root / "train.parquet", compression="none", use_dictionary=False, write_statistics=False)
    return root


WRITERS = {"imagefolder": write_folder, "webdataset": write_tar, "parquet": write_parquet}


def run_of(tmp_path: Path, data: Path, source: str = "imagefolder", name: str = "run", **keys) -> Run:
    return Run(tiny_config(tmp_path / name, data={"source": source, "path": str(data), "size": 8, "chunk": 3, **keys}))


def set_times(root: Path, seconds: int) -> None:
    for path in root.rglob("*"):
        os.utime(path, (seconds, seconds))


@pytest.mark.parametrize("source", WRITERS)
def test_changed_contents_under_the_same_names_and_sizes_are_an_error(tmp_path, source):
    data = WRITERS[source](tmp_path / "data")
    run_of(tmp_path, data, source).stages("ingest")
    shards = (tmp_path / "run" / "prepared" / "train" / "shard-00000.parquet").read_bytes()
    set_times(
        WRITERS[source](data, [*range(4), 99, *range(5, 8)]), 1_000_000_000
    )  # older than the ingest, as after rsync -t
    with pytest.raises(UserError, match=rf"(?s){CHANGED} \(1 of 8 compared samples differ\)\..Nothing was changed"):
        run_of(tmp_path, data, source).stages("ingest")
    assert (tmp_path / "run" / "prepared" / "train" / "shard-00000.parquet").read_bytes() == shards
    redo = run_of(tmp_path, data, source)
    redo.pipeline.dir.redo = "ingest"  # what the message advises
    text = redo.stages("ingest").text
    assert "ingest: the output here is of another configuration or other data and was moved to" in text
    assert "ingest: finished" in text
    assert (tmp_path / "run" / "prepared" / "train" / "shard-00000.parquet").read_bytes() != shards


@pytest.mark.parametrize("source", WRITERS)
def test_a_copy_with_other_times_is_the_same_data(tmp_path, source):
    data = WRITERS[source](tmp_path / "data")
    run_of(tmp_path, data, source).stages("ingest")
    assert "another time" not in run_of(tmp_path, data, source).stages("ingest").text
    shutil.copytree(data, tmp_path / "copy")
    set_times(tmp_path / "copy", 1_000_000_000)
    text = run_of(tmp_path, tmp_path / "copy", source).stages("ingest").text
    assert "ingest: already done for this configuration" in text
    assert "8 samples lie in files with another time of change; 8 were compared: unchanged" in text
    fresh = run_of(tmp_path, tmp_path / "copy", source, "fresh").stages(
        "ingest"
    )  # times are no part of its fingerprint
    records = [run_of(tmp_path, data, source, name).pipeline.dir.record("ingest") for name in ("run", "fresh")]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    assert records[0]["output"] == records[1]["output"]
    assert fresh.pipeline.dir.content("ingest") == records[0]["output"]


def test_a_single_changed_file_among_many_is_found_by_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "COMPARED", 2)
    data = write_folder(tmp_path / "data", range(40))
    run_of(tmp_path, data).stages("ingest")
    (data / "train" / "b" / "7.bmp").write_bytes(bmp(200))
    with pytest.raises(UserError, match=r"train/b/7\.bmp has another content .* \(1 of 1 compared samples"):
        run_of(tmp_path, data).stages("ingest")


def test_validate_compares_all_contents_where_asked(tmp_path):
    data = write_folder(tmp_path / "data")
    with pytest.raises(
        UserError, match=r"run holds no ingest of this configuration and data, with which --contents compares"
    ):
        run_of(tmp_path, data).pipeline.validate(compare=True)
    run_of(tmp_path, data).stages("ingest")
    run = run_of(tmp_path, data)
    assert run.pipeline.validate(compare=True) == 0
    assert "the contents of all 8 samples are those that were ingested" in run.text
    path = data / "train" / "a" / "4.bmp"
    status = path.stat()
    path.write_bytes(bmp(99))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the time tells nothing
    run_of(tmp_path, data).stages("ingest")
    with pytest.raises(UserError, match=rf"train/a/4\.bmp {CHANGED} \(1 of 8 compared"):
        run_of(tmp_path, data).pipeline.validate(compare=True)


def test_a_run_folder_of_an_earlier_version_says_that_nothing_was_compared(tmp_path):
    data = write_folder(tmp_path / "data")
    run = run_of(tmp_path, data).stages("ingest")
    (run.dir / "contents.parquet").unlink()
    record = run.pipeline.dir.record("ingest")
    del record["outputs"]["contents.parquet"]
    run.pipeline.dir._publish("ingest", record)
    text = run_of(tmp_path, data).stages("ingest").text
    assert "already done" in text
    assert "contents were not compared: this ingest is of an earlier version" in text


def test_an_ingest_of_other_data_is_not_taken_over(tmp_path):
    data = write_folder(tmp_path / "data")
    run_of(tmp_path, data).stages("ingest")
    config = tiny_config(tmp_path / "second", data={"source": "imagefolder", "path": str(data), "size": 8, "chunk": 3})
    reusing = config.model_copy(update={"run": config.run.model_copy(update={"reuse": str(tmp_path / "run")})})
    assert "ingest: taken over from" in Run(reusing).stages("ingest").text
    (tmp_path / "second" / "stages" / "ingest.json").unlink()
    write_folder(data, range(100, 108))
    text = Run(reusing).stages("ingest").text
    assert "ingest: not taken over from" in text
    assert CHANGED in " ".join(text.split())
    assert "ingest: finished" in text


@pytest.mark.parametrize("check", [False, True])
def test_an_interrupted_ingest_reads_changed_files_again_and_keeps_untouched_work(tmp_path, monkeypatch, check):
    data = write_folder(tmp_path / "data", range(12))  # four chunks of three

    def stop_after_two(executor, config, plan, parts, advance, check=False):
        source, recipe = ingest.open_source(config.data), tasks.ingest_chunks.recipe_of(config)
        for split, index, rows in plan.chunks(3)[:2]:
            tasks.ingest_chunks.ingest_chunk(
                source, recipe, rows, tasks.ingest_chunks.part_path(parts, split, index), None, check
            )
        raise KeyboardInterrupt

    def start() -> Run:
        run = run_of(tmp_path, data)
        run.pipeline.validate() if check else run.stages("ingest")
        return run

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "ingest", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            start()
        set_times(data, 1_000_000_000)  # copied: the same content
        with pytest.raises(KeyboardInterrupt):
            start()
    (data / "train" / "a" / "2.bmp").write_bytes(bmp(250))
    run = start()
    assert "files changed since this was interrupted; chunks to read again: 1" in run.text
    if not check:
        levels = {table["sample_id"][0]: table["pixels"][0][0] for table in shards_of(run)}
        assert levels["train/a/2.bmp"] == 250


def shards_of(run: Run):
    table = pq.read_table(run.dir / "prepared" / "train")
    return [table.slice(i, 1).to_pydict() for i in range(table.num_rows)]


def test_hashes_are_of_what_was_read(tmp_path):
    data = write_folder(tmp_path / "data", range(4))
    (data / "train" / "a" / "2.bmp").write_bytes(b"BM but no picture")
    (data / "train" / "b" / "3.bmp").write_bytes(bmp(3) + bytes(3000))
    run = run_of(tmp_path, data, max_bytes=2000).stages("ingest")
    hashes = pq.read_table(run.dir / "contents.parquet")["hash"].to_pylist()
    assert hashes == [content_hash(bmp(0)), content_hash(b"BM but no picture"), content_hash(bmp(1)), None]
    assert content_hash(np.arange(3)) != content_hash(np.arange(3) + 1)
    assert "2 of 4 samples were rejected" in run.text  # the reasons follow
    assert "train/a/2.bmp: damaged: " in run.text
    assert "more than data.max_bytes = 2,000; raise it" in run.text


def test_the_time_of_a_set_in_a_folder_is_that_of_its_last_modified_file(tmp_path):
    from distill_at_scale.storage.filesystem import Store

    (tmp_path / "a").mkdir()
    for seconds, name in ((100, "x"), (300, "y"), (200, "z")):
        (tmp_path / "a" / name).write_bytes(b"")
        os.utime(tmp_path / "a" / name, (seconds, seconds))
    assert Store(str(tmp_path)).modified(["a", "a/z", "none"]) == [300 * 10**9, 200 * 10**9, -1]
