"""Colours, fonts and matplotlib settings that all plots share, and figures as SVG data URIs."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {"distilled": "#2f5fd0", "random_real": "#8b97a8", "kept": "#12927f", "full": "#d9962b", "dropped": "#d5dae2"}


SET_NAMES = {
    "distilled": "Distilled",
    "random_real": "Random real",
    "kept": "All kept samples",
    "full": "Whole training set",
}


INK, FAINT, LINE = "#1c2430", "#66717f", "#dfe3e8"


FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


WIDTH = 9.6  # inches


STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,  # a class name may hold a dollar sign
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "text.color": INK,
}


def figure_of(height: float) -> tuple[Figure, Axes]:
    """A chart over the whole width, so many inches high."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def clean(axes: Axes, names: Sequence[tuple[float, str]]) -> None:
    """Named rows instead of a vertical axis, and light vertical lines."""
    axes.set_yticks([place for place, _ in names], [clip(name) for _, name in names], color=INK)
    axes.tick_params(length=0)
    axes.grid(axis="x", color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)


def clip(name: str, longest: int = 26) -> str:
    """A name cut to so many characters, with an ellipsis."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def svg(figure: Figure) -> str:
    """A figure as a data URI; its text is set in the reader's font."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's font has it
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _uri("image/svg+xml", re.sub(r"'DejaVu Sans'[^;\"]*", FONT, buffer.getvalue()).encode())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
