"""Observers of a run: their contract, and the dispatch of events to all of them. No observer can end the run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from distill_at_scale.core.events import Event

CREDENTIALS = re.compile(r"://\S*@")  # of addresses, which trackers name in full when they cannot be reached


class Observer(Protocol):
    name: str  # in messages

    def __call__(self, event: Event) -> None:
        """Take an event; may raise anything."""

    def close(self) -> None:
        """Called at the end of the command, successful or not."""


class Observers:
    """All observers of a run. One that fails is removed, with one message."""

    def __init__(self, say: Callable[[str], None], observers: Iterable[Observer] = ()):
        self.say, self.all = say, list(observers)
        self.stage = ""  # of events that name none

    def add(self, observer: Observer) -> None:
        self.all.append(observer)

    def emit(self, event: Event) -> None:
        event = event if event.stage else replace(event, stage=self.stage)
        for observer in list(self.all):
            self._guarded(observer, lambda observer=observer: observer(event))  # type: ignore[misc]

    def close(self) -> None:
        for observer in list(self.all):
            self._guarded(observer, observer.close)
        self.all.clear()

    def _guarded(self, observer: Observer, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a failing observer must not end the run
            self.all.remove(observer)
            reason = CREDENTIALS.sub("://", str(error)) or type(error).__name__
            self.say(f"  {observer.name} is switched off: {reason}")
