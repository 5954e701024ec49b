"""Connecting to Ray: refused addresses, and messages about tokens."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from distill_at_scale.config.infrastructure import ClusterSection
from distill_at_scale.core.errors import UserError

ray = pytest.importorskip("ray")


@pytest.fixture
def connected(monkeypatch):
    """connected(address, problem): what a session says that finds a Ray of two cores there, or that problem."""
    from distill_at_scale.cluster import session

    def logged(address: str | None = None, problem: Exception | None = None) -> list[str]:
        def init(**options):
            if problem:
                raise problem

        monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
        monkeypatch.setattr(session.ray, "init", init)
        monkeypatch.setattr(session.ray, "shutdown", lambda: None)
        monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 2})
        monkeypatch.setattr(session.ray, "nodes", lambda: [{}])
        lines: list[str] = []
        session.Session(ClusterSection(address=address), lines.append)
        return lines

    return logged


@pytest.mark.parametrize("address", ["ray://head:10001", "http://127.0.0.1:8265"])
@pytest.mark.parametrize("given", ["cluster.address", "RAY_ADDRESS"])
def test_an_address_for_ray_clients_is_refused_with_the_next_action(connected, monkeypatch, address, given):
    if given == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"{address} .* give HOST:PORT .*ray job submit"):
        connected(address if given == "cluster.address" else None)


@pytest.mark.parametrize("problem", [ConnectionError("no answer"), ray.exceptions.AuthenticationError("no token")])
def test_if_no_cluster_responds_the_error_explains_tokens(connected, problem):
    """Ray reports a wrong token as no answer."""
    with pytest.raises(UserError, match=r"cannot reach Ray .*'head:6379'.* RAY_AUTH_MODE=token .* RAY_AUTH_TOKEN_PATH"):
        connected("head:6379", problem)


@pytest.mark.parametrize("closed", [True, False])
def test_a_cluster_that_asks_for_no_token_is_warned_of(connected, monkeypatch, closed):
    monkeypatch.setattr("distill_at_scale.cluster.session.is_token_auth_enabled", lambda: closed)
    assert any("requires no token" in line for line in connected("head:6379")) != closed


@pytest.mark.usefixtures("ray_session")
def test_the_ray_that_is_started_here_asks_for_a_token():
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    assert is_token_auth_enabled()


@pytest.fixture
def started_here(monkeypatch):
    """Starts a session without a cluster: the options of ray.init, and RAY_AUTH_TOKEN at that moment and at the end."""
    from distill_at_scale.cluster import session

    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 2})
    monkeypatch.setattr(session.ray, "nodes", lambda: [{}])
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)

    def start(problem: Exception | Callable[[], object] | None = None) -> dict[str, object]:
        facts: dict[str, object] = {}

        def init(**options):
            facts.update(options, token=os.environ.get("RAY_AUTH_TOKEN"))
            if callable(problem):
                problem()
                pytest.fail("nothing ended it")
            if problem:
                raise problem

        monkeypatch.setattr(session.ray, "init", init)
        try:
            session.Session(ClusterSection(), lambda text: None).close()
        finally:
            facts["token afterwards"] = os.environ.get("RAY_AUTH_TOKEN")
        return facts

    return start


def test_a_long_TMPDIR_leaves_ray_a_short_folder_that_only_its_user_can_open(started_here, monkeypatch, tmp_path):
    long = tmp_path / ("scratch_of_a_user_on_the_cluster" * 3)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(long))
    folder = started_here()["_temp_dir"]
    assert len(f"{folder}/session_2026-11-29_18-43-46_957446_4194304/sockets/plasma_store") < 104
    status = Path(folder).parent.stat()
    assert (status.st_uid, status.st_mode & 0o777) == (os.getuid(), 0o700)
    assert not long.exists()


def test_a_usable_TMPDIR_is_left_to_ray(started_here, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert started_here()["_temp_dir"] is None


@pytest.mark.parametrize(("folder", "problem"), [("/tmp/" + "x" * 90, "too long .* by 60 bytes"), ("/proc", "not writable"),
                                             ("here", "not an absolute path")])  # fmt: skip
def test_an_unusable_RAY_TMPDIR_is_one_line_with_the_next_action(started_here, monkeypatch, folder, problem):
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(UserError, match=rf"RAY_TMPDIR = {folder} is {problem}.*; set RAY_TMPDIR to .*=none"):
        started_here()


def test_a_folder_of_another_user_is_not_used_for_ray(started_here, monkeypatch):
    from distill_at_scale.cluster import session

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/proc")
    monkeypatch.setattr(session, "_is_mine", lambda folder: False)
    with pytest.raises(UserError, match=r"TMPDIR = /proc is not writable"):
        started_here()


def test_ray_gets_a_token_in_the_environment_where_the_home_folder_has_none(started_here, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    session = pytest.importorskip("distill_at_scale.cluster.session")
    session.AuthenticationTokenLoader.instance().reset_cache()
    try:
        first, second = started_here(), started_here()
    finally:
        monkeypatch.undo()
        session.AuthenticationTokenLoader.instance().reset_cache()
    assert len(first["token"]) == 64
    assert first["token"] != second["token"]
    assert first["token afterwards"] is None
    assert not list(tmp_path.iterdir())


def test_a_token_of_the_user_is_used(started_here, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    assert started_here()["token"] == started_here()["token afterwards"] == "a" * 64


@pytest.mark.parametrize("place", ["init", "nodes"])
def test_ctrl_c_while_ray_starts_ends_what_was_started(monkeypatch, place):
    """`ray.init` ends first, as Ray loses track of its processes when an exception ends it."""
    from distill_at_scale.cluster import session

    calls, handler = [], signal.getsignal(signal.SIGINT)

    def called(name, value=None):
        def call(**options):
            calls.append(f"{name} begins")
            if name == place:
                signal.raise_signal(signal.SIGINT)
            calls.append(f"{name} ends")
            return value

        return call

    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    for name, value in (("init", None), ("shutdown", None), ("cluster_resources", {"CPU": 2}), ("nodes", [{}])):
        monkeypatch.setattr(session.ray, name, called(name, value))
    with pytest.raises(KeyboardInterrupt):
        session.start_early(ClusterSection(), lambda text: None)
    session.close_early()
    assert calls[:2] == ["init begins", "init ends"]
    assert calls[-2:] == ["shutdown begins", "shutdown ends"]
    assert calls.count("shutdown ends") == 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_ends_a_start_that_hangs(started_here):
    with pytest.raises(KeyboardInterrupt):
        started_here(lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])


def test_a_ray_that_does_not_start_is_not_explained_by_tokens(started_here):
    with pytest.raises(UserError, match=r"^Ray cannot start on this machine: no room; set cluster.address=none"):
        started_here(OSError("no room"))


@pytest.mark.parametrize(
    ("sections", "stages", "finished", "starts"),
    [
        ({}, ("ingest", "score"), (), True),
        ({}, ("ingest", "score"), ("ingest",), True),
        ({}, ("ingest", "score"), ("ingest", "score"), False),
        ({}, ("select", "report"), (), False),
        ({}, (), (), False),
        ({"cluster": {"address": "none"}}, ("ingest",), (), False),
        ({"cluster": {"address": "head:6379"}}, ("ingest",), (), False),
        ({"data": {"source": "imagefolder", "path": "no/such/folder"}}, ("ingest",), (), False),
        ({"run": {"dir": "s3://bucket/run"}}, ("ingest",), (), False),
    ],
)
def test_ray_starts_before_torch_where_a_stage_has_work_for_it(
    tmp_path, monkeypatch, sections, stages, finished, starts
):
    import distill_at_scale as das
    from distill_at_scale.cluster import session
    from distill_at_scale.config.load import validate
    from distill_at_scale.core.progress import Display

    calls = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "start_early", lambda config, say: calls.append("start"))
    monkeypatch.setattr(session, "close_early", lambda: calls.append("close"))
    config = validate({"run": {"dir": str(tmp_path)}} | sections)
    (tmp_path / "stages").mkdir()
    for stage in finished:
        (tmp_path / "stages" / f"{stage}.json").touch()
    with das.started_early(config, Display.silent(), stages):
        assert calls == (["start"] if starts else [])
    assert calls == (["start", "close"] if starts else [])
