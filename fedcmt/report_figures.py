"""The drawings of the report, each as a ``data:`` address: curves over rounds, and slices with their contours.

Only fixed words are drawn. Names that users chose stay in the page's text, where they are escaped.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

# Okabe and Ito's palette, without black; blue last because it is dark on a dark image.
CLASS_COLOURS = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")
LOCAL_COLOUR = "#0072B2"
AGGREGATED_COLOUR = "#D55E00"
INK = "#22303c"
GRID = "#dde3e8"
AGREE = (0x00, 0x72, 0xB2)
OPPOSE = (0xD5, 0x5E, 0x00)

SLICE_HEIGHT_INCHES = 3.1
TITLE_INCHES = 0.28
PAGE_WIDTH_INCHES = 8.8
SLICE_DPI = 120
THUMBNAIL_INCHES = 1.7
MAX_POINTS_MARKED = 30

Point = tuple[int, float]


@dataclass(frozen=True)
class Outline:
    """One class or region in a slice.

    Attributes:
        mask: ``[rows, columns]`` bool.
        index: Position of the class among the client's classes; decides colour and line.
        filled: Whether the area is tinted. Overlapping regions are outlined only.
    """

    mask: NDArray[np.bool_]
    index: int
    filled: bool

    @property
    def colour(self) -> str:
        return class_colour(self.index)


@dataclass(frozen=True)
class Panel:
    """One view of a slice: the image with the outlines drawn on it."""

    title: str
    outlines: Sequence[Outline] = ()


def class_colour(index: int) -> str:
    """Returns the colour of the class at position `index`; colours repeat after the last."""
    return CLASS_COLOURS[index % len(CLASS_COLOURS)]


def is_dashed(index: int) -> bool:
    """Whether the class at position `index` repeats a colour and so is drawn dashed."""
    return index // len(CLASS_COLOURS) % 2 == 1


def cosine_colours(cosine: float) -> tuple[str, str]:
    """Returns background and text colour of a cosine: blue for agreement, white at 0, orange for opposition."""
    share = min(abs(cosine), 1.0)
    end = AGREE if cosine >= 0 else OPPOSE
    red, green, blue = (round(255 + (channel - 255) * share) for channel in end)
    return f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if share > 0.8 else INK


def training_curves(
    losses: Sequence[Point], local: Sequence[Point], aggregated: Sequence[Point], best: Point | None, metric: str
) -> str:
    """Draws training loss and validation scores over rounds side by side.

    Args:
        losses: (round, mean training loss).
        local: (round, score) of the models as trained locally.
        aggregated: (round, score) of the models with the server's shared part.
        best: Round and score of the best model.
        metric: Name of the score, one of the program's own.
    """
    figure = Figure(figsize=(8.6, 2.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _line(left, losses, INK, "o")
    _finish_axes(left, "training loss", losses)
    _line(right, local, LOCAL_COLOUR, "o", "local")
    _line(right, aggregated, AGGREGATED_COLOUR, "s", "aggregated", "--")
    if best is not None:
        right.plot(
            *best, marker="*", markersize=13, color="#F0E442", markeredgecolor=INK, linestyle="", label="best", zorder=5
        )
    _finish_axes(right, f"validation {metric}", [*local, *aggregated])
    scores = [score for _, score in (*local, *aggregated)]
    if scores:
        right.set_ylim(_score_limits(scores))
        right.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8.5, labelcolor=INK)
    return _svg(figure)


def cosine_curve(points: Sequence[Point]) -> str:
    """Draws the mean cosine between different clients' updates over rounds."""
    figure = Figure(figsize=(5.2, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="#8795a1", linewidth=0.9)
    _line(axes, points, LOCAL_COLOUR, "o")
    _finish_axes(axes, "mean cosine", points)
    reach = max((abs(value) for _, value in points), default=0.0)
    bound = min(max(math.ceil(reach * 10) / 10 + 0.05, 0.15), 1.05)
    axes.set_ylim(-bound, bound)
    return _svg(figure)


def slice_panels(
    image: NDArray[np.floating], panels: Sequence[Panel], aspect: float, window: tuple[float, float], letters: str
) -> str:
    """Draws one slice several times side by side, each time with other outlines.

    Args:
        image: ``[rows, columns]``, first row at the top.
        panels: The views, from left to right.
        aspect: Height of a pixel over its width.
        window: Intensities shown black and white.
        letters: Four letters of the directions left, right, top, bottom.
    """
    rows, columns = image.shape
    # As large as the height and the page's width allow: a picture that is scaled down has unreadable letters.
    width = min(SLICE_HEIGHT_INCHES * columns / (rows * aspect), PAGE_WIDTH_INCHES / max(len(panels), 3))
    height = min(max(width * rows * aspect / columns, 0.8), SLICE_HEIGHT_INCHES) + TITLE_INCHES
    figure = Figure(figsize=(max(width, 1.2) * len(panels), height), facecolor="white")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_title(panel.title, fontsize=8.5, color=INK, pad=4)
        _show(axes, image, aspect, window)
        for outline in panel.outlines:
            _draw_outline(axes, outline)
        _draw_letters(axes, letters)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1 - TITLE_INCHES / height, wspace=0.03)
    return _png(figure)


def thumbnail(image: NDArray[np.floating], aspect: float, window: tuple[float, float], letters: str) -> str:
    """Draws one small slice without outlines; arguments as in `slice_panels`."""
    rows, columns = image.shape
    longest = max(rows * aspect, columns)
    size = (max(THUMBNAIL_INCHES * columns / longest, 0.4), max(THUMBNAIL_INCHES * rows * aspect / longest, 0.4))
    figure = Figure(figsize=size, facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1))
    _show(axes, image, aspect, window)
    _draw_letters(axes, letters)
    return _png(figure)


def _line(axes: Axes, points: Sequence[Point], colour: str, marker: str, label: str = "", style: str = "-") -> None:
    if not points:
        return
    rounds, values = zip(*points, strict=True)
    # Marks and dashes run into each other when rounds are many.
    few = len(points) <= MAX_POINTS_MARKED
    axes.plot(
        rounds,
        values,
        style if few else "-",
        color=colour,
        marker=marker,
        markersize=4.5 * few,
        linewidth=1.6,
        label=label,
    )


def _finish_axes(axes: Axes, title: str, points: Sequence[Point]) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("round", fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#8795a1")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if points:
        rounds = [index for index, _ in points]
        pad = 0.4 if len(set(rounds)) == 1 else 0.03 * (max(rounds) - min(rounds))
        axes.set_xlim(min(rounds) - pad, max(rounds) + pad)
    else:
        axes.set_yticks([])
        axes.set_xticks([])
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", va="center", color="#66727d")


def _score_limits(scores: Sequence[float]) -> tuple[float, float]:
    """Returns limits on tenths around the scores, inside 0 to 1 but for a margin."""
    low = max(math.floor(min(scores) * 10 - 0.2) / 10, 0.0)
    high = min(math.ceil(max(scores) * 10 + 0.2) / 10, 1.0)
    return low - 0.02 * (low == 0), high + 0.03 * (high == 1)


def _show(axes: Axes, image: NDArray[np.floating], aspect: float, window: tuple[float, float]) -> None:
    axes.imshow(image, cmap="gray", vmin=window[0], vmax=window[1], aspect=aspect, interpolation="bilinear")
    axes.set_axis_off()


def _draw_outline(axes: Axes, outline: Outline) -> None:
    mask = outline.mask
    if not mask.any():
        return
    # A border of background closes the contour of what touches the edge of the slice.
    padded = np.pad(mask, 1).astype(np.float32)
    rows, columns = np.arange(-1, mask.shape[0] + 1), np.arange(-1, mask.shape[1] + 1)
    style = "dashed" if is_dashed(outline.index) else "solid"
    if outline.filled:
        axes.contourf(columns, rows, padded, levels=[0.5, 1.5], colors=[outline.colour], alpha=0.28)
    axes.contour(columns, rows, padded, levels=[0.5], colors=[outline.colour], linewidths=1.3, linestyles=style)
    axes.set_xlim(-0.5, mask.shape[1] - 0.5)
    axes.set_ylim(mask.shape[0] - 0.5, -0.5)


def _draw_letters(axes: Axes, letters: str) -> None:
    places = (
        (0.02, 0.5, "left", "center"),
        (0.98, 0.5, "right", "center"),
        (0.5, 0.98, "center", "top"),
        (0.5, 0.02, "center", "bottom"),
    )
    for letter, (x, y, horizontal, vertical) in zip(letters, places, strict=True):
        axes.text(
            x,
            y,
            letter,
            transform=axes.transAxes,
            ha=horizontal,
            va=vertical,
            fontsize=8,
            color="#f4f4f4",
            bbox={"boxstyle": "round,pad=0.12", "facecolor": "black", "alpha": 0.45, "linewidth": 0},
        )


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _png(figure: Figure) -> str:
    figure.set_dpi(SLICE_DPI)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
