"""No federation: every client trains alone from the common start. The baseline that joining must beat."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedcmt.settings import Settings
from fedcmt.strategies.base import RoundUpdates, Strategy


class Local(Strategy):
    """Each client keeps its own encoder and adaptor."""

    name: ClassVar[str] = "local"
    settings_model: ClassVar[type[Settings]] = Settings
    federated: ClassVar[bool] = False

    def weights(self, updates: RoundUpdates) -> Tensor:
        """Never asked for: there is nothing to combine."""
        raise NotImplementedError("strategy 'local' combines no updates")
