"""ConFIG of the clients' updates (Liu et al., ICLR 2025, arXiv 2408.11104, equation 2)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedcmt.strategies.base import RoundUpdates, by_cases
from fedcmt.strategies.fedavg import FedAvg
from fedcmt.strategies.gram import cosines


class ConFIG(FedAvg):
    """The direction with the same cosine to every update, as long as the updates' mean projection on it.

    It opposes no update where the updates are linearly independent. Differs from the paper in the length: the mean by
    cases of the projections instead of their sum, so that equal updates give the update.
    """

    name: ClassVar[str] = "config"

    def weights(self, updates: RoundUpdates) -> Tensor:
        """pinv(U) 1 with unit rows U, from the Gram matrix: U^T (U U^T)^+ 1."""
        gram = updates.total_gram
        lengths = gram.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
        table = cosines(gram)
        direction = inverse * (torch.linalg.pinv(table, hermitian=True, rtol=1e-10) @ (lengths > 0).double())
        length = float(direction @ gram @ direction)
        if length <= 0:
            return torch.zeros_like(direction)
        projection = by_cases(updates.num_cases) @ gram @ direction  # times |direction|
        return direction * (projection / length)
