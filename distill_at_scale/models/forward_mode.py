"""How proxies, scoring and matching run a network: compiled or eagerly, in float32 or bf16. Only this module decides it.

Students, teachers and experts are not compiled; they run eagerly in the precision of their section.

`auto` compares the seconds that compiled code saves with the seconds that compiling takes. Both are estimates, never
measured in the run, so that all workers decide alike and a resumed run decides as before.

On a CPU they use bf16 in compiled code only: an eager forward pass is up to six times slower in bf16 than in float32, as
weights are converted in each pass. If the compiler fails, the code runs eagerly, and so in float32.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill_at_scale.core.errors import RunWarning
from distill_at_scale.models.precision import Precision, resolve
from distill_at_scale.models.spec import NetworkSpec

# seconds of compiling a training step and a forward pass on an idle EPYC core without torch's cache on the disk (it has the
# code in 3 to 5 s), with the import of the compiler
STEP_SECONDS, PASS_SECONDS = 10.0, 5.0
# nanoseconds of the same core per byte of NetworkSpec.activation_bytes and pass, for width 0, and more per channel of width;
# of a ConvNet at 8 x 8 to 64 x 64 (jobs/benchmarks/README.md, "When compiling pays")
RATES = {"eager": (0.47, 0.0057), "fp32": (0.28, 0.0053), "bf16": (0.13, 0.0031)}
SMALL, SMALL_RATE = 16, 0.8  # pixels of a side below which eager code takes this share
TRAINING_PASSES = 3  # of a sample in a training step: forward, and backward as much as two
GPU_BYTES = 10e9  # NetworkSpec.activation_bytes of forward passes from which compiling pays on a GPU: a guess
# More than torch's 8, as a process serves several stages and points. dynamic=False: code for one fixed shape, whatever shapes
# were compiled before. So the bytes of a result do not depend on what else the process does.
OPTIONS: dict[str, Any] = {"dynamic": False}
if "recompile_limit" in inspect.signature(torch.compile).parameters:  # older torch has 8 for each function
    OPTIONS["recompile_limit"] = 128

Forward = Callable[[Tensor], Tensor]
PreciseForward = Callable[[Tensor, Precision], Tensor]


class ForwardMode:
    """How one stage or method runs its network; all its workers must get the same arguments.

    Args:
        spec: the network.
        choice: "auto", "always" or "never".
        precision: "auto", "fp32" or "bf16".
        on_gpu: whether the device is a GPU.
        trained: samples that pass forward and backward, over all workers and steps.
        passed: samples that pass forward only.
        processes: how many processes compile. Not the real number of workers, of which results are independent.

    Attributes:
        compiled: whether functions are compiled. False after the compiler failed.
        eager_precision: of code that is not compiled.
        note: the decision and its reason, for the user.
    """

    def __init__(
        self, spec: NetworkSpec, choice: str, precision: str, on_gpu: bool, *, trained: float = 0, passed: float = 0,
        processes: int = 1,
    ):  # fmt: skip
        self.compiled_precision: Precision = resolve(precision, on_gpu)
        self.eager_precision: Precision = self.compiled_precision if on_gpu else "fp32"
        passes = TRAINING_PASSES * trained + passed
        eagerly = _seconds(spec, "eager", passes)
        compiling = processes * (STEP_SECONDS * (trained > 0) + PASS_SECONDS * (passed > 0))
        saved = eagerly - _seconds(spec, self.compiled_precision, passes) - compiling
        pays = spec.activation_bytes(1) * passes >= GPU_BYTES if on_gpu else saved > 0
        self.compiled = choice == "always" or (choice == "auto" and pays)
        self.note = f"{self.compiled_precision}, compiled" if self.compiled else f"{self.eager_precision}, not compiled"
        if choice == "auto" and not on_gpu:
            reason = f"saves about {saved:.0f} s of {eagerly:.0f} s" if pays else "compiling takes longer than it saves"
            self.note += f" ({reason})"

    def eager(self, function: PreciseForward) -> Forward:
        """`function(images, precision)` as a function of images that is not compiled."""
        return lambda images: function(images, self.eager_precision)

    def compile(self, function: PreciseForward) -> Forward:
        """The same, compiled if this is decided.

        If the compiler fails, warns once, and this and all other functions of this mode run eagerly from then on.
        """
        eagerly = self.eager(function)
        if not self.compiled:
            return eagerly
        compiled: Any = torch.compile(function, **OPTIONS)

        def forward(images: Tensor) -> Tensor:
            if self.compiled:
                try:
                    return compiled(images, self.compiled_precision)
                except Exception as error:
                    if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
                        raise
                    self.compiled = False
                    reason = str(error).partition("\n")[0] or type(error).__name__
                    problem = f"torch.compile does not work here ({reason})"
                    how = f"running eagerly in {self.eager_precision}, slower"
                    warnings.warn(f"{problem}; {how}", RunWarning, stacklevel=2)
            return eagerly(images)

        return forward


def _seconds(spec: NetworkSpec, code: str, passes: float) -> float:
    """The estimated seconds of one CPU core for `passes` forward passes of one sample; `code` is a key of RATES."""
    base, per_channel = RATES[code]
    small = code == "eager" and spec.shape[-1] < SMALL
    return passes * spec.activation_bytes(1) * (base + per_channel * spec.width) * (SMALL_RATE if small else 1) / 1e9
