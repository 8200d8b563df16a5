"""FedPer: base layers shared, the others personal (Arivazhagan et al., arXiv 1912.00818)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedcmt.exchange import ClientDescription
from fedcmt.settings import Settings
from fedcmt.strategies.base import RoundUpdates, StepSettings, Strategy, by_cases


class FedPer(Strategy):
    """The encoder averaged by cases; adaptor and decoder personal.

    Decoders are personal under every strategy here, so what sets it apart from `fedavg` is the adaptor, which is
    nobody's but the client's. The paper personalises the last layers only; inputs of different modalities and channels
    make the first ones personal as well.
    """

    name: ClassVar[str] = "fedper"
    settings_model: ClassVar[type[Settings]] = StepSettings
    settings: StepSettings

    def weights(self, updates: RoundUpdates) -> Tensor:
        """w_i = |D_i| / sum_j |D_j|."""
        return by_cases(updates.num_cases)

    def adaptor_key(self, client: ClientDescription) -> str:
        """The client's own."""
        return client.name
