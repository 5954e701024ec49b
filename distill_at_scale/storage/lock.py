"""One command at a time in a run folder on object storage, by a file that names who works there and that beats.

Who holds it is dead when the beat has not changed for STALE seconds of the watcher's own clock, or when its process is gone
from this very machine. Object storage gives pyarrow no conditional write, so two commands that start within the same
SETTLE seconds may both write; the one whose name is read afterwards stays, and the other is refused. Should a command be
cut off for longer than STALE and another take over, it finds so at its next beat, and stores and removes nothing any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from distill_at_scale.core.errors import Busy, UserError
from distill_at_scale.storage.object_store import ObjectStore

NAME = ".lease.json"
BEAT = 10.0  # seconds between two beats
STALE = 45.0  # seconds without one, after which the holder is taken to be dead
SETTLE = 1.0  # seconds between writing one's name and reading it back
LOOK = 2.0  # seconds between two looks at another's beat


class StorageLock:
    """Held between `take` and `release`."""

    def __init__(self, bucket: ObjectStore):
        self.bucket, self.token, self.beats = bucket, uuid.uuid4().hex, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def take(self) -> None:
        """Raises Busy where another command is at work in the folder."""
        holder = self._read()
        if holder is not None and not _is_dead(holder):
            self._watch(holder)
        self._write()
        time.sleep(SETTLE)
        if (self._read() or {}).get("token") != self.token:
            raise Busy(self._taken(self._read()))
        self._thread.start()

    def is_free(self) -> bool:
        """Whether nobody is at work in the folder, as far as can be seen at once."""
        holder = self._read()
        return holder is None or _is_dead(holder)

    def release(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(UserError, OSError):
            if (self._read() or {}).get("token") == self.token:
                self.bucket.delete(NAME)

    def check(self) -> None:
        """Raises Busy where another command has taken the folder over."""
        if not self._is_ours():
            raise Busy(f"{self._taken(self._read())} It took over while this one could not be seen to live.")

    def _is_ours(self) -> bool:
        """Where it is not any more, nothing more is stored: another command may be done already, and its name gone."""
        if (self._read() or {}).get("token") != self.token:
            self.bucket.barred.set()
        return not self.bucket.barred.is_set()

    def _watch(self, holder: dict[str, Any]) -> None:
        """Until the holder is seen to be dead; raises Busy as soon as it is seen to live."""
        who, until = _name(holder), time.monotonic() + STALE
        self.bucket.say(f"{self.bucket.place()}: waiting at most {STALE:.0f} s for a sign of life of {who}")
        while time.monotonic() < until:
            time.sleep(LOOK)
            now = self._read()
            if now is None:
                return
            if now != holder:
                raise Busy(self._taken(now))
        self.bucket.say(f"{who} gave none; taking over")

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with contextlib.suppress(UserError, OSError):
                if not self._is_ours():
                    return
                self._write(patience=0.0)  # a beat that is tried again may come when another has taken over

    def _read(self) -> dict[str, Any] | None:
        """Who holds it; None where nobody does, and where the file says nothing of the kind."""
        content = self.bucket.read(NAME)
        try:
            found = json.loads(content or b"{}")
        except (ValueError, RecursionError):
            return None
        kinds = {"host": str, "pid": int, "token": str}
        known = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items())
        return found if known else None

    def _write(self, patience: float | None = None) -> None:
        self.beats += 1
        who = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid()}
        self.bucket.write(NAME, json.dumps({**who, "token": self.token, "beat": self.beats}).encode(), patience)

    def _taken(self, holder: dict[str, Any] | None) -> str:
        who = _name(holder) if holder else "another command"
        return f"{who} is working in {self.bucket.place()}; wait for it, or choose another run.dir."


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether it is a process of this machine that is gone."""
    if holder.get("machine") != machine():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def machine() -> str:
    """What tells this machine from others of the same name, and its processes from those that a container hides from them."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"
