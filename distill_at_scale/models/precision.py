"""Which arithmetic the forward and backward passes of a run use.

bf16 is autocast: convolutions and matrix products in bfloat16; weights, gradients, losses, norms of gradients and the state
of optimizers stay in float32. The driver resolves `auto` once per run, so all workers compute alike, and fingerprints hold
the resolved value. `forward_mode.py` says where a CPU uses bf16.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from distill_at_scale.config.load import Config

Precision = Literal["fp32", "bf16"]
SECTIONS = ("score", "distill", "evaluate")  # sections with a key `precision`


def resolve(choice: str, on_gpu: bool) -> Precision:
    """The precision of `auto`, `fp32` or `bf16`; auto: bf16 on GPUs and on CPUs that compute in it."""
    return "bf16" if choice == "bf16" or (choice == "auto" and (on_gpu or cpu_has_bf16())) else "fp32"


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 (AMX or AVX512-BF16); elsewhere bf16 is emulated, and slower than float32."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    # torch before 2.12; each CPU with AMX has AVX512-BF16 too
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def on_gpu(config: Config) -> bool:
    """Whether the workers of a run compute on GPUs."""
    return torch.cuda.is_available() if config.cluster.address == "none" else config.cluster.gpus_per_worker > 0


def resolved(config: Config) -> Config:
    """A configuration whose keys `precision` are fp32 or bf16, for this machine and the devices of its workers."""
    gpu = on_gpu(config)
    sections = {name: getattr(config, name) for name in SECTIONS}
    return config.model_copy(
        update={
            name: section.model_copy(update={"precision": resolve(section.precision, gpu)})
            for name, section in sections.items()
        }
    )


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of forward passes in a precision; `auto` is resolved for this device and machine."""
    enabled = resolve(precision, device.type == "cuda") == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
