"""Reads the next draw in a thread of its own while the present one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class DrawRequest:
    """The arguments of one `ClassSampler.draw`: `n` samples of each of `labels`; `purpose` and `index` seed the draw."""

    labels: tuple[int, ...]
    n: int
    purpose: str
    index: tuple[int, ...]


class Lookahead(Generic[T]):
    """Answers draw requests one at a time in one thread, and the next scheduled one in advance.

    A request that is not the next scheduled one is answered when it arrives and leaves the schedule as it is. An
    exception raised while reading in advance is raised by the call that asks for that draw.
    """

    def __init__(self, answer: Callable[[DrawRequest], T]):
        self.answer, self.thread = answer, ThreadPoolExecutor(1)
        self.scheduled: Iterator[DrawRequest] = iter(())
        self.next: tuple[DrawRequest, Future[T]] | None = None
        self.hits = self.misses = 0

    def schedule(self, requests: Iterable[DrawRequest]) -> None:
        """Replace the schedule by the coming requests, in the order of the calls; `requests` may be endless."""
        self.scheduled = iter(requests)
        self._start_next()

    def change(self, change: Callable[[], None]) -> None:
        """Change what is read, in the thread that reads; what was read in advance is read again."""
        self.thread.submit(change).result()
        if self.next is not None:
            self.next = self.next[0], self.thread.submit(self.answer, self.next[0])

    def __call__(self, request: DrawRequest) -> T:
        if self.next is None or self.next[0] != request:
            self.misses += 1
            return self.thread.submit(self.answer, request).result()
        self.hits, future = self.hits + 1, self.next[1]
        self._start_next()
        return future.result()

    def _start_next(self) -> None:
        request = next(self.scheduled, None)
        self.next = None if request is None else (request, self.thread.submit(self.answer, request))
