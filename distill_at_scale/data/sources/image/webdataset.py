"""WebDataset shards: tars in which the files of a sample follow each other and share their name up to the first dot.

data.path is a folder with shards, or a pattern such as `folder/train-{000..999}.tar`. The split is a word in a shard's name,
else in its folder (`imagenet1k-train-0000.tar`, `val/00.tar`), else train. A sample has one image (jpg, jpeg, png, webp) and a
label: `cls` (a number or a class name), else `json` with the key data.label_column or "cls"; its other files are ignored. Its
id is the shared name if that is unique within the split, else `<shard>:<name>`. Numbered classes are called "0" to the largest
number of the training split, others are sorted by name. A sample without an image or a label is set aside, and so is an image
whose name has further dots (`0002.v2.jpg`), unless it belongs to a sample with an image (`0002.jpg`) and has no label of its
own. Not covered: compressed shards.
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
from distill_at_scale.data.codecs.image import SampleRejected
from distill_at_scale.data.sources import media
from distill_at_scale.data.sources.base import (
    INT64,
    LISTING,
    MAX_LABEL,
    SET_ASIDE,
    TEXT,
    by_split,
    rows_to_table,
    unused_split,
)  # fmt: skip
from distill_at_scale.data.sources.numbered_files import check_numbered
from distill_at_scale.storage.filesystem import Store, is_uri, redact_uri

IMAGES, LABELS = ("jpg", "jpeg", "png", "webp"), ("cls", "json")
# read for a sample that has none of IMAGES
OTHER_IMAGES = tuple(ending[1:] for ending in media.IMAGE_EXTENSIONS if ending[1:] not in IMAGES)
UNREAD_IMAGES = tuple(ending[1:] for ending in (*media.OTHER_IMAGES, *media.CAMERA_IMAGES))
OWN_FILES = frozenset((*IMAGES, *OTHER_IMAGES, *UNREAD_IMAGES, *LABELS))  # all others are ignored
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
        self._set_aside: dict[str, pa.Table] = {}

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
        for split in set(splits) - {"unused"}:
            check_numbered(splits[split], self.store, complete=self.named_shards is None)
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
            what = "is not in the training split; correct it, or complete that split"
            if (aside := self.set_aside("train")).num_rows:
                first = f"{aside['sample_id'][0]}: {aside['reason'][0]}"
                what += f" ({aside.num_rows} of its samples cannot be used: {first})"
            raise self._label_error(index, unknown, what)
        labels = pc.index_in(index["label"], pa.array(self.class_names, pa.string()))
        return pa.table([ids, labels, shards, index["row"], index["size"]], schema=LISTING)

    def set_aside(self, split: str) -> pa.Table:
        self._index(split)
        return self._set_aside[split]

    def notes(self) -> list[str]:
        unused = list(self.shards.get("unused", {}))
        return [unused_split(next(iter(self.shards["test"])), unused)] if unused else []

    def digest(self, split: str) -> str:
        """A hash of names and sizes of the shards and of names, labels, offsets and sizes of all samples."""
        return digest([self.shards[split], tar.index_digest(self.listing(split))])

    def read(self, rows: pa.Table) -> Sequence[bytes]:
        return tar.read(self.store, rows)

    def _index(self, split: str) -> pa.Table:
        if split not in self._indices:
            function = partial(index_shard, self.store, label_keys=(self.config.label_column, "cls"))
            tables = list(tar.map_in_threads(function, sorted(self.shards[split]), self.threads))
            index, aside = (pa.concat_tables(parts) for parts in zip(*tables, strict=True))
            if not index.num_rows:
                problem = f"the {split} shards in {self.store.place()} hold no samples"
                if aside.num_rows:
                    problem += f" that can be used; the first one is {aside['sample_id'][0]}: {aside['reason'][0]}"
                raise UserError(f"{problem}; {'correct the shards' if aside.num_rows else 'check data.path'}")
            self._set_aside[split] = aside
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
        kept = {k: v for k, v in self.__dict__.items() if k not in ("shards", "class_names")}
        return {**kept, "_indices": {}, "_set_aside": {}}


@dataclass
class _Sample:
    """The files of a sample: its image, and the content of those that may hold its label."""

    key: str
    image: tar.Member | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    dotted: list[str] = field(default_factory=list)  # other images and labels: names with dots before the extension
    names: list[str] = field(default_factory=list)  # of the images and labels
    fault: str = ""

    def add(self, extension: str, member: tar.Member, window: tar.Window) -> None:
        *dots, last = extension.split(".")
        if last not in OWN_FILES:
            return
        if dots:
            self.dotted.append(member.name)
            return
        self.names.append(member.name)
        image = _extension(self.image.name) if self.image else ""
        both_images = any(last in kinds and image in kinds for kinds in (IMAGES, OTHER_IMAGES))
        if both_images or last in self.texts:
            self.fault = f"it has a second file {member.name!r}: two images, or one name twice; keep one of them"
        elif last in IMAGES or (last in OTHER_IMAGES and not image):
            self.image = member
        elif last in LABELS and member.size > MAX_LABEL_FILE:
            self.fault = f"it has {member.size:,} bytes of {last}, more than a label needs; correct it"
        elif last in LABELS:
            self.texts[last] = window.read_at(member.offset, member.size)

    def lost_images(self) -> Iterator[str]:
        """The names of images that look like samples of their own, but are none, as a key ends at the first dot."""
        labelled = {name.rpartition(".")[0] for name in self.dotted if _extension(name) in LABELS}
        for name in self.dotted:
            if _extension(name) not in LABELS and (self.image is None or name.rpartition(".")[0] in labelled):
                yield name

    def label(self, json_keys: Sequence[str]) -> int | str:
        """Raises SampleRejected for a missing or wrong label."""
        extension = next((extension for extension in LABELS if extension in self.texts), None)
        if extension is None:
            raise SampleRejected("it has no label (cls or json); add one")
        try:
            value: Any = self.texts[extension].decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise SampleRejected(f"it has a {extension} file that is not UTF-8 text; correct it") from None
        if extension == "json":
            try:
                values = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise SampleRejected(f"it has a json file that cannot be read ({error}); correct it") from None
            key = next((k for k in json_keys if isinstance(values, dict) and k in values), None)
            if key is None:
                keys = " or ".join(map(repr, json_keys))
                raise SampleRejected(f"it has a json file without {keys}; set data.label_column to the label's key")
            value = values[key]
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
            value = int(value)
        if isinstance(value, str) and value.strip():
            return value.strip().encode("utf-8", "backslashreplace").decode()
        if isinstance(value, bool) or not isinstance(value, int):
            problem = f"it has the label {value!r:.100}, which is neither an integer nor a class name"
            raise SampleRejected(f"{problem}; correct it")
        if not 0 <= value <= MAX_LABEL:
            raise SampleRejected(f"it has the label {value}, outside 0..{MAX_LABEL:,}; correct it")
        return value


def index_shard(store: Store, shard: str, label_keys: Sequence[str]) -> tuple[pa.Table, pa.Table]:
    """The samples of one shard (schema INDEX) and what cannot be used (schema SET_ASIDE).

    `label_keys` are the keys of a json file that may hold the label.
    """
    keys: set[str] = set()
    rows: list[tuple[str, str, int, int, str, bool]] = []
    aside: list[tuple[str, int, str, str]] = []
    with tar.open_archive(store, shard) as window:
        for sample in _samples(window):
            lost = list(sample.lost_images())
            aside += [(f"{shard}:{name}", -1, shard, _key_ends_early(name)) for name in lost]
            if not sample.names or (lost and sample.image is None):
                continue
            try:
                if sample.fault:
                    raise SampleRejected(sample.fault)
                if sample.key in keys:
                    raise SampleRejected("it occurs twice, or its files are not in sequence; sort the shard by name")
                keys.add(sample.key)
                if sample.image is None:
                    raise SampleRejected(_no_image(sample.names))
                label, (_, offset, size) = sample.label(label_keys), sample.image
            except SampleRejected as reason:
                why = f"the sample {sample.key!r} cannot be used: {reason}"
                aside.append((f"{shard}:{sample.names[0]}", -1, shard, why))
            else:
                rows.append((sample.key, shard, offset, size, str(label), isinstance(label, int)))
    return rows_to_table(rows, INDEX), rows_to_table(aside, SET_ASIDE)


def _samples(window: tar.Window) -> Iterator[_Sample]:
    """Consecutive members with the same name up to the first dot, if images or labels are among them."""
    sample = _Sample("")
    for member in tar.members(window):
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = name.partition(".")
        key = folder + slash + stem
        if key != sample.key:
            if sample.names or sample.dotted:
                yield sample
            sample = _Sample(key)
        sample.add(extension.lower(), member, window)
    if sample.names or sample.dotted:
        yield sample


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _key_ends_early(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.rpartition(".")
    renamed = f"{folder}{slash}{stem.replace('.', '_')}.{extension}"
    return f"its key ends at the first dot (WebDataset's rule); rename it to {renamed!r}, and its label likewise"


def _no_image(names: Sequence[str]) -> str:
    if unread := [name for name in names if _extension(name) in UNREAD_IMAGES]:
        return f"{unread[0]}: {media.IMAGES.others[f'.{_extension(unread[0])}']}"
    return f"it has no image ({', '.join(IMAGES)}); add one"


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
