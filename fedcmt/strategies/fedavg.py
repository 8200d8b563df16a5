"""Federated averaging of the encoder (McMahan et al., AISTATS 2017, algorithm 1)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedcmt.config import Settings
from fedcmt.exchange import ClientDescription
from fedcmt.strategies.base import ServerSettings, Strategy, by_cases


class FedAvgSettings(ServerSettings):
    """Settings of federated averaging."""

    adaptors: Literal["channels", "group"] = Field(
        "channels", description="who shares an adaptor: equal number of channels, or equal modality as well"
    )


class FedAvg(Strategy):
    """The mean of the updates, weighted by numbers of cases.

    Differs from the paper in what cannot be averaged: decoders stay personal, and adaptors are averaged over clients
    with the same number of channels.
    """

    name: ClassVar[str] = "fedavg"
    settings_model: ClassVar[type[Settings]] = FedAvgSettings
    settings: FedAvgSettings

    def weights(self, gram: Tensor, num_cases: Tensor) -> Tensor:
        """w_i = |D_i| / sum_j |D_j|."""
        return by_cases(num_cases)

    def adaptor_key(self, client: ClientDescription) -> str:
        """By channels, or by modality and channels."""
        return client.group if self.settings.adaptors == "group" else f"{client.channels}-channel"
