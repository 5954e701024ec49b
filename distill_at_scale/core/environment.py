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


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Bytes of GPU memory that torch has allocated now and at most; empty on a CPU."""
    if device.type != "cuda":
        return {}
    import torch

    now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return {"gpu_bytes": now, "gpu_peak_bytes": peak}
