"""What the operations measure on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepStats:
    """What a server step did.

    Attributes:
        norm: Euclidean norm of lr * step, what was added to the parameters.
        nonfinite: Number of NaN and infinite values in d = sum_i weights[i] * updates[i].
        clipping: Factor by which `max_norm` shortened d; 1 where it did not.
    """

    norm: float
    nonfinite: int
    clipping: float = 1.0


@dataclass(frozen=True)
class ScreenStats:
    """What screening found in an update, as stored. Stats of consecutive parts add up with `+`.

    Attributes:
        nonfinite: Number of NaN and infinite values.
        norm: Euclidean norm of the finite values.
        largest: Largest absolute finite value.
    """

    nonfinite: int
    norm: float
    largest: float

    def __add__(self, other: ScreenStats) -> ScreenStats:
        """The stats of both parts together."""
        return ScreenStats(
            self.nonfinite + other.nonfinite, math.hypot(self.norm, other.norm), max(self.largest, other.largest)
        )
