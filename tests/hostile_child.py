"""Actions of an exploited decoder, run in a child of `data/codecs/worker_process.py`; imports nothing large."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tries_to_write(header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """Tries to write a file; reports the outcome and whether the process can gain privileges."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    try:
        Path(header["path"]).write_bytes(b"x")
        outcome = "written"
    except OSError as error:
        outcome = str(error.strerror)
    return {"outcome": outcome, "no_new_privileges": status["NoNewPrivs"].strip()}, b""
