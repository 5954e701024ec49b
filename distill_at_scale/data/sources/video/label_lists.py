"""The lists of labels of a set of videos: where they lie (data.annotations, or their usual places), and their text.

What a line of a list means is for the source to say; `data/sources/image/imagenet_labels.py` does the same for ImageNet's lists.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distill_at_scale.config.sections import DataSection
from distill_at_scale.core.errors import UserError
from distill_at_scale.storage.filesystem import Store, is_uri, joined


@dataclass(frozen=True)
class Lists:
    """The lists of labels of a set: where they lie, and the path of each by its name."""

    store: Store
    paths: dict[str, str]

    def read(self, name: str) -> str:
        """The text of a list in UTF-8, a byte-order mark left out.

        Raises UserError where there is no such list, or where it is no text.
        """
        place = self.place(name)
        try:
            return self.store.read(self.paths[name]).decode("utf-8-sig")
        except (KeyError, FileNotFoundError):
            raise UserError(
                f"{place} is missing; download the lists again, or set data.annotations to their folder"
            ) from None
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"{place} cannot be read as text in UTF-8 ({error}); download it again") from None

    def lines(self, name: str) -> Iterator[tuple[int, str]]:
        """The lines of a list that are not empty, without spaces at their ends, and their numbers from 1."""
        for number, line in enumerate(self.read(name).split("\n"), 1):
            if line := line.strip():
                yield number, line

    def place(self, name: str) -> str:
        """The full name of a list, for messages."""
        folder = next((path.rpartition("/")[0] for path in self.paths.values()), "")
        return self.store.place(self.paths.get(name, joined(folder, name)))


def find_lists(
    config: DataSection, store: Store, pattern: str, example: str, folders: Sequence[str], above: bool = False
) -> Lists:  # fmt: skip
    """The lists whose whole names match `pattern`: in data.annotations, else in the root of `store`, and there in `folders`.

    With `above` they may lie beside the root as well. Raises UserError where there are none, with an example of a name.
    """
    if config.annotations is not None:
        stores = [annotation_folder(config.annotations, store)]
    else:
        stores = [store, *(_parent(store) if above else [])]
    for place in stores:
        top = place.names()[0]
        paths: dict[str, str] = {}
        for folder in (*(name for name in folders if name in top), ""):
            paths |= {
                n: joined(folder, n) for n in place.names(folder)[1] if n not in paths and re.fullmatch(pattern, n)
            }
        if paths:
            return Lists(place, paths)
    raise UserError(
        f"{stores[0].place()} holds no list such as {example}, nor does a folder {' or '.join(folders)} in it; "
        "put the official lists there, or set data.annotations to their folder"
    )


def annotation_folder(path: str, store: Store) -> Store:
    """The folder that data.annotations names: absolute, a URI, or relative to the root of the data.

    Raises UserError where it is none.
    """
    place = inside(store.path, path)
    if not is_uri(place) and not os.path.isdir(os.path.expanduser(place)):
        raise UserError(
            f"data.annotations = {path!r}: there is no folder {place}; give the folder of the lists, relative to "
            f"{store.place()} or absolute"
        )
    return Store(place, "data.annotations")


def inside(root: str, path: str) -> str:
    """A path or URI as it is, or, where it is relative, below a root."""
    if is_uri(path) or os.path.isabs(os.path.expanduser(path)):
        return path
    base, question, query = root.partition("?") if is_uri(root) else (root, "", "")
    path = posixpath.normpath(path)
    return (base if path == "." else f"{base.rstrip('/')}/{path}") + question + query


def _parent(store: Store) -> list[Store]:
    """The folder that the root lies in, if it can be looked at."""
    if is_uri(store.path):
        base, question, query = store.path.partition("?")
        parent = base.rstrip("/").rpartition("/")[0] + question + query
    else:
        parent = os.path.dirname(os.path.abspath(os.path.expanduser(store.path)))
    try:
        found = Store(parent, store.key)
        found.names()
        return [found]
    except UserError:
        return []
