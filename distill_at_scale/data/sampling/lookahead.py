"""The next draw, made in a thread while the present one is used: a draw is a pure function of what is asked.

What will be asked next is guessed from the past; a wrong guess costs time and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """One call of `Pool.draw`."""

    labels: tuple[int, ...]
    n: int
    purpose: str
    index: tuple[int, ...]

    @property
    def key(self) -> tuple[tuple[int, ...], int, str]:
        return self.labels, self.n, self.purpose


class Foresight:
    """Guesses the next request from those before it: what followed this one last time, at the next index.

    Indices count like an odometer, whose wheels are learned from the first time that each one starts again. A wrong
    guess costs the time of reading it and changes nothing.
    """

    def __init__(self) -> None:
        self.last: Request | None = None
        self.after: dict[Any, Any] = {}
        self.seen: dict[Any, tuple[int, ...]] = {}
        self.limits: dict[tuple[str, int], int] = {}

    def next(self, request: Request) -> Request | None:
        """Take note of a request; the one that will probably follow, or None while nothing is known."""
        if self.last is not None:
            self.after[self.last.key] = request.key
        if (before := self.seen.get(request.key)) is not None:
            self._learn(request.purpose, before, request.index)
        self.seen[request.key] = request.index
        self.last = request
        key = self.after.get(request.key)
        if key is None or key not in self.seen:
            return None
        labels, n, purpose = key
        return Request(labels, n, purpose, self._counted(purpose, self.seen[key]))

    def _learn(self, purpose: str, before: tuple[int, ...], now: tuple[int, ...]) -> None:
        for wheel in range(1, len(now)):
            if now[:wheel] > before[:wheel] and now[wheel] <= before[wheel]:
                self.limits[purpose, wheel] = before[wheel]

    def _counted(self, purpose: str, index: tuple[int, ...]) -> tuple[int, ...]:
        new = list(index)
        for wheel in reversed(range(len(new))):
            if wheel == 0 or new[wheel] < self.limits.get((purpose, wheel), 2**62):
                new[wheel] += 1
                break
            new[wheel] = 0
        return tuple(new)


class Ahead:
    """Answers requests in a thread of its own, which prepares the probably next one meanwhile."""

    def __init__(self, answer: Callable[[Request], Any]):
        self.answer, self.foresight, self.thread = answer, Foresight(), ThreadPoolExecutor(1)
        self.waiting: tuple[Request, Future[Any]] | None = None
        self.hits = self.misses = 0

    def __call__(self, request: Request) -> Any:
        waiting, self.waiting = self.waiting, None
        if waiting is not None and waiting[0] == request:
            self.hits, future = self.hits + 1, waiting[1]
        else:
            if waiting is not None:
                waiting[1].cancel()
            self.misses, future = self.misses + 1, self.thread.submit(self.answer, request)
        following = self.foresight.next(request)
        found = future.result()
        if following is not None:
            self.waiting = following, self.thread.submit(self.answer, following)
        return found
