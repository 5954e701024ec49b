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
    """Versions, commit and hardware, for run.json and the report."""
    import torch

    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": {"machine": platform.machine(), "cpu": _cpu_name(), "cores": os.cpu_count(), "gpus": gpus},
    }


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Bytes that torch holds on a GPU for tensors now, and held at most; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    import torch

    now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return {"gpu_bytes": now, "gpu_peak_bytes": peak}


def _installed(name: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(name))
    return False


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
