"""Observers of a run: the contract, and how events reach all of them without any of them being able to end the run."""

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
        """Take an event in; may raise whatever goes wrong."""

    def close(self) -> None:
        """The command ends, well or not."""


class Observers:
    """Everyone who watches a run; one that fails is left out from then on, and that is said once."""

    def __init__(self, say: Callable[[str], None], observers: Iterable[Observer] = ()):
        self.say, self.all = say, list(observers)
        self.stage = ""  # where events that name none belong

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
        except Exception as error:  # watching is never worth a run
            self.all.remove(observer)
            reason = CREDENTIALS.sub("://", str(error)) or type(error).__name__
            self.say(f"  {observer.name} is left out from here on: {reason}")
