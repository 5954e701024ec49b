"""Named tensors in one safetensors file; errors of the disk are raised as OSError."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_at_scale.core.atomic_files import publish, set_aside
from distill_at_scale.core.errors import UserError


def save(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Publish tensors, with `facts` as the file's metadata. Raises OSError if the disk is full or not writable."""
    with publish(path) as temporary:
        write(temporary, tensors, facts)


def write(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Like `save`, but not atomic: for a file in a folder that is published as a whole."""
    contiguous = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata=facts)
    except SafetensorError as error:
        if match := re.search(r"os error (\d+)", str(error)):
            code = int(match.group(1))
            raise OSError(code, os.strerror(code), str(path)) from None
        raise


def load(path: Path, again: bool = False) -> dict[str, Tensor]:
    """Raises UserError if the file is damaged; `again`: it is renamed, so that the same command computes it again."""
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:  # SafetensorError, or torch's for an impossible shape
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged ({reason})" + (f"; {set_aside(path)}" if again else "")) from None


def metadata(path: Path) -> dict[str, str]:
    """The `facts` of a file."""
    with safe_open(path, "pt") as handle:
        return handle.metadata() or {}
