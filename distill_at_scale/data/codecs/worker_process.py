"""Runs a function on untrusted bytes in a child process: a hang, a crash or excessive memory use ends only that process.

Requests and answers (a JSON object and bytes, never pickles) go through a socket pair. A child that misses its deadline is
killed; the next call starts another. A child ends with its parent: it reads end-of-file on its socket, and if it hangs at that
moment, a kernel alarm ends it whatever lock it holds.

Not covered: concurrent calls, limits outside Linux, and a sandbox: an exploited child can read what this user can read.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import pkgutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

if sys.platform == "linux":
    import ctypes
    import resource

Header = dict[str, Any]

LENGTHS = struct.Struct("<QQ")  # of the JSON object and of the bytes that follow it
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from distill_at_scale.data.codecs import worker_process; worker_process.serve()"
)
START_SECONDS = 300.0  # for its imports, on a busy machine with a slow disk
NO_NEW_PRIVILEGES = 38  # prctl's PR_SET_NO_NEW_PRIVS
GRACE = 10  # seconds after the deadline at which a child without a parent ends itself


class WorkerDied(Exception):
    """The child gave no answer. The message says how it ended and continues a sentence about the child.

    `killed`: ended by a SIGKILL that is not ours, usually from the out-of-memory killer.
    """

    def __init__(self, message: str, killed: bool = False):
        super().__init__(message)
        self.killed = killed


class IsolatedFunction:
    """Calls `function` ("package.module:name"; takes and returns a JSON object and bytes) in a child process.

    One call may add `memory` bytes of address space, on top of three times its input. A child that holds more than `resident`
    bytes of memory after a call is replaced, which bounds leaks. A pickled copy starts a child of its own.
    """

    def __init__(self, function: str, memory: int = 4 * 2**30, resident: int = 2**29):
        self.function, self.memory, self.resident = function, memory, resident
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._end: Callable[[], object] = lambda: None

    def __reduce__(self) -> tuple[type, tuple[str, int, int]]:
        return type(self), (self.function, self.memory, self.resident)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def call(self, header: Mapping[str, Any], body: bytes, seconds: float) -> tuple[Header, bytearray]:
        """Raises WorkerDied without an answer within `seconds` or if the child ends; RuntimeError if it cannot start."""
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:  # none yet, or it ended while idle
                    self.close()
                    self._start()
                deadline = time.monotonic() + seconds
                request = {"seconds": seconds, "memory": self.memory, "header": dict(header)}
                text = json.dumps(request).encode()
                for part in (LENGTHS.pack(len(text), len(body)) + text, body):
                    self._connection(deadline).sendall(part)
                reply, data = self._receive(deadline)
                resident, answer = reply["resident"], reply["answer"]
            except TimeoutError:
                self.close()
                raise WorkerDied(f"gave no answer within {seconds:g} s") from None
            except (EOFError, ConnectionError):
                raise self._died() from None
            except BaseException:  # interrupted in the middle of a message
                self.close()
                raise
            if resident > self.resident:
                self.close()
            return answer, data

    def close(self) -> None:
        """Kills the child; the next call starts another."""
        self._end()
        self._process = self._socket = None

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-c", START, json.dumps(sys.path), self.function]
        with theirs:
            pipe = theirs.fileno()
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self._end = weakref.finalize(self, _end, self._process, self._socket)
        try:
            ready, _ = self._receive(time.monotonic() + START_SECONDS)
        except (EOFError, ConnectionError, TimeoutError):
            raise RuntimeError(f"the process for {self.function} cannot start: it {self._died()}") from None
        if "error" in ready:
            self.close()
            raise RuntimeError(f"the process for {self.function} cannot start: {ready['error']}")

    def _died(self) -> WorkerDied:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        code = self._process.poll()
        self.close()
        if code is None:
            return WorkerDied("closed its end of the connection")
        if code >= 0:
            return WorkerDied(f"ended with exit code {code}")
        name = {number.value: number.name for number in signal.Signals}.get(-code, "unknown")
        return WorkerDied(f"died with signal {-code} ({name})", killed=code == -signal.SIGKILL)

    def _receive(self, deadline: float) -> tuple[Header, bytearray]:
        text, body = LENGTHS.unpack(self._read(LENGTHS.size, deadline))
        return json.loads(self._read(text, deadline)), self._read(body, deadline)

    def _read(self, count: int, deadline: float) -> bytearray:
        buffer, done = bytearray(count), 0
        while done < count:
            received = self._connection(deadline).recv_into(memoryview(buffer)[done:])
            if not received:
                raise EOFError
            done += received
        return buffer

    def _connection(self, deadline: float) -> socket.socket:
        """The socket, whose next operation raises TimeoutError at the deadline."""
        assert self._socket is not None
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))  # 0 would mean non-blocking
        return self._socket


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    process.kill()
    process.wait()
    connection.close()


# In the child


def serve() -> None:
    """Answers calls of the function named by the second argument until the input ends."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    if sys.platform == "linux":  # a decoder needs no file to write, no core file and no set-uid programs
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.CDLL(None).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    try:
        function = pkgutil.resolve_name(sys.argv[2])
    except Exception as error:
        return _write(replies, {"error": f"{type(error).__name__}: {error}"}, b"")
    try:
        _write(replies, {}, b"")
        while len(lengths := requests.read(LENGTHS.size)) == LENGTHS.size:
            text_size, body_size = LENGTHS.unpack(lengths)
            text, body = requests.read(text_size), requests.read(body_size)
            if len(text) < text_size or len(body) < body_size:
                return  # the parent ended in the middle of a message
            request = json.loads(text)
            signal.alarm(math.ceil(request["seconds"]) + GRACE)  # no handler: the kernel ends a child that hangs
            if sys.platform == "linux":
                limit = _memory()[0] + request["memory"] + 3 * len(body)
                _, hard = resource.getrlimit(resource.RLIMIT_AS)
                limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
                resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
            answer, data = function(request["header"], body)
            signal.alarm(0)
            _write(replies, {"answer": answer, "resident": _memory()[1]}, data)
    except ConnectionError:
        os._exit(0)  # the parent is gone


def _memory() -> tuple[int, int]:
    """Bytes of address space and of resident memory of this process; 0 outside Linux."""
    if sys.platform != "linux":
        return 0, 0
    with open("/proc/self/statm", encoding="utf-8") as file:
        pages = [int(word) for word in file.read().split()[:2]]
    return pages[0] * mmap.PAGESIZE, pages[1] * mmap.PAGESIZE


def _write(replies: BinaryIO, header: Header, body: bytes) -> None:
    text = json.dumps(header).encode()
    replies.write(LENGTHS.pack(len(text), len(body)) + text)
    replies.write(body)
    replies.flush()
