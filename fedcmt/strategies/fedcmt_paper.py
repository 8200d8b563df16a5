"""FedCMT as published, in our reading of its overview figure."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedcmt.settings import Settings
from fedcmt.strategies.base import RoundUpdates, StepSettings, Strategy, by_cases
from fedcmt.strategies.client_work import ClientWork, DistillationSettings
from fedcmt.strategies.conflict_averse import cagrad_weights


class FedCMTPaperSettings(StepSettings):
    """Settings of FedCMT as published: momentum 0.6, rate from 1.0 to 0.9 along a cosine, distillation."""

    server_momentum: float = Field(0.6, ge=0, lt=1)
    server_learning_rate_end: float | None = Field(0.9, gt=0, le=100, description="in the last round, along a cosine")
    conflict_aversion: float = Field(0.4, ge=0, lt=1, description="c of CAGrad")
    distillation: DistillationSettings = DistillationSettings(weight=0.5)


class FedCMTPaper(Strategy):
    """theta <- theta + gamma O(CA(Delta, w)): group adaptors, data-weighted conflict-averse step, distillation.

    The figure subtracts alpha grad <g_i, g_j> with g_i = theta_i - theta, which is extra averaging, or a step away from
    the clients if the cosine is meant. So the term is CAGrad in update space. The published coefficient of the
    distillation is unknown; see :mod:`fedcmt.distillation` for ours.
    """

    name: ClassVar[str] = "fedcmt-paper"
    settings_model: ClassVar[type[Settings]] = FedCMTPaperSettings
    settings: FedCMTPaperSettings

    def weights(self, updates: RoundUpdates) -> Tensor:
        """CAGrad's weights around the mean by numbers of cases."""
        return cagrad_weights(updates.total_gram, by_cases(updates.num_cases), self.settings.conflict_aversion)

    @property
    def client_work(self) -> ClientWork:
        """Distillation from the received model."""
        return ClientWork(distillation=self.settings.distillation)
