"""WebDataset shards: tars in which the files of a sample follow each other and share their name up to the first dot.

data.path is a folder with shards, or a pattern such as `folder/train-{000..999}.tar`. The split is a word in a shard's name,
else in its folder (`imagenet1k-train-0000.tar`, `val/00.tar`), else train. A sample has one image (jpg, jpeg, png, webp) and a
label: `cls` (a number or a class name), else `json` with the key data.label_column or "cls"; its other files are ignored. Its
id is the shared name if that is unique within the split, else `<shard>:<name>`. Numbered classes are called "0" to the largest
number of the training split, others are sorted by name. Not covered: compressed shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
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
from distill_at_scale.data.sources.base import INT64, LISTING, MAX_LABEL, TEXT, by_split, rows_to_table
from distill_at_scale.storage.filesystem import Store, is_uri, redact_uri

IMAGES, LABELS = ("jpg", "jpeg", "png", "webp"), ("cls", "json")
ARCHIVE = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
MAX_LABEL_FILE = 2**24  # bytes of a cls or json file
MAX_SHARDS = 10**6
LOCAL_THREADS = 4
INDEX = pa.schema({"key": TEXT, "shard": TEXT, "row": INT64, "size": INT64, "label": TEXT, "is_number": pa.bool_()})


class WebDataset:
    """Opens no shard before the first listing; the index is cached in memory."""

    def __init__(self, config: DataSection) -> None:
        if config.path is None:
            raise UserError(f"data.path is not set; {config.source!r} needs a folder with shards or their pattern")
        self.config, path = config, config.path
        root = path
        self.named_shards: list[str] | None = None  # those of a pattern or of a single shard's path, below the root
        base, question, query = path.partition("?") if is_uri(path) else (path, "", "")
        is_local_folder = not is_uri(path) and Path(path).expanduser().is_dir()
        if ("{" in base or ARCHIVE.search(base)) and not is_local_folder:
            cut = base.partition("{")[0].rfind("/") + 1
            root = base[: cut - 1] if cut > 1 and base[cut - 2] != "/" else base[:cut] or "."
            root, self.named_shards = root + question + query, list(dict.fromkeys(expand(base[cut:])))
        self.store = Store(root)
        self.threads = LOCAL_THREADS if self.store.local else tar.REMOTE_THREADS
        self._indices: dict[str, pa.Table] = {}

    def splits(self) -> list[str]:
        return [split for split in ("train", "test") if split in self.shards]

    @cached_property
    def shards(self) -> dict[str, dict[str, int]]:
        """Split -> path of each shard below the root -> bytes."""
        if self.named_shards is None:
            sizes = {entry.path: entry.size for entry in self.store.files() if ARCHIVE.search(entry.path)}
        else:
            known = tar.map_in_threads(self.store.size, self.named_shards, self.threads)
            sizes = {s: -1 if size is None else size for s, size in zip(self.named_shards, known, strict=True)}
        for shard, size in sizes.items():
            if not shard.lower().endswith(".tar"):
                raise UserError(f"{self.store.place(shard)} is compressed, so no sample can be read alone; unpack it")
            if size < 0:
                raise UserError(f"{self.store.place(shard)} is missing; download it, or correct data.path")
        splits = by_split(list(sizes), self.store)
        if "train" not in splits:
            place = redact_uri(str(self.config.path))
            raise UserError(f"{place} holds no training shards (train-000000.tar); check data.path")
        return {split: {shard: sizes[shard] for shard in shards} for split, shards in splits.items()}

    @cached_property
    def class_names(self) -> list[str]:
        index = self._index("train")
        labels = pc.unique(index["label"]).to_pylist()
        if not index["is_number"][0].as_py():
            return sorted(labels)
        return [str(number) for number in range(max(map(int, labels)) + 1)]

    def listing(self, split: str) -> pa.Table:
        """The samples in the order of the shards and of their offsets. Errors name shard and sample."""
        index = self._index(split)
        keys, shards = index["key"], index["shard"]
        is_unique = pc.count_distinct(keys).as_py() == len(keys)
        ids = keys if is_unique else pc.binary_join_element_wise(shards, keys, ":")
        in_train = pc.is_in(index["label"], pc.unique(self._index("train")["label"]))
        if (unknown := pc.index(in_train, False).as_py()) >= 0:
            raise self._label_error(index, unknown, "is not in the training split; correct it, or complete that split")
        labels = pc.index_in(index["label"], pa.array(self.class_names, pa.string()))
        return pa.table([ids, labels, shards, index["row"], index["size"]], schema=LISTING)

    def digest(self, split: str) -> str:
        """A hash of names and sizes of the shards and of names, labels, offsets and sizes of all samples."""
        return digest([self.shards[split], tar.index_digest(self.listing(split))])

    def read(self, rows: pa.Table) -> Sequence[bytes]:
        return tar.read(self.store, rows)

    def _index(self, split: str) -> pa.Table:
        if split not in self._indices:
            function = partial(index_shard, self.store, label_keys=(self.config.label_column, "cls"))
            index = pa.concat_tables(tar.map_in_threads(function, sorted(self.shards[split]), self.threads))
            if not index.num_rows:
                raise UserError(f"the {split} shards in {self.store.place()} hold no samples; check data.path")
            first = index["is_number"][0]
            if (odd := pc.index(index["is_number"], pc.invert(first)).as_py()) >= 0:
                kinds = ("a name", "a number") if first.as_py() else ("a number", "a name")
                what = f"is {kinds[0]}, but the first one of the split is {kinds[1]}; use one of both"
                raise self._label_error(index, odd, what)
            self._indices[split] = index
        return self._indices[split]

    def _label_error(self, index: pa.Table, i: int, what: str) -> UserError:
        key, shard, label = (index[name][i].as_py() for name in ("key", "shard", "label"))
        return UserError(f"{self.store.place(shard)}, sample {key!r}: the label {label!r} {what}")

    def __getstate__(self) -> dict[str, Any]:
        """Drops the index, which an actor that only reads does not need."""
        return {k: v for k, v in self.__dict__.items() if k not in ("shards", "class_names")} | {"_indices": {}}


@dataclass
class _Sample:
    """The files of a sample: its image, and the content of those that may hold its label."""

    place: str  # of the shard
    key: str
    image: tar.Member | None = None
    texts: dict[str, bytes] = field(default_factory=dict)

    def error(self, what: str) -> UserError:
        return UserError(f"{self.place}: the sample {self.key!r} {what}. Write the shard again without this fault.")

    def add(self, extension: str, member: tar.Member, window: tar.Window) -> None:
        if (extension in IMAGES and self.image) or extension in self.texts:
            raise self.error(f"has a second file {member.name!r}: it has two images, or its name occurs twice")
        if extension in IMAGES:
            self.image = member
        elif extension in LABELS:
            if member.size > MAX_LABEL_FILE:
                raise self.error(f"has {member.size:,} bytes of {extension}, more than a label needs")
            self.texts[extension] = window.read_at(member.offset, member.size)

    def label(self, json_keys: Sequence[str]) -> int | str:
        extension = next((extension for extension in LABELS if extension in self.texts), None)
        if extension is None:
            raise self.error("has no label (cls or json)")
        try:
            value: Any = self.texts[extension].decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise self.error(f"has a {extension} file that is not UTF-8 text") from None
        if extension == "json":
            try:
                values = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise self.error(f"has a json file that cannot be read ({error})") from None
            key = next((k for k in json_keys if isinstance(values, dict) and k in values), None)
            if key is None:
                raise self.error(f"has a json file without {' or '.join(map(repr, json_keys))} (data.label_column)")
            value = values[key]
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
            value = int(value)
        if isinstance(value, str) and value.strip():
            return value.strip().encode("utf-8", "backslashreplace").decode()
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"has the label {value!r:.100}, which is neither an integer nor a class name")
        if not 0 <= value <= MAX_LABEL:
            raise self.error(f"has the label {value}, outside 0..{MAX_LABEL:,}")
        return value


def index_shard(store: Store, shard: str, label_keys: Sequence[str]) -> pa.Table:
    """The samples of one shard (schema INDEX); `label_keys` are the keys of a json file that may hold the label."""
    keys: set[str] = set()
    rows: list[tuple[str, str, int, int, str, bool]] = []
    with tar.open_archive(store, shard) as window:
        for sample in _samples(window):
            if sample.key in keys:
                raise sample.error("occurs twice")
            if sample.image is None:
                raise sample.error(f"has no image ({', '.join(IMAGES)})")
            keys.add(sample.key)
            label, (_, offset, size) = sample.label(label_keys), sample.image
            rows.append((sample.key, shard, offset, size, str(label), isinstance(label, int)))
    return rows_to_table(rows, INDEX)


def _samples(window: tar.Window) -> Iterator[_Sample]:
    """Consecutive members with the same name up to the first dot, if they have an image or a label."""
    sample = _Sample(window.place, "")
    for member in tar.members(window):
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = name.partition(".")
        key = folder + slash + stem
        if not stem:
            continue  # hidden files, such as macOS adds
        if key != sample.key:
            if sample.image or sample.texts:
                yield sample
            sample = _Sample(window.place, key)
        sample.add(extension.lower(), member, window)
    if sample.image or sample.texts:
        yield sample


def expand(pattern: str) -> list[str]:
    """Expands the braces of a pattern, in order: `{000..127}`, `{train,val}`, several of them, also nested.

    A range is padded with zeros if one of its ends is. Raises UserError for an unbalanced brace, a brace that holds neither a
    range of numbers nor alternatives, and for too many names.
    """

    def error(what: str) -> UserError:
        return UserError(f"the pattern {pattern!r} in data.path cannot be read: {what}")

    head, brace, rest = pattern.partition("{")
    if not brace:
        if "}" in head:
            raise error("a brace is closed that was never opened")
        return [head]
    depth, start, parts = 0, 0, []
    for i, letter in enumerate(rest):
        if depth == 0 and letter in ",}":
            parts.append(rest[start:i])
            start = i + 1
            if letter == "}":
                break
        depth += (letter == "{") - (letter == "}")
    else:
        raise error("a brace is not closed")
    if len(parts) > 1:
        middles = [name for part in parts for name in expand(part)]
    else:
        match = re.fullmatch(r"([0-9]{1,12})\.\.([0-9]{1,12})", parts[0])
        first, last = match.groups() if match else ("", "")
        if not match or not 0 <= int(last) - int(first) < MAX_SHARDS:
            raise error(f"{{{parts[0]}}} is neither a rising range ({{000..127}}) nor a choice ({{train,val}})")
        padded = any(end.startswith("0") and len(end) > 1 for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        middles = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    tails = expand(rest[start:])
    if len(middles) * len(tails) > MAX_SHARDS:
        raise error(f"it stands for more than {MAX_SHARDS:,} names")
    return [head + middle + tail for middle in middles for tail in tails]
