"""One clear error where a cluster is lost: Ray's C++ core then ends the process or waits for ever, and raises nothing.

So the command runs in a copy of this process; this one waits, looks whether the head still answers, and says how it ended.
Left out: nodes and workers that are lost while the head lives, which Ray and `pool.py` make good.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any

from distill_at_scale.core.errors import UserError, WorkersLost

DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
PROBE = 5  # seconds in which a head must answer
LOOK, EVERY = 0.2, 5  # seconds between two looks at the copy, and between two at the head
AWAY = 30  # seconds that a head may be away: more than the start of one that keeps its state elsewhere (Redis) takes
BY_RAY = (1, -signal.SIGABRT)  # how its core ends a process; negative: by a signal


def gone(address: str) -> str:
    """What to tell the user."""
    return f"the Ray cluster at {address} is gone; start it again and give the same command again; what is finished is kept"


def guarded(address: str, body: Callable[[], int]) -> int:
    """Run `body` in a copy of this process and return its exit status.

    Raises UserError where the process ended with its cluster.
    """
    answer, tell = os.pipe()
    with tempfile.TemporaryFile() as native:
        if (pid := os.fork()) == 0:
            os.close(answer)
            os._exit(_copy(body, tell, native))
        os.close(tell)
        ended = _wait(pid, Head(address))
        said = os.read(answer, 1)
        os.close(answer)
        if said:
            return said[0]
        if ended in BY_RAY:
            raise UserError(gone(address))
        native.seek(0)
        sys.stderr.write(native.read().decode(errors="replace"))
    return 128 - ended if ended < 0 else ended


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Whatever is raised because the head does not answer any more becomes a UserError that says so."""
    try:
        yield
    except Exception as error:
        if (isinstance(error, UserError) and not isinstance(error, WorkersLost)) or answers(address):
            raise
        raise UserError(gone(address)) from None


def answers(address: str) -> bool:
    """Whether something listens at host:port; True for any other form of address."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return True
    with contextlib.suppress(OSError, ValueError, OverflowError), socket.create_connection((host, int(port)), PROBE):
        return True
    return False


class Head:
    """A cluster's head, once it has answered."""

    def __init__(self, address: str):
        self.address, self.looked = address, time.monotonic()
        self.seen = self.looked if answers(address) else None

    def lost(self) -> bool:
        """Whether it has not answered for too long; one that never did is reported by who connects to it."""
        now = time.monotonic()
        if now - self.looked > EVERY:
            self.looked = now
            if answers(self.address):
                self.seen = now
        return self.seen is not None and self.looked - self.seen > AWAY


def _copy(body: Callable[[], int], tell: int, native: IO[bytes]) -> int:
    """In the copy; what native code writes to the terminal is kept apart, and shown only where it ends the process."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(native.fileno(), 2)
    threading.Thread(target=_end_with_node, daemon=True).start()
    try:
        status = body()
    except SystemExit as error:  # after SIGTERM
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(tell, bytes([status & 0xFF]))
    return status


def _end_with_node() -> None:
    """End this process when the head does not know its node any more: one that was started anew, without its state.

    What waits for that head would wait for ever. A head that is away holds this up; `Head` sees that.
    """
    while True:
        time.sleep(EVERY)
        ray: Any = sys.modules.get("ray")
        with contextlib.suppress(Exception):
            if ray is not None and ray.is_initialized():
                here = ray.get_runtime_context().get_node_id()
                if here not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
                    os.abort()


def _wait(pid: int, head: Head) -> int:
    """The exit status of the copy, negative where a signal ended it; what would end this process ends the copy.

    Raises UserError where the head was away for too long; the copy is ended then.
    """

    def pass_on(number: int, frame: object) -> None:
        if number != signal.SIGINT or not sys.stdin.isatty():  # a terminal sends Ctrl-C to both
            os.kill(pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            time.sleep(LOOK)
            if head.lost():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise UserError(gone(head.address))
        return os.waitstatus_to_exitcode(ended[1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
