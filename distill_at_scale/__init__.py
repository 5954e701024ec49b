"""Dataset distillation with bi-level pruning, on Ray. This is the public Python API; attributes are imported on first use.

from distill_at_scale import synthetic

images = synthetic.load("runs/digits").images
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_at_scale.config.load import Config
    from distill_at_scale.config.load import load as load_config
    from distill_at_scale.core.errors import UserError
    from distill_at_scale.distillation import synthetic_set as synthetic
    from distill_at_scale.distillation.synthetic_set import SyntheticSet, load

__version__ = "0.1.0"
__all__ = ["Config", "SyntheticSet", "UserError", "__version__", "load", "load_config", "synthetic"]

_SOURCES = {  # module and its attribute; None: the module itself
    "Config": ("config.load", "Config"),
    "load_config": ("config.load", "load"),
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
