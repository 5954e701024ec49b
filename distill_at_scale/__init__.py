"""Dataset distillation with bi-level pruning, on Ray. This is the public Python API; attributes are imported on first use.

import distill_at_scale as das

run = das.run("digits")  # or das.open_run("runs/digits")
run.results, run.scores.to_pandas(), run.synthetic.images
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_at_scale.api import load_config, run
    from distill_at_scale.config.load import Config
    from distill_at_scale.core.errors import UserError
    from distill_at_scale.distillation import synthetic_set as synthetic
    from distill_at_scale.distillation.synthetic_set import SyntheticSet, load
    from distill_at_scale.pipeline.run_reader import Run, open_run

__version__ = "0.1.0"
__all__ = [
    "Config", "Run", "SyntheticSet", "UserError", "__version__", "load", "load_config", "open_run", "run", "synthetic",
]  # fmt: skip

_SOURCES = {  # module and its attribute; None: the module itself
    "Config": ("config.load", "Config"),
    "Run": ("pipeline.run_reader", "Run"),
    "run": ("api", "run"),
    "open_run": ("pipeline.run_reader", "open_run"),
    "load_config": ("api", "load_config"),
    "UserError": ("core.errors", "UserError"),
    "synthetic": ("distillation.synthetic_set", None),
    "SyntheticSet": ("distillation.synthetic_set", "SyntheticSet"),
    "load": ("distillation.synthetic_set", "load"),
}


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _SOURCES[name]
    imported = importlib.import_module(f"{__name__}.{module}")
    globals()[name] = value = getattr(imported, attribute) if attribute else imported
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
