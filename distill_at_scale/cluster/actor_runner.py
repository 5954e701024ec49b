"""A pool of warm actors that call any importable function: many small pieces of work without a process start each.

Actors have one thread and a core (or the GPU share of a worker) each. They are started when they are first needed, stay for
the whole command, and give their cores back while the ordinary executor works on the same Ray. A lost actor is replaced and
its call made again, at most `cluster.max_failures` times. Left out: what the functions do (`experiments/points.py` says it).
"""

from __future__ import annotations

import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import ray
import ray.exceptions

from distill_at_scale.cluster.actor_pool import LOST, actor_count, check_gpus
from distill_at_scale.cluster.executor import RayExecutor
from distill_at_scale.cluster.session import Session, root_cause
from distill_at_scale.config.load import Config
from distill_at_scale.core.errors import UserError

Call = tuple[int, Any]  # the number of a call, and the actor that makes it


class ActorRunner:
    """Connects to Ray when it is first used, and ends what it started; use it as a context."""

    def __init__(self, config: Config, say: Callable[[str], None]):
        self.config, self.say = config, say
        self._session: Session | None = None
        self._idle: list[Any] = []
        self._busy: dict[Any, Call] = {}  # by the reference of the result

    def map(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Mapping[str, Any]],
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Call function(**a) for every a of `arguments`; yields (index, result) as they come.

        What the function raises is raised here as it was, after which no further call is begun. Raises UserError where a
        call lost its actor too often; `names` say what each call is there.
        """
        self._connect()
        waiting, losses = deque(range(len(arguments))), Counter[int]()
        try:
            while waiting or self._busy:
                while waiting and (actor := self._free_actor()):
                    index = waiting.popleft()
                    self._busy[actor.call.remote(function, dict(arguments[index]))] = (index, actor)
                finished, _ = ray.wait(list(self._busy))
                index, actor = self._busy.pop(finished[0])
                try:
                    result = ray.get(finished[0])
                except LOST as error:
                    losses[index] += 1
                    if losses[index] > self.config.cluster.max_failures:
                        raise UserError(
                            _gave_up(names[index] if names else f"call {index}", losses[index], error)
                        ) from None
                    waiting.appendleft(index)
                    continue
                except ray.exceptions.RayTaskError as error:
                    self._idle.append(actor)
                    cause = root_cause(error)
                    raise cause if isinstance(cause, UserError | OSError) else error from None
                self._idle.append(actor)
                yield index, result
        finally:
            self._drop_busy()

    def executor(self) -> RayExecutor:
        """The ordinary executor on the same Ray; the actors make room for it and come back with the next call of `map`."""
        self._connect()
        self._release()
        return RayExecutor(self.config, self.say)

    def close(self) -> None:
        """End the actors, and Ray where this pool has started it."""
        if self._session is not None:
            self._drop_busy()
            self._release()
            self._session.close()
            self._session = None

    def __enter__(self) -> ActorRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> None:
        if self._session is None:
            self._session = Session(self.config.cluster, self.say)
            check_gpus(self.config.cluster)
            self._size = actor_count(self.config, self.config.cluster.gpus_per_worker)

    def _free_actor(self) -> Any:
        """An actor that waits, a new one while there is room, else None."""
        if self._idle:
            return self._idle.pop()
        if len(self._busy) >= self._size:
            return None
        gpus = self.config.cluster.gpus_per_worker
        # the pool replaces and repeats, not Ray, so that it can count
        actor: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Warm)
        return actor.remote([entry or os.getcwd() for entry in sys.path])

    def _drop_busy(self) -> None:
        """Actors whose result nobody waits for any more."""
        for _, actor in self._busy.values():
            ray.kill(actor)
        self._busy.clear()

    def _release(self) -> None:
        for actor in self._idle:
            ray.kill(actor)
        self._idle.clear()


class _Warm:
    def __init__(self, path: list[str]):
        """Modules are found as in the driver, after the worker's own."""
        import torch

        sys.path.extend(entry for entry in path if entry not in sys.path)
        torch.set_num_threads(1)

    def call(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        return function(**arguments)


def _gave_up(name: str, times: int, error: BaseException) -> str:
    return (
        f"{name}: its worker was lost {times} times ({str(error).splitlines()[0]}). What is finished is kept: give the same "
        "command again, with fewer cluster.actors if the workers ran out of memory"
    )
