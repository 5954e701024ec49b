"""A command on a cluster ends with one clear error where the cluster ends, whatever Ray's core does to the process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from distill_at_scale.cluster import head_watchdog
from distill_at_scale.core.errors import UserError, WorkersLost

pytestmark = pytest.mark.xdist_group("ray")  # not in parallel to tests on Ray: the copies are timed

CODE = """
import os, sys, time
from distill_at_scale.cluster.head_watchdog import guarded
from distill_at_scale.core.errors import UserError
def body():
    {body}
try:
    sys.exit(guarded("127.0.0.1:1", body))
except UserError as error:
    sys.exit(f"error: {{error}}")
"""


def ended(body: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE.format(body=body)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_the_status_of_the_command_is_passed_on(status):
    assert ended(f"return {status}").returncode == status


@pytest.mark.parametrize("end", ["os.write(2, b'*** stack trace'); os.abort()", "os._exit(1)"])
def test_what_the_core_does_becomes_one_line(end):
    done = ended(end)
    assert done.stderr == f"error: {head_watchdog.gone('127.0.0.1:1')}\n"


def test_a_process_that_was_killed_is_not_blamed_on_the_cluster():
    done = ended("os.write(2, b'last words'); os.kill(os.getpid(), 9)")
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr == "last words"


def test_an_exception_is_shown_as_it_is():
    done = ended("raise RuntimeError('a defect')")
    assert done.returncode == 1
    assert "RuntimeError: a defect" in done.stderr


def test_a_command_that_waits_for_a_lost_head_is_ended(monkeypatch):
    monkeypatch.setattr(head_watchdog, "EVERY", 0)
    monkeypatch.setattr(head_watchdog, "AWAY", 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        head = head_watchdog.Head(address)
        assert not head.lost()
    pid = os.fork()
    if pid == 0:
        signal.pause()
    with pytest.raises(UserError, match=f"the Ray cluster at {address} is gone"):
        head_watchdog._wait(pid, head)


def test_errors_of_a_reachable_cluster_are_not_changed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(KeyError), head_watchdog.explained(address):
            raise KeyError("x")
    for problem in (KeyError("x"), WorkersLost("too often")):
        with pytest.raises(UserError, match="is gone"), head_watchdog.explained(address):
            raise problem
    with pytest.raises(UserError, match="a wrong key"), head_watchdog.explained(address):
        raise UserError("a wrong key")


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "..:6379"])
def test_an_address_that_cannot_be_does_not_answer(address):
    assert not head_watchdog.answers(address)
