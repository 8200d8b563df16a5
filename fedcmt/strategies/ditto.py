"""Ditto: a personal model drawn to the shared one (Li et al., ICML 2021, arXiv 2012.04221, algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedcmt.settings import Count, Settings
from fedcmt.strategies.client_work import ClientWork
from fedcmt.strategies.fedavg import AveragingSettings, FedAvg


class DittoSettings(AveragingSettings):
    """Settings of Ditto."""

    personal: float = Field(0.1, ge=0, le=1000, description="lambda of lambda/2 |v - received|^2")
    personal_steps: Count | None = Field(None, description="of the personal model a round; default: the local steps")


class Ditto(FedAvg):
    """Federated averaging, and beside it a personal model v of each client, which is the one that the client uses.

    v minimises the local loss plus lambda/2 |v - received|^2 over encoder and adaptor; decoders are personal anyway.
    A round trains both models, so it costs a client twice the steps.
    """

    name: ClassVar[str] = "ditto"
    settings_model: ClassVar[type[Settings]] = DittoSettings
    settings: DittoSettings

    @property
    def client_work(self) -> ClientWork:
        """The personal model."""
        return ClientWork(personal=self.settings.personal, personal_steps=self.settings.personal_steps)
