"""Plots of one run as figures; its pictures as data URIs: images as PNG, clips as animated PNG or WebP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from distill_at_scale.core.images import Frames, palette_png, png, to_frames, webp
from distill_at_scale.pipeline.report import style

BINS = 72
COLUMNS = 10  # pictures side by side
FEW = 20  # up to this many kept samples of a class are drawn one by one

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class AccuracyBar:
    """A bar of the accuracy chart: a row of the evaluation's summary, its seeds' top-1 in per cent, and the bar's label."""

    row: Mapping[str, Any]
    seeds: Sequence[float]
    text: str

    @property
    def mean(self) -> float:
        return 100 * self.row["mean"]

    @property
    def std(self) -> float:
        """Zero for a single seed."""
        return 100 * (self.row["std"] or 0)

    @property
    def end(self) -> float:
        return max([self.mean + self.std, *self.seeds])


@dataclass(frozen=True)
class Distribution:
    """The scores of one class and which of its samples are kept."""

    name: str
    scores: Array  # float [n]
    kept: Array  # bool [n]


@dataclass(frozen=True)
class Gallery:
    """Pictures as data URIs in the given order, and their form: "exact", "lossy" or "still" (the middle frame of clips)."""

    pictures: Sequence[str]
    shown: str


def accuracies(bars: Sequence[AccuracyBar], chance: float, tested: str) -> Figure:
    """Bars by network with standard deviation and every single seed; a dashed line marks `chance` (in per cent). `tested` names
    the samples of the accuracies.
    """
    networks = list(dict.fromkeys(bar.row["network"] for bar in bars))
    with matplotlib.rc_context(style.STYLE):
        figure, axes = style.figure_of(0.46 * len(bars) + 0.34 * len(networks) + 0.62)
        place, names = -0.95, []
        for network in networks:
            place += 0.95
            left = axes.get_yaxis_transform()
            axes.text(-0.006, place + 0.1, network, transform=left, weight="bold", ha="right", va="center")
            for bar in (bar for bar in bars if bar.row["network"] == network):
                place += 1
                names.append((place, style.SET_NAMES[bar.row["set"]]))
                axes.barh(place, bar.mean, height=0.66, color=style.COLORS[bar.row["set"]], alpha=0.85)
                if bar.row["std"] is not None:
                    axes.errorbar(bar.mean, place, xerr=bar.std, color=style.INK, lw=1.2, capsize=4, capthick=1.2)
                spread = np.linspace(-0.18, 0.18, len(bar.seeds)) if len(bar.seeds) > 1 else np.zeros(1)
                axes.scatter(bar.seeds, place + spread, s=11, color="white", edgecolor=style.INK, lw=0.7, zorder=3)
                where: Any = {"xytext": (9, 0), "textcoords": "offset points"}
                axes.annotate(bar.text, (bar.end, place), **where, va="center", weight="bold")
        style.name_rows(axes, names)
        axes.set_ylim(place + 0.65, -0.4)
        axes.set_xlim(0, max(1.2 * max(bar.end for bar in bars), 1.1 * chance))
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 100])
        axes.axvline(chance, color=style.FAINT, lw=0.8, ls=(0, (3, 3)), zorder=0)
        axes.set_xlabel(f"top-1 accuracy on {tested} in %  (dashed: chance)")
        return figure


def distributions(classes: Sequence[Distribution], label: str) -> Figure:
    """A histogram of scores per class, kept and dropped samples stacked, with a mark at each cut."""
    scores = np.concatenate([c.scores for c in classes])
    edges = np.linspace(scores.min(), max(scores.max(), scores.min() + 1e-6), BINS + 1)
    with matplotlib.rc_context(style.STYLE):
        figure, axes = style.figure_of(0.42 * len(classes) + 0.75)
        for row, one in enumerate(classes):
            counts, _ = np.histogram(one.scores, edges)
            kept, _ = np.histogram(one.scores[one.kept], edges)
            scale = 0.82 / max(1, counts.max())
            axes.stairs(row - counts * scale, edges, baseline=row, fill=True, color=style.COLORS["dropped"], zorder=2)
            axes.stairs(row - kept * scale, edges, baseline=row, fill=True, color=style.COLORS["kept"], zorder=3)
            axes.plot(edges[[0, -1]], [row, row], color=style.LINE, lw=0.8, zorder=1)
            if one.kept.sum() <= FEW:
                axes.vlines(one.scores[one.kept], row - 0.5, row, color=style.COLORS["kept"], lw=1.6, zorder=4)
            for cut in cuts(one.scores, one.kept):
                axes.vlines(cut, row - 0.9, row, color=style.INK, lw=1.1, zorder=5)
            text = f"{int(one.kept.sum()):,} of {len(one.kept):,}"
            right = axes.get_yaxis_transform()
            axes.text(1.01, row - 0.05, text, transform=right, va="bottom", color=style.FAINT, size=8)
        style.name_rows(axes, [(row - 0.3, one.name) for row, one in enumerate(classes)])
        axes.set_ylim(len(classes) - 0.9, -1.0)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel(label)
        return figure


def cuts(scores: Array, kept: Array) -> list[float]:
    """The scores that separate kept from dropped samples; empty if they are mixed, as in a random selection."""
    inside, outside = scores[kept], scores[~kept]
    if not len(inside) or not len(outside):
        return []
    low, high = inside.min(), inside.max()
    if ((outside > low) & (outside < high)).any():
        return []
    below, above = outside[outside <= low], outside[outside >= high]
    result = [(low + below.max()) / 2] if len(below) else []
    return [float(cut) for cut in result + ([(high + above.min()) / 2] if len(above) else [])]


def curve(loss: Sequence[tuple[int, float]], top1: Sequence[tuple[int, float]]) -> Figure:
    """The distillation loss over the steps with a running mean; below it the accuracy, if it was measured."""
    panels = [(loss, "distillation loss", style.INK), (top1, "top-1 in % (one network)", style.COLORS["distilled"])]
    panels = [panel for panel in panels if panel[0]]  # those with points
    with matplotlib.rc_context(style.STYLE):
        figure = style.PlotFigure(figsize=(style.WIDTH, 2.5 * len(panels) + 0.3), layout="constrained")
        shared: Axes | None = None
        for place, (points, label, color) in enumerate(panels):
            shared = axes = figure.add_subplot(len(panels), 1, place + 1, sharex=shared)
            steps, values = np.array(points, dtype=float).T
            window = max(1, len(values) // 20)
            if window > 1:
                axes.plot(steps, values, color=color, lw=0.8, alpha=0.35)
                places, sums = np.arange(len(values)), np.concatenate([[0.0], np.cumsum(values)])
                starts, ends = np.maximum(0, places - window // 2), np.minimum(len(values), places + window // 2 + 1)
                axes.plot(steps, (sums[ends] - sums[starts]) / (ends - starts), color=color, lw=1.7)
            else:
                axes.plot(steps, values, color=color, lw=1.5, marker="o", ms=3)
            axes.set_xlim(left=0)
            if values.min() > 0 and values.max() > 30 * values.min():
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
            style.frame(axes, "both")
            axes.set_ylabel(label)
        axes.set_xlabel("step")
        return figure


def pictures(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Figure:
    """Named rows of pictures; where each has a single picture, they are put side by side under their names."""
    single = all(len(images) == 1 for _, images in rows)
    lines = [rows[i : i + COLUMNS] for i in range(0, len(rows), COLUMNS)] if single else [[row] for row in rows]
    columns = max(len(line) if single else len(line[0][1]) for line in lines)
    with matplotlib.rc_context(style.STYLE):
        size = (0.9 * columns + (0 if single else 1.2), (1.1 if single else 0.9) * len(lines))
        figure = style.PlotFigure(figsize=size, layout="constrained")
        places = figure.subplots(len(lines), columns, squeeze=False)
        for axes in places.flat:
            axes.set_axis_off()
        for line, own in zip(lines, places, strict=True):
            images = [images[0] for _, images in line] if single else line[0][1]
            for axes, image in zip(own, images, strict=False):
                axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
            for axes, (name, _) in zip(own, line, strict=False):
                if single:
                    axes.set_title(style.clip(name, 12))
                else:
                    axes.text(-0.1, 0.5, style.clip(name), transform=axes.transAxes, ha="right", va="center")
        return figure


def picture(pixels: Array, limit: int) -> str:
    """uint8 [C, H, W] -> PNG; a clip [T, C, H, W] -> animated PNG with a palette. Sides above `limit` are reduced to it."""
    return _png(to_frames(pixels, limit))


def gallery(samples: Iterable[Array], limit: int, budget: int) -> Gallery:
    """Pictures of real samples as PNG. Clips take the first form in which all fit `budget` bytes: animated PNG (grey only),
    animated WebP, or the middle frame, whose size is not limited.
    """
    clips = [to_frames(sample, limit) for sample in samples]
    if all(len(frames) == 1 for frames in clips):
        return Gallery([_png(frames) for frames in clips], "exact")
    if all(frames[0].mode == "L" for frames in clips) and (pictures := _within(clips, _png, budget)):
        return Gallery(pictures, "exact")
    if pictures := _within(clips, lambda frames: style.data_uri("image/webp", webp(frames)), budget):
        return Gallery(pictures, "lossy")
    return Gallery([_png([frames[len(frames) // 2]]) for frames in clips], "still")


def _within(clips: Sequence[Frames], encode: Callable[[Frames], str], budget: int) -> list[str]:
    """All clips encoded, or an empty list as soon as they take more than `budget` bytes."""
    pictures: list[str] = []
    for frames in clips:
        pictures.append(encode(frames))
        budget -= size_of(pictures[-1])
        if budget < 0:
            return []
    return pictures


def _png(frames: Frames) -> str:
    return style.data_uri("image/png", palette_png(frames) if len(frames) > 1 else png(frames, optimize=True))


def size_of(uri: str) -> int:
    """Bytes that a data URI holds."""
    return (len(uri) - uri.index(",")) * 3 // 4
