"""The time limit of a test, which `conftest.py` sets."""

from __future__ import annotations

import signal
import threading

import pytest
from conftest import limited


def test_a_test_that_waits_without_end_fails_and_is_named(request):
    before = signal.getsignal(signal.SIGALRM)
    message = r"test_limits\.py::test_a_test.*: the test takes more than 0\.05 s"
    with pytest.raises(pytest.fail.Exception, match=message), limited(request.node, "the test", 0.05):
        threading.Event().wait(30)
    assert signal.getsignal(signal.SIGALRM) is before
