"""Which layouts the files of a folder may be: evidence from their names alone, and from the first bytes of a few of them.

`LAYOUTS` holds one test per source, in the order in which `inspect.py` tries them: layouts that special files mark come first,
plain class folders last. A test returns the layout with the reason, or None.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_at_scale.config.explain import nearest
from distill_at_scale.core.errors import UserError
from distill_at_scale.data.sources.base import split_word
from distill_at_scale.data.sources.image import torchvision
from distill_at_scale.data.sources.image.imagenet import CLASS_ORDER, TRAIN
from distill_at_scale.data.sources.media import (
    IMAGE_EXTENSIONS,
    OTHER_IMAGES,
    OTHER_SOUNDS,
    SOUND_EXTENSIONS,
    VIDEO_EXTENSIONS,
)
from distill_at_scale.data.sources.video import something_v2, ucf101
from distill_at_scale.storage.filesystem import Store, is_uri, join_path

SOUNDS = (*SOUND_EXTENSIONS, *OTHER_SOUNDS)
PICTURES = (*IMAGE_EXTENSIONS, *OTHER_IMAGES)
MEDIA = {"image": PICTURES, "video": VIDEO_EXTENSIONS, "sound": SOUNDS}
TARS = (".tar", ".tar.gz", ".tgz")
MAX_OTHERS = 10_000  # paths of files that are no media
HEAD = 4096  # bytes of a list that are read for its first line
WNID = re.compile(r"n\d{8}")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "fine_label", "cls", "digit", "y")


@dataclass(frozen=True)
class Layout:
    """A source that may read the data: why, and keys of the section `data` that differ from their defaults."""

    source: str
    why: str
    keys: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Survey:
    """The files of a folder, counted by folder and ending."""

    store: Store
    counts: Counter[tuple[str, str]]  # (folder, ending in lower case with its dot) -> files
    others: list[str]  # paths of files that are no pictures, videos or sounds, at most MAX_OTHERS

    @classmethod
    def of(cls, store: Store) -> Survey:
        """Lists all files once; opens none. Raises Unreachable if the folder cannot be read."""
        paths, _ = store.table()
        folders = pc.replace_substring_regex(paths, r"/?[^/]*$", "")
        endings = pc.struct_field(pc.extract_regex(paths, r"(?P<ending>(?:\.[Tt][Aa][Rr])?\.[^./]+)$"), "ending")
        endings = pc.utf8_lower(pc.fill_null(endings, ""))
        grouped = (
            pa.table({"folder": folders, "ending": endings})
            .group_by(["folder", "ending"])
            .aggregate([([], "count_all")])
        )
        counts = Counter({(row["folder"], row["ending"]): row["count_all"] for row in grouped.to_pylist()})
        media = pa.array([ending for kind in MEDIA.values() for ending in kind])
        others = paths.filter(pc.invert(pc.is_in(endings, media))).slice(0, MAX_OTHERS).to_pylist()
        return cls(store, counts, others)

    @cached_property
    def endings(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for (_, ending), count in self.counts.items():
            total[ending] += count
        return total

    @cached_property
    def folders(self) -> dict[str, list[str]]:
        """The names of the folders in each folder that has any files below it; "" is the root."""
        names: dict[str, set[str]] = {"": set()}
        for folder, _ in self.counts:
            while folder:
                parent, _, name = folder.rpartition("/")
                names.setdefault(folder, set())
                names.setdefault(parent, set()).add(name)
                folder = parent
        return {folder: sorted(below) for folder, below in names.items()}

    def count(self, kind: str, folder: str = "", below: bool = True) -> int:
        """Files of a medium ("image", "video", "sound") in a folder, with or without its subfolders."""
        start = f"{folder}/" if folder else ""
        return sum(
            count for (place, ending), count in self.counts.items()
            if ending in MEDIA[kind] and (place == folder or (below and f"{place}/".startswith(start)))
        )  # fmt: skip

    def split_folders(self, folder: str = "") -> list[str]:
        """The folders of `folder` that are named like splits."""
        return [name for name in self.folders.get(folder, []) if split_word(name)]

    def named(self, pattern: str) -> list[str]:
        """The other files whose own name matches `pattern` as a whole."""
        return [path for path in self.others if re.fullmatch(pattern, path.rpartition("/")[2], re.IGNORECASE)]

    def first_line(self, path: str) -> str:
        """The first line of a text file, for a look at its columns; "" if it cannot be read."""
        try:
            return self.store.read_range(path, 0, HEAD).decode("utf-8-sig", "replace").partition("\n")[0]
        except OSError:
            return ""


def _torchvision(survey: Survey) -> Layout | None:
    for layout in torchvision.LAYOUTS:
        for path in (join_path(folder, layout.marker) for folder in layout.folders):
            if path in survey.others or f"{path}.gz" in survey.others:
                return Layout("torchvision", f"{path} is a file of torchvision's {layout.name}")
    return None


def _imagenet_tar(survey: Survey) -> Layout | None:
    return Layout("imagenet_tar", f"it holds {TRAIN}") if TRAIN in survey.others else None


def _kinetics(survey: Survey) -> Layout | None:
    lists = survey.named(r".*\.(csv|txt)")[:20]
    path = next((path for path in lists if "youtube_id" in survey.first_line(path).lower()), None)
    if path is None:
        return None
    tars = any(survey.endings[ending] for ending in TARS) and not survey.count("video")
    return Layout("kinetics_tar" if tars else "kinetics", f"{path} lists clips by youtube_id")


def _something_v2(survey: Survey) -> Layout | None:
    lists = survey.named(something_v2.SomethingV2.list_pattern)
    fits = survey.count("video") and any("labels" in path for path in lists) and len(lists) > 1
    return Layout("something_v2", f"{lists[0]} is one of Something-Something's lists") if fits else None


def _ucf101(survey: Survey) -> Layout | None:
    lists = survey.named(re.escape(ucf101.CLASSES))
    return Layout("ucf101", f"{lists[0]} is UCF-101's list of classes") if lists and survey.count("video") else None


def _hmdb51(survey: Survey) -> Layout | None:
    lists = survey.named(r".+_test_split[123]\.txt")
    return Layout("hmdb51", f"{lists[0]} is one of HMDB-51's lists") if lists and survey.count("video") else None


def _tiny_imagenet(survey: Survey) -> Layout | None:
    fits = CLASS_ORDER in survey.others and "train" in survey.folders[""]
    return Layout("tiny_imagenet", f"it holds {CLASS_ORDER} and train/") if fits else None


def _parquet(survey: Survey) -> Layout | None:
    files = [path for path in survey.others if path.endswith(".parquet")]
    if not files:
        return None
    path = next((path for path in files if split_word(path.rpartition("/")[2]) == "train"), files[0])
    try:
        schema = pq.read_schema(survey.store.open_native(path))
    except (pa.ArrowException, OSError):  # the source says what is wrong with the file
        return Layout("parquet", f"it holds {len(files):,} Parquet files")
    features = _features(schema)
    label = next((name for name in schema.names if features.get(name) == "ClassLabel"), None)
    label = label or next((name for name in LABEL_NAMES if name in schema.names), None)
    keys = {} if label in (None, "label") else {"label_column": label}
    is_sound = {name for name in schema.names if features.get(name) == "Audio" or name in ("audio", "sound")}
    for source, key, default, holds in (
        ("parquet", "image_column", "image", _holds_bytes),
        ("tensors", "value_column", "values", _holds_numbers),
    ):
        names = [name for name in schema.names if holds(schema.field(name).type) and name not in is_sound]
        if names:
            name = default if default in names else names[0]
            what = "encoded images" if source == "parquet" else "arrays of numbers"
            other = {} if name == default else {key: name}
            return Layout(source, f"{path} has the column {name!r} with {what}", {**other, **keys})
    return None


def _features(schema: pa.Schema) -> dict[str, str]:
    """Column -> type, as Hugging Face's `datasets` writes them into the schema; empty without them."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: one["_type"] for name, one in features.items() if isinstance(one, dict) and "_type" in one}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_numbers(kind: pa.DataType) -> bool:
    nested = False
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, nested = kind.value_type, True
    if isinstance(kind, pa.FixedShapeTensorType):
        return True
    return nested and (pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _webdataset(survey: Survey) -> Layout | None:
    tars = [path for path in survey.others if path.lower().endswith(".tar")]
    return Layout("webdataset", f"it holds {len(tars):,} tars, such as {tars[0]}") if tars else None


def _imagenet(survey: Survey) -> Layout | None:
    splits = survey.split_folders()
    train = next((name for name in splits if split_word(name) == "train"), None)
    wnids = [name for name in survey.folders.get(train or "", []) if WNID.fullmatch(name)]
    if train is None or not wnids or not survey.count("image", train):
        return None
    flat = [name for name in splits if survey.count("image", name, below=False) and not survey.folders[name]]
    why = f"{train}/ has {len(wnids):,} folders named by WordNet ids"
    return Layout("imagenet", f"{why}, {flat[0]}/ is flat" if flat else why)


def _folders(source: str, kind: str) -> Callable[[Survey], Layout | None]:
    def fits(survey: Survey) -> Layout | None:
        splits = survey.split_folders()
        top = next((name for name in splits if split_word(name) == "train"), "")
        if not top and kind != "image" and splits and not any(
            survey.count(kind, name) for name in survey.folders[""] if name not in splits
        ):  # fmt: skip
            top = splits[0]  # only a test split
        classes = [name for name in survey.folders.get(top, []) if top or name not in splits]
        classes = [name for name in classes if survey.count(kind, join_path(top, name))]
        place = f"{top}/" if top else "its root"
        return Layout(source, f"{place} has {len(classes):,} folders with {kind}s") if classes else None

    return fits


def _audiofolder(survey: Survey) -> Layout | None:
    """Class folders; or names of one form, such as 7_anna_12.wav, of which a part may be the class."""
    folders = _folders("audiofolder", "sound")(survey)
    places = sorted({place for place, ending in survey.counts if ending in SOUNDS})
    if folders is not None and len({place.rpartition("/")[2] for place in places}) > 1:
        return folders
    if survey.count("sound") < max(survey.count("image"), survey.count("video")):
        return folders
    names = [name for place in places for name in survey.store.names(place)[1] if name.lower().endswith(SOUNDS)]
    return _label_in_names(names) or folders


def _label_in_names(names: list[str]) -> Layout | None:
    """The first part, between `_` or `-`, that all names have and that repeats like a class: two files or more of each."""
    for mark in "_-":
        parts = [name.rpartition(".")[0].split(mark) for name in names]
        if len({len(own) for own in parts}) != 1 or len(parts[0]) < 2:
            continue
        counted = [Counter(values) for values in zip(*parts, strict=True)]
        fitting = [place for place, values in enumerate(counted) if len(values) > 1 and min(values.values()) > 1]
        if fitting:
            first = fitting[0]
            shown = "; ".join(
                f"part {place + 1} has {len(counted[place])} values ({', '.join(sorted(counted[place])[:3])}, …)"
                for place in fitting[:3]
            )
            before = f"(?:[^{mark}/]*{mark}){{{first}}}" if first else ""
            after = r"\.\w+$" if first == len(counted) - 1 else f"{mark}[^/]*$"
            why = f"in names such as {names[0]}, {shown}: part {first + 1} is taken as the class by data.label_pattern"
            return Layout("audiofolder", why, {"label_pattern": f"(?:^|/){before}(?P<label>[^{mark}/]+){after}"})
    return None


LAYOUTS: tuple[Callable[[Survey], Layout | None], ...] = (
    _torchvision, _imagenet_tar, _kinetics, _something_v2, _ucf101, _hmdb51, _tiny_imagenet, _parquet, _webdataset,
    _folders("imagefolder", "image"), _imagenet, _folders("videofolder", "video"), _audiofolder,
)  # fmt: skip


def fitting(survey: Survey) -> list[Layout]:
    """The layouts that have evidence, best first.

    A flat val/ rules `imagefolder` out for ImageNet; of class folders with several media, the one with most files comes first.
    """
    layouts = [layout for test in LAYOUTS if (layout := test(survey))]
    kinds = {"imagefolder": "image", "imagenet": "image", "videofolder": "video", "audiofolder": "sound"}
    marked = [layout for layout in layouts if layout.source not in kinds]
    plain = [layout for layout in layouts if layout.source in kinds]
    plain.sort(key=lambda layout: (-survey.count(kinds[layout.source]), not layout.why.endswith("flat")))
    shards = bool(marked) and marked[0].source == "webdataset"
    if shards and plain and survey.count(kinds[plain[0].source]) > survey.endings[".tar"]:
        return plain + marked  # the folder holds archives and what was unpacked from them
    return marked + plain


def open_store(path: str) -> tuple[Store, Layout | None]:
    """The folder of `path`; for a pattern of shards or a single archive also the layout, which reads it as it is.

    Raises UserError for a file that is no data set, and for a path that does not exist, with the nearest name.
    """
    name = path.rstrip("/").rpartition("/")[2]
    local = not is_uri(path)
    if "{" in path or (path.lower().partition("?")[0].endswith(TARS) and not (local and os.path.isdir(path))):
        head = path.partition("{")[0] if "{" in path else path
        folder = head.rpartition("/")[0] or "."
        return Store(folder), None if name == TRAIN else Layout("webdataset", "it names tars")
    if local and os.path.isfile(os.path.expanduser(path)):
        if name.lower().endswith(".parquet"):
            return Store(path.rpartition("/")[0] or "."), None
        raise UserError(f"{path} is a file; give the folder that holds the data (unpack an archive first)")
    if local and not os.path.isdir(os.path.expanduser(path)):
        parent = os.path.dirname(os.path.abspath(os.path.expanduser(path)))
        near = nearest(name, os.listdir(parent) if os.path.isdir(parent) else (), 0.6)
        hint = f"did you mean {os.path.join(parent, near[0])}?" if near else "check the path"
        raise UserError(f"{path} does not exist; {hint}")
    return Store(path), None
