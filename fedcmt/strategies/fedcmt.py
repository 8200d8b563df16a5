"""FedCMT: adaptors shared within modality groups, a conflict-averse step for the encoder."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedcmt.config import Settings
from fedcmt.strategies.base import ServerSettings, Strategy, by_cases
from fedcmt.strategies.conflict_averse import cagrad_weights


class FedCMTSettings(ServerSettings):
    """Settings of FedCMT."""

    conflict_aversion: float = Field(
        0.4, ge=0, lt=1, description="c: how far, relative to the mean update, the step may leave it"
    )


class FedCMT(Strategy):
    """theta <- theta + gamma O(d), d = CAGrad of the clients' updates, O the server's momentum.

    The method's overview figure adds the gradient of the updates' inner products to the averaged step; read literally
    that is extra averaging. Here the term is defined in update space, on the updates' Gram matrix.
    """

    name: ClassVar[str] = "fedcmt"
    settings_model: ClassVar[type[Settings]] = FedCMTSettings
    settings: FedCMTSettings

    def weights(self, gram: Tensor, num_cases: Tensor) -> Tensor:
        """CAGrad's weights around the mean by numbers of cases."""
        return cagrad_weights(gram, by_cases(num_cases), self.settings.conflict_aversion)
