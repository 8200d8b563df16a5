"""MGDA of the clients' updates (Sener & Koltun, NeurIPS 2018, arXiv 1810.04650, equation 3)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedcmt.strategies.base import RoundUpdates
from fedcmt.strategies.fedavg import FedAvg
from fedcmt.strategies.gram import smallest_mean


class MGDA(FedAvg):
    """The shortest mean of the updates. It opposes no update; numbers of cases do not matter.

    Differs from the paper in the solver: the minimum is found exactly instead of by Frank-Wolfe steps.
    """

    name: ClassVar[str] = "mgda"

    def weights(self, updates: RoundUpdates) -> Tensor:
        """argmin over the simplex of x^T G x."""
        return smallest_mean(updates.total_gram)
