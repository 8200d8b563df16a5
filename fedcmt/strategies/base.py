"""What every strategy provides. The server does the rest: Gram matrix, fused step, adaptors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedcmt.config import Settings
from fedcmt.exchange import ClientDescription


class ServerSettings(Settings):
    """Settings of the server's step, theta <- theta + lr m with m <- beta m + d."""

    server_learning_rate: float = Field(1.0, gt=0, le=100)
    server_momentum: float = Field(0.0, ge=0, lt=1)


class Strategy(ABC):
    """Weights for the clients' encoder updates, and who shares an adaptor."""

    name: ClassVar[str]
    settings_model: ClassVar[type[Settings]]
    federated: ClassVar[bool] = True  # False: nothing is exchanged after the common start

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def server_learning_rate(self) -> float:
        """Factor of the server's step."""
        return self.settings.server_learning_rate if isinstance(self.settings, ServerSettings) else 1.0

    @property
    def server_momentum(self) -> float:
        """Momentum of the server's step."""
        return self.settings.server_momentum if isinstance(self.settings, ServerSettings) else 0.0

    @abstractmethod
    def weights(self, gram: Tensor, num_cases: Tensor) -> Tensor:
        """Factors of the updates in the combined encoder step d = sum_i weights_i Delta_i.

        Args:
            gram: `[N, N]` float64, inner products of the updates.
            num_cases: `[N]` training cases of their clients.

        Returns:
            `[N]` float64.
        """

    def adaptor_key(self, client: ClientDescription) -> str:
        """Clients of equal key share an adaptor."""
        return client.group


def by_cases(num_cases: Tensor) -> Tensor:
    """w_i = |D_i| / sum_j |D_j|, `[N]` float64."""
    return num_cases.double() / num_cases.sum()
