"""What a decoder that was taken over might try, for a child of `data/codecs/worker_process.py`; it imports nothing large."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tries_to_write(header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """Leaves a file behind if it can; says what happened, and whether the process can gain rights."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    try:
        Path(header["path"]).write_bytes(b"x")
        said = "written"
    except OSError as error:
        said = str(error.strerror)
    return {"said": said, "no_new_privileges": status["NoNewPrivs"].strip()}, b""
