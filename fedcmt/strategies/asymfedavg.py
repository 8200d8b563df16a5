"""AsymFedAvg: tensors averaged where names and shapes agree (FednnU-Net, arXiv 2503.02549)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedcmt.exchange import ClientDescription
from fedcmt.settings import Settings
from fedcmt.strategies.base import DecoderRound, RoundUpdates, StepSettings, Strategy, by_cases
from fedcmt.strategies.client_work import ClientWork
from fedcmt.strategies.matching import matched_mean


class AsymFedAvg(Strategy):
    """Every tensor of the whole network is averaged, by cases, over the clients with one of its name and shape.

    Encoders are equal by contract. Adaptors of different numbers of channels share all but their first convolution's
    weights; decoders travel under this strategy and share all but output layers of different numbers of heads, and
    nothing with heads of classification.
    """

    name: ClassVar[str] = "asymfedavg"
    settings_model: ClassVar[type[Settings]] = StepSettings
    settings: StepSettings
    matches_adaptors: ClassVar[bool] = True

    def weights(self, updates: RoundUpdates) -> Tensor:
        """w_i = |D_i| / sum_j |D_j|."""
        return by_cases(updates.num_cases)

    def adaptor_key(self, client: ClientDescription) -> str:
        """Equal shapes: equal numbers of channels."""
        return f"{client.channels}-channel"

    @property
    def client_work(self) -> ClientWork:
        """Decoders travel."""
        return ClientWork(sends_decoder=True)

    def combine_decoders(self, decoders: DecoderRound) -> dict[str, Tensor]:
        """The mean of each tensor over its owners."""
        cases = {client.name: client.num_cases for client in decoders.clients}
        return matched_mean(decoders.values, decoders.layouts, cases)
