"""Files that appear whole or not at all, and what tells their content apart."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there (a file or a folder) replaces `path` in one step."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            retired = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            os.replace(path, retired)
            os.replace(temporary, path)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with publish(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False, default=str) + "\n")


def resolve_parent(path: Path) -> Path:
    """What a path is called on all nodes of a cluster: links above it may be this node's alone. It may itself be a link, by
    which one run folder stands on another."""
    return path.parent.resolve() / path.name


def file_digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as handle:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def file_digests(paths: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Of many files, several at a time: hashing leaves Python to other threads."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(file_digest, paths), strict=True))


def files_in(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.exists() else []
