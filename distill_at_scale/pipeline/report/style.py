"""Colours, fonts and matplotlib settings that all plots share, and figures as SVG data URIs.

Plots use `Figure` objects, not pyplot's global state. Text stays text, in the reader's font. Equal input gives equal bytes.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {
    "distilled": "#2f5fd0", "unpruned": "#d9962b", "random_keep": "#0f8ec7", "random_real": "#8b97a8",
    "kept": "#12927f", "full": "#7a5195", "dropped": "#d5dae2",
}  # fmt: skip
SET_NAMES = {
    "distilled": "Distilled",
    "unpruned": "Distilled without pruning",
    "random_keep": "Distilled, kept at random",
    "random_real": "Random real",
    "kept": "All kept samples",
    "full": "Whole training set",
}
INK, FAINT, LINE = "#1c2430", "#66717f", "#dfe3e8"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
WIDTH, NARROW = 9.6, 4.8  # inches: of a plot, and of its variant for a telephone
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


class PlotFigure(Figure):
    """A figure that a notebook shows, also where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def figure_of(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure of a height and width in inches."""
    figure = PlotFigure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def frame(axes: Axes, grid: Any) -> None:
    """Light grid lines along "x", "y" or "both", no spines, no tick marks."""
    axes.grid(axis=grid, color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)


def name_rows(axes: Axes, names: Sequence[tuple[float, str]]) -> None:
    """Names at their places instead of a vertical axis."""
    axes.set_yticks([place for place, _ in names], [clip(name) for _, name in names], color=INK)
    frame(axes, "x")


def clip(name: str, longest: int = 26) -> str:
    """Cut a name to `longest` characters, with an ellipsis."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def both_widths(figure: Figure) -> dict[str, str]:
    """A figure as data URIs, `wide` and `narrow`, for the macro `chart` of the templates."""
    wide, (width, height) = svg(figure), figure.get_size_inches()
    figure.set_size_inches(NARROW, height)
    narrow = svg(figure)
    figure.set_size_inches(width, height)
    return {"wide": wide, "narrow": narrow}


def svg(figure: Figure) -> str:
    """A figure as a data URI."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's font has the glyph
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return data_uri("image/svg+xml", re.sub(r"'DejaVu Sans'[^;\"]*", FONT, buffer.getvalue()).encode())


def data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
