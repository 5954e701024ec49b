"""Connecting to Ray: refused addresses, and messages about tokens."""

from __future__ import annotations

import pytest

from distill_at_scale.config.sections import ClusterSection
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
