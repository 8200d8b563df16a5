"""Fixed weights of the clients, chosen beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedcmt.errors import InputError
from fedcmt.settings import Settings
from fedcmt.strategies.base import RoundUpdates
from fedcmt.strategies.fedavg import AveragingSettings, FedAvg


class TunedWeightsSettings(AveragingSettings):
    """Settings of fixed weights."""

    client_weights: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = Field(
        {}, description="weight by client, relative to the others'; 1 for those not named"
    )


class TunedWeights(FedAvg):
    """A mean with weights of your own. Well chosen ones often match multi-task optimizers (arXiv 2508.13979)."""

    name: ClassVar[str] = "tuned-weights"
    settings_model: ClassVar[type[Settings]] = TunedWeightsSettings
    settings: TunedWeightsSettings

    def weights(self, updates: RoundUpdates) -> Tensor:
        """The clients' weights divided by their sum; all zero where only clients of weight 0 took part."""
        chosen = [self.settings.client_weights.get(client.name, 1.0) for client in updates.clients]
        weights = torch.tensor(chosen, dtype=torch.float64)
        return weights / weights.sum() if bool(weights.any()) else weights

    def check(self, clients: Sequence[str]) -> None:
        """Every weight names a client, and one is positive."""
        odd = sorted(set(self.settings.client_weights) - set(clients))
        field = "strategy.client_weights"
        if odd:
            raise InputError(f"no client '{odd[0]}'", field=field, fix=f"use {', '.join(sorted(clients))}")
        if not any(self.settings.client_weights.get(name, 1.0) for name in clients):
            raise InputError("every client has weight 0", field=field, fix="give one a positive weight")
