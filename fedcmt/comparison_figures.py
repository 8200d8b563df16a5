"""Figures of a comparison: scores over rounds, and a forest plot of the differences."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedcmt.comparison import Difference, Row, ScoreKind, clients_of, difference, labels_of
from fedcmt.report_figures import CLASS_COLOURS, GRID, INK

_DPI = 120
_LINES = ("-", "--", ":")


def curves_png(rows: Sequence[Row]) -> bytes:
    """Held-out score over rounds, the mean over clients and seeds, a line a strategy."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, label in enumerate(labels_of(rows)):
        by_round: dict[int, list[float]] = {}
        for row in rows:
            if row.strategy == label:
                for round_index, score in row.curve:
                    by_round.setdefault(round_index, []).append(score)
        rounds = sorted(by_round)
        means = [float(np.mean(by_round[r])) for r in rounds]
        colour, line = CLASS_COLOURS[index % len(CLASS_COLOURS)], _LINES[index // len(CLASS_COLOURS) % len(_LINES)]
        axes.plot(rounds, means, line, color=colour, label=label, marker="o" if len(rounds) == 1 else None)
    axes.set_xlabel("round")
    axes.set_ylabel("held-out score, mean over clients and seeds")
    axes.grid(color=GRID)
    axes.legend(fontsize="small", frameon=False)
    return _png(figure)


def forest_png(rows: Sequence[Row], reference: str, kind: ScoreKind) -> bytes:
    """Differences to the reference with 95 % intervals: for each strategy the mean over clients, then each client."""
    labels, clients = [label for label in labels_of(rows) if label != reference], clients_of(rows)
    entries: list[tuple[str, Difference, bool]] = []
    for label in labels:
        entries.append((label, difference(rows, label, reference, kind), True))
        entries += [(client, difference(rows, label, reference, kind, client), False) for client in clients]
    figure = Figure(figsize=(8, 1 + 0.22 * len(entries)), layout="constrained")
    axes = figure.add_subplot()
    for position, (_, found, mean) in enumerate(entries):
        if math.isnan(found.mean):
            continue
        colour = INK if mean else CLASS_COLOURS[0]
        axes.plot([found.mean], [position], "D" if mean else "o", color=colour, markersize=6 if mean else 4)
        if not math.isnan(found.low):
            axes.plot([found.low, found.high], [position, position], color=colour, linewidth=2 if mean else 1)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(entries)), [text if mean else f"    {text}" for text, _, mean in entries], fontsize=8)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_xlabel(f"difference to {reference}, 95 % interval over seeds")
    axes.grid(axis="x", color=GRID)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
