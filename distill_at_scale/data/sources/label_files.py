"""Text files with the labels of a data set: reading one, and finding them in the folder that the configuration names, in the
root of the data or in their usual subfolders. Each source parses its own format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.storage.filesystem import Store, child_address, is_uri, join_path, redact_uri


@dataclass(frozen=True)
class LabelFile:
    place: str  # the full name, for messages
    content: bytes

    def text(self) -> str:
        """Decodes UTF-8 and drops a byte-order mark; raises UserError if it is not text."""
        try:
            return self.content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{self.place} is not a text file in UTF-8; download it again") from None

    def rows(self) -> list[list[str]]:
        """The words of each line that is not empty; commas count as spaces."""
        return [words for line in self.text().splitlines() if (words := line.replace(",", " ").split())]


@dataclass(frozen=True)
class LabelFiles:
    """The label files of a data set: name -> path in `store`."""

    store: Store
    paths: dict[str, str]

    def read(self, name: str) -> str:
        """The text of a file; raises UserError if it is missing, cannot be read or is not text."""
        place = self.place(name)
        try:
            return LabelFile(place, self.store.read(self.paths[name])).text()
        except (KeyError, FileNotFoundError):
            raise UserError(f"{place} is missing; download it again, or set data.annotations to its folder") from None
        except OSError as error:
            raise UserError(f"{place} cannot be read ({error}); download it again") from None

    def lines(self, name: str) -> Iterator[tuple[int, str]]:
        """(number from 1, stripped line) of each line that is not empty."""
        for number, line in enumerate(self.read(name).split("\n"), 1):
            if line := line.strip():
                yield number, line

    def place(self, name: str) -> str:
        folder = next((path.rpartition("/")[0] for path in self.paths.values()), "")
        return self.store.place(self.paths.get(name, join_path(folder, name)))


def find_label_files(
    config: DataSection, store: Store, pattern: str, example: str, folders: Sequence[str], above: bool = False
) -> LabelFiles:  # fmt: skip
    """Finds the files whose whole names match `pattern`, in `folders` and the top of the first folder that has any.

    Looks in data.annotations if it is set, else in the root of `store` and, with `above`, in the folder that holds the root.
    Raises UserError if there are none, with `example` as a file name.
    """
    if config.annotations is None:
        stores = [store]
        if above:
            address = store.path if is_uri(store.path) else os.path.abspath(os.path.expanduser(store.path))
            with suppress(UserError):  # the folder that holds the root cannot be read
                parent = Store(child_address(address, ".."), store.key)
                parent.names()
                stores.append(parent)
    else:
        address = resolve(store, config.annotations)
        if not is_uri(address) and not os.path.isdir(os.path.expanduser(address)):
            problem = f"data.annotations = {config.annotations!r}: there is no folder {address}"
            raise UserError(f"{problem}; give the folder of the lists, relative to {store.place()} or absolute")
        stores = [Store(address, "data.annotations")]
    for place in stores:
        top = place.names()[0]
        paths: dict[str, str] = {}
        for folder in (*(name for name in folders if name in top), ""):
            for name in place.names(folder)[1]:
                if name not in paths and re.fullmatch(pattern, name):
                    paths[name] = join_path(folder, name)
        if paths:
            return LabelFiles(place, paths)
    problem = f"{stores[0].place()} holds no list such as {example}, nor does a folder {' or '.join(folders)} in it"
    raise UserError(f"{problem}; put the official lists there, or set data.annotations to their folder")


def resolve(store: Store, path: str) -> str:
    """An absolute path or URI unchanged; a relative path below the root of `store`."""
    return path if is_uri(path) or os.path.isabs(os.path.expanduser(path)) else child_address(store.path, path)


def named_file(store: Store, path: str, key: str) -> LabelFile:
    """The file that a configuration key names: absolute, a URI, or relative to the root of the data.

    Raises UserError if it cannot be read (Unreachable is one).
    """
    try:
        if is_uri(path):
            address, question, options = path.partition("?")
            folder, _, name = address.rpartition("/")
            return LabelFile(redact_uri(address), Store(folder + question + options, key).read(name))
        if Path(path).expanduser().is_absolute():
            return LabelFile(path, Path(path).expanduser().read_bytes())
        return LabelFile(store.place(path), store.read(path))
    except OSError as error:
        problem = f"{key} = {redact_uri(path)!r} cannot be read ({error.strerror or error})"
        raise UserError(f"{problem}; give a path relative to {store.place()}, or an absolute one") from None
