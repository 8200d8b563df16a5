"""Federated averaging of the encoder (McMahan et al., AISTATS 2017, algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedcmt.exchange import ClientDescription
from fedcmt.settings import Settings
from fedcmt.strategies.base import AdaptorSharing, RoundUpdates, StepSettings, Strategy, adaptor_key, by_cases


class AveragingSettings(StepSettings):
    """Settings of strategies that share one encoder."""

    adaptors: AdaptorSharing = Field(
        "channels", description="who shares an adaptor: equal number of channels, equal modality as well, or nobody"
    )


class FedAvg(Strategy):
    """The mean of the updates, weighted by numbers of cases.

    Differs from the paper in what cannot be averaged: decoders stay personal, and adaptors are averaged over clients
    with the same number of channels.
    """

    name: ClassVar[str] = "fedavg"
    settings_model: ClassVar[type[Settings]] = AveragingSettings
    settings: AveragingSettings

    def weights(self, updates: RoundUpdates) -> Tensor:
        """w_i = |D_i| / sum_j |D_j|."""
        return by_cases(updates.num_cases)

    def adaptor_key(self, client: ClientDescription) -> str:
        """By channels, by modality and channels, or by client."""
        return adaptor_key(client, self.settings.adaptors)
