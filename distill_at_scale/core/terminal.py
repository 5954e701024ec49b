"""Text for terminals and logs whose encoding lacks some of our characters, such as ASCII, GBK or KOI8-R."""

from __future__ import annotations

import codecs
import sys

HANDLER = "distill_at_scale.plain"
# what a terminal without these characters shows instead; any other character becomes a question mark
PLAIN = str.maketrans({
    "±": "+-", "×": "x", "≤": "<=", "≥": ">=", "≈": "~", "…": "...", "–": "-", "—": "-", "−": "-", "·": ".", "→": "->",
    "°": "*", "’": "'", "‘": "'", "“": '"', "”": '"', "\N{NO-BREAK SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " ",
})  # fmt: skip


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    shown = error.object[error.start : error.end].translate(PLAIN)
    return "".join(c if c.isascii() else "?" for c in shown), error.end


codecs.register_error(HANDLER, _plain)


def replace_unknown_characters() -> None:
    """From now on, standard output and error show a replacement for a character that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "backslashreplace") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=HANDLER)
