"""Connects to Ray: starts it on this machine, joins a running cluster, or uses the current connection."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill_at_scale.config.infrastructure import ClusterSection
from distill_at_scale.config.load import Config
from distill_at_scale.core.environment import usable_cores
from distill_at_scale.core.errors import UserError
from distill_at_scale.storage.run_dir import RunDir

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under `uv run`, workers use this same environment
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # the C++ core bypasses Python's stderr; its log files keep all

import ray
import ray.exceptions
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

TOKEN = "if it requires a token, set RAY_AUTH_MODE=token and put it into ~/.ray/auth_token (or the file of RAY_AUTH_TOKEN_PATH)"
OPEN = "  warning: this Ray requires no token: everyone who reaches its ports can run code; start it with RAY_AUTH_MODE=token"
SOCKET_BYTES = 103  # in the path of a Unix socket, on every system
SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # the longest one below Ray's folder
OBJECT_STORE_BYTES = 2 * 2**30  # enough, because lists of samples travel through it, not pixels


PRELOADED = ["distill_at_scale.pipeline.executors.tasks"]  # modules that workers import while the driver starts
PRELOADING_CORES = (
    16  # Ray starts a process per core at once; on larger machines, those that get work import the modules
)


class Session:
    """Ray for the duration of one command."""

    def __init__(self, config: ClusterSection, say: Callable[[str], None]):
        self.config, self.say = config, say
        self.started = not ray.is_initialized()
        self.local = False  # whether it started a Ray of its own on this machine
        self.cleanup = contextlib.ExitStack()  # ends what the session started: Ray, and its token in the environment
        if self.started:
            with contextlib.ExitStack() as stack:
                self.cleanup = stack
                self._start()
                self.cleanup = stack.pop_all()
        quieten()

    def close(self) -> None:
        """Shut Ray down if this session started it."""
        if self.started:
            self.cleanup.close()
            self.started = False

    def _start(self) -> None:
        address = self.config.address or os.environ.get("RAY_ADDRESS")
        if address and "://" in address:
            raise UserError(
                f"{address} (cluster.address or RAY_ADDRESS) is an address for Ray clients, but the stages need a driver on "
                "the cluster: give HOST:PORT of its head on one of its machines, or "
                "`ray job submit -- python jobs/pipeline.py CONFIG`"
            )
        address = self.config.address or ("auto" if address else None)  # None: start Ray on this machine
        logging.getLogger("ray").setLevel(logging.ERROR)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            memory = min(OBJECT_STORE_BYTES, int(0.2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
            configured = self.config.object_store_mb
            options["include_dashboard"] = False
            options["object_store_memory"] = configured * 2**20 if configured else memory
            options["_temp_dir"] = ray_folder()
            if usable_cores() <= PRELOADING_CORES:
                options["_system_config"] = {"preload_python_modules": PRELOADED}
            self.cleanup.enter_context(token_in_environment())
        self.local = address is None
        self.say("starting Ray on this machine" if self.local else f"connecting to Ray at {address}")
        self.cleanup.callback(ray.shutdown)
        try:
            with _silent_stderr(), _interrupted_afterwards() if self.local else contextlib.nullcontext():
                ray.init(address=address or "local", **options)
        except (OSError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            if address is None:
                advice = "set cluster.address=none to run in this process without Ray"
                raise UserError(f"Ray cannot start on this machine: {error}; {advice}") from None
            raise UserError(f"cannot reach Ray (cluster.address = {self.config.address!r}): {error}; {TOKEN}") from None
        if not is_token_auth_enabled():
            self.say(OPEN)
        total = ray.cluster_resources()
        cores, gpus = total.get("CPU", 0), total.get("GPU", 0)
        self.say(f"Ray is ready: {cores:g} cores, {gpus:g} GPUs, {len(ray.nodes())} node(s)")
        if gpus and not self.config.gpus_per_worker:
            self.say("the GPUs are not used; set cluster.gpus_per_worker=1 to use them")


_early: list[Session] = []  # at most one


def start_early(config: ClusterSection, say: Callable[[str], None]) -> None:
    """Start Ray on this machine for the next `connected` of this process, which imports torch meanwhile."""
    if not ray.is_initialized():
        _early.append(Session(config, say))


def connected(config: ClusterSection, say: Callable[[str], None]) -> Session:
    """The session that was started early, else a new one."""
    return _early.pop() if _early else Session(config, say)


def close_early() -> None:
    """Shut down what was started early and not used."""
    while _early:
        _early.pop().close()


def ray_folder() -> str | None:
    """The folder for the sockets and logs of a Ray that starts here; None if Ray's own choice is usable.

    Ray's own choice is RAY_TMPDIR, TMPDIR or /tmp. The path of a Unix socket is at most about 100 bytes long.

    Raises:
        UserError: RAY_TMPDIR is not usable, or no folder is.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "the temporary folder")
    place = os.environ.get(variable, "/tmp")
    if (problem := _unusable(Path(place, "ray"))) is None:
        return None
    if variable != "RAY_TMPDIR":
        for parent in ("/tmp", "/var/tmp", "/dev/shm"):
            own = Path(parent, f"ray-{os.getuid()}")  # Ray opens its own folder to everyone, so this one protects it
            with contextlib.suppress(OSError):
                own.mkdir(0o700, exist_ok=True)
                if _is_mine(own) and _unusable(own / "ray") is None:
                    return str(own / "ray")
    raise UserError(
        f"Ray cannot start: {variable} = {place} {problem}; set RAY_TMPDIR to a short folder that you can write in "
        "(for example RAY_TMPDIR=/tmp), or set cluster.address=none to run without Ray"
    )


def _unusable(folder: Path) -> str | None:
    """Why Ray cannot keep its sockets and logs in a folder, which is made if it is missing; None if it can keep them."""
    if not folder.is_absolute():
        return "is not an absolute path"
    if len(os.fsencode(folder / SOCKET)) > SOCKET_BYTES:
        return f"is too long for the path of a socket, by {len(os.fsencode(folder / SOCKET)) - SOCKET_BYTES} bytes"
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            folder.chmod(0o777)  # as Ray does: it may be shared by several users
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"is not writable ({error.strerror})"


def _is_mine(folder: Path) -> bool:
    """Whether this user owns the folder and nobody else may write to it."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


@contextmanager
def token_in_environment() -> Iterator[None]:
    """Give a Ray that starts here a token if the user has none, so that Ray writes none into the home folder."""
    loader = AuthenticationTokenLoader.instance()
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or loader.has_token(ignore_auth_mode=True):
        yield
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    loader.reset_cache()
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_TOKEN"]
        loader.reset_cache()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hide the terminal output of Ray's C++ core while it starts. Python exceptions pass."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


@contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Delay Ctrl-C until the block has ended; a second Ctrl-C ends the block.

    If an exception ends `ray.init`, Ray no longer knows the processes that it has started, and `ray.shutdown` leaves them.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():  # only that thread gets signals
        yield
        return
    delayed = False

    def delay(number: int, frame: object) -> None:
        nonlocal delayed
        delayed = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, delay)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if delayed:
        signal.raise_signal(signal.SIGINT)


def pack(config: Config) -> dict[str, Any]:
    """A configuration for a worker, with this process's module search path (for plug-ins) and its run folder's marker."""
    remote = RunDir.of(config.run).remote
    path = [entry or os.getcwd() for entry in sys.path]
    return {"config": config.model_dump(), "path": path, "copy": remote.marker() if remote else None}


def unpack(packed: dict[str, Any]) -> Config:
    """The configuration, in the worker. Extends the worker's module search path by the driver's."""
    sys.path.extend(entry for entry in packed["path"] if entry not in sys.path)
    return Config.model_validate(packed["config"])


def quieten() -> None:
    """Switch off Ray's logs; the command has its own."""
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are raised in the driver, once
    # messages about lost nodes and tasks, which log_to_driver=False does not suppress
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None


@contextmanager
def plain_errors() -> Iterator[None]:
    """Re-raise the worker's own exception instead of Ray's wrapper, if a user can act on it."""
    try:
        yield
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, ray.exceptions.OutOfDiskError):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "Ray's object store") from None
        if isinstance(cause, UserError | OSError | ray.exceptions.RayActorError):
            raise cause from None
        raise


def root_cause(error: BaseException) -> BaseException:
    """The innermost exception, through RayTaskError.cause, Ray Train's worker failures, and __cause__."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None) or {}
        inner = next(iter(failures.values()), None) or getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException):
            return error
        error = inner
    return error
