"""What a run ran on: versions, commit and hardware, for run.json, the report, the benchmarks and `plan`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
PACKAGES = ("ray", "torch", "torchvision", "numpy", "pyarrow", "pillow", "simplejpeg", "scikit-learn")


def environment() -> dict[str, Any]:
    """Versions of installed packages, commit and hardware."""
    import torch

    versions, commit = {}, None
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    cpu = platform.processor() or "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit,
        "python": platform.python_version(),
        "versions": versions,
        "hardware": {"machine": platform.machine(), "cpu": cpu, "cores": os.cpu_count(), "gpus": gpus},
    }


def usable_cores() -> int:
    """The cores that this process may use: its CPU affinity, and in a container at most the container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # control groups, version 2 and 1
        with contextlib.suppress(OSError, ValueError, IndexError):  # "max": no limit
            words = " ".join(Path("/sys/fs/cgroup", file).read_text(encoding="utf-8") for file in files).split()
            quota, period = int(words[0]), int(words[1])
            return max(1, min(cores, -(-quota // period))) if quota > 0 else cores
    return cores


@cache
def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones, up to 2 GB, where the C library is glibc.

    Otherwise glibc returns the memory of large tensors to the system after each pass of a network, and each next pass waits for
    new pages: eager code takes twice as long.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt  # returns 0 if it refuses; older versions of glibc take at most 2**25
    if mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def busy_seconds() -> float | None:
    """CPU seconds that all programs together have used on the cores of this process; None outside Linux."""
    try:
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
        used = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        ticks = [list(map(int, line.split()[1:9])) for line in lines if line.split()[0] in used]
        # user, nice, system, idle, iowait, irq, softirq, steal
        return sum(sum(each) - each[3] - each[4] for each in ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError, IndexError):
        return None


def other_programs(seconds: float) -> float:
    """Cores that other programs use, measured for some seconds in which this process sleeps; 0 where it is unknown."""
    before, own, began = busy_seconds(), time.process_time(), time.monotonic()
    time.sleep(seconds)
    after, own = busy_seconds(), time.process_time() - own
    return 0.0 if before is None or after is None else max(0.0, after - before - own) / (time.monotonic() - began)


@dataclass(frozen=True)
class Machine:
    cores: int
    memory: int  # bytes in total
    gpus: int
    gpu_memory: int  # bytes of one GPU
    disk: int  # free bytes on one disk


def this_machine(folder: Path) -> Machine:
    """This machine, and the disk of an existing folder."""
    import torch

    gpus = torch.cuda.device_count()
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if gpus else 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container may have less
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return Machine(usable_cores(), memory, gpus, gpu_bytes, shutil.disk_usage(folder).free)


def most_memory() -> int:
    """The most bytes of memory that this process has held; 0 where it is unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Bytes of GPU memory that torch has allocated now and at most; empty on a CPU."""
    if device.type != "cuda":
        return {}
    import torch

    now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return {"gpu_bytes": now, "gpu_peak_bytes": peak}
