"""Reports a lost cluster as one clear error. Ray's C++ core would end the process or wait forever, without an exception.

The command runs in a forked child. The parent waits, checks that the head still answers, and reports how the child ended.
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
LOOK, EVERY = 0.2, 5  # seconds between two checks of the child, and of the head
AWAY = 30  # seconds without an answer after which a head is lost; a head with external state (Redis) restarts faster
BY_RAY = (1, -signal.SIGABRT)  # exit codes with which Ray's core ends a process; negative: a signal


def gone(address: str) -> str:
    return f"the Ray cluster at {address} is gone; start it again and repeat the command; finished work is kept"


def guarded(address: str, body: Callable[[], int]) -> int:
    """Run `body` in a forked child and return its exit status.

    Raises UserError if the child ended because the cluster was lost.
    """
    status_in, status_out = os.pipe()
    with tempfile.TemporaryFile() as native:
        if (pid := os.fork()) == 0:
            os.close(status_in)
            os._exit(_child(body, status_out, native))
        os.close(status_out)
        ended = _wait(pid, Head(address))
        status = os.read(status_in, 1)
        os.close(status_in)
        if status:
            return status[0]
        if ended in BY_RAY:
            raise UserError(gone(address))
        native.seek(0)
        sys.stderr.write(native.read().decode(errors="replace"))
    return 128 - ended if ended < 0 else ended


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn an error into a UserError about the lost cluster if the head no longer answers."""
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
    """Tracks when a cluster's head last answered."""

    def __init__(self, address: str):
        self.address, self.checked = address, time.monotonic()
        self.answered = self.checked if answers(address) else None

    def lost(self) -> bool:
        """Whether it stopped answering for longer than AWAY; a head that never answered is reported on connecting."""
        now = time.monotonic()
        if now - self.checked > EVERY:
            self.checked = now
            if answers(self.address):
                self.answered = now
        return self.answered is not None and self.checked - self.answered > AWAY


def _child(body: Callable[[], int], status_out: int, native: IO[bytes]) -> int:
    """Runs in the child. Terminal output of native code goes to `native`; the parent shows it only if it ended the child."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    encoding, errors = getattr(sys.stderr, "encoding", None), getattr(sys.stderr, "errors", None)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=encoding, errors=errors)
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
    os.write(status_out, bytes([status & 0xFF]))
    return status


def _end_with_node() -> None:
    """Abort this process when the head no longer knows its node: the head restarted without its state.

    Calls to such a head would wait forever. While a head does not answer this thread waits; `Head` detects that case.
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
    """The exit status of the child, negative if a signal ended it. Signals to this process go to the child.

    Raises UserError, after ending the child, if the head is lost.
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
