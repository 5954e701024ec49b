"""A folder on object storage and its working copy: what differs travels, and a file is there whole or not at all."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.storage import lock as lease
from distill_at_scale.storage import object_store, working_copy
from distill_at_scale.storage.object_store import ObjectStore
from distill_at_scale.storage.sync import FolderSync, scratch_of
from distill_at_scale.storage.working_copy import WorkingCopy

BUCKETS = itertools.count()


@pytest.fixture
def place(s3):
    """The URI of a folder in its own bucket."""
    bucket = f"mirror-{next(BUCKETS)}"
    s3.client.create_bucket(Bucket=bucket)
    return s3(f"{bucket}/runs/x")


@pytest.fixture
def copies(place, tmp_path):
    """Two machines that work on one folder."""
    return [FolderSync(place, tmp_path / name, 0.0) for name in "ab"]


def write(mirror, name, text):
    path = mirror.local / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_what_one_machine_stores_another_fetches(copies):
    a, b = copies
    write(a, "prepared/train/0.parquet", "pixels")
    write(a, ".work/score-1/pieces/0.parquet", "piece")
    write(a, ".work/score-1/pieces/.1.parquet.tmp", "half")
    write(a, ".probe", "hidden")
    a.push()
    b.pull()
    assert {p.relative_to(b.local).as_posix() for p in b.local.rglob("*") if p.is_file()} == {
        "prepared/train/0.parquet",
        ".work/score-1/pieces/0.parquet",
    }
    assert (b.local / "prepared/train/0.parquet").read_text(encoding="utf-8") == "pixels"


def test_only_what_differs_travels(copies, monkeypatch):
    a, b = copies
    write(a, "one", "1")
    write(a, "two", "2")
    a.push()
    b.pull()
    fetched, stored = [], []
    monkeypatch.setattr(FolderSync, "_fetch", lambda self, name, info: fetched.append(name) or name)
    monkeypatch.setattr(object_store, "put", lambda system, path, content: stored.append(path))
    FolderSync(b.store.uri, b.local, 0.0).pull()
    b.push()
    assert fetched == stored == []
    write(b, "two", "3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderSync, "_store", lambda self, names: stored.extend(names))
        b.push()
    assert stored == ["two"]


def test_what_was_changed_here_is_not_overwritten(copies):
    a, b = copies
    write(a, "log", "1\n")
    a.push()
    b.pull()
    write(b, "log", "1\n2\n")
    write(a, "log", "1\nother\n")
    a.push()
    b.pull()
    assert (b.local / "log").read_text(encoding="utf-8") == "1\n2\n"


def test_sync_removes_files_that_are_gone_on_the_other_side(copies):
    a, b = copies
    write(a, "work/note", "1")
    write(a, "work/state", "1")
    a.push()
    b.pull()
    (a.local / "work/note").unlink()
    a.push(gone=True)
    b.mirror("work")
    assert not (b.local / "work/note").exists()
    assert (b.local / "work/state").exists()


def test_an_output_that_is_not_what_its_record_says_is_refused(copies):
    a, b = copies
    write(a, "scores", "1")
    a.push()
    with pytest.raises(UserError, match="scores is not what was written"):
        b.pull(outputs={"scores": {"bytes": 1, "sha256": "0" * 64}})


class Cut:
    """A proxy to a server that breaks for good once the client has sent `limit` bytes."""

    def __init__(self, server: str, limit: int):
        self.server, self.left = server.split(":"), limit
        self.listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        host, port = self.listening.getsockname()
        return f"{host}:{port}"

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listening.accept()
                server = socket.create_connection(self.server)
                threading.Thread(target=self._send, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _send(self, client, server):
        with client, server, contextlib.suppress(OSError):
            while self.left > 0 and (data := client.recv(2**16)):
                self.left -= len(data)
                server.sendall(data if self.left > 0 else data[: self.left])
            client.shutdown(socket.SHUT_RDWR)
            server.shutdown(socket.SHUT_RDWR)

    def _answer(self, server, client):
        with contextlib.suppress(OSError):
            while data := server.recv(2**16):
                client.sendall(data)


@pytest.mark.parametrize("size", [4 * 2**20, 25 * 2**20], ids=["one request", "several parts"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_an_upload_that_is_cut_off_is_never_seen(place, s3, tmp_path, size, share):
    """pyarrow completes what a stream was given when it is closed, or thrown away; so nothing is given by halves."""
    cut = Cut(s3.address, int(size * share))
    uri = place.replace(s3.address.replace(":", "%3A"), cut.address.replace(":", "%3A")) + "&attempts=1"
    broken, whole = FolderSync(uri, tmp_path / "a", 0.0), FolderSync(place, tmp_path / "b", 0.0)
    write(broken, "large", "x" * size)
    with cut.listening, pytest.raises(Unreachable, match="storing large failed"):
        broken.push()
    del broken
    gc.collect()
    assert whole.store.read("large") is None
    assert not whole.exists("large")


def test_a_refused_request_is_retried_and_logged(copies, monkeypatch):
    a, _ = copies
    lines, refusals = [], iter([OSError("503 SlowDown"), OSError("503 SlowDown")])
    a.store.retry_seconds, a.store.say, real = 60.0, lines.append, object_store.put

    def refusing(*arguments):
        for error in refusals:
            raise error
        real(*arguments)

    monkeypatch.setattr(object_store, "put", refusing)
    monkeypatch.setattr(object_store, "FIRST_PAUSE", 0.0)
    write(a, "one", "1")
    a.push()
    assert a.store.read("one") == b"1"
    assert len(lines) == 2
    assert re.search(r"storing one in \S+ failed \(503 SlowDown\); retrying", lines[0])


def test_outputs_are_stored_in_the_order_of_publication(copies, monkeypatch):
    a, _ = copies
    stored = []
    monkeypatch.setattr(FolderSync, "_store", lambda self, names: stored.extend(names))
    for second, name in enumerate(["pieces/1.rejected", "pieces/1.arrow", "pieces/2.rejected", "pieces/2.arrow"]):
        write(a, name, "x")
        os.utime(a.local / name, ns=(second, second))
    a.push()
    for number in "12":
        assert stored.index(f"pieces/{number}.rejected") < stored.index(f"pieces/{number}.arrow")


def test_an_interrupted_command_does_not_wait_for_a_storage_that_refuses(copies, monkeypatch):
    a, _ = copies
    a.store.retry_seconds, pauses = 3600.0, []
    monkeypatch.setattr(object_store, "put", lambda *arguments: (_ for _ in ()).throw(OSError("503 SlowDown")))
    monkeypatch.setattr(a.store.closing, "wait", pauses.append)
    write(a, "one", "1")
    with pytest.raises(KeyboardInterrupt), a.pushing():
        raise KeyboardInterrupt
    assert pauses == []


def test_a_beat_of_the_lease_is_not_tried_again(copies, monkeypatch):
    """It would come late: another command may have taken over meanwhile."""
    a, _ = copies
    a.store.retry_seconds, a.store.say, asked = 3600.0, pytest.fail, []
    held = lease.StorageLock(a.store)
    monkeypatch.setattr(held, "_done", SimpleNamespace(wait=lambda seconds: len(asked) == 2))
    monkeypatch.setattr(held, "_is_ours", lambda: True)
    monkeypatch.setattr(
        object_store, "put", lambda *arguments: asked.append(arguments) or (_ for _ in ()).throw(OSError("503"))
    )
    held._beat()
    assert len(asked) == 2


def test_a_full_disk_is_not_a_storage_failure(copies):
    a, _ = copies
    write(a, "one", "1")
    a.push()
    a.store.retry_seconds, a.store.say = 3600.0, pytest.fail
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        a.store.fetch("one", Path("/dev/full"))


def test_a_missing_bucket_is_not_waited_for(s3, tmp_path):
    nowhere = FolderSync(s3("no-such-bucket/run"), tmp_path, 600.0)
    with pytest.raises(Unreachable, match=r"run\.dir = .*storing one failed"):
        nowhere.store.write("one", b"1")


def test_secrets_are_not_in_messages(s3, tmp_path):
    uri = s3("no-such-bucket/run").replace("s3://", "s3://someone:verysecretword@")
    with pytest.raises(Unreachable) as error:
        FolderSync(uri, tmp_path, 0.0).store.write("one", b"1")
    assert "verysecretword" not in str(error.value)


def test_each_folder_has_its_own_working_copy():
    assert scratch_of("s3://bucket/a") == scratch_of("s3://key:secret@bucket/a")
    assert scratch_of("s3://bucket/a") != scratch_of("s3://bucket/b")
    assert scratch_of("s3://bucket/a", "/fast").parent.as_posix() == "/fast"


@pytest.mark.parametrize(
    ("stage", "fingerprint"), [("../../victim", "0" * 32), ("score", "/../../../victim" + "0" * 16)]
)
def test_neither_records_nor_names_lead_out_of_the_copy(place, s3, tmp_path, stage, fingerprint):
    victim = tmp_path / "copies" / f"victim-{fingerprint[:16]}" if stage != "score" else tmp_path / "copies" / "victim"
    victim.mkdir(parents=True)
    (tmp_path / "copies" / "b" / ".work" / "score-").mkdir(parents=True)
    (tmp_path / "copies" / "b" / working_copy.IDENTITY).write_text("id", encoding="utf-8")
    bucket_name = place.removeprefix("s3://").partition("/")[0]
    record = {"stage": stage, "fingerprint": fingerprint, "outputs": {"../../out.txt": {"bytes": 1, "sha256": ""}}}
    for key, body in (("stages/score.json", json.dumps(record)), ("../../out.txt", "x")):
        s3.client.put_object(Bucket=bucket_name, Key=f"runs/x/{key}", Body=body.encode())
    copy = WorkingCopy(FolderSync(place, tmp_path / "copies" / "b", 0.0))
    copy.sync.store.write(working_copy.IDENTITY, b"id")
    copy.fetch()
    assert victim.is_dir()
    assert not list(tmp_path.rglob("out.txt"))


def test_two_pushes_at_once_store_a_file_once(copies, monkeypatch):
    """The second waits for the first, so nothing is on its way any more when it returns."""
    copy, stored, write = copies[0], [], ObjectStore.write

    def slowly(store, name, content):
        stored.append(name)
        time.sleep(0.2)
        return write(store, name, content)

    monkeypatch.setattr(ObjectStore, "write", slowly)
    copy.create()
    (copy.local / "one").write_text("1", encoding="utf-8")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: copy.push(), range(2)))
    assert stored == ["one"]
