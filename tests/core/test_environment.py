"""Memory of freed tensors stays with a worker's process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

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


def page_faults(choice: str, **variables: str) -> int:
    """Of an array as large as one that was freed just before."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "LD_PRELOAD"}
    command = [sys.executable, "-c", PROGRAM, choice]
    return int(subprocess.run(command, env=own | variables, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is a function of glibc")
def test_freed_memory_is_used_again_unless_the_user_sets_the_allocator():
    assert page_faults("kept") < 10
    returned = page_faults("returned")
    assert returned > 30  # huge pages: 64
    assert page_faults("kept", MALLOC_TRIM_THRESHOLD_="131072") == pytest.approx(returned, rel=0.2)
