"""The door to storage: local folders as they really are, with hidden things, links and names of every kind."""

from __future__ import annotations

import errno
import os
import pickle
import sys

import pytest

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import Unreachable, UserError
from distill_at_scale.data.sources import SOURCES
from distill_at_scale.storage import filesystem, s3
from distill_at_scale.storage.filesystem import FileInfo, Store, is_hidden


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def test_files_are_sorted_by_path_at_any_depth_without_hidden_ones(tmp_path):
    put(tmp_path, "b/1", "b-a/2", "a/c/d/3", ".x", ".h/4", "a/.h/5", "a/c/.y", "z é/6")
    store = Store(str(tmp_path))
    assert [entry.path for entry in store.files()] == ["a/c/d/3", "b-a/2", "b/1", "z é/6"]
    assert store.files("a") == [FileInfo("a/c/d/3", 7)]
    assert store.files("nowhere") == []
    assert store.names() == (["a", "b", "b-a", "z é"], [])
    assert store.names("a/c/d") == ([], ["3"])


SYSTEM_FILES = [
    "a/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir/2.png", "__MACOSX/a/._1.png", "__MACOSX/3.png", "a/.AppleDouble/1.png",
    "lost+found/4.png", "$RECYCLE.BIN/S-1-5/5.png", "System Volume Information/6.png", "#recycle/7.png", "@Recycle/a/8.png",
    "a/.ipynb_checkpoints/1-checkpoint.png", "a/Thumbs.db", "a/desktop.ini", "a/._1.png", ".Trash-1000/9.png", "A/THUMBS.DB",
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["local", "remote"])
def test_what_systems_add_is_left_out(tmp_path, scheme):
    put(tmp_path, "a/1.png", "a/recycle/2.png", "a/@home/3.png", "macosx/4.png", *SYSTEM_FILES)
    store = Store(str(tmp_path))
    if scheme == "remote":
        store = Store(tmp_path.as_uri())
        store.local = False
    assert [entry.path for entry in store.files()] == ["a/1.png", "a/@home/3.png", "a/recycle/2.png", "macosx/4.png"]
    assert [entry.path for entry in store.files("a")] == ["a/1.png", "a/@home/3.png", "a/recycle/2.png"]
    assert store.names()[0] == ["A", "a", "macosx"]
    assert store.names("a") == (["@home", "recycle"], ["1.png"])
    assert [path for path in SYSTEM_FILES if not is_hidden(path)] == []
    assert not is_hidden("./a/../b.png")


def test_a_file_uri_is_a_local_folder(tmp_path):
    put(tmp_path, "a b/1")
    store = Store((tmp_path / "a b").as_uri())
    assert store.local
    assert store.read("1") == b"a b/1"
    assert store.place("1").endswith("/1")


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path, "real/1")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "real")
    (tmp_path / "root" / "dangling").symlink_to(tmp_path / "none")
    files = {entry.path: entry.size for entry in Store(str(tmp_path / "root")).files()}
    assert files["linked/1"] == 6
    assert files["dangling"] == -1
    assert len(files) == 3


def test_ranges_and_sizes(tmp_path):
    put(tmp_path, "abcdef")
    store = Store(str(tmp_path))
    assert store.read_range("abcdef", 2, 3) == b"cde"
    assert store.read_range("abcdef", 4, 10) == b"ef"
    assert (store.size("abcdef"), store.size("none")) == (6, None)
    assert store.read_many(["abcdef"] * 3) == [b"abcdef"] * 3


def test_a_missing_file_is_one_files_matter_until_the_folder_is_gone(tmp_path):
    put(tmp_path, "data/1")
    store = Store(str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError) as caught:
        store.read_many(["1", "2"])
    assert caught.value.errno == errno.ENOENT
    (tmp_path / "data" / "1").unlink()
    (tmp_path / "data").rmdir()
    with pytest.raises(UserError, match="there is no such folder"):
        store.read("1")


def test_a_folder_read_as_a_file_is_one_files_matter(tmp_path):
    put(tmp_path, "a/1")
    with pytest.raises(IsADirectoryError):
        Store(str(tmp_path)).read("a")


def test_an_unreadable_folder_is_one_error(tmp_path, monkeypatch):
    put(tmp_path, "train/a/1.png", "train/b/2.png")
    source = SOURCES["imagefolder"](DataSection(source="imagefolder", path=str(tmp_path)))
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("train/b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot be read: .*Permission denied: '.*train/b'\. Check the permissions"):
        source.listing("train")


def test_a_name_that_is_not_utf8_is_one_error(tmp_path, monkeypatch):
    try:
        (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(UserError, match="is not UTF-8; rename the file"):
        Store(str(tmp_path)).files()
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "gbk")
    with pytest.raises(UserError, match="encoding of the locale, gbk; set PYTHONUTF8=1"):
        Store(str(tmp_path)).files()


def test_a_store_is_pickled_without_its_connection(tmp_path):
    put(tmp_path, "1")
    store = Store(str(tmp_path))
    store.read("1")
    assert "_located" not in store.__getstate__()
    assert pickle.loads(pickle.dumps(store)).read("1") == b"1"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/at/all", "there is no such folder"),
        ("nothing://x/y", "cannot be opened"),
        ("s3://", "it names no bucket"),
        ("s3://b/x?conect_timeout=1", "unknown option 'conect_timeout'; known: region"),
        ("s3://b/x?connect_timeout=soon", "connect_timeout=soon: write a number"),
        ("s3://b/x?anonymous=maybe", "anonymous=maybe: write true or false"),
    ],
)
def test_an_address_that_cannot_be_is_one_error(path, message):
    with pytest.raises(UserError, match=message):
        Store(path)


def test_credentials_in_a_uri_are_used_and_never_shown(monkeypatch):
    given = {}
    monkeypatch.setattr(s3.fs, "S3FileSystem", lambda **options: given.update(options))
    _, root = s3.connect("s3://key:sec%2Fret@bucket/a%20b/?region=eu-west-1&anonymous=true&attempts=1")
    assert root == "bucket/a b"
    assert (given["access_key"], given["secret_key"], given["region"]) == ("key", "sec/ret", "eu-west-1")
    assert given["anonymous"] is True
    assert "sec" not in filesystem.redact_uri("s3://key:sec%2Fret@bucket/x?region=x")
    with pytest.raises(UserError) as caught:
        Store("s3://key:sec%2Fret@bucket/x?unknown=1")
    assert "sec" not in str(caught.value)


SECRETS = [
    "s3://KEYID:sec/ret@bucket/set",
    "s3://KEYID:sec%2Fret@bucket/set?region=x",
    "s3://KEYID:s@c/ret@bucket/set",
    "s3://KEYID:sec?ret@bucket/set",
    "gs://bucket/set?access_token=secret&project=p",
    "s3://bucket/set?region=x&secret_key=secret",
]


@pytest.mark.parametrize("path", SECRETS)
def test_nothing_secret_is_shown_of_an_address(path):
    shown = filesystem.redact_uri(path)
    assert "KEYID" not in shown
    assert "sec" not in shown.replace("secret_key", "")
    assert "ret" not in shown.replace("secret_key", "")
    assert "bucket/set" in shown


def test_what_is_not_secret_is_shown_as_it_is():
    for path in ("data/a@b", "/mnt/c:/x", "s3://bucket/set?region=eu-west-1&scheme=http", "file:///data/x"):
        assert filesystem.redact_uri(path) == path


@pytest.mark.parametrize("path", [*SECRETS[:4], "nothing://KEYID:sec/ret@bucket/x", "gs://KEYID:sec/ret@bu cket/x"])
def test_an_address_that_cannot_be_opened_is_named_without_its_credentials(path):
    with pytest.raises(UserError) as caught:
        Store(path + ("&" if "=" in path else "?") + "unknown=1")
    assert not any(part in str(caught.value) for part in ("KEYID", "sec", "s@c", "ret@"))


def test_what_another_library_says_loses_its_credentials(tmp_path):
    store = Store(str(tmp_path))
    store.path = "s3://KEYID:sec/ret+x@bucket/x"
    output = str(store.unreachable(OSError(f"no access to {store.path} by KEYID with ret+x")))
    assert "KEYID" not in output
    assert "ret+x" not in output


def test_an_unreachable_source_is_distinguished_from_other_bad_input(tmp_path):
    with pytest.raises(Unreachable, match="no such folder"):
        Store(str(tmp_path / "none"))
    with pytest.raises(UserError) as caught:
        Store("s3://bucket/x?unknown=1")
    assert not isinstance(caught.value, Unreachable)
    with pytest.raises(UserError, match="is not set") as caught:
        SOURCES["imagefolder"](DataSection(source="imagefolder"))
    assert not isinstance(caught.value, Unreachable)


def test_a_folder_without_permission_is_unreachable(tmp_path, monkeypatch):
    put(tmp_path, "1")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(Unreachable, match="Check the permissions"):
        Store(str(tmp_path)).files()
    with pytest.raises(Unreachable, match="Check the permissions"):
        Store(str(tmp_path)).names()
