"""Memory of freed tensors stays with a worker's process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from distill_at_scale.core import environment

PROGRAM = """
import resource, sys
import numpy as np
from distill_at_scale.core.environment import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
np.ones(2**24)  # 128 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(choice: str) -> int:
    """Of an array as large as one that was freed just before."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "LD_PRELOAD"}
    command = [sys.executable, "-c", PROGRAM, choice]
    return int(subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is a function of glibc")
def test_freed_memory_is_used_again():
    assert page_faults("kept") < 10
    assert page_faults("returned") > 30  # huge pages: 64


@pytest.mark.parametrize(
    ("largest", "accepted"), [(2**30, {-3: 2**30, -1: 2**31 - 1}), (2**25, {-3: 2**25, -1: 2**31 - 1}), (0, {})]
)
def test_a_threshold_that_glibc_refuses_is_lowered_or_nothing_is_changed(monkeypatch, largest, accepted):
    """Older versions of glibc refuse more than 2**25; the other threshold alone would make things worse."""
    values = {}

    class Library:
        def __init__(self, name):
            assert name is None

        def mallopt(self, parameter, value):
            if parameter == environment.M_MMAP_THRESHOLD and value > largest:
                return 0
            values[parameter] = value
            return 1

    monkeypatch.setattr(environment.ctypes, "CDLL", Library)
    monkeypatch.setattr(environment.platform, "libc_ver", lambda: ("glibc", "2.31"))
    environment.keep_freed_memory.__wrapped__()
    assert values == accepted
