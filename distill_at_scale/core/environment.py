"""What a run ran on: versions, commit and hardware, for run.json, the report and the benchmarks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Bytes of GPU memory that torch has allocated now and at most; empty on a CPU."""
    if device.type != "cuda":
        return {}
    import torch

    now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return {"gpu_bytes": now, "gpu_peak_bytes": peak}
