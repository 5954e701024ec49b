"""Processes that help this one with long units of work, on the cores that other programs leave free.

A helper starts when the work has lasted as long as the start of a helper takes. It gets a pickled task; units and results go
through pipes. Helpers end with this process. If a helper is lost, this process repeats its unit.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable

from distill_at_scale.core.environment import busy_seconds
from distill_at_scale.core.errors import UserError
from distill_at_scale.core.events import Emit, Event, TimeSpent
from distill_at_scale.pipeline.executors.base import Result, Task, Unit

START = 4.0  # seconds that a helper takes to start, at most twice as long on a busy machine
COMMAND = "from distill_at_scale.pipeline.executors import helpers; helpers.serve()"
Say = Callable[[str], None]


class Helpers:
    """The helpers of one task. `pending` holds the units that nobody works on; this process takes from it, too."""

    def __init__(self, task: Task, pending: collections.deque[Unit], most: int, threads: int, cores: int, say: Say):
        """At most `most` helpers with `threads` threads each, on a machine where this process may use `cores` cores."""
        self.task, self.pending, self.most, self.threads, self.cores = task, pending, most, threads, cores
        self.say, self.finished = say, 0  # units that this process finished
        self._results: queue.SimpleQueue[tuple[Result, Event] | BaseException | str] = queue.SimpleQueue()
        self._ended, self._busy, self._lock = threading.Event(), 0, threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._start, daemon=True)
        self._thread.start()

    @property
    def working(self) -> bool:
        """Whether a helper works on a unit, or its result was not collected."""
        return self._busy > 0 or not self._results.empty()

    def collect(self, done: Callable[[Result], None], emit: Emit) -> None:
        """Deliver the results that have arrived. Raises the error of a unit."""
        while not self._results.empty():
            result = self._results.get()
            if isinstance(result, BaseException):
                raise result
            if isinstance(result, str):
                self.say(f"  {result}")
                continue
            emit(result[1])
            done(result[0])

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        with self._lock:
            for process in self._processes:
                process.kill()
                process.wait()

    def _start(self) -> None:
        """Start as many helpers as there are free cores, if enough work is left."""
        before, own = busy_seconds(), time.process_time()
        if self._ended.wait(START):
            return
        seconds, own, after = time.monotonic() - self._began, time.process_time() - own, busy_seconds()
        left = len(self.pending) * seconds / max(1, self.finished)
        if left < START:
            return
        others = max(0.0, (after - before - own) / seconds) if before is not None and after is not None else 0.0
        count = min(self.most, len(self.pending), int((self.cores - others + 0.3) / self.threads) - 1)
        used = f"other programs use {others:.1f} of {self.cores} cores"
        if count < 1:
            self._results.put(f"{self.task.worker.name}: in one process, because {used}")
            return
        each = "one thread" if self.threads == 1 else f"{self.threads} threads"
        self._results.put(f"{self.task.worker.name}: in {count + 1} processes with {each} each; {used}")
        for _ in range(count):
            threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        """Start one helper, and give it units until none is pending."""
        with self._lock:
            if self._ended.is_set():
                return
            process = start(self.task, self.threads)
            self._processes.append(process)
        assert process.stdout is not None
        unit = self._next()
        try:
            while unit is not None:
                ask(process, unit)
                self._results.put(pickle.load(process.stdout))
                self._release()
                unit = self._next()
        except Exception:  # the helper ended, or its answer cannot be unpickled here
            process.kill()
            code = process.wait()
            if not self._ended.is_set() and unit is not None:
                self.pending.append(unit)
                self._results.put(f"a process ended with exit code {code}; its work is done again in this process")
                self._release()

    def _next(self) -> Unit | None:
        with self._lock:
            if self._ended.is_set() or not self.pending:
                return None
            self._busy += 1
            return self.pending.popleft()

    def _release(self) -> None:
        with self._lock:
            self._busy -= 1


def start(task: Task, threads: int) -> subprocess.Popen[bytes]:
    """A process that works on units of a task: it takes pickled units on its input, and answers (result, event) or an
    exception for each.
    """
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {COMMAND}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    pickle.dump((task.config.model_dump(), task.worker, dict(task.paths), threads), process.stdin)
    process.stdin.flush()
    return process


def ask(process: subprocess.Popen[bytes], unit: Unit) -> None:
    """Send a unit to a helper."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, as `answer` says
        pickle.dump(unit, process.stdin)
        process.stdin.flush()


def answer(process: subprocess.Popen[bytes]) -> tuple[Result, Event] | Exception:
    """Wait for the result of the next unit that a helper has: the result, or the error that the unit raised.

    Raises UserError if the helper has ended.
    """
    assert process.stdout is not None
    try:
        given: tuple[Result, Event] | Exception = pickle.load(process.stdout)
    except EOFError:
        why = "; perhaps the memory is too small" if process.wait() == -signal.SIGKILL else ""
        ended = f"a process that was started here has ended with exit code {process.returncode}{why}"
        raise UserError(f"{ended}; free memory and run the same command again") from None
    return given


def serve() -> None:
    """The body of a helper: reads units, and writes (result, event) or an exception for each."""
    import torch

    from distill_at_scale.config.load import Config

    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    values, kind, paths, threads = pickle.load(requests)
    units: queue.SimpleQueue[Unit] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                units.put(pickle.load(requests))
        except (EOFError, OSError, pickle.UnpicklingError):
            os._exit(0)  # the parent ended

    threading.Thread(target=receive, daemon=True).start()
    torch.set_num_threads(threads)
    worker = None
    while True:
        unit, began = units.get(), time.time()
        answer: bytes
        try:
            if worker is None:
                worker = kind(Config.model_validate(values), paths, torch.device("cpu"), TimeSpent())
            (result,) = worker.run([unit])
            event = Event("work", worker.event, began, time.time(), values=worker.counts(result))
            answer = pickle.dumps((result, event))
        except Exception as error:
            answer = pickled_error(error)
        replies.write(answer)
        replies.flush()


def pickled_error(error: Exception) -> bytes:
    """An error for another process; one that cannot be unpickled there becomes a RuntimeError with its traceback."""
    try:
        pickle.loads(answer := pickle.dumps(error))
        return answer
    except Exception:
        return pickle.dumps(RuntimeError("".join(traceback.format_exception(error))))
