"""Named tensors in one safetensors file, written in one step; a full disk shows as the OSError that it is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_at_scale.core.atomic_files import publish
from distill_at_scale.core.errors import UserError


def save(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Publish tensors and, as the file's metadata, some facts.

    Raises OSError where the disk is full or cannot be written.
    """
    with publish(path) as temporary:
        write(temporary, tensors, facts)


def write(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """As `save`, straight to the path: for a file inside a folder that is published as a whole."""
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, path, metadata=facts)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            code = int(found.group(1))
            raise OSError(code, os.strerror(code), str(path)) from None
        raise


def load(path: Path) -> dict[str, Tensor]:
    """Raises UserError where the file is damaged."""
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:  # of the library, or of torch for a shape that cannot be
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged ({reason}); remove it and give the command again") from None
