"""PCGrad of the clients' updates (Yu et al., NeurIPS 2020, arXiv 2001.06782, algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedcmt import ops
from fedcmt.seeding import derive_seed
from fedcmt.strategies.base import RoundUpdates, by_cases
from fedcmt.strategies.fedavg import FedAvg


class PCGrad(FedAvg):
    """Each update loses what conflicts with the others, one after the other; then the mean by cases.

    The order in which an update meets the others is drawn from the federation's seed and the round. With three or more
    updates the result depends on it, and the step may still oppose one of them.
    """

    name: ClassVar[str] = "pcgrad"

    def weights(self, updates: RoundUpdates) -> Tensor:
        """w @ C, C the factors of the projected updates."""
        count = len(updates.clients)
        seed = derive_seed(updates.seed, round_index=updates.round_index, purpose="order of projections")
        generator = torch.Generator().manual_seed(seed)
        order = torch.stack([torch.randperm(count, generator=generator) for _ in range(count)])
        return by_cases(updates.num_cases) @ ops.project_conflicts(updates.total_gram, order=order)
