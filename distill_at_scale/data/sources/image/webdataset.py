"""WebDataset shards: tars in which the files of one sample follow each other and share their name up to the first dot.

data.path is a folder with shards, or a pattern such as `folder/train-{000..999}.tar`. The split is a word of a shard's
name, else of its folder (`imagenet1k-train-0000.tar`, `val/00.tar`), else train. A sample has one image (jpg, jpeg, png,
webp) and a label: `cls` (a number or a class name), else `json` with the key data.label_column or "cls"; its other files
are passed over. Its id is that name where it is unique within the split, else `<shard>:<name>`. Numbered classes are
called "0" to the largest number of the training split, others are sorted by name. Left out: compressed shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.hashing import digest
from distill_at_scale.data.archives import tar
from distill_at_scale.data.sources.base import LISTING, MAX_LABEL, SPLIT_NAMES, prefer_validation
from distill_at_scale.storage.filesystem import Store, is_uri, shown

IMAGES, LABELS = ("jpg", "jpeg", "png", "webp"), ("cls", "json")
ARCHIVE = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
LARGEST_FILE = 2**24  # bytes of a cls or json file
MOST_SHARDS = 10**6
LOCAL_THREADS = 4
INDEX = pa.schema({"key": pa.string(), "shard": pa.string(), "row": pa.int64(), "size": pa.int64(),
                   "label": pa.string(), "numbered": pa.bool_()})  # fmt: skip
REWRITE = "Write the shard again without this fault"


class WebDataset:
    """Opens nothing but the root before it is asked; the index is made once and kept in memory."""

    def __init__(self, config: DataSection) -> None:
        if config.path is None:
            raise UserError(f"data.path is not set; {config.source!r} needs a folder with shards or their pattern")
        root, self.named = _located(config.path)
        self.config, self.store = config, Store(root)
        self.threads = LOCAL_THREADS if self.store.local else tar.REMOTE_THREADS
        self._indices: dict[str, pa.Table] = {}

    def splits(self) -> list[str]:
        """Raises UserError where there is no training shard, a shard of the pattern is missing, or one is compressed."""
        return [split for split in ("train", "test") if split in self.shards]

    @cached_property
    def shards(self) -> dict[str, dict[str, int]]:
        """The bytes of every shard, by split and by path below the root."""
        found: dict[str, dict[str, int]] = {}
        for shard, size in self._sizes().items():
            split = "test" if _split_word(shard) in SPLIT_NAMES["test"] else "train"
            found.setdefault(split, {})[shard] = size
        if test := found.get("test"):
            found["test"] = {
                shard: test[shard] for shard in prefer_validation({shard: _split_word(shard) for shard in test})
            }
        if "train" not in found:
            place = shown(str(self.config.path))
            raise UserError(f"{place} holds no training shards (train-000000.tar); check data.path")
        return found

    @cached_property
    def class_names(self) -> list[str]:
        """Raises UserError where the training split mixes class numbers and class names."""
        index = self._index("train")
        known = pc.unique(index["label"]).to_pylist()
        if not index["numbered"][0].as_py():
            return sorted(known)
        return [str(number) for number in range(max(map(int, known)) + 1)]

    def listing(self, split: str) -> pa.Table:
        """The samples in the order of the shards and of their offsets.

        Raises UserError, naming shard and sample, for a damaged shard, a sample without image or label, a repeated name, a
        label that cannot be read, and one that the training split does not have.
        """
        index = self._index(split)
        keys, shards = index["key"], index["shard"]
        unique = pc.count_distinct(keys).as_py() == len(keys)
        ids = keys if unique else pc.binary_join_element_wise(shards, keys, ":")
        columns = [ids, self._labels(index), shards, index["row"], index["size"]]
        return pa.table(columns, schema=LISTING)

    def digest(self, split: str) -> str:
        """A hash of names and sizes of the shards and of names, labels, offsets and sizes of all samples."""
        return digest([self.shards[split], tar.index_digest(self.listing(split))])

    def read(self, rows: pa.Table) -> Sequence[bytes]:
        return tar.read(self.store, rows)

    def _sizes(self) -> dict[str, int]:
        if self.named is None:
            files = {entry.path: entry.size for entry in self.store.files() if ARCHIVE.search(entry.path)}
        else:
            sizes = tar.map_in_threads(self.store.size, self.named, self.threads)
            files = {shard: -1 if size is None else size for shard, size in zip(self.named, sizes, strict=True)}
        for shard, size in files.items():
            if not shard.lower().endswith(".tar"):
                raise UserError(f"{self.store.place(shard)} is compressed, so no sample can be read alone; unpack it")
            if size < 0:
                raise UserError(f"{self.store.place(shard)} is missing; download it, or correct data.path")
        return files

    def _index(self, split: str) -> pa.Table:
        """What lies in the shards of a split (schema INDEX)."""
        if split not in self._indices:
            work = partial(index_shard, self.store, label_keys=(self.config.label_column, "cls"))
            found = pa.concat_tables(tar.map_in_threads(work, sorted(self.shards[split]), self.threads))
            if not found.num_rows:
                raise UserError(f"the {split} shards in {self.store.place()} hold no samples; check data.path")
            self._refuse_mixed(found)
            self._indices[split] = found
        return self._indices[split]

    def _refuse_mixed(self, index: pa.Table) -> None:
        numbered = index["numbered"][0]
        odd = pc.index(index["numbered"], pc.invert(numbered)).as_py()
        if odd >= 0:
            kinds = ("a name", "a number") if numbered.as_py() else ("a number", "a name")
            raise self._at(index, odd, f"is {kinds[0]}, but the first one of the split is {kinds[1]}; use one of both")

    def _labels(self, index: pa.Table) -> pa.ChunkedArray:
        """The place of every label in class_names."""
        places = pc.index_in(index["label"], pc.unique(self._index("train")["label"]))
        if places.null_count:
            odd = pc.index(pc.is_null(places), True).as_py()
            raise self._at(index, odd, "does not occur in the training split; correct it, or complete that split")
        return pc.index_in(index["label"], pa.array(self.class_names, pa.string()))

    def _at(self, index: pa.Table, i: int, what: str) -> UserError:
        key, shard, label = (index[name][i].as_py() for name in ("key", "shard", "label"))
        return UserError(f"{self.store.place(shard)}, sample {key!r}: the label {label!r} {what}")

    def __getstate__(self) -> dict[str, Any]:
        """Without the index, which an actor that only reads does not need."""
        return {k: v for k, v in self.__dict__.items() if k not in ("shards", "class_names")} | {"_indices": {}}


@dataclass
class _Sample:
    """The files of one sample: its image, and the content of those that may hold its label."""

    key: str
    fault: Callable[[str], UserError]
    image: tar.Member | None = None
    texts: dict[str, bytes] = field(default_factory=dict)

    def add(self, extension: str, member: tar.Member, window: tar.Window) -> None:
        if (extension in IMAGES and self.image) or extension in self.texts:
            raise self.fault(f"has a second file {member.name!r}: it has two images, or its name occurs twice")
        if extension in IMAGES:
            self.image = member
        elif extension in LABELS:
            if member.size > LARGEST_FILE:
                raise self.fault(f"has {member.size:,} bytes of {extension}, more than a label needs")
            self.texts[extension] = window.read_at(member.offset, member.size)

    def label(self, json_keys: Sequence[str]) -> int | str:
        if "cls" in self.texts:
            return self._checked(self._text("cls"))
        if "json" not in self.texts:
            raise self.fault("has no label (cls or json)")
        try:
            values = json.loads(self._text("json"))
        except (ValueError, RecursionError) as error:
            raise self.fault(f"has a json file that cannot be read ({error})") from None
        key = next((k for k in json_keys if isinstance(values, dict) and k in values), None)
        if key is None:
            raise self.fault(f"has a json file without {' or '.join(map(repr, json_keys))} (data.label_column)")
        return self._checked(values[key])

    def _text(self, extension: str) -> str:
        try:
            return self.texts[extension].decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise self.fault(f"has a {extension} file that is no UTF-8 text") from None

    def _checked(self, value: Any) -> int | str:
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
            value = int(value)
        if isinstance(value, str) and value.strip():
            return value.strip().encode("utf-8", "backslashreplace").decode()
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fault(f"has the label {value!r:.100}, which is neither an integer nor a class name")
        if not 0 <= value <= MAX_LABEL:
            raise self.fault(f"has the label {value}, outside 0..{MAX_LABEL:,}")
        return value


def index_shard(store: Store, shard: str, label_keys: Sequence[str]) -> pa.Table:
    """The samples of one shard (schema INDEX); `label_keys` are the keys under which a json file may have the label.

    Raises UserError, naming shard and sample, for everything that is wrong.
    """
    seen: set[str] = set()
    found: list[tuple[str, str, int, int, str, bool]] = []
    with tar.open_archive(store, shard) as window:
        for sample in _samples(window):
            if sample.key in seen:
                raise sample.fault("occurs twice")
            if sample.image is None:
                raise sample.fault(f"has no image ({', '.join(IMAGES)})")
            seen.add(sample.key)
            label, (_, offset, size) = sample.label(label_keys), sample.image
            found.append((sample.key, shard, offset, size, str(label), isinstance(label, int)))
    columns = zip(*found, strict=True) if found else [()] * len(INDEX)
    return pa.table([pa.array(column, kind.type) for column, kind in zip(columns, INDEX, strict=True)], schema=INDEX)


def _samples(window: tar.Window) -> Iterator[_Sample]:
    """Members that follow each other with the same name up to the first dot, where they have an image or a label."""
    sample = _Sample("", partial(_fault, window.place, ""))
    for member in tar.members(window):
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = name.partition(".")
        key = folder + slash + stem
        if not stem:
            continue  # hidden files, such as macOS adds
        if key != sample.key:
            if sample.image or sample.texts:
                yield sample
            sample = _Sample(key, partial(_fault, window.place, key))
        sample.add(extension.lower(), member, window)
    if sample.image or sample.texts:
        yield sample


def _fault(place: str, key: str, what: str) -> UserError:
    return UserError(f"{place}: the sample {key!r} {what}. {REWRITE}.")


def _located(path: str) -> tuple[str, list[str] | None]:
    """The root folder and, where the path is a pattern or a single shard, the shards below it."""
    base, question, query = path.partition("?") if is_uri(path) else (path, "", "")
    is_folder = "{" not in base and not ARCHIVE.search(base)
    if is_folder or (not is_uri(path) and Path(path).expanduser().is_dir()):
        return path, None
    cut = base.partition("{")[0].rfind("/") + 1
    root = base[: cut - 1] if cut > 1 and base[cut - 2] != "/" else base[:cut] or "."
    return root + question + query, list(dict.fromkeys(expand(base[cut:])))


def _split_word(shard: str) -> str | None:
    """The word of a shard's name, else of its nearest folder, that names a split."""
    known = {word for words in SPLIT_NAMES.values() for word in words}
    parts = reversed(shard.lower().split("/"))
    return next((word for part in parts for word in re.split(r"[^a-z]+", part) if word in known), None)


def expand(pattern: str) -> list[str]:
    """All names that a brace pattern stands for, in its order: `{000..127}`, `{train,val}`, several of them, also nested.

    A range is padded with zeros where one of its ends is. Raises UserError for a brace that is not closed or holds neither
    a range of numbers nor alternatives, and for too many names.
    """
    head, brace, rest = pattern.partition("{")
    if not brace:
        if "}" in head:
            raise _wrong(pattern, "a brace is closed that was never opened")
        return [head]
    parts, rest = _alternatives(rest, pattern)
    middles = _range(parts[0], pattern) if len(parts) == 1 else [name for part in parts for name in expand(part)]
    tails = expand(rest)
    if len(middles) * len(tails) > MOST_SHARDS:
        raise _wrong(pattern, f"it stands for more than {MOST_SHARDS:,} names")
    return [head + middle + tail for middle in middles for tail in tails]


def _alternatives(text: str, pattern: str) -> tuple[list[str], str]:
    """The alternatives up to the closing brace, and what follows it."""
    depth, start, parts = 0, 0, []
    for i, letter in enumerate(text):
        if depth == 0 and letter in ",}":
            parts.append(text[start:i])
            start = i + 1
            if letter == "}":
                return parts, text[start:]
        depth += (letter == "{") - (letter == "}")
    raise _wrong(pattern, "a brace is not closed")


def _range(text: str, pattern: str) -> list[str]:
    ends = re.fullmatch(r"([0-9]{1,12})\.\.([0-9]{1,12})", text)
    first, last = ends.groups() if ends else ("", "")
    if not ends or not 0 <= int(last) - int(first) < MOST_SHARDS:
        raise _wrong(pattern, f"{{{text}}} is neither a rising range ({{000..127}}) nor a choice ({{train,val}})")
    padded = any(end.startswith("0") and len(end) > 1 for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def _wrong(pattern: str, what: str) -> UserError:
    return UserError(f"the pattern {pattern!r} in data.path cannot be read: {what}")
