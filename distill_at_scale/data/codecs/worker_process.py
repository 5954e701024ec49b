"""A function in a process of its own: one that hangs, crashes or asks for all memory takes down nothing but that process.

One child per `Isolated`, started when first needed. Requests and answers (a JSON object and bytes) go through pipes; video
frames of a clip are so few bytes that shared memory would gain nothing. No answer in time: the child is killed; the next
call starts another. A child ends when its parent does: it reads the end of its input, and where it hangs at that moment,
an alarm of the kernel ends it, which works whatever lock it holds. It writes nothing to the terminal.

Left out: more than one call at a time, limits where the system is not Linux, and a sandbox: whoever takes the child over may
read what this user may read.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

Header = dict[str, Any]
Function = Callable[[Header, bytes], tuple[Header, bytes]]

LENGTHS = struct.Struct("<QQ")  # of the JSON object and of the bytes that follow it
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from distill_at_scale.data.codecs import worker_process as w; w.serve()"
START_SECONDS = 300.0  # for its imports, on a busy machine with a slow disk
NO_NEW_PRIVILEGES = 38  # of prctl
GRACE = 10  # seconds after which a child whose parent is gone ends itself
AT_ONCE = 2**20  # bytes of one write


class Died(Exception):
    """The child gave no answer; the message says how it ended, as the end of a sentence about it.

    `killed`: by SIGKILL and not by us, so by the system in want of memory, or by a person.
    """

    def __init__(self, message: str, killed: bool = False):
        super().__init__(message)
        self.killed = killed


class Isolated:
    """`function` ("package.module:name"; takes and returns a JSON object and bytes), called in a child process.

    `memory`: bytes of address space that one call may add, besides three times the bytes it is given. `resident`: a child
    that keeps more bytes of memory than these after a call is replaced, so leaks have an end. Can be pickled: the copy
    starts a child of its own.
    """

    def __init__(self, function: str, memory: int = 4 * 2**30, resident: int = 2**29):
        self.function, self.memory, self.resident = function, memory, resident
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def __reduce__(self) -> tuple[type, tuple[str, int, int]]:
        return type(self), (self.function, self.memory, self.resident)

    @property
    def pid(self) -> int | None:
        """Of the child, while there is one."""
        return None if self._process is None else self._process.pid

    def call(self, header: Mapping[str, Any], body: bytes, seconds: float) -> tuple[Header, bytearray]:
        """Raises Died if there is no answer within `seconds` or the child ends; RuntimeError if it cannot start."""
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:  # none yet, or it ended while idle
                    self.close()
                    self._start()
                deadline = time.monotonic() + seconds
                self._send({"seconds": seconds, "memory": self.memory, "header": dict(header)}, body, deadline)
                answer, data = self._receive(deadline)
                resident, found = answer["resident"], answer["answer"]
            except TimeoutError:
                self.close()
                raise Died(f"gave no answer within {seconds:g} s") from None
            except (EOFError, BrokenPipeError):
                raise self._died() from None
            except BaseException:  # interrupted in the middle of a message
                self.close()
                raise
            if resident > self.resident:
                self.close()
            return found, data

    def close(self) -> None:
        """Kills the child; the next call starts another."""
        self._end()
        self._process = None

    def _start(self) -> None:
        command = [sys.executable, "-P", "-c", START, json.dumps(sys.path), self.function]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = process = subprocess.Popen(command, bufsize=0, **pipes)  # type: ignore[call-overload]
        self._end = weakref.finalize(self, _end, process)
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        try:
            ready, _ = self._receive(time.monotonic() + START_SECONDS)
        except (EOFError, TimeoutError):
            raise RuntimeError(f"the process for {self.function} cannot start: it {self._died()}") from None
        if "error" in ready:
            self.close()
            raise RuntimeError(f"the process for {self.function} cannot start: {ready['error']}")

    def _died(self) -> Died:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        code = self._process.poll()
        self.close()
        if code is None:
            return Died("closed its end of the pipe")
        how = f"died with signal {-code} ({_signal_name(-code)})" if code < 0 else f"ended with exit code {code}"
        return Died(how, killed=code == -signal.SIGKILL)

    def _send(self, header: Header, body: bytes, deadline: float) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        text, pipe = json.dumps(header).encode(), self._process.stdin.fileno()
        for part in (LENGTHS.pack(len(text), len(body)) + text, body):
            view = memoryview(part)
            while view:
                _wait(pipe, select.POLLOUT, deadline)
                with contextlib.suppress(BlockingIOError):
                    view = view[os.write(pipe, view[:AT_ONCE]) :]

    def _receive(self, deadline: float) -> tuple[Header, bytearray]:
        text, body = LENGTHS.unpack(self._read(LENGTHS.size, deadline))
        return json.loads(self._read(text, deadline)), self._read(body, deadline)

    def _read(self, count: int, deadline: float) -> bytearray:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe, buffer, done = self._process.stdout.fileno(), bytearray(count), 0
        while done < count:
            _wait(pipe, select.POLLIN, deadline)
            with contextlib.suppress(BlockingIOError):
                got = os.readv(pipe, [memoryview(buffer)[done:]])
                if not got:
                    raise EOFError
                done += got
        return buffer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _wait(pipe: int, event: int, deadline: float) -> None:
    """Returns when the pipe is ready or closed at its other end. Raises TimeoutError."""
    waiting = select.poll()
    waiting.register(pipe, event)
    if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


# In the child


def serve() -> None:
    """Answers calls of the function named by the second argument until the input ends."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the parent's business
    _give_up_rights()
    try:
        function = _resolve(sys.argv[2])
    except Exception as error:
        return _write(replies, {"error": f"{type(error).__name__}: {error}"}, b"")
    try:
        _write(replies, {}, b"")
        while (message := _message(requests)) is not None:
            _write(replies, *_answer(function, *message))
    except BrokenPipeError:
        os._exit(0)  # the parent is gone


def _resolve(name: str) -> Function:
    module, _, attribute = name.partition(":")
    found: Function = getattr(importlib.import_module(module), attribute)
    return found


def _answer(function: Function, request: Header, body: bytes) -> tuple[Header, bytes]:
    signal.alarm(math.ceil(request["seconds"]) + GRACE)  # not caught: the kernel ends a child that hangs for good
    _limit_memory(request["memory"] + 3 * len(body))
    answer, data = function(request["header"], body)
    signal.alarm(0)
    return {"answer": answer, "resident": _memory()[1]}, data


def _memory() -> tuple[int, int]:
    """Bytes of address space, and of memory, that this process has; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0, 0
    with open("/proc/self/statm") as file:
        pages = [int(word) for word in file.read().split()[:2]]
    return pages[0] * mmap.PAGESIZE, pages[1] * mmap.PAGESIZE


def _give_up_rights() -> None:
    """What a decoder never needs: files to write, core files, and the rights of programs that belong to others."""
    if sys.platform != "linux":
        return
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def _limit_memory(more: int) -> None:
    """So much address space may be added to what the process has now."""
    if sys.platform != "linux":
        return
    import resource

    now = _memory()[0]
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + more if hard == resource.RLIM_INFINITY else min(now + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _message(requests: BinaryIO) -> tuple[Header, bytes] | None:
    lengths = requests.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    text, body = LENGTHS.unpack(lengths)
    header, raw = requests.read(text), requests.read(body)
    return (json.loads(header), raw) if len(header) + len(raw) == text + body else None


def _write(replies: BinaryIO, header: Header, body: bytes) -> None:
    text = json.dumps(header).encode()
    replies.write(LENGTHS.pack(len(text), len(body)) + text)
    replies.write(body)
    replies.flush()
