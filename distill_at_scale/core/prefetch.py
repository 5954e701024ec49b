"""Prefetching: a thread produces the next items while the caller works on the present one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
END = object()


def prefetch(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """Yield the same items in the same order; at most `depth` are queued. An exception is raised at its place."""
    ready: queue.Queue[tuple[object, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: object, error: BaseException | None = None) -> None:
        while not stop.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(END)
        except BaseException as error:
            put(END, error)

    threading.Thread(target=produce, daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is END:
                return
            yield item  # type: ignore[misc]
    finally:
        stop.set()
