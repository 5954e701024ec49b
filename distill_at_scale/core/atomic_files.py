"""Files and folders that are published in one step, and digests of their content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

DAMAGED = ".damaged"  # end of the names that `set_aside` gives


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; the file or folder written there replaces `path` when the block ends. If
    the block raises, `path` stays as it was and the temporary path is removed.
    """
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


def set_aside(path: Path) -> str:
    """Rename a damaged file or folder that can be computed again; returns the end of an error's sentence."""
    new = path.with_name(f"{path.name}{DAMAGED}")
    try:
        shutil.rmtree(new) if new.is_dir() else new.unlink(missing_ok=True)
        os.replace(path, new)
    except FileNotFoundError:  # another process was faster
        pass
    except OSError as error:
        return f"it could not be renamed ({error.strerror}); remove it and give the same command again"
    return f"it was renamed to {new.name}; give the same command again to compute it again"


def write_json(path: Path, value: Any) -> None:
    with publish(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False, default=str) + "\n", encoding="utf-8")


def resume_log(path: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows of a log with one JSON object per line. Damaged lines, such as one that an interruption cut short, are removed
    from the file, and `say` gets a sentence on them.
    """
    lines, rows = path.read_bytes().splitlines() if path.exists() else [], []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(row := json.loads(line), dict):
                rows.append(row)
    with publish(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if damaged := len(lines) - len(rows):
        what = "a damaged line was" if damaged == 1 else f"{damaged} damaged lines were"
        say(f"  {what} removed from {path}; what is lost is computed again")
    return rows


def resolve_parent(path: Path) -> Path:
    """An absolute path that is valid on all nodes: links above it are resolved, since they may exist on this node only.
    A link at the path itself is kept: run folders link to shared ones.
    """
    return path.parent.resolve() / path.name


def file_digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as handle:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def file_digests(paths: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Digests of many files, computed in threads, since hashing releases the GIL."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(file_digest, paths), strict=True))


def files_in(path: Path) -> list[Path]:
    """All files below a folder, sorted; of a file itself; empty if nothing exists."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.exists() else []
