"""Run folders on `gs://`, against an emulator on this machine; more of it is in `test_object_storage.py`, on S3."""

from __future__ import annotations

import io
import json
import urllib.request
import uuid
from urllib.parse import urlencode

import pyarrow.fs
import pytest
from conftest import Run, tiny_config
from rich.console import Console
from storage_cases import artefact_digests

from distill_at_scale.core.errors import UserError
from distill_at_scale.core.progress import Display
from distill_at_scale.distillation import synthetic_set
from distill_at_scale.experiments.runners import LocalRunner
from distill_at_scale.experiments.sweep import run as sweeping
from distill_at_scale.storage import lock as lease
from distill_at_scale.storage.filesystem import child_address

pytestmark = pytest.mark.usefixtures("no_pauses")

SWEEP = {"space": {"select.keep": [0.1, 0.3]}, "controls": []}


@pytest.fixture(scope="module")
def server():
    """HOST:PORT of an emulator that holds its objects in memory."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with emulator.create_server("127.0.0.1", 0, in_memory=True) as running:
        host, port = running._api._httpd.server_address
        yield f"{host}:{port}"


@pytest.fixture
def folder(server):
    """The address of a run folder in an empty bucket."""
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    request = json.dumps({"name": bucket}).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"http://{server}/storage/v1/b?project=p", request, headers))
    return address(server, bucket)


def address(server, bucket):
    options = {"scheme": "http", "endpoint_override": server, "retry_limit_seconds": "10"}
    return f"gs://anonymous@{bucket}/run?{urlencode(options)}"


@pytest.fixture
def remote(folder, tmp_path):
    """remote("a"): a configuration with this run folder, from machine "a"."""

    def make(machine="a", **overrides):
        own = {"run__scratch": str(tmp_path / machine), "run__retry_seconds": 0.0, **overrides}
        return tiny_config(folder, **own)

    return make


def objects(folder):
    """Content by name, without what stands for empty folders."""
    system, path = pyarrow.fs.FileSystem.from_uri(folder)
    stored = system.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    files = [one.path for one in stored if one.type == pyarrow.fs.FileType.File]
    return {name.removeprefix(f"{path}/"): system.open_input_stream(name).read() for name in files}


def test_a_run_by_two_machines_has_the_bytes_of_a_run_on_disk(remote, folder, local_digests):
    Run(remote()).stages("ingest", "score")
    other = Run(remote("b"))
    other.pipeline.run()
    assert "score: already done" in other.text
    stored = objects(folder)
    assert artefact_digests(stored) == local_digests
    assert {"report.html", "metrics.jsonl", "run.json"} <= set(stored)
    assert not [name for name in stored if name.startswith(".work") or name == ".lease.json"]
    assert len(synthetic_set.load(folder).labels) == 3


def test_an_output_that_was_cut_short_is_refused(remote, folder):
    Run(remote()).stages("ingest", "score")
    system, path = pyarrow.fs.FileSystem.from_uri(child_address(folder, "scores.parquet"))
    expected = system.open_input_stream(path).read()
    with system.open_output_stream(path) as out:
        out.write(expected[:-1])
    with pytest.raises(UserError, match=r"/run/scores\.parquet is missing; to move it to replaced/"):
        Run(remote("b")).stages("select")


def test_a_missing_bucket_is_one_error_at_once(server, tmp_path):
    config = tiny_config(address(server, "nowhere"), run__scratch=str(tmp_path), run__retry_seconds=60.0)
    run = Run(config)
    with pytest.raises(
        UserError, match=r"^run\.dir = 'gs://nowhere/run.*there is no bucket nowhere\. Check the address"
    ):
        run.stages("ingest")
    assert "it is tried again" not in run.text


def test_a_second_command_is_refused(remote, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "LOOK", 0.1)
    first, second = (Run(remote(machine)).pipeline.dir for machine in "ab")
    first.create()
    second.create()
    with first.lock(), pytest.raises(UserError, match=r"process \d+ on .* is working in gs://bucket-\w+/run"):
        second.lock().__enter__()
    with second.lock():
        pass


def sweep(config):
    log = io.StringIO()
    table = sweeping.run(config, Display(Console(file=log, width=300)), LocalRunner)
    rows = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in table.to_pylist()]
    return rows, log.getvalue()


def test_a_sweep_has_the_table_of_one_on_a_disk_and_another_machine_reads_it(remote, folder, tmp_path):
    table, _ = sweep(remote(sweep=SWEEP, runtime__rule="none"))
    expected, _ = sweep(tiny_config(tmp_path / "disk", sweep=SWEEP, runtime__rule="none"))
    assert table == expected
    there = objects(folder)
    assert {"sweep.parquet", "sweep.html"} <= set(there)
    assert len([name for name in there if name.endswith("scores.parquet")]) == 1, "scores lie there more than once"
    again, log = sweep(remote("b", sweep=SWEEP, runtime__rule="none"))
    assert again == table
    assert "2 trials, 2 of them finished before" in log
