"""The lock of a run folder in an object store: one command at a time, by an object with the holder's name and a heartbeat.

A holder counts as dead if its heartbeat does not change for STALE seconds of the waiting command's clock, or if its process
no longer exists on this machine. pyarrow has no conditional write, so two commands that start within SETTLE seconds may both
write; the one that is read back afterwards continues, the other is refused. A command that is cut off for longer than STALE
while another takes over learns this at its next heartbeat; from then on it stores and removes nothing.
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
BEAT = 10.0  # seconds between two heartbeats
STALE = 45.0  # seconds without a heartbeat after which the holder counts as dead
SETTLE = 1.0  # seconds between writing the lock and reading it back
LOOK = 2.0  # seconds between two checks of another holder's heartbeat


class StorageLock:
    """Held between `acquire` and `release`."""

    def __init__(self, store: ObjectStore):
        self.store, self.token, self.beats = store, uuid.uuid4().hex, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def acquire(self) -> None:
        """Raises Busy if another command works in the folder."""
        holder = self._read()
        if holder is not None and not _is_dead(holder):
            who, until = f"process {holder['pid']} on {holder['host']}", time.monotonic() + STALE
            self.store.say(f"{self.store.place()}: waiting up to {STALE:.0f} s for a heartbeat from {who}")
            while time.monotonic() < until:
                time.sleep(LOOK)
                now = self._read()
                if now is None:
                    break
                if now != holder:
                    raise Busy(self._taken(now))
            else:
                self.store.say(f"no heartbeat from {who} for {STALE:.0f} s; taking the lock")
        self._write()
        time.sleep(SETTLE)
        if (self._read() or {}).get("token") != self.token:
            raise Busy(self._taken(self._read()))
        self._thread.start()

    def is_free(self) -> bool:
        """Whether no command works in the folder, without waiting for a heartbeat."""
        holder = self._read()
        return holder is None or _is_dead(holder)

    def release(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(UserError, OSError):
            if (self._read() or {}).get("token") == self.token:
                self.store.delete(NAME)

    def check(self) -> None:
        """Raises Busy if another command has taken the lock."""
        if not self._is_ours():
            raise Busy(f"{self._taken(self._read())} It took the lock while this command sent no heartbeat.")

    def _is_ours(self) -> bool:
        """Fences the store if the lock is lost: another command may have taken it and already released it."""
        if (self._read() or {}).get("token") != self.token:
            self.store.fenced.set()
        return not self.store.fenced.is_set()

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with contextlib.suppress(UserError, OSError):
                if not self._is_ours():
                    return
                self._write(retry_seconds=0.0)  # a late retry could overwrite the lock of another command

    def _read(self) -> dict[str, Any] | None:
        """The holder; None if the lock is free or its object is not valid."""
        content = self.store.read(NAME)
        try:
            holder = json.loads(content or b"{}")
        except (ValueError, RecursionError):
            return None
        kinds = {"host": str, "pid": int, "token": str}
        valid = isinstance(holder, dict) and all(isinstance(holder.get(key), kind) for key, kind in kinds.items())
        return holder if valid else None

    def _write(self, retry_seconds: float | None = None) -> None:
        self.beats += 1
        who = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid()}
        self.store.write(NAME, json.dumps({**who, "token": self.token, "beat": self.beats}).encode(), retry_seconds)

    def _taken(self, holder: dict[str, Any] | None) -> str:
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another command"
        return f"{who} is working in {self.store.place()}; wait for it, or choose another run.dir."


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that no longer exists."""
    if holder.get("machine") != machine():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # a process of another user
        pass
    return False


def machine() -> str:
    """An identifier of this machine's boot and process namespace: equal host names or containers do not share it."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"
