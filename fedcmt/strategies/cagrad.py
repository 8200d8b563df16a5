"""CAGrad of the clients' updates (Liu et al., NeurIPS 2021, arXiv 2110.14048)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedcmt.settings import Settings
from fedcmt.strategies.base import RoundUpdates, by_cases
from fedcmt.strategies.conflict_averse import cagrad_weights
from fedcmt.strategies.fedavg import AveragingSettings, FedAvg


class CAGradSettings(AveragingSettings):
    """Settings of CAGrad."""

    conflict_aversion: float = Field(0.4, ge=0, lt=1, description="c: radius of the ball around the mean, relative")


class CAGrad(FedAvg):
    """The step in a ball around the mean whose smallest inner product with an update is largest."""

    name: ClassVar[str] = "cagrad"
    settings_model: ClassVar[type[Settings]] = CAGradSettings
    settings: CAGradSettings

    def weights(self, updates: RoundUpdates) -> Tensor:
        """CAGrad's weights around the mean by numbers of cases."""
        return cagrad_weights(updates.total_gram, by_cases(updates.num_cases), self.settings.conflict_aversion)
