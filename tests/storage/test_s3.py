"""Every kind of reading against a real S3 server on this machine, and every way in which it can refuse."""

from __future__ import annotations

import http.server
import io
import socket
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.data.archives import tar
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.storage.filesystem import Store

ThreadedMotoServer = pytest.importorskip("moto.server", reason='moto is not here: install ".[test]"').ThreadedMotoServer
PATIENCE = {"connect_timeout": "1", "request_timeout": "1", "attempts": "1"}


def png(level):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def put(root, name, content):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


def folders(root):
    for level in range(12):
        put(root, f"train/{'cat' if level % 3 else 'a dog'}/{level}.png", png(level))
    put(root, "val/cat/v.png", png(99))
    put(root, "train/cat/.hidden.png", b"x")
    put(root, "train/cat/notes.txt", b"x")
    return root


def parquet(root):
    for part in range(3):
        images = [{"bytes": png(10 * part + i), "path": f"{part}-{i}.png"} for i in range(7)]
        table = pa.table({"image": images, "label": [i % 2 for i in range(7)]})
        root.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / f"train-{part}.parquet", row_group_size=3)
    return root


def imagenet(root):
    for wnid in ("n01", "n02"):
        put(root, f"train/{wnid}/{wnid}_1.JPEG", wnid.encode())
    for i in range(4):
        put(root, f"val/ILSVRC2012_val_{i}.JPEG", bytes([i]))
    put(root, "LOC_val_solution.csv", b"ImageId,PredictionString\n" + b"".join(
        f"ILSVRC2012_val_{i},n0{1 + i % 2} 1 2 3 4\n".encode() for i in range(4)))  # fmt: skip
    return root


MAKERS = {"imagefolder": folders, "parquet": parquet, "imagenet": imagenet}


def source(kind, path):
    return SOURCES[kind](DataSection(source=kind, path=str(path)))


@pytest.fixture(scope="module")
def everywhere(s3, tmp_path_factory):
    """Each layout on disk and, in a bucket of the same name, below the prefix deep/set."""
    local = {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MAKERS.items()}
    for kind, folder in local.items():
        s3.upload(folder, f"{kind}-set", "deep/set/")
    return local


@pytest.mark.parametrize("kind", MAKERS)
def test_a_set_on_s3_is_the_set_on_disk(s3, everywhere, kind):
    here, there = source(kind, everywhere[kind]), source(kind, s3(f"{kind}-set/deep/set"))
    assert there.class_names == here.class_names
    assert there.splits() == here.splits()
    for split in here.splits():
        table = there.listing(split)
        assert table.equals(here.listing(split))
        assert there.digest(split) == here.digest(split)
        shuffled = table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows)))
        assert there.read(shuffled) == here.read(shuffled)
    assert all(there.read(there.listing("train")))


def test_a_store_on_s3_lists_and_reads_as_a_local_one(s3, everywhere):
    here, there = Store(str(everywhere["imagefolder"])), Store(s3("imagefolder-set/deep/set"))
    assert there.files() == here.files()
    assert there.names("train") == here.names("train") == (["a dog", "cat"], [])
    file = "train/a dog/0.png"
    assert there.read_range(file, 3, 5) == here.read_range(file, 3, 5) == png(0)[3:8]
    assert (there.size(file), there.size("none")) == (len(png(0)), None)
    assert there.place(file) == "s3://imagefolder-set/deep/set/train/a dog/0.png"


TWO = """
import sys
from distill_at_scale.config.sections import DataSection
from distill_at_scale.data.sources import SOURCES
source = SOURCES["imagefolder"](DataSection(source="imagefolder", path=sys.argv[1]))
rows = source.listing("train")
print(source.digest("train"), sum(map(len, source.read(rows))))
"""


def test_two_processes_open_a_set_without_credentials_in_the_configuration(s3, everywhere):
    path = s3("imagefolder-set/deep/set")
    assert "testing" not in path
    runs = [
        subprocess.Popen([sys.executable, "-c", TWO, path], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in "ab"
    ]
    output = [run.communicate(timeout=60)[0].split() for run in runs]
    here = source("imagefolder", everywhere["imagefolder"])
    wanted = [here.digest("train"), str(sum(map(len, here.read(here.listing("train")))))]
    assert output == [wanted, wanted]


@pytest.mark.parametrize("path", ["no-such-bucket/deep", "imagefolder-set/no-such-prefix"])
def test_a_missing_bucket_or_prefix_is_one_error(s3, everywhere, path):
    with pytest.raises(
        Unreachable, match=rf"data\.path = 's3://{path}.*there is no such folder; check bucket and prefix"
    ):
        source("imagefolder", s3(path))


def test_a_deleted_object_is_one_samples_matter_and_a_deleted_bucket_is_not(s3, tmp_path):
    for name in ("train/a/1.png", "train/a/2.png", "train/b/3.png"):
        put(tmp_path, name, png(1))
    s3.upload(tmp_path, "shrinking")
    there = source("imagefolder", s3("shrinking"))
    rows = there.listing("train")
    s3.client.delete_object(Bucket="shrinking", Key="train/a/2.png")
    with pytest.raises(FileNotFoundError, match=r"s3://shrinking/train/a/2\.png"):
        there.read(rows)
    assert there.read(rows.slice(2, 1)) == [png(1)]
    for key in ("train/a/1.png", "train/b/3.png"):
        s3.client.delete_object(Bucket="shrinking", Key=key)
    s3.client.delete_bucket(Bucket="shrinking")
    with pytest.raises(UserError, match="there is no such folder"):
        there.read(rows)


def test_a_parquet_file_deleted_after_listing_is_one_error(s3, tmp_path):
    s3.upload(parquet(tmp_path), "parquet-gone")
    there = source("parquet", s3("parquet-gone"))
    rows = there.listing("train")
    s3.client.delete_object(Bucket="parquet-gone", Key="train-1.parquet")
    with pytest.raises(UserError, match=r"s3://parquet-gone/train-1\.parquet is gone"):
        there.read(rows)


def test_a_truncated_parquet_file_on_s3_is_named(s3, tmp_path):
    parquet(tmp_path)
    cut = (tmp_path / "train-1.parquet").read_bytes()[:-20]
    (tmp_path / "train-1.parquet").write_bytes(cut)
    s3.upload(tmp_path, "parquet-cut")
    with pytest.raises(UserError, match=r"s3://parquet-cut/train-1\.parquet is not a readable Parquet file"):
        source("parquet", s3("parquet-cut")).listing("train")


def test_an_address_where_nothing_listens_is_one_error(s3):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Unreachable, match=r"cannot be read: .*NETWORK_CONNECTION.*Check the address"):
            Store(s3("bucket/x", endpoint_override=address))


def test_a_server_that_never_responds_times_out(s3):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=r"cannot be read: .*Timeout was reached"):
            Store(s3("bucket/x", endpoint_override=address, **PATIENCE))


class Forbidding(http.server.BaseHTTPRequestHandler):
    """Answers everything as S3 answers wrong credentials."""

    def do_HEAD(self):
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


def test_wrong_credentials_are_one_error(s3):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        with pytest.raises(Unreachable, match=r"cannot be read: .*ACCESS_DENIED.*Check the address, the credentials"):
            source("imagefolder", s3("bucket/x", endpoint_override=address, **PATIENCE))
        server.shutdown()


def test_a_server_that_goes_away_while_reading_stops_the_run(s3, everywhere):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)  # serves the same buckets
    server.start()
    address = "{}:{}".format(*server.get_host_and_port())
    there = source("imagefolder", s3("imagefolder-set/deep/set", endpoint_override=address, **PATIENCE))
    rows = there.listing("train")
    assert len(there.read(rows)) == 12
    of_parquet = source("parquet", s3("parquet-set/deep/set", endpoint_override=address, **PATIENCE))
    groups = of_parquet.listing("train")
    of_parquet.read(groups.slice(0, 1))  # its file stays open
    store = Store(s3("imagefolder-set/deep/set", endpoint_override=address, **PATIENCE))
    handle = store.open("train/a dog/0.png")
    server.stop()
    with pytest.raises(Unreachable, match=r"cannot be read: .*NETWORK_CONNECTION"):
        there.read(rows)
    for asked in (groups.slice(6, 1), groups.slice(10, 1)):  # of the open file, and of another one
        with pytest.raises(Unreachable, match=r"cannot be read: .*NETWORK_CONNECTION"):
            of_parquet.read(asked)
    store.open = lambda file: handle
    sample = pa.table({"location": ["train/a dog/0.png"], "row": [0], "size": [20]})
    with pytest.raises(Unreachable, match=r"cannot be read: .*NETWORK_CONNECTION"):
        tar.read(store, sample)


def test_an_archive_that_became_shorter_on_s3_concerns_single_samples(s3, tmp_path):
    put(tmp_path, "x.tar", bytes(1000))
    s3.upload(tmp_path, "short-archive")
    store = Store(s3("short-archive"))
    for row in (900, 1000, 5000):
        with pytest.raises(FileNotFoundError, match="the archive ends inside the sample"):
            tar.read(store, pa.table({"location": ["x.tar"], "row": [row], "size": [200]}))
