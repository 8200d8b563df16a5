"""UPGrad of the clients' updates (Quinton & Rey, arXiv 2406.16232, equation 1)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedcmt.strategies.base import RoundUpdates, by_cases
from fedcmt.strategies.fedavg import FedAvg
from fedcmt.strategies.gram import onto_dual_cone


class UPGrad(FedAvg):
    """The mean by cases of the updates projected onto their dual cone; it opposes no update."""

    name: ClassVar[str] = "upgrad"

    def weights(self, updates: RoundUpdates) -> Tensor:
        """w @ V, V the factors of the projected updates."""
        return by_cases(updates.num_cases) @ onto_dual_cone(updates.total_gram)
