"""Updates out of all proportion: finite, but so large that one of them would undo everybody's work."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedcmt.ops import ScreenStats


class Quarantine:
    """Compares the size of each update with the others' of the same round.

    Robust means would throw out the only client of a modality; this asks for orders of magnitude only. The size of an
    update is the root mean square of its values, so that adaptors of different shapes compare.

    Args:
        ratio: How many times the median of the others an update may be; None for no limit.

    Attributes:
        usual: Part -> median size in the last finished round; the measure where nobody else sent anything.
    """

    def __init__(self, ratio: float | None) -> None:
        self._ratio = ratio
        self.usual: dict[str, float] = {}
        self._sizes: dict[str, dict[str, float]] = {}

    def begin(self) -> None:
        """Forget the sizes of the round before."""
        self._sizes = {}

    def note(self, part: str, client: str, stats: ScreenStats, numel: int) -> None:
        """Keep the size of a part of a client's update."""
        if stats.norm > 0:
            self._sizes.setdefault(part, {})[client] = stats.norm / math.sqrt(numel)

    def outsized(self, clients: Sequence[str]) -> dict[str, str]:
        """Who is out of all proportion, and how.

        Args:
            clients: Those whose updates were taken.
        """
        found: dict[str, str] = {}
        for part, sizes in self._sizes.items() if self._ratio is not None else ():
            for client in clients:
                others = [sizes[name] for name in clients if name in sizes and name != client]
                usual = _median(others) if others else self.usual.get(part)
                size = sizes.get(client, 0.0)
                if usual is not None and self._ratio is not None and size > self._ratio * usual and client not in found:
                    found[client] = (
                        f"{part} update is {size / usual:.2g} times the others' median "
                        f"(quarantine_ratio {self._ratio:g})"
                    )
        return found

    def remember(self, clients: Sequence[str]) -> None:
        """Keep the median sizes of a finished round."""
        for part, sizes in self._sizes.items():
            counted = [sizes[name] for name in clients if name in sizes]
            if counted:
                self.usual[part] = _median(counted)


def _median(values: Sequence[float]) -> float:
    """The lower median: one of the values."""
    return sorted(values)[(len(values) - 1) // 2]
