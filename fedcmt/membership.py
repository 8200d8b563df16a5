"""When a client belongs to a federation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Membership:
    """When a client belongs to the federation, and how it begins.

    Attributes:
        joins_at_round: Its first round.
        leaves_after_round: Its last one; None to stay.
        warmup_rounds: First rounds in which it trains its own parts on the encoder as received, and its update does
            not count.
        starting_adaptor: Where no client of its group has trained yet: that of the nearest group, or a fresh one.
    """

    joins_at_round: int = 1
    leaves_after_round: int | None = None
    warmup_rounds: int = 0
    starting_adaptor: Literal["nearest", "fresh"] = "nearest"

    def takes_part(self, round_index: int) -> bool:
        """Whether it is in the federation in a round."""
        last = self.leaves_after_round
        return round_index >= self.joins_at_round and (last is None or round_index <= last)

    def warms_up(self, round_index: int) -> bool:
        """Whether a round is one of its warm-up."""
        return self.takes_part(round_index) and round_index < self.joins_at_round + self.warmup_rounds
