"""Rates that change by round."""

from __future__ import annotations

import math


def cosine(start: float, end: float | None, round_index: int, rounds: int) -> float:
    """From ``start`` in round 1 to ``end`` in the last round along half a cosine; constant where ``end`` is None."""
    if end is None or rounds == 1:
        return start
    done = (round_index - 1) / (rounds - 1)
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
